# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The whole decode on a GPU, for inference: logits and boxes in, :class:`detpost.Detections` out, without gradients.

Sigmoid scores ranked over all (query, class) pairs, which is what most of the family does, take one launch with one
program per image: select as :mod:`detpost.kernels.triton.select` does, then score, gather and convert the boxes, and
write the rows while the candidates are still in registers. Scores come back out of the keys that were sorted, so the
logits are read twice, the second time from the cache. Long rows in small batches take one launch more, in which several
programs share an image. Softmax, and the best class of each query, take one launch before it, which writes a key for
each pair or query.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from detpost.detections import INVALID, Detections
from detpost.kernels.triton.common import flat, jit, operator, power_of_two, runs_on, wrap_triton
from detpost.kernels.triton.select import (
    BLOCK,
    MAX_K,
    WARPS,
    best_of_row,
    block_sizes,
    index_of,
    partial_selection,
    score_of,
)
from detpost.reference.softmax import limbs
from detpost.spec import BOX_FORMAT_CODES, DecodeSpec

__all__ = ["decode", "takes"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The classes of a query are held in registers at once where they are compared with each other.
_MAX_CLASSES = 8192
_MAX_PAIRS = 2**30
# What slots that are not valid read, and formats of boxes, as constants of a kernel.
_SCORE, _LABEL = tl.constexpr(INVALID.score), tl.constexpr(INVALID.label)
_BOX, _QUERY = tl.constexpr(INVALID.box), tl.constexpr(INVALID.query)
_CXCYWH, _XYWH = tl.constexpr(BOX_FORMAT_CODES["cxcywh"]), tl.constexpr(BOX_FORMAT_CODES["xywh"])
# Logits per program where queries are looked at one by one.
_TILE = 2048


def takes(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> bool:
    """Tell whether :func:`decode` takes these arguments, which the post-processor has checked.

    Args:
        logits: (B, Q, C).
        boxes: (B, Q, 4).
        image_sizes: (B, 2) or ``None``.
        spec: what the decode does.

    Returns:
        True where logits and boxes are float32, float16 or bfloat16 on a CUDA device (on the CPU under
        ``TRITON_INTERPRET=1``), nothing is empty, K is at most 1024, a row has at most 2**30 pairs and, for softmax or
        ``per_query``, at most 8192 classes. The caller sees to it that no gradient is wanted.
    """
    batch, queries, classes = logits.shape
    rows = queries * classes if spec.selection == "flat" else queries
    compares_classes = spec.activation == "softmax" or spec.selection == "per_query"
    return (
        logits.dtype in _DTYPES
        and boxes.dtype in _DTYPES
        and runs_on(logits.device)
        and (image_sizes is None or image_sizes.dtype != torch.bool)
        and batch > 0
        and rows > 0
        and queries * classes <= _MAX_PAIRS
        and min(spec.top_k, rows) <= MAX_K
        and not (compares_classes and classes > _MAX_CLASSES)
    )


def decode(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Detections:
    """Decode a batch as :class:`detpost.DetectionPostProcessor` does, without gradients.

    Args:
        logits: (B, Q, C), float32, float16 or bfloat16; see :func:`takes`.
        boxes: (B, Q, 4), the same choice of dtypes, in units of the image, in ``spec.box_format``.
        image_sizes: (B, 2), (height, width) in pixels, or ``None``.
        spec: what the decode does.

    Returns:
        Detections with the indices, labels and validity of the plain decode to the bit. Sigmoid scores are computed in
        float64 and rounded, as there: logits that are equal score alike. Softmax scores are those of
        :mod:`detpost.reference.softmax` to the bit.
    """
    classes = logits.shape[2]
    sizes = flat(boxes if image_sizes is None else image_sizes)
    outputs = _decode(
        flat(logits),
        flat(boxes),
        sizes,
        image_sizes is not None,
        min(spec.top_k, logits.shape[1] * (classes if spec.selection == "flat" else 1)),
        spec.activation == "softmax",
        spec.selection == "per_query",
        spec.background_channel(classes),
        BOX_FORMAT_CODES[spec.box_format],
        spec.clip,
        # Scores are at least 0: above a negative threshold is above none.
        -1.0 if spec.score_threshold is None else spec.score_threshold,
    )
    return Detections(*outputs)


@operator("detpost::triton_decode")
def _decode(
    logits: Tensor,
    boxes: Tensor,
    sizes: Tensor,
    has_sizes: bool,
    count: int,
    softmax: bool,
    per_query: bool,
    background: int,
    box_format: int,
    clip: bool,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, queries, classes = logits.shape
    device = logits.device
    rows, labels = logits.reshape(batch, queries * classes), torch.empty((0,), dtype=torch.int32, device=device)
    if softmax or per_query:
        rows = torch.empty((batch, queries * (1 if per_query else classes)), dtype=torch.float32, device=device)
        labels = torch.empty((batch, queries), dtype=torch.int32, device=device)
        width = power_of_two(classes)
        tile = max(1, _TILE // width)
        bits, limb_count = limbs(classes)
        wrap_triton(_query_kernel)[(-(-batch * queries // tile),)](
            logits,
            rows,
            labels,
            batch * queries,
            classes,
            background,
            SOFTMAX=softmax,
            PER_QUERY=per_query,
            QUERIES=tile,
            CLASSES=width,
            BITS=bits,
            LIMBS=limb_count,
            num_warps=max(4, width // 512),  # 16 logits for a thread
        )
        background = -1  # its keys are NaN already
    source, places, length, segments = partial_selection(rows, count, classes, background)
    groups, capacity = block_sizes(count)
    scratch = torch.empty((batch, capacity + count), dtype=torch.int64, device=device)
    scores = torch.empty((batch, count), dtype=torch.float32, device=device)
    out_labels = torch.empty((batch, count), dtype=torch.int64, device=device)
    corners = torch.empty((batch, count, 4), dtype=torch.float32, device=device)
    out_queries = torch.empty((batch, count), dtype=torch.int64, device=device)
    valid = torch.empty((batch, count), dtype=torch.bool, device=device)
    wrap_triton(_decode_kernel)[(batch,)](
        source,
        places,
        labels,
        boxes,
        sizes,
        scratch,
        scores,
        out_labels,
        corners,
        out_queries,
        valid,
        length,
        queries,
        count,
        classes,
        background,
        threshold,
        PRESELECTED=segments > 1,
        HAS_SIZES=has_sizes,
        SOFTMAX=softmax,
        PER_QUERY=per_query,
        FORMAT=box_format,
        CLIP=clip,
        GROUPS=groups,
        BLOCK=BLOCK,
        CAPACITY=capacity,
        num_warps=WARPS,
    )
    return scores, out_labels, corners, out_queries, valid


@jit
def _query_kernel(
    logits_ptr,  # (B * Q, C)
    keys_ptr,  # (B * Q) or (B * Q, C) float32: what is ranked, NaN for the background
    labels_ptr,  # (B * Q) int32, written where PER_QUERY
    rows,
    classes,
    background,
    SOFTMAX: tl.constexpr,
    PER_QUERY: tl.constexpr,
    QUERIES: tl.constexpr,
    CLASSES: tl.constexpr,
    BITS: tl.constexpr,
    LIMBS: tl.constexpr,
):
    """Make the key of each query, or of each pair: a logit, or a probability."""
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)[:, None]
    channel = tl.arange(0, CLASSES)[None, :]
    inside = (row < rows) & (channel < classes)
    place = row.to(tl.int64) * classes + channel
    logits = tl.load(logits_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
    keys = _softmax_scores(logits, inside, BITS, LIMBS) if SOFTMAX else logits
    is_candidate = inside & (channel != background)
    if PER_QUERY:
        # Among the logits: far below the background, all of a query's probabilities are 0.
        is_candidate = is_candidate & (logits == logits)
        numbers = tl.where(is_candidate, logits, float("-inf"))
        is_best = is_candidate & (numbers == tl.max(numbers, axis=1)[:, None])
        label = tl.min(tl.where(is_best, channel, classes - 1), axis=1)[:, None]
        # One lane of each query writes.
        is_label = inside & (channel == label)
        query = row + tl.zeros_like(channel)
        tl.store(keys_ptr + query, tl.where(is_best, keys, float("nan")), mask=is_label)
        tl.store(labels_ptr + query, channel + tl.zeros_like(row), mask=is_label)
    else:
        tl.store(keys_ptr + place, tl.where(is_candidate, keys, float("nan")), mask=inside)


@jit
def _softmax_scores(logits, inside, BITS: tl.constexpr, LIMBS: tl.constexpr):
    """Score along the rows in the arithmetic of :mod:`detpost.reference.softmax`, to the bit; NaN where a row has one.

    The tables are computed: float64's exponential is right far beyond the places that float32 keeps of it.
    """
    is_nan = inside & (logits != logits)
    numbers = tl.where(inside & (logits == logits), logits, float("-inf"))
    peak = tl.max(numbers, axis=1)[:, None]
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    gap = tl.where(numbers == peak, 0.0, peak - numbers)  # inf - inf would be NaN
    steps = tl.minimum(gap * 4194304.0, 268435456.0).to(tl.int32)
    coarse = tl.exp(-0.0625 * (steps >> 18).to(tl.float64)).to(tl.float32)
    coarse = tl.where(steps == 268435456, 0.0, coarse)
    fine = tl.exp(-0.000244140625 * ((steps >> 10) & 255).to(tl.float64)).to(tl.float32)
    rest = coarse * fine * (1.0 - (steps & 1023).to(tl.float32) * 2.384185791015625e-07)
    weights = rest
    # As many limbs as a sum needs; those that it does not are 0, and change nothing.
    first, rest = _limb(rest, BITS)
    second = tl.zeros_like(first)
    third = tl.zeros_like(first)
    fourth = tl.zeros_like(first)
    if LIMBS > 1:
        second, rest = _limb(rest, BITS)
    if LIMBS > 2:
        third, rest = _limb(rest, BITS)
    if LIMBS > 3:
        fourth, rest = _limb(rest, BITS)
    unit: tl.constexpr = 2.0**-BITS
    total = tl.maximum((first + (second + (third + fourth * unit) * unit) * unit) * unit, 1.0)[:, None]
    has_nan = tl.max(is_nan.to(tl.int32), axis=1)[:, None] > 0
    return tl.where(has_nan, float("nan"), weights * tl.div_rn(tl.full(total.shape, 1.0, tl.float32), total))


@jit
def _limb(rest, BITS: tl.constexpr):
    """Cut the next BITS bits off the weights: the sum of them along the rows, exact in any order, and what is left."""
    scaled = rest * 2.0**BITS
    limb = tl.floor(scaled)
    return tl.sum(limb, axis=1), scaled - limb


@jit
def _decode_kernel(
    source_ptr,  # (B, length): logits or keys of queries, or what a partial selection left
    places_ptr,  # (B, length) int32: index of what a partial selection left
    labels_ptr,  # (B, Q) int32: best class of each query, read where PER_QUERY
    boxes_ptr,  # (B, Q, 4)
    sizes_ptr,  # (B, 2), read where HAS_SIZES
    scratch_ptr,  # (B, CAPACITY + K) int64
    scores_ptr,  # (B, K) float32
    out_labels_ptr,  # (B, K) int64
    corners_ptr,  # (B, K, 4) float32
    out_queries_ptr,  # (B, K) int64
    valid_ptr,  # (B, K) bool
    length,
    queries,
    count,
    classes,
    background,
    threshold,
    PRESELECTED: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PER_QUERY: tl.constexpr,
    FORMAT: tl.constexpr,  # BOX_FORMAT_CODES
    CLIP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    packed = best_of_row(
        source_ptr + image * length,
        scratch_ptr + image * (CAPACITY + count),
        0,
        length,
        count,
        classes,
        background,
        PRESELECTED,
        GROUPS,
        BLOCK,
        CAPACITY,
    )
    slot = tl.arange(0, CAPACITY)
    is_kept = slot < count
    index = tl.where(is_kept, index_of(packed), 0)
    if PRESELECTED:
        index = tl.load(places_ptr + image * length + index, mask=is_kept, other=0).to(tl.int64)
    if PER_QUERY:
        query = index
        label = tl.load(labels_ptr + image * queries + query, mask=is_kept, other=0).to(tl.int64)
    else:
        query = index // classes
        label = index % classes
    value = score_of(packed)
    score = value if SOFTMAX else _sigmoid(value)
    valid = (value == value) & (score > threshold)
    out = image * count + slot
    tl.store(scores_ptr + out, tl.where(valid, score, _SCORE), mask=is_kept)
    tl.store(out_labels_ptr + out, tl.where(valid, label, _LABEL), mask=is_kept)
    tl.store(out_queries_ptr + out, tl.where(valid, query, _QUERY), mask=is_kept)
    tl.store(valid_ptr + out, valid, mask=is_kept)
    x1, y1, x2, y2 = _corners(boxes_ptr + (image * queries + query) * 4, is_kept, FORMAT)
    if HAS_SIZES:
        height = tl.load(sizes_ptr + image * 2).to(tl.float32)
        width = tl.load(sizes_ptr + image * 2 + 1).to(tl.float32)
        x1, y1, x2, y2 = x1 * width, y1 * height, x2 * width, y2 * height
    else:
        height = 1.0
        width = 1.0
    if CLIP:
        x1, y1, x2, y2 = _clipped(x1, width), _clipped(y1, height), _clipped(x2, width), _clipped(y2, height)
    tl.store(corners_ptr + out * 4, tl.where(valid, x1, _BOX), mask=is_kept)
    tl.store(corners_ptr + out * 4 + 1, tl.where(valid, y1, _BOX), mask=is_kept)
    tl.store(corners_ptr + out * 4 + 2, tl.where(valid, x2, _BOX), mask=is_kept)
    tl.store(corners_ptr + out * 4 + 3, tl.where(valid, y2, _BOX), mask=is_kept)


@jit
def _sigmoid(value):
    """Score in float64, rounded to float32 at the end."""
    return (1.0 / (1.0 + tl.exp(-value.to(tl.float64)))).to(tl.float32)


@jit
def _corners(box_ptr, mask, FORMAT: tl.constexpr):
    """Load boxes as xyxy. Halving is exact, so that a fused multiply-add rounds as the two operations do."""
    a = tl.load(box_ptr, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(box_ptr + 1, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(box_ptr + 2, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(box_ptr + 3, mask=mask, other=0.0).to(tl.float32)
    if FORMAT == _CXCYWH:
        x1, y1, x2, y2 = a - 0.5 * c, b - 0.5 * d, a + 0.5 * c, b + 0.5 * d
    elif FORMAT == _XYWH:
        x1, y1, x2, y2 = a, b, a + c, b + d
    else:
        x1, y1, x2, y2 = a, b, c, d
    return x1, y1, x2, y2


@jit
def _clipped(value, limit):
    """Clip to [0, limit]; NaN stays, as torch has it."""
    at_least_0 = tl.where(value < 0, 0.0, value)
    return tl.where(at_least_0 > limit, limit, at_least_0)
