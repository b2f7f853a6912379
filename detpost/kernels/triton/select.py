# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Selection of the k best scores of each row on a GPU: one program per row, or per segment of a long row.

The order is that of :mod:`detpost.selection`. A program

1. reads the row once and keeps the maxima of strided groups (element i belongs to group i mod G) in registers;
2. bisects a threshold that at least k of the maxima, and so at least k of the elements, reach;
3. reads the row again, from the cache, and packs what lies above the threshold, and the first k elements equal to it,
   into scratch memory; only where more lie above than fit does it bisect once more, over the whole row;
4. sorts the few packed candidates. A key is the score as an ordered integer over a count-down of the index, so no two
   are equal and the order is the one right order.

The groups are strided because scores that belong together stand together: a query with many good classes, or a row that
rises, spreads over all the groups, and the threshold stays close to the k-th score.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from detpost.kernels.triton.common import flat, jit, operator, power_of_two, runs_on, wrap_triton

__all__ = ["select", "takes"]

MAX_K = 1024
_MAX_ROW = 2**30
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_PADDING = tl.constexpr(-(2**31))  # below every score
_NAN_KEY = tl.constexpr(-(2**31) + 1)  # below -inf, whose key is -(2**31) + 0x7FFFFF
_CEILING = tl.constexpr(2**31 - 1)  # above every score: that of +inf is 0x7F800000
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_LOW_HALF = tl.constexpr(2**32 - 1)
_NOTHING = tl.constexpr(-(2**63))

# Elements that one step of the packing pass scans: two counts of at most this many share a 32-bit integer.
BLOCK = 4096
WARPS = 16
# Rows longer than two of these are read by several programs each.
_SEGMENT = 16384
_MAX_SEGMENTS = 64
# About two programs for each processor of a large GPU: more segments than that only add candidates to merge.
_MAX_PROGRAMS = 256


def takes(scores: Tensor, k: int) -> bool:
    """Tell whether :func:`select` takes these arguments.

    Args:
        scores: what would be selected from.
        k: how many would be kept.

    Returns:
        True for non-empty (B, N) float32, float16 or bfloat16 rows of at most 2**30 scores on a CUDA device (on the CPU
        under ``TRITON_INTERPRET=1``), with ``1 <= min(k, N) <= 1024``.
    """
    return (
        scores.ndim == 2
        and scores.dtype in _DTYPES
        and runs_on(scores.device)
        and scores.shape[0] > 0
        and 0 < scores.shape[1] <= _MAX_ROW
        and 0 < min(k, scores.shape[1]) <= MAX_K
    )


def select(scores: Tensor, k: int) -> Tensor:
    """Give the indices of the k greatest scores of each row, as :func:`detpost.select_top_k` does.

    Args:
        scores: (B, N), float32, float16 or bfloat16; see :func:`takes`. Any strides; other than contiguous ones
            cost a copy.
        k: how many to keep.

    Returns:
        (B, min(k, N)), int64, best first. Carries no gradient.
    """
    indices: Tensor = _select(flat(scores), min(k, scores.shape[1]))
    return indices


@operator("detpost::triton_select")
def _select(scores: Tensor, k: int) -> Tensor:
    batch = scores.shape[0]
    indices = torch.empty((batch, k), dtype=torch.int64, device=scores.device)
    source, places, length, segments = partial_selection(scores, k, 1, -1)
    groups, capacity = block_sizes(k)
    scratch = torch.empty((batch, capacity + k), dtype=torch.int64, device=scores.device)
    wrap_triton(_select_kernel)[(batch,)](
        source,
        places,
        scratch,
        indices,
        indices,
        length,
        length,
        k,
        1,
        -1,
        1,
        PRESELECTED=segments > 1,
        PARTIAL=False,
        GROUPS=groups,
        BLOCK=BLOCK,
        CAPACITY=capacity,
        num_warps=WARPS,
    )
    return indices


