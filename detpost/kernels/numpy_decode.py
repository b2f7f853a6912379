"""The decode on a CPU without a compiler: NumPy's ``partition`` behind the group prefilter.

Of any partition of a row into groups, the k-th greatest group maximum bounds the k best elements from below. Few others
reach that bound, so all that is left to order fits into a cache. Rows that hold NaN or too many ties are left to the
plain form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.spec import DecodeSpec

__all__ = ["decode", "select", "takes_scores", "takes_spec"]

# Groups per kept element: the fewer, the cheaper the partition and the looser the bound.
_GROUPS_PER_KEPT = 2
# A looser bound than this (ties, mostly) is not worth sorting.
_MOST_CANDIDATES_PER_KEPT = 16


def takes_scores(dtype: torch.dtype) -> bool:
    """Whether :func:`select` and :func:`decode` take scores of this dtype. bfloat16 is widened first."""
    return dtype in (torch.float32, torch.float16, torch.bfloat16)


def takes_spec(spec: DecodeSpec) -> bool:
    """Whether :func:`decode` knows this kind of decode."""
    return spec.activation == "sigmoid" and spec.selection == "flat" and spec.background == "none"


def select(scores: Tensor, k: int) -> Tensor | None:
    """Select as :func:`detpost.select_top_k` does.

    Args:
        scores: (B, N), float32, float16 or bfloat16, on the CPU.
        k: how many to keep, at least 1.

    Returns:
        (B, min(k, N)), int64, or ``None`` where a row has NaN or too many ties.
    """
    kept = min(k, scores.shape[1])
    if 0 in (len(scores), kept):
        return None
    rows = scores.detach().to(torch.float32).numpy()
    chosen = [_best_of_row(row, kept) for row in rows]
    if any(indices is None for indices in chosen):
        return None
    return torch.from_numpy(np.stack(chosen))  # type: ignore[arg-type]


def decode(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Detections | None:
    """Decode as :class:`detpost.DetectionPostProcessor` does, without a gradient.

    Args:
        logits: (B, Q, C), float32, float16 or bfloat16, on the CPU.
        boxes: (B, Q, 4), floating but not float64, on the CPU.
        image_sizes: (B, 2), (height, width) in pixels, or ``None``.
        spec: one that :func:`takes_spec` takes.

    Returns:
        The detections, or ``None`` where :func:`select` gives none.
    """
    batch, queries, classes = logits.shape
    kept = min(spec.top_k, queries * classes)
    if 0 in (batch, kept):
        return None
    rows = logits.detach().to(torch.float32).numpy().reshape(batch, queries * classes)
    corners_of = boxes.detach().to(torch.float32).numpy()
    sizes = None if image_sizes is None else image_sizes.detach().to(torch.float32).numpy()
    scores = np.empty((batch, kept), np.float32)
    labels = np.empty((batch, kept), np.int64)
    corners = np.empty((batch, kept, 4), np.float32)
    chosen = np.empty((batch, kept), np.int64)
    for image in range(batch):
        best = _best_of_row(rows[image], kept)
        if best is None:
            return None
        with np.errstate(over="ignore"):  # exp(inf) is meant
            scores[image] = 1.0 / (1.0 + np.exp(-rows[image][best].astype(np.float64)))
        np.floor_divide(best, classes, out=chosen[image])
        np.subtract(best, chosen[image] * classes, out=labels[image])
        _decode_boxes(corners_of[image], chosen[image], None if sizes is None else sizes[image], spec, corners[image])
    valid = np.ones((batch, kept), bool)
    if spec.score_threshold is not None:
        valid = scores > np.float32(spec.score_threshold)
        scores, labels, chosen = np.where(valid, scores, 0), np.where(valid, labels, -1), np.where(valid, chosen, -1)
        corners = np.where(valid[..., None], corners, np.float32(0))
    found = (torch.from_numpy(part) for part in (scores.astype(np.float32, copy=False), labels, corners, chosen, valid))
    return Detections(*found)


def _best_of_row(row: Any, kept: int) -> Any | None:
    """Give the indices of the best, or ``None`` where the bound does not hold: NaN, or too many ties."""
    width = row.shape[0]
    groups = _GROUPS_PER_KEPT * kept
    if width >= 4 * groups:
        # Groups of elements far apart: their maxima are maxima of whole slices, which a processor takes in its stride.
        whole = width // groups * groups
        maxima = row[:whole].reshape(-1, groups).max(axis=0)
        bound = np.partition(maxima, groups - kept)[groups - kept]
        if np.isnan(maxima).any():
            return None
        candidates = np.flatnonzero(row >= bound)
        if len(candidates) > _MOST_CANDIDATES_PER_KEPT * kept:
            return None
        values = row[candidates]
        order = np.argsort(-values, kind="stable")[:kept]
        return candidates[order] if not np.isnan(row[whole:]).any() else None
    order = np.argsort(-row, kind="stable")[:kept]  # -0.0 and 0.0 compare equal
    return order if not np.isnan(row).any() else None


def _decode_boxes(boxes: Any, chosen: Any, size: Any | None, spec: DecodeSpec, out: Any) -> None:
    taken = boxes[chosen]
    first, second = taken[:, :2], taken[:, 2:]
    if spec.box_format == "cxcywh":
        half = second * np.float32(0.5)
        np.subtract(first, half, out=out[:, :2])
        np.add(first, half, out=out[:, 2:])
    else:
        out[:, :2] = first
        out[:, 2:] = second if spec.box_format == "xyxy" else first + second
    if size is not None:
        limits = size[[1, 0, 1, 0]]
        np.multiply(out, limits, out=out)
    if spec.clip:
        np.maximum(out, np.float32(0), out=out)
        np.minimum(out, np.float32(1) if size is None else limits, out=out)
