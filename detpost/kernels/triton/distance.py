# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The exact squared Euclidean distance transform on a GPU, one launch per spatial axis.

It separates over the axes as :mod:`detpost.losses.distance_transform` says. The last axis takes two scans over rows
held in registers. Every other axis takes the minimum of a parabola per element of a line; a program takes it for a
block of lines and of places on them, walks outwards from its block, and stops as soon as the squared gap alone exceeds
its worst minimum, which on most masks is soon. What it leaves out could not have won, so the result is that of the
whole walk.

Distances to both sides of a boundary cost one transform: of an element's distance to the nearest zero and that to the
nearest non-zero one is 0, so that one number with a sign carries both through every axis.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from detpost.kernels.triton.common import flat, jit, operator, power_of_two, runs_on, wrap_triton

__all__ = ["squared_boundary_distance", "squared_distance", "takes"]

_MAX_SIDE = 4096
_MAX_ELEMENTS = 2**31 - 1
# Elements of rows that one program of the first pass scans, and results of one program of the others.
_ROW_TILE = 2048
_TILE = 1024

_FAR = tl.constexpr(2**30)


def takes(inside: Tensor) -> bool:
    """Tell whether the functions here take this mask.

    Args:
        inside: the mask.

    Returns:
        True for a boolean (B, C, H, W) or (B, C, D, H, W) on a CUDA device (on the CPU under ``TRITON_INTERPRET=1``)
        that is not empty, with sides of at most 4096 and at most 2**31 - 1 elements.
    """
    return (
        inside.ndim in (4, 5)
        and inside.dtype == torch.bool
        and runs_on(inside.device)
        and 0 < inside.numel() <= _MAX_ELEMENTS
        and max(inside.shape[2:]) <= _MAX_SIDE
    )


def squared_distance(inside: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, float]:
    """Give the squared distance to the nearest False; the contract of the function of this name in ``losses``.

    Args:
        inside: (B, C, *spatial) boolean; see :func:`takes`.
        spacing: one length per spatial axis.

    Returns:
        (B, C, *spatial) float32, infinite throughout a field without any False, and the unit it counts in, the largest
        spacing. Exact for equal spacing; unequal spacing rounds as the plain path does, to a unit in the last place.
    """
    unit = max(spacing)
    squared: Tensor = _squared_distance(flat(inside), [length / unit for length in spacing], False)
    return squared, unit


def squared_boundary_distance(inside: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, float]:
    """Give the squared distance to the nearest element of the other kind, for both kinds by one transform.

    Args:
        inside: (B, C, *spatial) boolean; see :func:`takes`.
        spacing: one length per spatial axis.

    Returns:
        (B, C, *spatial) float32, infinite throughout a field of one kind, and the unit. Equal to the sum of
        :func:`squared_distance` of ``inside`` and of ``~inside``.
    """
    unit = max(spacing)
    squared: Tensor = _squared_distance(flat(inside), [length / unit for length in spacing], True)
    return squared, unit


