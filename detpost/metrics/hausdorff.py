"""The Hausdorff distance between binary masks, to measure what the losses train."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from detpost.losses._arguments import Spacing, by_image, spacings
from detpost.losses.distance_transform import squared_distance


def hausdorff_distance(
    a: Tensor | NDArray[Any],
    b: Tensor | NDArray[Any],
    percentile: float | None = None,
    spacing: Spacing | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Hausdorff distance between the boundaries of two masks, per image and channel.

    The larger of the two directed distances, each the maximum (or the given percentile) over one mask's boundary of the
    distance to the other's (Huttenlocher, Klanderman and Rucklidge 1993, equations 1 and 2). The boundary is the mask
    without its erosion by direct neighbours; beyond the image counts as outside, so a mask that touches the border has
    boundary there. Values are those of ``monai.metrics.compute_hausdorff_distance(..., include_background=True)``,
    MONAI's reading of special cases included: nan where both masks are empty, inf where one is (nan if a percentile is
    asked for), and a percentile of 0 means the maximum.

    Args:
        a: (B, C, H, W) or (B, C, D, H, W) mask, a tensor or a NumPy array; an element is inside where it is not zero.
        b: mask of the same shape and device.
        percentile: in [0, 100], interpolated linearly; 95 gives HD95. ``None`` takes the maximum.
        spacing: side lengths of an element, one number or one per spatial axis, in the unit of the result, or a
            sequence of these for each image; ``None`` counts in elements.
        ignore_index: channel of a class that is left out: elements that ``b`` gives it count in no channel, and the
            channel itself reads nan.

    Returns:
        (B, C) float32, in the unit of ``spacing``.

    Raises:
        TypeError: a mask is neither a tensor nor an array.
        ValueError: rank, shapes, percentile, spacing or ignore_index are not as above.

    Example:
        >>> a = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
        >>> b = a.clone()
        >>> a[..., 1:4, 1:4] = True
        >>> b[..., 1:4, 3:7] = True
        >>> hausdorff_distance(a, b)
        tensor([[3.]])
        >>> hausdorff_distance(a, b, percentile=50, spacing=0.5)
        tensor([[0.7500]])
    """
    a, b = _as_tensor(a), _as_tensor(b)
    _check_masks(a, b)
    if percentile is not None and not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be between 0 and 100, or None for the maximum; got {percentile}")
    if ignore_index is not None and not 0 <= ignore_index < a.shape[1]:
        raise ValueError(f"ignore_index must be a channel in [0, {a.shape[1]}); got {ignore_index}")
    each = spacings(spacing, a.shape[0], a.dim() - 2)
    with torch.no_grad():
        inside_a, inside_b = a != 0, b != 0
        if ignore_index is not None:
            counted = ~inside_b[:, ignore_index : ignore_index + 1]
            inside_a, inside_b = inside_a & counted, inside_b & counted
        edges_a, edges_b = _boundary(inside_a), _boundary(inside_b)
        found = by_image(lambda one, other, steps: _undirected(one, other, percentile, steps), each, edges_a, edges_b)
        if ignore_index is None:
            return found
        channel = torch.arange(a.shape[1], device=a.device)
        return torch.where(channel == ignore_index, torch.nan, found)


def _undirected(edges_a: Tensor, edges_b: Tensor, percentile: float | None, spacing: tuple[float, ...]) -> Tensor:
    """Greater of the two directed distances: (B, C)."""
    forward = _directed(edges_a, edges_b, percentile, spacing)
    return torch.maximum(forward, _directed(edges_b, edges_a, percentile, spacing))  # nan if either is


def _directed(source: Tensor, goal: Tensor, percentile: float | None, spacing: tuple[float, ...]) -> Tensor:
    """Maximum or percentile over source's elements of the distance to goal's nearest: (B, C)."""
    squared, unit = squared_distance(~goal, spacing)
    distance = (squared.sqrt() * unit).flatten(2)  # (B, C, N)
    chosen = source.flatten(2)
    some_source, some_goal = chosen.any(2), goal.flatten(2).any(2)
    both_empty = ~(some_source | some_goal)
    if not percentile:
        largest = torch.where(chosen, distance, 0.0).amax(2)
        largest = torch.where(some_source & some_goal, largest, torch.inf)
        return torch.where(both_empty, torch.nan, largest)
    value = _percentile(distance, chosen, percentile)
    return torch.where(some_source & some_goal, value, torch.nan)


def _percentile(values: Tensor, chosen: Tensor, percentile: float) -> Tensor:
    """Percentile of the chosen values along the last axis, interpolated linearly, without a data-dependent shape."""
    ordered = torch.where(chosen, values, torch.inf).sort(-1).values
    # The rank is rounded to float32 as torch.quantile rounds it: on large boundaries the weight of the next value
    # would differ from MONAI's otherwise.
    last = (chosen.sum(-1, keepdim=True) - 1).clamp(min=0).float()
    rank = last * (percentile / 100)
    below = ordered.gather(-1, rank.floor().long())
    above = ordered.gather(-1, rank.ceil().long())
    return torch.lerp(below, above, rank - rank.floor()).squeeze(-1)


def _boundary(inside: Tensor) -> Tensor:
    """Elements of the mask with a direct neighbour outside it."""
    axes = inside.dim() - 2
    padded = F.pad(inside, (1, 1) * axes)
    interior = inside
    for axis in range(2, inside.dim()):
        core = padded
        for other in range(2, inside.dim()):
            core = core if other == axis else core.narrow(other, 1, inside.shape[other])
        length = inside.shape[axis]
        interior = interior & core.narrow(axis, 0, length) & core.narrow(axis, 2, length)
    return inside & ~interior


def _as_tensor(mask: Tensor | NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(mask != 0)) if isinstance(mask, np.ndarray) else mask


def _check_masks(a: Tensor, b: Tensor) -> None:
    for name, mask in (("a", a), ("b", b)):
        if not isinstance(mask, Tensor):
            kind = type(mask).__name__
            raise TypeError(f"{name} must be a torch.Tensor or an array; got {kind}: use torch.as_tensor")
    if a.dim() not in (4, 5) or 0 in a.shape[2:]:
        raise ValueError(f"masks must be (B, C, H, W) or (B, C, D, H, W) with sides >= 1; got {tuple(a.shape)}")
    if a.shape != b.shape:
        raise ValueError(f"masks must have one shape; got {tuple(a.shape)} and {tuple(b.shape)}: one-hot both alike")
