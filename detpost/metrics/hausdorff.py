"""The Hausdorff distance between binary masks, to measure what the losses train."""

from __future__ import annotations

import torch
from torch import Tensor

from detpost.losses._arguments import Spacing
from detpost.metrics._surface import Mask, Surface, measure


def hausdorff_distance(
    a: Mask,
    b: Mask,
    percentile: float | None = None,
    spacing: Spacing | None = None,
    ignore_index: int | None = None,
    use_subvoxels: bool = False,
) -> Tensor:
    """Hausdorff distance between the boundaries of two masks, per image and channel.

    The larger of the two directed distances, each the maximum (or the given percentile) over one mask's boundary of the
    distance to the other's (Huttenlocher, Klanderman and Rucklidge 1993, equations 1 and 2). The boundary is the mask
    without its erosion by direct neighbours; beyond the image counts as outside, so a mask that touches the border has
    boundary there. Values are those of ``monai.metrics.compute_hausdorff_distance(..., include_background=True)``,
    MONAI's reading of special cases included: nan where both masks are empty, inf where one is (nan if a percentile is
    asked for), and a percentile of 0 means the maximum.

    With ``use_subvoxels`` values are those of google-deepmind's surface-distance, ``compute_robust_hausdorff``: the
    surface runs between the elements, percentiles weigh its pieces with their length or area (Nikolov et al. 2021)
    and are not interpolated, and the result is inf where a mask is empty, or both are.

    Args:
        a: (B, C, H, W) or (B, C, D, H, W) mask, a tensor or a NumPy array; an element is inside where it is not zero.
        b: mask of the same shape and device.
        percentile: in [0, 100], interpolated linearly; 95 gives HD95. ``None`` takes the maximum.
        spacing: side lengths of an element, one number or one per spatial axis, in the unit of the result, or a
            sequence of these for each image; ``None`` counts in elements.
        ignore_index: channel of a class that is left out: elements that ``b`` gives it count in no channel, and the
            channel itself reads nan.
        use_subvoxels: take the surface between the elements, as surface-distance does.

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
    check_percentile(percentile)

    def undirected(of_a: Surface, of_b: Surface, channel: int | None) -> Tensor:
        if use_subvoxels:
            return torch.maximum(_weighted_percentile(of_a, percentile), _weighted_percentile(of_b, percentile))
        one, other = _directed(of_a, of_b, percentile), _directed(of_b, of_a, percentile)
        return torch.maximum(one, other)  # nan if either is

    return measure(undirected, a, b, spacing, ignore_index, use_subvoxels)


def check_percentile(percentile: float | None) -> None:
    """Refuse what is no percentile."""
    if percentile is not None and not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be between 0 and 100, or None for the maximum; got {percentile}")


def _directed(source: Surface, goal: Surface, percentile: float | None) -> Tensor:
    """Maximum or percentile over source's elements of the distance to goal's nearest: (B, C)."""
    some_source, some_goal = source.chosen.any(2), goal.chosen.any(2)
    both_empty = ~(some_source | some_goal)
    if not percentile:
        largest = torch.where(source.chosen, source.distance, 0.0).amax(2)
        largest = torch.where(some_source & some_goal, largest, torch.inf)
        return torch.where(both_empty, torch.nan, largest)
    value = _percentile(source.distance, source.chosen, percentile)
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


def _weighted_percentile(source: Surface, percentile: float | None) -> Tensor:
    """Smallest distance within which lies the given part of the source's surface: (B, C)."""
    if percentile is None:
        largest = torch.where(source.chosen, source.distance, 0.0).amax(2)
        return torch.where(source.chosen.any(2), largest, torch.inf)
    # Off the surface an element has no size, and inf puts it last. Elements of one distance are added up by size: where
    # the part is reached exactly, the order of a sum decides.
    by_size = source.size.sort(-1)
    distance = torch.where(source.chosen, source.distance, torch.inf).gather(-1, by_size.indices)
    ordered = torch.sort(distance, dim=-1, stable=True)
    covered = by_size.values.gather(-1, ordered.indices).cumsum(-1)
    reached = covered / covered[..., -1:] >= percentile / 100
    # The first element that reaches it; rounding may leave all but none, then the last of the surface.
    first = torch.where(reached.any(-1), reached.to(torch.int8).argmax(-1), source.chosen.sum(-1) - 1)
    value = ordered.values.gather(-1, first.clamp(min=0)[..., None])[..., 0]
    return torch.where(source.chosen.any(2), value, torch.inf)