@operator("detpost::triton_squared_distance")
def _squared_distance(inside: Tensor, steps: list[float], both: bool) -> Tensor:
    sides = inside.shape[2:]
    length = sides[-1]
    rows = inside.numel() // length
    squared = torch.empty(inside.shape, dtype=torch.float32, device=inside.device)
    width = power_of_two(length)
    tile = max(1, _ROW_TILE // width)
    wrap_triton(_row_kernel)[(-(-rows // tile),)](
        inside.view(torch.uint8), squared, rows, length, steps[-1], BOTH=both, ROWS=tile, WIDTH=width, num_warps=4
    )
    for axis in range(len(sides) - 2, -1, -1):
        length, lanes = sides[axis], math.prod(sides[axis + 1 :])
        # 32 lanes are one line of memory; lines shorter than a block leave its other places to more lanes.
        width = min(power_of_two(lanes), max(32, _TILE // power_of_two(length)))
        height = min(power_of_two(length), max(1, _TILE // width))
        blocks, strips = -(-length // height), -(-lanes // width)
        result = torch.empty(inside.shape, dtype=torch.float32, device=inside.device)
        wrap_triton(_line_kernel)[(inside.numel() // (length * lanes) * blocks * strips,)](
            squared,
            result,
            length,
            lanes,
            blocks,
            strips,
            steps[axis],
            BOTH=both,
            LAST=axis == 0,
            HEIGHT=height,
            WIDTH=width,
            STRIDE=8,
            num_warps=4,
        )
        squared = result
    return squared


@jit
def _greater(a, b):
    return tl.maximum(a, b)


@jit
def _lesser(a, b):
    return tl.minimum(a, b)


@jit
def _row_kernel(
    inside_ptr,  # (rows, length) uint8
    out_ptr,  # (rows, length) float32
    rows,
    length,
    step,
    BOTH: tl.constexpr,  # signed, negative outside; else 0 outside
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Square the distance to the nearest element of the other kind in the same row: to the ends of its own run."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    index = tl.arange(0, WIDTH)[None, :]
    place = row.to(tl.int64) * length + index
    mask = (row < rows) & (index < length)
    has_left = mask & (index > 0)
    has_right = mask & (index + 1 < length)
    here = tl.load(inside_ptr + place, mask=mask, other=0)
    left = tl.load(inside_ptr + place - 1, mask=has_left, other=0)
    right = tl.load(inside_ptr + place + 1, mask=has_right, other=0)
    start = tl.where(has_left & (left != here), index, -_FAR)
    stop = tl.where(has_right & (right != here), index, _FAR)
    start = tl.associative_scan(start, 1, _greater)
    stop = tl.associative_scan(stop, 1, _lesser, reverse=True)
    count = tl.minimum(index - start, stop - index) + 1
    distance = tl.where(count > length, float("inf"), count.to(tl.float32)) * step
    squared = distance * distance
    squared = tl.where(here != 0, squared, -squared if BOTH else 0.0)
    tl.store(out_ptr + place, squared, mask=mask)


@jit
def _line_kernel(
    values_ptr,  # (fields, length, lanes) float32
    out_ptr,  # the same
    length,
    lanes,
    blocks,
    strips,
    step,
    BOTH: tl.constexpr,
    LAST: tl.constexpr,  # the last axis drops the signs
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,  # rows that one step of the walk takes on each side
):
    """Replace values[:, i] by the least of values[:, j] + (step (i - j))^2 over j."""
    program = tl.program_id(0)
    strip = program % strips
    first = (program // strips) % blocks * HEIGHT
    field = (program // (strips * blocks)).to(tl.int64)
    lane = strip * WIDTH + tl.arange(0, WIDTH)[None, :]
    index = first + tl.arange(0, HEIGHT)[:, None]
    mask = (index < length) & (lane < lanes)
    base = values_ptr + field * length * lanes
    place = index * lanes + lane
    own = tl.load(base + place, mask=mask, other=0.0)
    sign = tl.where(own < 0, -1.0, 1.0)  # whatever it is at 0, to which nothing can come closer
    least = tl.abs(own)
    column = base + lane
    is_lane = lane < lanes
    stop = tl.minimum(first + HEIGHT, length)
    for other in range(first, stop):
        least = _lowered(least, column, is_lane, index, other, lanes, sign, step, BOTH)
    reach = 1  # distance from the block to the next rows on either side
    gap = step
    while ((first - reach >= 0) | (stop - 1 + reach < length)) & (gap * gap < tl.max(least)):
        for offset in tl.static_range(STRIDE):
            # Beyond the line its end is taken again, which changes nothing and saves a mask.
            before = tl.maximum(first - reach - offset, 0)
            behind = tl.minimum(stop - 1 + reach + offset, length - 1)
            least = _lowered(least, column, is_lane, index, before, lanes, sign, step, BOTH)
            least = _lowered(least, column, is_lane, index, behind, lanes, sign, step, BOTH)
        reach += STRIDE
        gap = reach * step
    result = least * sign if BOTH and not LAST else least
    tl.store(out_ptr + field * length * lanes + place, result, mask=mask)


@jit
def _lowered(least, column, is_lane, index, other, lanes, sign, step, BOTH: tl.constexpr):
    """Take row ``other`` of the line into the minimum."""
    value = tl.load(column + other * lanes, mask=is_lane, other=0.0)  # (1, WIDTH)
    if BOTH:
        # Of the other kind: nothing to go here. Of the same kind: as far as from there.
        value = tl.maximum(value * sign, 0.0)
    offset = (index - other).to(tl.float32) * step
    return tl.minimum(least, value + offset * offset)