def block_sizes(k: int) -> tuple[int, int]:
    """Give the number of groups, and how many candidates a program packs and sorts.

    With four groups to each kept element the threshold lets about k * 1.13 elements of an unordered row through.
    """
    return max(1024, power_of_two(4 * k)), power_of_two(max(32, k + k // 4))


def segment_count(batch: int, width: int) -> int:
    """Give into how many segments rows are cut: as the GPU has room for, none shorter than is worth a program."""
    if width <= 2 * _SEGMENT:
        return 1
    return max(1, min(width // _SEGMENT, _MAX_PROGRAMS // batch, _MAX_SEGMENTS))


def partial_selection(scores: Tensor, k: int, classes: int, background: int) -> tuple[Tensor, Tensor, int, int]:
    """Cut long rows into segments and keep the best k of each, where that is worth a launch.

    Each segment's best stand in order, and segments stand in the row's order: among equal scores the places still rise
    with the index, so a selection among what is kept, ties by place, is the selection from the whole row.

    Args:
        scores: (B, N), contiguous.
        k: how many of each row are to be selected in the end.
        classes: C, where an index is query * C + class.
        background: the class that counts as NaN, or -1.

    Returns:
        What to select from, (B, M): ordered keys (int32) where segments are more than 1, else the scores. The index of
        each, (B, M). M. The number of segments.
    """
    batch, width = scores.shape
    segments = segment_count(batch, width)
    if segments == 1:
        return scores, scores, width, 1
    span = -(-width // segments)
    keys = torch.empty((batch, segments * k), dtype=torch.int32, device=scores.device)
    places = torch.empty((batch, segments * k), dtype=torch.int32, device=scores.device)
    groups, capacity = block_sizes(k)
    scratch = torch.empty((batch * segments, capacity + k), dtype=torch.int64, device=scores.device)
    wrap_triton(_select_kernel)[(batch * segments,)](
        scores,
        scores,
        scratch,
        keys,
        places,
        width,
        span,
        k,
        classes,
        background,
        segments,
        PRESELECTED=False,
        PARTIAL=True,
        GROUPS=groups,
        BLOCK=BLOCK,
        CAPACITY=capacity,
        num_warps=WARPS,
    )
    return keys, places, segments * k, segments


@jit
def _select_kernel(
    scores_ptr,  # (B, N), or keys of a partial selection
    places_ptr,  # (B, N), the index of each key; not read unless PRESELECTED
    scratch_ptr,  # (programs, CAPACITY + K) int64
    keys_out_ptr,  # (programs, K) int32, written where PARTIAL
    out_ptr,  # (programs, K)
    row_stride,
    span,  # length of a segment
    count,  # K
    classes,
    background,
    segments,
    PRESELECTED: tl.constexpr,
    PARTIAL: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // segments
    first = (program % segments) * span
    stop = tl.minimum(first + span, row_stride)
    packed = best_of_row(
        scores_ptr + row * row_stride,
        scratch_ptr + program * (CAPACITY + count),
        first.to(tl.int32),
        stop.to(tl.int32),
        count,
        classes,
        background,
        PRESELECTED,
        GROUPS,
        BLOCK,
        CAPACITY,
    )
    slot = tl.arange(0, CAPACITY)
    index = index_of(packed)
    if PRESELECTED:
        index = tl.load(places_ptr + row * row_stride + index, mask=slot < count, other=0).to(tl.int64)
    if PARTIAL:
        tl.store(keys_out_ptr + program * count + slot, key_of(packed), mask=slot < count)
        index = index.to(tl.int32)
    tl.store(out_ptr + program * count + slot, index, mask=slot < count)


@jit
def best_of_row(
    row_ptr,
    scratch_ptr,
    first,
    stop,
    count,
    classes,
    background,
    PRESELECTED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Give CAPACITY packed keys, descending; the first ``count`` are the best of elements ``first`` to ``stop``."""
    maxima = tl.full([GROUPS], _PADDING, tl.int32)
    for start in range(first, stop, GROUPS):
        index = start + tl.arange(0, GROUPS)
        scores = tl.load(row_ptr + index, mask=index < stop, other=0)
        maxima = tl.maximum(maxima, _keys(scores, index, stop, classes, background, PRESELECTED))
    threshold = _threshold_of_maxima(maxima, count)
    above, equal = _pack(
        row_ptr, scratch_ptr, first, stop, threshold, count, classes, background, PRESELECTED, BLOCK, CAPACITY
    )
    if above > CAPACITY:
        # The best stand in few groups, or thousands share a value: bisect over the row itself, up to a value that as
        # many reach as fit, or to the count-th score.
        high = tl.full([], _CEILING, tl.int32)
        while threshold + 1 < high:
            middle = _mean(threshold, high)
            reaching = tl.zeros([BLOCK], tl.int32)
            for start in range(first, stop, BLOCK):
                index = start + tl.arange(0, BLOCK)
                scores = tl.load(row_ptr + index, mask=index < stop, other=0)
                keys = _keys(scores, index, stop, classes, background, PRESELECTED)
                reaching += (keys >= middle).to(tl.int32)
            threshold, high = _narrowed(threshold, high, middle, tl.sum(reaching, axis=0), count, CAPACITY)
        tl.debug_barrier()  # the first packing must be over before another writes to the same places
        above, equal = _pack(
            row_ptr, scratch_ptr, first, stop, threshold, count, classes, background, PRESELECTED, BLOCK, CAPACITY
        )
    tl.debug_barrier()  # what some threads wrote, others read
    slot = tl.arange(0, CAPACITY)
    is_above = slot < above
    is_equal = (slot >= above) & (slot < count) & (slot - above < equal)
    place = tl.where(is_above, slot, CAPACITY + slot - above)
    packed = tl.load(scratch_ptr + place, mask=is_above | is_equal, other=_NOTHING)
    return tl.sort(packed, descending=True)


@jit
def _keys(scores, index, stop, classes, background, PRESELECTED: tl.constexpr):
    """Make scores integers of the same order: zeros equal, then -inf, then NaN, then what is beyond the row.

    Takes what was loaded and no pointer: torch takes whatever goes into a function whose result leads to the address of
    a store for written to, and Inductor would copy the scores before each call.
    """
    if PRESELECTED:
        return tl.where(index < stop, scores, _PADDING)
    # By bits alone: no flushing of denormals and no liberty with comparisons can change an order of integers.
    if scores.dtype == tl.bfloat16:  # the upper half of a float32
        bits = scores.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = scores.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    keys = tl.where(bits < 0, -magnitude - 1, bits)
    keys = tl.where(magnitude == 0, 0, keys)
    keys = tl.where(magnitude > _INFINITY, _NAN_KEY, keys)
    if background >= 0:
        keys = tl.where(index % classes == background, _NAN_KEY, keys)
    return tl.where(index < stop, keys, _PADDING)


@jit
def _threshold_of_maxima(maxima, count):
    """Give a value that at least ``count`` maxima reach, and as good as no more than that exceed.

    The bisection ends at the first value that an eighth more than ``count`` reach at the most; among ties there is none
    such, and it ends at the count-th maximum itself.
    """
    enough = count + count // 8
    low = tl.full([], _PADDING, tl.int32)
    high = tl.full([], _CEILING, tl.int32)
    while low + 1 < high:
        middle = _mean(low, high)
        reaching = tl.sum((maxima >= middle).to(tl.int32), axis=0)
        low, high = _narrowed(low, high, middle, reaching, count, enough)
    return low


@jit
def _mean(low, high):
    """Give the mean, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@jit
def _narrowed(low, high, middle, reaching, count, enough):
    """Narrow a bisection in which at least ``count`` reach ``low``; close it where ``enough`` do at the most."""
    is_reached = reaching >= count
    is_close = is_reached & (reaching <= enough)
    next_low = tl.where(is_reached, middle, low)
    next_high = tl.where(is_close | (reaching < count), middle, high)
    return next_low, next_high


@jit
def _pack(
    row_ptr,
    scratch_ptr,
    first,
    stop,
    threshold,
    count,
    classes,
    background,
    PRESELECTED: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Write the elements above the threshold, then from CAPACITY on those equal to it; give how many there are.

    Both in the order of the index, which settles ties at the threshold: the ones that come first are the ones wanted.
    """
    above_count = tl.full([], 0, tl.int32)
    equal_count = tl.full([], 0, tl.int32)
    for start in range(first, stop, BLOCK):
        index = start + tl.arange(0, BLOCK)
        scores = tl.load(row_ptr + index, mask=index < stop, other=0)
        keys = _keys(scores, index, stop, classes, background, PRESELECTED)
        is_above = keys > threshold
        is_equal = (keys == threshold) & (index < stop)
        # One scan for both counts: neither exceeds BLOCK, which is far below 2**15.
        marks = (is_above.to(tl.int32) << 16) + is_equal.to(tl.int32)
        upto = tl.cumsum(marks, axis=0)
        total = tl.sum(marks, axis=0)
        packed = (keys.to(tl.int64) << 32) | (_LOW_HALF - index.to(tl.int64))
        above_place = above_count + (upto >> 16) - 1
        equal_place = equal_count + (upto & 0xFFFF) - 1
        tl.store(scratch_ptr + above_place, packed, mask=is_above & (above_place < CAPACITY))
        tl.store(scratch_ptr + CAPACITY + equal_place, packed, mask=is_equal & (equal_place < count))
        above_count += total >> 16
        equal_count += total & 0xFFFF
    return above_count, equal_count


@jit
def key_of(packed):
    """Give the ordered 32-bit key of the score."""
    return (packed >> 32).to(tl.int32)


@jit
def index_of(packed):
    """Give the index, int64."""
    return _LOW_HALF - (packed & _LOW_HALF)


@jit
def score_of(packed):
    """Give the score in float32; NaN where it was NaN, and 0.0 for -0.0."""
    key = key_of(packed)
    bits = tl.where(key < 0, (-key - 1) | _PADDING, key)
    return tl.where(key > _NAN_KEY, bits.to(tl.float32, bitcast=True), float("nan"))
