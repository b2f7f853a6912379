"""The decode on a CPU without a compiler: NumPy's ``partition`` behind the group prefilter.

Of any partition of a row into groups, the k-th greatest group maximum bounds the k best elements from below. Few others
reach that bound, so all that is left to order fits into a cache. What holds NaN or too many ties is left to PyTorch's
operators.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from detpost.detections import INVALID, Detections
from detpost.kernels.aten import decode as aten
from detpost.reference import decode as reference
from detpost.reference import softmax
from detpost.spec import DecodeSpec

__all__ = ["decode", "select"]

_COARSE, _FINE = np.array(softmax.COARSE, np.float32), np.array(softmax.FINE, np.float32)
# Groups per kept element: the fewer, the cheaper the partition and the looser the bound.
_GROUPS_PER_KEPT = 2
# A looser bound than this (ties, mostly) is not worth sorting.
_MOST_CANDIDATES_PER_KEPT = 16


def select(scores: Tensor, k: int) -> Tensor:
    """Select as :func:`detpost.select_top_k` does.

    Args:
        scores: (B, N), float32, float16 or bfloat16, on the CPU.
        k: how many to keep, at least 1.

    Returns:
        (B, min(k, N)), int64.
    """
    kept = min(k, scores.shape[1])
    chosen = [_best_of_row(row, kept) for row in _array(scores)] if kept else []
    if not chosen or any(indices is None for indices in chosen):
        return aten.STEPS.select(scores, k)
    return torch.from_numpy(np.stack(chosen))  # type: ignore[arg-type]


def decode(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Detections:
    """Decode as :class:`detpost.DetectionPostProcessor` does, without a gradient.

    Args:
        logits: (B, Q, C), float32, float16 or bfloat16, on the CPU.
        boxes: (B, Q, 4), floating but not float64, on the CPU.
        image_sizes: (B, 2), (height, width) in pixels, or ``None``.
        spec: what the decode does.

    Returns:
        The detections.
    """
    found = _decode(logits, boxes, image_sizes, spec)
    return reference.decode(logits, boxes, image_sizes, spec, aten.STEPS) if found is None else found


def _decode(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Detections | None:
    """Decode, or give ``None`` where there is nothing to decode, NaN, or too many ties."""
    batch, queries, classes = logits.shape
    objects = classes - (spec.background != "none")
    per_query = 1 if spec.selection == "per_query" else classes
    kept = min(spec.top_k, queries * per_query)
    filled = min(kept, queries * min(per_query, objects))
    if 0 in (batch, filled):
        return None
    values = _array(logits)
    corners_of = _array(boxes)
    sizes = None if image_sizes is None else _array(image_sizes)
    scores = np.empty((batch, kept), np.float32)
    labels = np.empty((batch, kept), np.int64)
    corners = np.empty((batch, kept, 4), np.float32)
    chosen = np.empty((batch, kept), np.int64)
    best_pairs = _best_of_all if spec.selection == "flat" else _best_of_queries
    for image in range(batch):
        best = best_pairs(values[image], spec, filled)
        if best is None:
            return None
        chosen[image, :filled], labels[image, :filled], scores[image, :filled] = best
        size = None if sizes is None else sizes[image]
        corners[image, :filled] = _decoded_boxes(corners_of[image], chosen[image, :filled], size, spec).T
    if spec.background == "first":
        labels += 1
    valid = np.ones((batch, kept), bool)
    if spec.score_threshold is not None:
        valid = scores > np.float32(spec.score_threshold)
    if spec.score_threshold is not None or filled < kept:
        valid[:, filled:] = False
        scores, labels = np.where(valid, scores, INVALID.score), np.where(valid, labels, INVALID.label)
        chosen = np.where(valid, chosen, INVALID.query)
        corners = np.where(valid[..., None], corners, np.float32(INVALID.box))
    found = (torch.from_numpy(part) for part in (scores.astype(np.float32, copy=False), labels, corners, chosen, valid))
    return Detections(*found)


def _best_of_all(values: Any, spec: DecodeSpec, kept: int) -> tuple[Any, Any, Any] | None:
    """Give queries, labels and scores of the best pairs of one image (Q, C); labels count without the background."""
    keys = values if spec.activation == "sigmoid" else _probabilities(values)
    if keys is None:
        return None
    keys = _without_background(keys, spec)
    row = keys.reshape(-1)
    best = _best_of_row(row, kept)
    if best is None:
        return None
    queries = best // keys.shape[1]
    return queries, best - queries * keys.shape[1], _scores(row[best], spec)


def _best_of_queries(values: Any, spec: DecodeSpec, kept: int) -> tuple[Any, Any, Any] | None:
    """Give the best queries of one image (Q, C), each with its best class; labels count without the background."""
    objects = _without_background(values, spec)
    labels = objects.argmax(axis=1)  # the first of equal ones, or a NaN
    keys = objects[np.arange(labels.shape[0]), labels]
    if spec.activation == "softmax":
        keys = _probabilities(values, keys)
        if keys is None:
            return None
    best = _best_of_row(keys, kept)
    return None if best is None else (best, labels[best], _scores(keys[best], spec))


def _without_background(values: Any, spec: DecodeSpec) -> Any:
    return {"none": values, "first": values[:, 1:], "last": values[:, :-1]}[spec.background]


def _scores(keys: Any, spec: DecodeSpec) -> Any:
    if spec.activation == "softmax":
        return keys
    # Beyond 709 the exponential overflows with a warning; there a score is 0 in float32 all the same.
    opposite = np.minimum(np.negative(keys, dtype=np.float64), 709.0)
    return 1.0 / (1.0 + np.exp(opposite))


def _probabilities(values: Any, of: Any | None = None) -> Any | None:
    """Give the softmax of one image (Q, C), float32, to the bit of :func:`detpost.reference.softmax.scores`.

    Args:
        values: (Q, C), float32.
        of: (Q,), a logit of each query, whose probability alone is wanted.

    Returns:
        (Q, C) or (Q,), or ``None`` where there is NaN.
    """
    peak = values.max(axis=1)
    if np.isnan(peak).any():
        return None
    peak = np.where(peak == -np.inf, np.float32(0), peak)
    shares = _weights(values, peak[:, None])
    bits, count = softmax.limbs(values.shape[1])
    sums, rest = [], shares
    for _ in range(count):  # exact in any order: at most 24 bits
        rest = rest * np.float32(2.0**bits)
        limb = np.floor(rest)
        rest -= limb
        sums.append(limb.sum(axis=1))
    total = sums.pop()
    for coarser in reversed(sums):
        total = coarser + total * np.float32(2.0**-bits)
    inverse = np.float32(1) / np.maximum(total * np.float32(2.0**-bits), np.float32(1))
    return shares * inverse[:, None] if of is None else _weights(of, peak) * inverse


def _weights(values: Any, peak: Any) -> Any:
    """Give exp(value - peak), float32, from the integer that the gap is in steps of 2**-22."""
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf; gaps beyond every table
        gap = peak - values
        gap *= np.float32(softmax.GAP_SCALE)
    if np.isinf(peak).any():
        gap = np.where(np.isnan(gap), np.float32(0), gap)
    steps = np.minimum(gap, np.float32(softmax.GREATEST_STEP), out=gap).astype(np.int32)  # towards 0, which is down
    shares = _COARSE[steps >> 18] * _FINE[(steps >> 10) & 255]
    shares *= np.float32(1) - (steps & 1023).astype(np.float32) * np.float32(softmax.REST_SCALE * softmax.SLOPE)
    return shares


def _array(values: Tensor) -> Any:
    return (values if values.dtype == torch.float32 else values.to(torch.float32)).detach().numpy()


def _best_of_row(row: Any, kept: int) -> Any | None:
    """Give the indices of the best, or ``None`` where the bound does not hold: NaN, or too many ties."""
    width = row.shape[0]
    groups = _GROUPS_PER_KEPT * kept
    if width < 4 * groups:
        return None if np.isnan(row).any() else _in_order(row, np.arange(width), kept)
    # Groups of elements far apart: their maxima are maxima of whole slices, which vector instructions take.
    whole = width // groups * groups
    maxima = np.maximum.reduce(row[:whole].reshape(-1, groups), axis=0)
    maxima.partition((groups - kept, groups - 1))
    bound, last = maxima[groups - kept], maxima[groups - 1]
    if last != last or (whole < width and np.isnan(row[whole:]).any()):  # NaN is sorted to the end
        return None
    candidates = (row >= bound).nonzero()[0]
    if candidates.shape[0] > _MOST_CANDIDATES_PER_KEPT * kept:
        return None
    return _in_order(row[candidates], candidates, kept)


def _in_order(values: Any, indices: Any, kept: int) -> Any:
    """Order numbers downwards and then by index, as unique integers: NumPy sorts these fastest, without a branch."""
    bits = (values + np.float32(0)).view(np.int32)  # -0.0 and 0.0 are one number
    ascending = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    keys = (~ascending).astype(np.int64) << 32
    keys |= indices
    keys.sort()
    return keys[:kept] & 0xFFFFFFFF


def _decoded_boxes(boxes: Any, chosen: Any, size: Any | None, spec: DecodeSpec) -> Any:
    """Give the corners (4, K) of the chosen boxes: side by side, since rows of four are too short for a processor."""
    taken = boxes[chosen].T.copy()
    first, second = taken[:2], taken[2:]
    if spec.box_format == "cxcywh":
        half = second * np.float32(0.5)
        np.add(first, half, out=second)
        np.subtract(first, half, out=first)
    elif spec.box_format == "xywh":
        np.add(first, second, out=second)
    limits: Any = np.float32(1) if size is None else size[::-1, None]
    for corner in (first, second):
        if size is not None:
            np.multiply(corner, limits, out=corner)
        if spec.clip:
            np.minimum(np.maximum(corner, np.float32(0), out=corner), limits, out=corner)
    return taken
