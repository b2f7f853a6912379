# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The erosions of the Hausdorff ER loss and their gradient on a GPU: one launch per erosion each way.

An erosion is a stencil and a stretch, and the stretch needs the extremes of the whole field. So a launch reads the last
dilation, stretches each tap as it loads it, writes the next dilation, and leaves its part of the extremes behind; the
next launch gathers the parts. Nothing but the dilations ever reaches memory. The gradient goes the same way back: a
launch turns the gradient that came in into one of the dilation at each tap, adds up the stencil, and leaves its part
of the four sums that the next one needs.

Parts are gathered by every program of the next launch in one order: no atomics, and the same bits each time. Which
elements tie for an extreme is decided up to rounding, as ``detpost/reference/erosion.py`` explains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from detpost.kernels.triton.common import flat, jit, operator, power_of_two, runs_on, wrap_triton

__all__ = ["erode", "erosion_gradient", "takes"]

_BLOCK = 512
# Programs per field: each reads the parts that all of them left, so there must not be too many.
_MAX_PROGRAMS = 256
_MAX_ELEMENTS = 2**31 - 1
_MAX_FIELDS = 65535  # the second dimension of a CUDA grid

# The constants of reference/erosion.py, as float32 has them.
_WEIGHT_2D = tl.constexpr(13421773 / 2**26)
_WEIGHT_3D = tl.constexpr(9586981 / 2**26)
_LARGEST_DIFFERENCE = tl.constexpr(1e12)
_TIE_2D = tl.constexpr(8 * 2.0**-23)
_TIE_3D = tl.constexpr(10 * 2.0**-23)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_NAN_BITS = tl.constexpr(0x7FC00000)

# What is kept of each step and field: lower bound and range of the stretch; the range again, 0 where the field is flat
# up to rounding; from where on dilations tie with maximum, lower bound and threshold; the error that is carried on.
_LIMITS = 7


def takes(pred: Tensor, target: Tensor) -> bool:
    """Tell whether the functions here take this pair, which the loss has checked.

    Args:
        pred: (B, C, H, W) or (B, C, D, H, W).
        target: (B, 1, ...), integer.

    Returns:
        True for a float32 ``pred`` that is not empty, with at most 65535 fields (B * C) of at most 2**31 - 1 elements
        each, on a CUDA device (on the CPU under ``TRITON_INTERPRET=1``).
    """
    return (
        pred.ndim in (4, 5)
        and pred.dtype == torch.float32
        and runs_on(pred.device)
        and target.device == pred.device
        and pred.numel() > 0
        and pred.shape[0] * pred.shape[1] <= _MAX_FIELDS
        and math.prod(pred.shape[2:]) <= _MAX_ELEMENTS
    )


