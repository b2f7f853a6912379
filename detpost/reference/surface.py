"""The surfaces of two masks and the distances between them, in PyTorch's own operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detpost.reference.distance import SquaredDistance

__all__ = ["boundary", "cropped", "surface_distances"]


def boundary(inside: Tensor) -> Tensor:
    """Give the elements of a mask (B, C, *spatial), bool, with a direct neighbour outside; beyond the image is outside.

    Example:
        >>> boundary(torch.ones(1, 1, 3, 3, dtype=torch.bool)).int().tolist()
        [[[[1, 1, 1], [1, 0, 1], [1, 1, 1]]]]
    """
    padded = F.pad(inside, (1, 1) * (inside.dim() - 2))
    interior = inside
    for axis in range(2, inside.dim()):
        core = padded
        for other in range(2, inside.dim()):
            core = core if other == axis else core.narrow(other, 1, inside.shape[other])
        length = inside.shape[axis]
        interior = interior & core.narrow(axis, 0, length) & core.narrow(axis, 2, length)
    return inside & ~interior


def surface_distances(
    a: Tensor, b: Tensor, spacing: tuple[float, ...], squared_distance: SquaredDistance
) -> tuple[Tensor, Tensor]:
    """Give how far each element of one mask's surface is from the other's, in the order in which they lie in memory.

    Args:
        a: (1, 1, *spatial), bool.
        b: a mask of the same shape and device.
        spacing: one length per spatial axis.
        squared_distance: gives what :func:`detpost.reference.distance.squared_distance` gives.

    Returns:
        (N,) and (M,), float32, of the N elements of ``a``'s surface and of the M of ``b``'s; infinite throughout where
        the other mask is empty.
    """
    a, b = cropped(a, b)
    surfaces = boundary(a), boundary(b)
    to_a, to_b = (_distance_to(surface, spacing, squared_distance) for surface in surfaces)
    return to_b[surfaces[0]], to_a[surfaces[1]]


def _distance_to(goal: Tensor, spacing: tuple[float, ...], squared_distance: SquaredDistance) -> Tensor:
    squared, unit = squared_distance(~goal, spacing)
    return squared.sqrt() * unit


def cropped(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Cut both masks, (1, 1, *spatial), to the smallest box that holds them: no distance between them changes."""
    either = a | b
    for axis in range(2, a.dim()):
        others = [other for other in range(a.dim()) if other != axis]
        held = torch.nonzero(either.any(others))[:, 0]  # detpost: allow DP020 on a CPU, eagerly
        if held.numel() == 0:
            nothing = either.flatten(2)[..., :1].reshape(1, 1, *[1] * (a.dim() - 2))
            return nothing, nothing
        first, last = int(held[0]), int(held[-1])  # detpost: allow DP003 on a CPU, eagerly
        a, b, either = (part.narrow(axis, first, last - first + 1) for part in (a, b, either))
    return a.contiguous(), b.contiguous()
