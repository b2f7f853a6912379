"""The decode on a CPU without a compiler: NumPy's ``partition`` behind the group prefilter.

Of any partition of a row into groups, the k-th greatest group maximum bounds the k best elements from below. Few others
reach that bound, so all that is left to order fits into a cache. What holds NaN or too many ties is left to PyTorch's
operators.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
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

# Groups per kept element: the fewer, the cheaper the partition and the looser the bound.
_GROUPS_PER_KEPT = 2
# In rows this many times longer than what is kept, groups of so many neighbours, and only the best are looked into.
_LONG, _NEIGHBOURS = 160, 64
# A looser bound than this (ties, mostly) is not worth sorting.
_MOST_CANDIDATES_PER_KEPT = 16
# Numbers that are weighed at a time, so that all that they become stays in the cache.
_CHUNK = 1 << 16
# From how many numbers on PyTorch's reductions and threads are worth their start.
_MANY = 1 << 17
# How far a softmax in float32 may be off for so many classes, generously.
_MARGIN, _MOST_SUMMED = 1e-2, 1 << 14


def select(scores: Tensor, k: int) -> Tensor:
    """Select as :func:`detpost.select_top_k` does.

    Args:
        scores: (B, N), float32, float16 or bfloat16, on the CPU.
        k: how many to keep, at least 1.

    Returns:
        (B, min(k, N)), int64.
    """
    kept = min(k, scores.shape[1])
    chosen = _best_of_rows(_array(scores), kept) if kept and scores.shape[0] else None
    return aten.STEPS.select(scores, k) if chosen is None else torch.from_numpy(chosen)


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
    best_pairs = _best_of_all if spec.selection == "flat" else _best_of_queries
    best = best_pairs(_array(logits), spec, filled)
    if best is None:
        return None
    chosen, labels, keys = best
    scores = _scores(keys, spec).astype(np.float32, copy=False)
    corners = _decoded_boxes(_array(boxes), chosen, None if image_sizes is None else _array(image_sizes), spec)
    if spec.background == "first":
        labels = labels + 1
    if filled < kept:
        chosen, labels, scores = (_padded(part, kept) for part in (chosen, labels, scores))
        corners = _padded(corners, kept)
    valid = np.ones((batch, kept), bool)
    if spec.score_threshold is not None:
        valid = scores > np.float32(spec.score_threshold)
    if spec.score_threshold is not None or filled < kept:
        valid[:, filled:] = False
        scores, labels = np.where(valid, scores, np.float32(INVALID.score)), np.where(valid, labels, INVALID.label)
        chosen = np.where(valid, chosen, INVALID.query)
        corners = np.where(valid[..., None], corners, np.float32(INVALID.box))
    found = (scores, labels.astype(np.int64, copy=False), corners, chosen, valid)
    return Detections(*map(torch.from_numpy, found))


def _padded(part: Any, kept: int) -> Any:
    """Fill slots (B, filled, ...) up to (B, kept, ...)."""
    return np.concatenate((part, np.zeros((part.shape[0], kept - part.shape[1], *part.shape[2:]), part.dtype)), axis=1)


def _best_of_all(values: Any, spec: DecodeSpec, kept: int) -> tuple[Any, Any, Any] | None:
    """Give queries, labels and keys (B, K) of the best pairs (B, Q, C); labels count without the background."""
    batch, queries, classes = values.shape
    keys = values
    if spec.activation == "softmax":
        keys = _probabilities(values.reshape(-1, classes)).reshape(values.shape)
    keys = _without_background(keys, spec)
    objects = keys.shape[2]
    rows = keys.reshape(batch, queries * objects)
    best = _best_of_rows(rows, kept)
    if best is None:
        return None
    found = best // objects
    return found, best - found * objects, rows.take(best + np.arange(batch)[:, None] * rows.shape[1])


def _best_of_queries(values: Any, spec: DecodeSpec, kept: int) -> tuple[Any, Any, Any] | None:
    """Give the best queries (B, K), each with its best class, and their keys; labels count without the background."""
    batch, queries, classes = values.shape
    labels = _without_background(values, spec).argmax(axis=2)  # the first of equal ones, or a NaN
    rows = np.arange(batch * queries)
    channels = labels.reshape(-1) + (spec.background == "first")
    if spec.activation == "softmax":
        keys = _probabilities(values.reshape(-1, classes), channels, spec.score_threshold)
    else:
        keys = values.reshape(-1).take(rows * classes + channels)
    is_nan = np.isnan(keys)
    if is_nan.any():
        if spec.activation == "sigmoid" or spec.score_threshold is None:
            return None
        keys = np.where(is_nan, np.float32(-np.inf), keys)  # none of the query's classes reaches a threshold
    keys = keys.reshape(batch, queries)
    if queries < 4 * _GROUPS_PER_KEPT * kept:
        best = _in_order(keys, np.arange(queries), kept)
    else:
        best = _best_of_rows(keys, kept)
        if best is None:
            return None
    places = best + rows[::queries, None]
    return best, labels.take(places), keys.take(places)


def _without_background(values: Any, spec: DecodeSpec) -> Any:
    return {"none": values, "first": values[..., 1:], "last": values[..., :-1]}[spec.background]


def _scores(keys: Any, spec: DecodeSpec) -> Any:
    if spec.activation == "softmax":
        return keys
    # Beyond 709 the exponential overflows with a warning; there a score is 0 in float32 all the same.
    opposite = np.minimum(np.negative(keys, dtype=np.float64), 709.0)
    return 1.0 / (1.0 + np.exp(opposite))


def _probabilities(values: Any, of: Any | None = None, threshold: float | None = None) -> Any:
    """Give the softmax of queries, float32, to the bit of :func:`detpost.reference.softmax.scores`.

    Args:
        values: (N, C), float32.
        of: (N,), the channel of each query whose probability alone is wanted.
        threshold: of what is wanted, what surely does not reach it may read 0.

    Returns:
        (N, C) or (N,); NaN where the query has one.
    """
    count, classes = values.shape
    if of is None or threshold is None or threshold <= 0 or classes > _MOST_SUMMED:
        return _weighed(values, of)
    # PyTorch's own softmax, in one pass, tells most of those that stay below; what it makes NaN is looked at again.
    about = torch.from_numpy(values).softmax(dim=1).gather(1, torch.from_numpy(of).unsqueeze(1)).squeeze(1).numpy()
    chosen = (~(about < np.float32(threshold * (1 - _MARGIN)))).nonzero()[0]
    scores = np.zeros(count, np.float32)
    if chosen.shape[0]:
        scores[chosen] = _weighed(values[chosen], of[chosen])
    return scores


def _weighed(values: Any, of: Any | None) -> Any:
    """Give the softmax of queries (N, C), or (N,) of their channels ``of``, a few at a time."""
    count, classes = values.shape
    step = max(1, _CHUNK // classes)
    if count <= step:
        return _weighed_at_once(values, of)
    found = np.empty(values.shape if of is None else count, np.float32)

    def weigh(first: int) -> None:
        here = slice(first, first + step)
        found[here] = _weighed_at_once(values[here], None if of is None else of[here])

    workers = min(torch.get_num_threads(), -(-count // step)) if values.size >= _MANY else 1
    if workers == 1:
        for first in range(0, count, step):
            weigh(first)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(weigh, range(0, count, step)))
    return found


def _weighed_at_once(values: Any, of: Any | None) -> Any:
    peak = values.max(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf; gaps beyond every table
        return _shares_of_sum(np.where(peak == -np.inf, np.float32(0), peak)[:, None] - values, peak, of)


def _shares_of_sum(gap: Any, peak: Any, of: Any | None) -> Any:
    shares = _weights(gap)
    inverse = np.float32(1) / _total(shares)
    if np.isnan(peak).any():
        inverse = np.where(np.isnan(peak), np.float32(np.nan), inverse)
    if of is None:
        return shares * inverse[:, None]
    return shares.take(np.arange(shares.shape[0]) * shares.shape[1] + of) * inverse


def _weights(gap: Any) -> Any:
    """Give exp(-gap), float32, of gaps from 0; NaN is that of a greatest logit from itself."""
    gap = gap * np.float32(softmax.GAP_SCALE)
    if np.isnan(gap.sum()):
        gap = np.where(np.isnan(gap), np.float32(0), gap)
    steps = np.minimum(gap, np.float32(softmax.GREATEST_STEP), out=gap).astype(np.int32)  # towards 0, which is down
    shares = aten.products_on(torch.device("cpu")).numpy().take(steps >> 10)
    rest = (steps & 1023).astype(np.float32)
    rest *= np.float32(-softmax.REST_SCALE * softmax.SLOPE)
    rest += np.float32(1)
    shares *= rest
    return shares


def _total(shares: Any) -> Any:
    """Sum weights (N, C) in limbs to (N,), as :func:`detpost.kernels.aten.decode` does: the last two as one."""
    bits, count = softmax.limbs(shares.shape[1])
    sums, left = [], shares
    for _ in range(count - 2):
        left = left * np.float32(2.0**bits)
        limb = np.floor(left)
        left -= limb
        sums.append(limb.sum(axis=1))  # exact in any order: at most 24 bits
    last = min(count, 2) * bits
    rest = left.astype(np.float64)
    rest *= 2.0**last
    total = (np.floor(rest, out=rest).sum(axis=1) * 2.0 ** (bits - last)).astype(np.float32)
    for coarser in reversed(sums):
        total = coarser + total * np.float32(2.0**-bits)
    return np.maximum(total * np.float32(2.0**-bits), np.float32(1))


def _array(values: Tensor) -> Any:
    if values.dtype in (torch.int64, torch.int32):  # of image sizes: a call of PyTorch costs more than all of them
        return values.detach().numpy().astype(np.float32)
    return (values if values.dtype == torch.float32 else values.to(torch.float32)).detach().numpy()


def _best_of_rows(rows: Any, kept: int) -> Any | None:
    """Give the indices (B, K) of the best of each row (B, N), or ``None`` for NaN, or too many ties."""
    batch, width = rows.shape
    short = _GROUPS_PER_KEPT * kept
    if width < 4 * short:
        return None if np.isnan(rows).any() else _in_order(rows, np.arange(width), kept)
    if width >= _LONG * kept:
        return _best_of_long_rows(rows, kept)
    # Groups of elements far apart: their maxima are maxima of whole slices, which vector instructions take.
    whole = width // short * short
    layers = rows[:, :whole].reshape(batch, -1, short)
    maxima = torch.from_numpy(layers).amax(dim=1).numpy() if rows.size >= _MANY else np.maximum.reduce(layers, axis=1)
    if np.isnan(maxima.max()) or (whole < width and np.isnan(rows[:, whole:]).any()):
        return None
    bounds = np.partition(maxima, short - kept, axis=1)[:, short - kept]
    found = (rows >= bounds[:, None]).reshape(-1).nonzero()[0]
    starts = found.searchsorted(np.arange(batch + 1) * width).tolist()
    return _best_of_candidates(rows, [found[first:last] for first, last in itertools.pairwise(starts)], kept)


def _best_of_long_rows(rows: Any, kept: int) -> Any | None:
    """Do so where a row is so long that only the best groups are looked into."""
    batch, width = rows.shape
    groups = width // _NEIGHBOURS
    whole = groups * _NEIGHBOURS
    # Of neighbours, which PyTorch reads in one go: it takes three times as long for as many elements far apart.
    grouped = rows[:, :whole].reshape(batch, groups, _NEIGHBOURS)
    maxima = torch.from_numpy(grouped).amax(dim=2).numpy()
    if np.isnan(maxima.max()) or (whole < width and np.isnan(rows[:, whole:]).any()):
        return None
    bounds = np.partition(maxima, groups - kept, axis=1)[:, groups - kept]

    found = []
    for first, (elements, most, bound) in enumerate(zip(grouped, maxima, bounds, strict=True)):
        best = (most >= bound).nonzero()[0]
        place = (elements.take(best, axis=0) >= bound).reshape(-1).nonzero()[0]
        inside = best.take(place // _NEIGHBOURS) * _NEIGHBOURS + place % _NEIGHBOURS
        after = (rows[first, whole:] >= bound).nonzero()[0] + whole
        found.append(np.concatenate((inside, after)) + first * width)
    return _best_of_candidates(rows, found, kept)


def _best_of_candidates(rows: Any, candidates: list[Any], kept: int) -> Any | None:
    """Order candidates of each row, given by their places in the whole of (B, N); ``None`` for too many of one."""
    batch, width = rows.shape
    counts = np.array([places.shape[0] for places in candidates])
    if counts.max() > _MOST_CANDIDATES_PER_KEPT * kept:
        return None
    if batch == 1:
        return _in_order(rows[0].take(candidates[0]), candidates[0], kept)[None]
    places = np.concatenate(candidates)
    keys = _sort_keys(rows.reshape(-1).take(places), places - np.repeat(np.arange(batch) * width, counts))
    # Side by side, what is missing last: one call for all rows costs as much as two of them.
    beside = np.full((batch, int(counts.max())), np.iinfo(np.int64).max)
    beside[np.arange(beside.shape[1]) < counts[:, None]] = keys
    beside.sort(axis=1)
    return beside[:, :kept] & 0xFFFFFFFF


def _in_order(values: Any, indices: Any, kept: int) -> Any:
    """Order rows of numbers (..., N) downwards and then by index (N,)."""
    keys = _sort_keys(values, indices)
    keys.sort(axis=-1)
    return keys[..., :kept] & 0xFFFFFFFF


def _sort_keys(values: Any, indices: Any) -> Any:
    """Make unique integers of numbers and their indices, which NumPy sorts fastest, without a branch."""
    bits = (values + np.float32(0)).view(np.int32)  # -0.0 and 0.0 are one number
    ascending = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    keys = (~ascending).astype(np.int64) << 32
    keys |= indices
    return keys


@np.errstate(all="ignore")  # infinite boxes make NaN, as elsewhere
def _decoded_boxes(boxes: Any, chosen: Any, sizes: Any | None, spec: DecodeSpec) -> Any:
    """Give the corners (B, K, 4) of the chosen boxes."""
    batch, queries = boxes.shape[:2]
    kept = chosen.shape[1]
    places = (chosen + np.arange(batch)[:, None] * queries).reshape(-1)
    # Side by side, since rows of four are too short for a processor.
    taken = boxes.reshape(-1, 4).take(places, axis=0).T.copy()
    first, second = taken[:2], taken[2:]
    if spec.box_format == "cxcywh":
        half = second * np.float32(0.5)
        np.add(first, half, out=second)
        np.subtract(first, half, out=first)
    elif spec.box_format == "xywh":
        np.add(first, second, out=second)
    limits: Any = np.float32(1)
    if sizes is not None:
        limits = np.repeat(sizes[:, ::-1].T, kept, axis=1)  # (2, B * K)
    for corner in (first, second):
        if sizes is not None:
            np.multiply(corner, limits, out=corner)
        if spec.clip:
            np.copyto(corner, 0, where=corner < 0)  # as torch: a zero keeps its sign
            np.minimum(corner, limits, out=corner)
    return np.ascontiguousarray(taken.T).reshape(batch, kept, 4)
