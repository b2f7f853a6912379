"""The exact Euclidean distance transform in PyTorch's own operators: what every kernel is held to."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements that one step of the minimum works on when a CPU runs it eagerly: they and their sums stay in its cache.
_CPU_BLOCK = 1 << 16
# Output rows per step where a step costs a launch or a graph node: eight times the input in flight, still O(N).
ROWS_PER_STEP = 8


def squared_distance(
    inside: Tensor,
    spacing: tuple[float, ...],
    rows_per_step: int | None = None,
    envelope: Callable[[Tensor, float, int | None], Tensor] | None = None,
) -> tuple[Tensor, float]:
    """Give the squared distance to the nearest False, in the returned unit; infinite in a field without any False.

    The unit is the largest spacing. Dividing by it keeps equal spacings on whole numbers, and extreme ones in range.

    Args:
        inside: (B, C, *spatial) boolean.
        spacing: one length per spatial axis.
        rows_per_step: output rows that are worked on at once; 0 for all of them, which suits a compiler that fuses a
            sum into a minimum; ``None`` for blocks that fit a CPU's cache, and for ``ROWS_PER_STEP`` elsewhere.
        envelope: gives what :func:`lower_envelope` gives; ``None`` takes that.

    Returns:
        (B, C, *spatial) float32, and the unit.
    """
    unit = max(spacing)
    steps = [length / unit for length in spacing]
    sides = inside.shape[2:]
    squared = (_distance_along_last_axis(inside) * steps[-1]).square()
    for axis in range(len(sides) - 2, -1, -1):
        rows = squared.reshape(-1, sides[axis], sides[axis + 1 :].numel())  # (fields, L, lanes)
        squared = (envelope or lower_envelope)(rows, steps[axis], rows_per_step)
    return squared.reshape(inside.shape), unit


SquaredDistance = Callable[[Tensor, tuple[float, ...]], tuple[Tensor, float]]


def boundary_distance(
    field: Tensor, spacing: tuple[float, ...], squared_distance: SquaredDistance = squared_distance
) -> tuple[Tensor, float]:
    """Give the squared distance to the nearest element across 0.5, in the returned unit; 0 where there is none.

    Args:
        field: (B, C, *spatial), floating.
        spacing: one length per spatial axis.
        squared_distance: gives what :func:`squared_distance` gives.

    Returns:
        (B, C, *spatial) float32, and the unit.
    """
    inside = field > 0.5
    within, unit = squared_distance(inside, spacing)
    beyond, _ = squared_distance(~inside, spacing)
    # One of the two is 0 at each element, or infinite throughout when the mask is empty or full.
    return torch.nan_to_num(within + beyond, posinf=0.0), unit


def weighted_error(
    values: Tensor,
    truth: Tensor,
    spacing: tuple[float, ...],
    alpha: float,
    sigmoid: bool,
    boundary_distance: SquaredDistance = boundary_distance,
) -> Tensor:
    """Give the mean over each field of the squared error, weighted with the distances to both boundaries.

    Args:
        values: (B, C, *spatial), float32 or float64: probabilities, or logits with ``sigmoid``.
        truth: (B, C, *spatial), of the same dtype.
        spacing: one length per spatial axis.
        alpha: exponent of the distances.
        sigmoid: whether a sigmoid is applied to ``values``.
        boundary_distance: gives what :func:`boundary_distance` gives.

    Returns:
        (B, C, 1, ...), differentiable in values and truth.
    """
    values = values.sigmoid() if sigmoid else values
    with torch.no_grad():
        ours, unit = boundary_distance(values, spacing)
        theirs, _ = boundary_distance(truth, spacing)
        weight = (_power(ours, unit, alpha) + _power(theirs, unit, alpha)).to(values.dtype)
    limit = largest_difference(values, spacing, alpha)
    error = (values - truth).clamp(-limit, limit).square()
    return (error * weight).mean(tuple(range(2, values.dim())), keepdim=True)


def _power(squared: Tensor, unit: float, alpha: float) -> Tensor:
    """Raise distances, given as squares in a unit, to the power alpha."""
    power: Tensor = squared if alpha == 2 else squared.pow(alpha / 2)
    return power if unit == 1 else power * unit**alpha


def largest_difference(values: Tensor, spacing: tuple[float, ...], alpha: float) -> float:
    """Give the largest difference whose weighted square, summed over every element, stays finite; never below 1000."""
    diagonal = math.hypot(*(side * step for side, step in zip(values.shape[2:], spacing, strict=True)))
    # 2**24 stands for images times classes: their real number would tie a compiled graph to one batch size.
    elements = 8.0 * 2**24 * math.prod(values.shape[2:])
    log_weight = max(0.0, alpha * math.log(max(diagonal, 1e-30))) + math.log(max(elements, 1.0))
    log_limit = (math.log(torch.finfo(values.dtype).max) - log_weight) / 2
    return math.exp(min(max(log_limit, math.log(1e3)), 300.0))


def _distance_along_last_axis(inside: Tensor) -> Tensor:
    """Count the elements to the nearest False in the same row; inf where the row has none.

    After the step of length s the result is right for every zero within 2 s - 1, because each such offset is a sum of
    distinct smaller steps in one direction.
    """
    distance = torch.where(inside, float("inf"), 0.0).to(torch.float32)  # of two numbers: the default dtype
    step = 1
    while step < inside.shape[-1]:
        padded = F.pad(distance, (step, step), value=float("inf"))
        neighbours = torch.minimum(padded[..., : -2 * step], padded[..., 2 * step :])
        distance = torch.minimum(distance, neighbours + step)
        step = step * 2
    return distance


def lower_envelope(values: Tensor, step: float, rows_per_step: int | None) -> Tensor:
    """Replace values (R, L, M) by min_j values[:, j] + (step (i - j))^2 along the middle axis."""
    length, lanes = values.shape[1:]
    index = torch.arange(length, dtype=torch.float32, device=values.device)
    # The difference is a whole number: only the product with an unequal step rounds, once.
    parabolas = ((index[:, None] - index) * step).square()[:, :, None]  # (L, L, 1)
    if rows_per_step is not None or values.device.type != "cpu":
        rows = ROWS_PER_STEP if rows_per_step is None else rows_per_step or length
        return _minimum_by_rows(values, parabolas, rows)
    width = max(1, min(lanes, _CPU_BLOCK // length))
    fields = max(1, _CPU_BLOCK // (length * width))
    return torch.cat(
        [
            torch.cat([_minimum_by_rows(block, parabolas, 1) for block in blocks(group, 2, width)], dim=2)
            for group in blocks(values, 0, fields)
        ]
    )


def _minimum_by_rows(values: Tensor, parabolas: Tensor, rows: int) -> Tensor:
    """Take the minimum for ``rows`` output rows at a time."""
    if rows >= parabolas.shape[0]:
        return (values[:, None] + parabolas).amin(2)
    return torch.cat([(values[:, None] + some).amin(2) for some in blocks(parabolas, 0, rows)], dim=1)


def blocks(tensor: Tensor, axis: int, size: int) -> list[Tensor]:
    """Give views of ``size`` slices each along an axis, the last one shorter."""
    length = tensor.shape[axis]
    return [tensor.narrow(axis, start, min(size, length - start)) for start in range(0, length, size)]
