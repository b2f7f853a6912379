"""The average distance between the surfaces of binary masks."""

from __future__ import annotations

import torch
from torch import Tensor

from detpost.losses._arguments import Spacing
from detpost.metrics._surface import Mask, Surface, measure


def average_surface_distance(
    a: Mask,
    b: Mask,
    symmetric: bool = True,
    spacing: Spacing | None = None,
    ignore_index: int | None = None,
    use_subvoxels: bool = False,
) -> Tensor:
    """Average distance between the boundaries of two masks, per image and channel.

    Directed, the mean over ``a``'s boundary of the distance to ``b``'s nearest boundary; symmetric, the mean over both
    boundaries together (ASSD). Boundary and values are those of ``monai.metrics.compute_average_surface_distance(...,
    include_background=True)``, whose default is directed: nan where both masks are empty, inf where one is.

    With ``use_subvoxels`` the boundary runs between the elements and its pieces weigh as much as they are long or large
    (Nikolov et al. 2021); the directed values are those of google-deepmind's surface-distance,
    ``compute_average_surface_distance``: nan where ``a`` is empty, inf where ``b`` alone is.

    Args:
        a: (B, C, H, W) or (B, C, D, H, W) mask, a tensor or a NumPy array; an element is inside where it is not zero.
        b: mask of the same shape and device.
        symmetric: take the mean over both boundaries.
        spacing: side lengths of an element, one number or one per spatial axis, in the unit of the result, or a
            sequence of these for each image; ``None`` counts in elements.
        ignore_index: channel of a class that is left out: elements that ``b`` gives it count in no channel, and the
            channel itself reads nan.
        use_subvoxels: take the surface between the elements, as surface-distance does.

    Returns:
        (B, C) float32, in the unit of ``spacing``.

    Raises:
        TypeError: a mask is neither a tensor nor an array.
        ValueError: rank, shapes, spacing or ignore_index are not as above.

    Example:
        >>> a = torch.zeros(1, 1, 1, 8)
        >>> a[..., 1] = 1
        >>> b = a.roll(1, -1) + a
        >>> average_surface_distance(a, b, symmetric=False)
        tensor([[0.]])
        >>> average_surface_distance(a, b, spacing=3)
        tensor([[1.]])
    """

    def mean(of_a: Surface, of_b: Surface, channel: int | None) -> Tensor:
        total, size = _sums(of_a)
        if symmetric:
            more, larger = _sums(of_b)
            return (total + more) / (size + larger)
        if use_subvoxels:
            return total / size
        only_b = ~of_a.chosen.any(2) & of_b.chosen.any(2)
        return torch.where(only_b, torch.inf, total / size)

    return measure(mean, a, b, spacing, ignore_index, use_subvoxels)


def _sums(surface: Surface) -> tuple[Tensor, Tensor]:
    """Give sum of the distances, weighted with the sizes, and of the sizes: (B, C) each."""
    weighted = torch.where(surface.chosen, surface.distance * surface.size, 0.0)
    return weighted.sum(2), surface.size.sum(2)
