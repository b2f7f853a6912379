"""The part of two masks' surfaces that lies within a tolerance of the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detpost.losses._arguments import Spacing
from detpost.metrics._surface import Mask, Surface, measure


def surface_dice(
    a: Mask,
    b: Mask,
    tolerance: float | Sequence[float],
    spacing: Spacing | None = None,
    ignore_index: int | None = None,
    use_subvoxels: bool = False,
) -> Tensor:
    """Part of the boundaries of two masks that is no farther than a tolerance from the other's, per image and channel.

    Also called normalised surface Dice or normalised surface distance (NSD; Nikolov et al. 2021): 1 where every piece
    of either boundary has the other's within the tolerance. By default boundary elements are counted, and values are
    those of ``monai.metrics.compute_surface_dice(..., include_background=True)``: nan where both masks are empty, 0
    where one is.

    With ``use_subvoxels`` the boundary runs between the elements and its pieces weigh as much as they are long or
    large: the values of google-deepmind's surface-distance, ``compute_surface_dice_at_tolerance``, and of MONAI with
    the same argument.

    Args:
        a: (B, C, H, W) or (B, C, D, H, W) mask, a tensor or a NumPy array; an element is inside where it is not zero.
        b: mask of the same shape and device.
        tolerance: largest distance that still counts, 0 or more, in the unit of ``spacing``; one number, or one per
            channel.
        spacing: side lengths of an element, one number or one per spatial axis, or a sequence of these for each image;
            ``None`` counts in elements.
        ignore_index: channel of a class that is left out: elements that ``b`` gives it count in no channel, and the
            channel itself reads nan.
        use_subvoxels: take the surface between the elements, as surface-distance does.

    Returns:
        (B, C) float32, between 0 and 1.

    Raises:
        TypeError: a mask is neither a tensor nor an array.
        ValueError: rank, shapes, tolerance, spacing or ignore_index are not as above.

    Example:
        >>> a = torch.zeros(1, 1, 8, 8)
        >>> a[..., 1:4, 1:4] = 1
        >>> surface_dice(a, a.roll(1, -1), tolerance=1)
        tensor([[1.]])
        >>> surface_dice(a, a.roll(1, -1), tolerance=0.5)
        tensor([[0.5000]])
    """
    limits = check_tolerance(tolerance)
    channels = a.shape[1] if len(getattr(a, "shape", ())) > 1 else 1
    if len(limits) not in (1, channels):
        raise ValueError(f"tolerance must be one number or one per channel ({channels}); got {len(limits)}")

    def overlap(of_a: Surface, of_b: Surface, channel: int | None) -> Tensor:
        limit = limits if channel is None or len(limits) == 1 else limits[channel : channel + 1]
        near = _size_within(of_a, limit) + _size_within(of_b, limit)
        return near / (of_a.size.sum(2) + of_b.size.sum(2))

    return measure(overlap, a, b, spacing, ignore_index, use_subvoxels)


def check_tolerance(tolerance: float | Sequence[float]) -> list[float]:
    """Read a tolerance as a list, and refuse what is none."""
    limits = [float(tolerance)] if isinstance(tolerance, int | float) else [float(limit) for limit in tolerance]
    if not limits or not all(math.isfinite(limit) and limit >= 0 for limit in limits):
        raise ValueError(f"tolerance must be finite and at least 0; got {tolerance!r}")
    return limits


def _size_within(surface: Surface, limits: list[float]) -> Tensor:
    """Size of the surface's elements within the limit of their channel: (B, C)."""
    # A millionth more: a distance that is the tolerance but for rounding is within it.
    limit = torch.tensor([limit * (1 + 1e-6) for limit in limits], device=surface.distance.device)
    near = surface.chosen & (surface.distance <= limit.to(torch.float32)[:, None])
    return torch.where(near, surface.size, 0.0).sum(2)
