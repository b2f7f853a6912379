"""Signed and unsigned distances to a mask's boundary, as the boundary losses define them; none carries a gradient."""

from __future__ import annotations

import math
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from detpost.kernels import boundary_distance, squared_distance
from detpost.losses._arguments import Spacing
from detpost.losses.distance_transform import distance_transform_edt, of_mask


@overload
def signed_distance_transform(mask: Tensor, spacing: Spacing | None = None) -> Tensor: ...
@overload
def signed_distance_transform(mask: NDArray[Any], spacing: Spacing | None = None) -> NDArray[np.float32]: ...
def signed_distance_transform(
    mask: Tensor | NDArray[Any], spacing: Spacing | None = None
) -> Tensor | NDArray[np.float32]:
    """Exact Euclidean distance of every element to the nearest one on the other side, negative inside the mask.

    Outside it is the distance to the nearest element of the mask, inside minus the distance to the nearest element that
    is not of it: with scipy, ``edt(~mask) - edt(mask)``. A mask without a boundary, empty or full, gives 0 everywhere.
    Kervadec's map, which :func:`boundary_loss` uses, has ``1 - edt(mask)`` inside.

    Args:
        mask: (B, C, H, W) or (B, C, D, H, W) of any dtype, a tensor or a NumPy array; an element is inside where it is
            not zero.
        spacing: side lengths of an element, one number or one per spatial axis, in the unit that the distances shall
            have; or a sequence of these for each image. ``None`` counts in elements.

    Returns:
        Distances in the unit of ``spacing``, float32, of the shape of ``mask``: a tensor on its device, or an array for
        an array. No gradient flows.

    Raises:
        TypeError: ``mask`` is neither a tensor nor an array.
        ValueError: ``mask`` has another rank or a side of length 0, or ``spacing`` does not fit its axes.

    Example:
        >>> signed_distance_transform(torch.tensor([[[[0, 0, 1, 1, 1]]]]))
        tensor([[[[ 2.,  1., -1., -2., -3.]]]])
        >>> signed_distance_transform(torch.ones(1, 1, 2, 3)).abs().max()
        tensor(0.)
    """
    return of_mask(mask, spacing, _signed)


def kervadec_map(inside: Tensor, spacing: tuple[float, ...]) -> Tensor:
    """Give the map of Kervadec et al. as their code makes it: d outside, 1 - d inside, 0 where the mask is empty.

    The 1 is one whatever the spacing. A full mask has the distances of :func:`distance_transform_edt`, as there.

    Args:
        inside: (B, C, *spatial) boolean.
        spacing: one length per spatial axis.

    Returns:
        (B, C, *spatial) float32.
    """
    distance = _signed(inside, spacing).abs()
    # Only a full mask makes a difference to the plain distance; both are zero outside of one.
    full = inside.flatten(2).all(2).reshape(*inside.shape[:2], *[1] * len(spacing))
    within = torch.where(full, distance_transform_edt(inside, spacing), distance)
    return torch.where(inside, 1 - within, distance)


def squared_surface_map(inside: Tensor, spacing: tuple[float, ...]) -> Tensor:
    """Give the squared distance to the mask's surface: those elements with one outside among their 3^d - 1 neighbours.

    These are the distances of ITK's signed Maurer filter, which Celaya et al. use, squared. An empty mask has the
    image's diagonal throughout, as in their code; so has a full one, for which that filter has no answer.

    Args:
        inside: (B, C, *spatial) boolean.
        spacing: one length per spatial axis.

    Returns:
        (B, C, *spatial) float32.
    """
    squared, unit = squared_distance(~_surface(inside), spacing)
    diagonal = math.hypot(*(side * step for side, step in zip(inside.shape[2:], spacing, strict=True)))
    return torch.where(torch.isinf(squared), diagonal**2, squared * unit**2)


def _signed(inside: Tensor, spacing: tuple[float, ...]) -> Tensor:
    """Give the distance to the other side, negative inside."""
    squared, unit = boundary_distance(inside.to(torch.float32), spacing)
    distance = squared.sqrt() * unit
    return torch.where(inside, -distance, distance)


def _surface(inside: Tensor) -> Tensor:
    """Give the mask's elements that have one outside it beside them, diagonally too; the image's edge is no outside."""
    outside = (~inside).to(torch.float32)
    pool = F.max_pool2d if inside.dim() == 4 else F.max_pool3d
    return inside & (pool(outside, 3, stride=1, padding=1) > 0)