def erode(
    pred: Tensor, target: Tensor, classes: Tensor, weights: Sequence[float], keep_field: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of the stretched erosions of the squared difference, and what its gradient needs.

    Args:
        pred: (B, C, *spatial) float32; see :func:`takes`.
        target: (B, 1, *spatial), integer class ids.
        classes: (C,), the class id of each channel.
        weights: of each of the k erosions.
        keep_field: whether the sum stays a field, or runs over the elements of each field too.

    Returns:
        The sum, (B, C, *spatial), or with ones for the spatial sides. The dilations (k, B, C, *spatial). Their limits
        (k, 7, B, C): lower bounds and ranges first.
    """
    total, dilations, limits = _erode(flat(pred), flat(target), flat(classes), list(weights), keep_field)
    return total, dilations, limits


def erosion_gradient(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    classes: Tensor,
    weights: Sequence[float],
    dilations: Tensor,
    limits: Tensor,
) -> Tensor:
    """Gradient of the sum of :func:`erode` with respect to ``pred``; elements that share an extreme share its gradient.

    Args:
        grad: with respect to the sum, of its shape, or one that expands to it.
        pred: as given to :func:`erode`.
        target: as given.
        classes: as given.
        weights: as given.
        dilations: as returned.
        limits: as returned.

    Returns:
        (B, C, *spatial) float32: finite, but NaN throughout where NaN or infinity came in with ``grad`` or NaN with
        ``pred``.
    """
    gradient: Tensor = _gradient(
        flat(grad), flat(pred), flat(target), flat(classes), list(weights), flat(dilations), flat(limits)
    )
    return gradient


@operator("detpost::triton_erode")
def _erode(
    pred: Tensor, target: Tensor, classes: Tensor, weights: list[float], keep_field: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = pred.shape[:2]
    fields, elements = batch * channels, math.prod(pred.shape[2:])
    programs, span = _division(elements)
    steps = len(weights)
    dilations = torch.empty((steps, *pred.shape), dtype=torch.float32, device=pred.device)
    limits = torch.empty((steps, _LIMITS, batch, channels), dtype=torch.float32, device=pred.device)
    # What each program found: least, and greatest as bits, which order floats that are not negative; NaN on top.
    least = torch.empty((steps, fields, programs), dtype=torch.float32, device=pred.device)
    greatest = torch.empty((steps, fields, programs), dtype=torch.int32, device=pred.device)
    sums = torch.empty(pred.shape if keep_field else (fields, programs), dtype=torch.float32, device=pred.device)
    for step in range(steps + 1):  # the last launch only adds the last erosion to the sum
        this, last = min(step, steps - 1), max(step - 1, 0)
        wrap_triton(_erode_kernel)[(programs, fields)](
            pred if step == 0 else dilations[last],
            target,
            classes,
            least[last],
            greatest[last],
            limits[max(last - 1, 0)],
            limits[last],
            dilations[this],
            least[this],
            greatest[this],
            sums,
            weights[last],
            channels,
            elements,
            span,
            programs,
            pred.shape[-3] if pred.ndim == 5 else 1,
            pred.shape[-2],
            pred.shape[-1],
            fields,
            AXES=pred.ndim - 2,
            FIRST=step == 0,
            STARTS=step == 1,
            ENDS=step == steps,
            KEEP=keep_field,
            PROGRAMS=power_of_two(programs),
            BLOCK=_BLOCK,
            num_warps=4,
        )
    if not keep_field:
        sums = sums.sum(1).view(batch, channels, *[1] * (pred.ndim - 2))
    return sums, dilations, limits


@operator("detpost::triton_erosion_gradient")
def _gradient(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    classes: Tensor,
    weights: list[float],
    dilations: Tensor,
    limits: Tensor,
) -> Tensor:
    batch, channels = pred.shape[:2]
    fields, elements = batch * channels, math.prod(pred.shape[2:])
    programs, span = _division(elements)
    steps = len(weights)
    # What came in as NaN or infinity must be seen going out. A NaN in a field makes its range NaN.
    poison = (grad.sum() + limits.sum()) * 0
    is_field = grad.shape == pred.shape
    if not is_field:
        grad = grad.expand((batch, channels, *[1] * (pred.ndim - 2))).contiguous()
    parts = torch.empty((2, 4, fields, programs), dtype=torch.float32, device=pred.device)
    onto = [torch.empty(pred.shape, dtype=torch.float32, device=pred.device) for _ in range(2)]
    for step in range(steps, -1, -1):  # the first launch only spreads the gradient and takes the sums
        this, before = min(step, steps - 1), max(step - 1, 0)
        wrap_triton(_gradient_kernel)[(programs, fields)](
            onto[step % 2],
            onto[(step + 1) % 2],
            grad,
            pred,
            target,
            classes,
            dilations[this],
            limits[this],
            dilations[before],
            limits[before],
            parts[step % 2],
            parts[(step + 1) % 2],
            poison,
            weights[before],
            channels,
            elements,
            span,
            programs,
            pred.shape[-3] if pred.ndim == 5 else 1,
            pred.shape[-2],
            pred.shape[-1],
            fields,
            AXES=pred.ndim - 2,
            STARTS=step == steps,
            ENDS=step == 0,
            IS_FIELD=is_field,
            PROGRAMS=power_of_two(programs),
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return onto[1]


def _division(elements: int) -> tuple[int, int]:
    """Give how many programs share a field, and how many elements each takes: whole blocks."""
    blocks = -(-elements // _BLOCK)
    span = -(-blocks // _MAX_PROGRAMS) * _BLOCK
    return -(-elements // span), span


@jit
def _erode_kernel(
    source_ptr,  # (fields, elements): prediction if FIRST, else the last dilation
    target_ptr,  # (B, elements) integer
    classes_ptr,  # (C,) integer
    least_ptr,  # (fields, programs): least of the last dilation, part by part
    greatest_ptr,  # (fields, programs) int32: greatest, likewise, as bits
    earlier_ptr,  # (7, fields): limits of the dilation before the last; not read if STARTS
    limits_ptr,  # (7, fields), written: limits of the last dilation
    out_ptr,  # (fields, elements), written: the next dilation
    next_least_ptr,  # (fields, programs), written
    next_greatest_ptr,  # (fields, programs) int32, written
    sums_ptr,  # (fields, programs), or (fields, elements) if KEEP, added to
    weight,  # of the last erosion
    channels,
    elements,
    span,
    programs,
    depth,
    height,
    width,
    fields,
    AXES: tl.constexpr,
    FIRST: tl.constexpr,
    STARTS: tl.constexpr,  # the sum starts here
    ENDS: tl.constexpr,  # there is no next dilation
    KEEP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stretch the last dilation, add it to the sum, and dilate it."""
    program = tl.program_id(0)
    field = tl.program_id(1).to(tl.int64)
    source_ptr += field * elements
    target_ptr += field // channels * elements
    out_ptr += field * elements
    class_id = tl.load(classes_ptr + field % channels)
    lower, extent = 0.0, 0.0
    if not FIRST:
        lower, extent = _limits(least_ptr + field * programs, greatest_ptr + field * programs, programs, PROGRAMS)
        if program == 0:
            carried = 0.0 if STARTS else tl.load(earlier_ptr + 6 * fields + field)
            _store_limits(limits_ptr + field, fields, lower, extent, carried, AXES)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    greatest = tl.zeros([BLOCK], tl.int32)
    added = tl.zeros([BLOCK], tl.float32)
    for start in range(program * span, tl.minimum((program + 1) * span, elements), BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < elements
        middle = _bound(source_ptr, target_ptr, class_id, lower, extent, index, mask, FIRST)
        if KEEP and not FIRST:
            place = sums_ptr + field * elements + index
            previous = tl.zeros([BLOCK], tl.float32) if STARTS else tl.load(place, mask=mask, other=0.0)
            tl.store(place, tl.fma(middle, tl.full([BLOCK], weight, tl.float32), previous), mask=mask)
        added += middle
        if not ENDS:
            total = tl.zeros([BLOCK], tl.float32)
            for tap in tl.static_range(2 * AXES + 1):
                shift, is_inside = _neighbour(index, tap, depth, height, width, AXES)
                if tap == AXES:
                    value = middle
                else:
                    inside = mask & is_inside
                    value = _bound(source_ptr, target_ptr, class_id, lower, extent, index + shift, inside, FIRST)
                total = _tap(total, value, AXES)
            tl.store(out_ptr + index, total, mask=mask)
            least = tl.minimum(least, tl.where(mask, total, float("inf")))
            bits = tl.where(total == total, total.to(tl.int32, bitcast=True), _NAN_BITS)
            greatest = tl.maximum(greatest, tl.where(mask, bits, 0))
    part = field * programs + program
    if not ENDS:
        tl.store(next_least_ptr + part, tl.min(least, axis=0))
        tl.store(next_greatest_ptr + part, tl.max(greatest, axis=0))
    if not FIRST and not KEEP:
        sum_of_part = tl.sum(added, axis=0) * weight
        if not STARTS:
            sum_of_part += tl.load(sums_ptr + part)
        tl.store(sums_ptr + part, sum_of_part)


@jit
def _limits(least_ptr, greatest_ptr, programs, PROGRAMS: tl.constexpr):
    """Gather the parts of the extremes: lower bound and range that take max(dilation - 0.5, 0) to [0, 1]."""
    part = tl.arange(0, PROGRAMS)
    mask = part < programs
    least = tl.min(tl.load(least_ptr + part, mask=mask, other=float("inf")), axis=0)
    greatest = tl.max(tl.load(greatest_ptr + part, mask=mask, other=0), axis=0).to(tl.float32, bitcast=True)
    lower = tl.maximum(least, 0.5)
    # where and not maximum: NaN must reach the range.
    extent = tl.where(greatest < 0.5, 0.5, greatest) - lower
    return tl.where(extent == 0, 0.5, lower), extent


@jit
def _store_limits(limits_ptr, fields, lower, extent, carried, AXES: tl.constexpr):
    """Write what the gradient asks of a step: where dilations tie, given the error that the steps before carried on."""
    step = _TIE_2D if AXES == 2 else _TIE_3D
    greatest = lower + extent
    slack = carried + step * greatest
    tl.store(limits_ptr, lower)
    tl.store(limits_ptr + fields, extent)
    tl.store(limits_ptr + 2 * fields, tl.where(extent <= slack, 0.0, extent))
    tl.store(limits_ptr + 3 * fields, greatest - slack)
    tl.store(limits_ptr + 4 * fields, lower + (carried + step * lower))
    tl.store(limits_ptr + 5 * fields, 0.5 - 0.5 * step - carried)
    grown = 0.5 * slack / tl.where(extent == 0, 1.0, extent)
    tl.store(limits_ptr + 6 * fields, tl.where(grown > 1.0, 1.0, grown))


@jit
def _bound(source_ptr, target_ptr, class_id, lower, extent, index, mask, FIRST: tl.constexpr):
    """Load what is dilated next, 0 where masked: the squared difference if FIRST, else the stretched last dilation."""
    source = tl.load(source_ptr + index, mask=mask, other=0.0)
    if FIRST:
        difference = _difference(source, tl.load(target_ptr + index, mask=mask, other=0), class_id)
        value = difference * difference
    else:
        value = _stretch(source, lower, extent)
    return tl.where(mask, value, 0.0)


@jit
def _difference(pred, ids, class_id):
    """Prediction minus one-hot target, clamped to what can be squared and summed; NaN stays."""
    difference = pred - tl.where(ids == class_id, 1.0, 0.0)
    difference = tl.where(difference > _LARGEST_DIFFERENCE, _LARGEST_DIFFERENCE, difference)
    return tl.where(difference < -_LARGEST_DIFFERENCE, -_LARGEST_DIFFERENCE, difference)


@jit
def _stretch(dilation, lower, extent):
    """Threshold at the lower bound and divide by the range; a flat field (range 0) is not divided."""
    return _divided(tl.maximum(dilation, lower) - lower, extent)


@jit
def _neighbour(index, tap: tl.constexpr, depth, height, width, AXES: tl.constexpr):
    """Give how far a tap of the stencil is in memory, and whether it lies in the field. Taps are in memory order."""
    column = index % width
    row = index // width
    if AXES == 3:
        plane = row // height
        row = row % height
    if tap == AXES:
        shift, is_inside = 0, index >= 0
    elif tap == AXES - 1:
        shift, is_inside = -1, column > 0
    elif tap == AXES + 1:
        shift, is_inside = 1, column + 1 < width
    elif tap == AXES - 2:
        shift, is_inside = -width, row > 0
    elif tap == AXES + 2:
        shift, is_inside = width, row + 1 < height
    elif tap == 0:
        shift, is_inside = -height * width, plane > 0
    else:
        shift, is_inside = height * width, plane + 1 < depth
    return shift, is_inside


@jit
def _tap(total, value, AXES: tl.constexpr):
    """Add a tap with one rounding, as the plain path does."""
    weight = tl.full(value.shape, _WEIGHT_2D if AXES == 2 else _WEIGHT_3D, tl.float32)
    return tl.fma(value, weight, total)


@jit
def _gradient_kernel(
    incoming_ptr,  # (fields, elements): gradient of the last stretched dilation; not read if STARTS
    out_ptr,  # (fields, elements), written: of the one before, or of the prediction if ENDS
    grad_ptr,  # (fields, elements) if IS_FIELD, else (fields,): of the sum
    pred_ptr,  # (fields, elements)
    target_ptr,  # (B, elements) integer
    classes_ptr,  # (C,) integer
    dilation_ptr,  # (fields, elements): the last
    limits_ptr,  # (7, fields)
    before_ptr,  # (fields, elements): the one before
    before_limits_ptr,  # (7, fields)
    parts_ptr,  # (4, fields, programs): sums over the last dilation, part by part
    next_parts_ptr,  # (4, fields, programs), written: over the one before
    poison_ptr,  # (): 0 or NaN
    weight,  # of the erosion before
    channels,
    elements,
    span,
    programs,
    depth,
    height,
    width,
    fields,
    AXES: tl.constexpr,
    STARTS: tl.constexpr,
    ENDS: tl.constexpr,
    IS_FIELD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Carry the gradient through one stretch and one stencil, and take the sums that the next stretch needs."""
    program = tl.program_id(0)
    field = tl.program_id(1).to(tl.int64)
    offset = field * elements
    incoming_ptr += offset
    out_ptr += offset
    dilation_ptr += offset
    before_ptr += offset
    limits_ptr += field
    before_limits_ptr += field
    extent, top, bottom, half = _ties(limits_ptr, fields)
    before_lower = tl.load(before_limits_ptr)
    before_stretch = tl.load(before_limits_ptr + fields)
    before_extent, before_top, before_bottom, _ = _ties(before_limits_ptr, fields)
    per_maximum, per_minimum = 0.0, 0.0
    if not STARTS:
        per_maximum, per_minimum = _shares(parts_ptr + field * programs, fields * programs, programs, extent, PROGRAMS)
    onto_range = tl.zeros([BLOCK], tl.float32)
    onto_both = tl.zeros([BLOCK], tl.float32)
    at_maximum = tl.zeros([BLOCK], tl.float32)
    at_minimum = tl.zeros([BLOCK], tl.float32)
    for start in range(program * span, tl.minimum((program + 1) * span, elements), BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < elements
        total = tl.zeros([BLOCK], tl.float32)
        if not ENDS:
            grad_place = grad_ptr + (offset + index if IS_FIELD else field + tl.zeros_like(index))
            total = tl.load(grad_place, mask=mask, other=0.0) * weight
        if not STARTS:
            for tap in tl.static_range(2 * AXES + 1):
                shift, is_inside = _neighbour(index, tap, depth, height, width, AXES)
                value = _onto_dilation(
                    incoming_ptr,
                    dilation_ptr,
                    index + shift,
                    mask & is_inside,
                    extent,
                    top,
                    bottom,
                    half,
                    per_maximum,
                    per_minimum,
                )
                total = _tap(total, value, AXES)
        if ENDS:
            pred = tl.load(pred_ptr + offset + index, mask=mask, other=0.0)
            ids = tl.load(target_ptr + field // channels * elements + index, mask=mask, other=0)
            total = total * (_difference(pred, ids, tl.load(classes_ptr + field % channels)) * 2)
            total = _finite(total) + tl.load(poison_ptr)
        else:
            before = tl.load(before_ptr + index, mask=mask, other=0.0)
            onto = _divided(total, before_extent)
            onto_range += tl.where(mask, onto * _stretch(before, before_lower, before_stretch), 0.0)
            onto_both += tl.where(mask, onto, 0.0)
            at_maximum += tl.where(mask & (before >= before_top), 1.0, 0.0)
            at_minimum += tl.where(mask & (before <= before_bottom), 1.0, 0.0)
        tl.store(out_ptr + index, total, mask=mask)
    if not ENDS:
        part = next_parts_ptr + field * programs + program
        stride = fields * programs
        tl.store(part, tl.sum(onto_range, axis=0))
        tl.store(part + stride, tl.sum(onto_both, axis=0))
        tl.store(part + 2 * stride, tl.sum(at_maximum, axis=0))
        tl.store(part + 3 * stride, tl.sum(at_minimum, axis=0))


@jit
def _ties(limits_ptr, fields):
    """Load the range, 0 for a flat field, and from where on dilations tie with maximum, lower bound and threshold."""
    extent = tl.load(limits_ptr + 2 * fields)
    top = tl.load(limits_ptr + 3 * fields)
    bottom = tl.load(limits_ptr + 4 * fields)
    half = tl.load(limits_ptr + 5 * fields)
    return extent, top, bottom, half


@jit
def _shares(parts_ptr, stride, programs, extent, PROGRAMS: tl.constexpr):
    """Gather the parts of the sums: what flows to each element at the maximum, and to each at or below the minimum."""
    part = tl.arange(0, PROGRAMS)
    mask = part < programs
    onto_range = -tl.sum(tl.load(parts_ptr + part, mask=mask, other=0.0), axis=0)
    onto_both = tl.sum(tl.load(parts_ptr + stride + part, mask=mask, other=0.0), axis=0)
    at_maximum = tl.sum(tl.load(parts_ptr + 2 * stride + part, mask=mask, other=0.0), axis=0)
    at_minimum = tl.sum(tl.load(parts_ptr + 3 * stride + part, mask=mask, other=0.0), axis=0)
    moves = tl.where(extent != 0, 1.0, 0.0)  # the limits of a flat field are constants
    onto_range = onto_range * moves
    onto_minimum = -onto_both * moves - onto_range
    return onto_range / tl.maximum(at_maximum, 1.0), onto_minimum / tl.maximum(at_minimum, 1.0)


@jit
def _onto_dilation(incoming_ptr, dilation_ptr, index, mask, extent, top, bottom, half, per_maximum, per_minimum):
    """Load the gradient of a stretched dilation as that of the dilation, 0 where masked."""
    dilation = tl.load(dilation_ptr + index, mask=mask, other=0.0)
    onto = _divided(tl.load(incoming_ptr + index, mask=mask, other=0.0), extent)
    onto += tl.where(dilation >= top, per_maximum, 0.0) + tl.where(dilation <= bottom, per_minimum, 0.0)
    # Nothing flows below the threshold, and all of it at the threshold itself.
    return tl.where(mask & ((dilation >= half) | (dilation != dilation)), onto, 0.0)


@jit
def _divided(value, extent):
    """Divide by the range, unless the field is flat; rounded correctly, where `/` would be off by a bit or two."""
    return tl.div_rn(value, tl.zeros_like(value) + tl.where(extent == 0, 1.0, extent))


@jit
def _finite(value):
    """Replace NaN by 0 and infinities by the largest numbers, as torch.nan_to_num does."""
    value = tl.where(value == value, value, 0.0)
    return tl.where(value > _LARGEST, _LARGEST, tl.where(value < -_LARGEST, -_LARGEST, value))
