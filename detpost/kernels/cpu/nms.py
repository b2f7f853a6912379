"""Greedy suppression and merging by ``nms.cpp``, as PyTorch operators and as plain calls."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from ctypes import c_char_p
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.kernels.cpu import library
from detpost.reference.derivatives import wants_derivative

__all__ = ["keep", "keep_as_operator", "merge", "merge_as_operator", "suppress", "takes"]

# Addresses and whole numbers in the order of nms.cpp's Call, and two thresholds; in that of its Rows.
_RECORD = struct.Struct("=12q2d")
_ROWS = struct.Struct("=13q")
_FLOAT_TYPES = {torch.float32: 1, torch.float64: 2}


@functools.cache
def _run() -> Callable[[bytes, bytes | None], None]:
    run: Callable[[bytes, bytes | None], None] = library.function("detpost_nms", c_char_p, c_char_p)
    return run


def keep(
    boxes: Tensor, scores: Tensor | None, labels: Tensor | None, valid: Tensor | None, threshold: float, smaller: bool
) -> Tensor:
    """Say which boxes stay; as :func:`detpost.nms.nms`.

    Args:
        boxes: (B, N, 4), floating, xyxy, on the CPU.
        scores: (B, N), floating, or ``None``: the boxes come best first.
        labels: (B, N), integer, or ``None``: one class.
        valid: (B, N), bool, or ``None``: all are.
        threshold: in [0, 1].
        smaller: whether an overlap is a part of the smaller box, and not of the union.

    Returns:
        (B, N), bool.
    """
    boxes, scores, labels, valid = _ready(boxes, scores, labels, valid)
    kept = torch.zeros(boxes.shape[:2], dtype=torch.bool, device="cpu")
    if kept.numel():
        _run()(_record(boxes, scores, labels, valid, smaller, kept, None, threshold, 0.0), None)
    return kept


def keep_as_operator(
    boxes: Tensor, scores: Tensor | None, labels: Tensor | None, valid: Tensor | None, threshold: float, smaller: bool
) -> Tensor:
    """Say the same through the registered operator, which compilers and tracers see."""
    kept: Tensor = torch.ops.detpost.native_nms(boxes, scores, labels, valid, threshold, smaller)
    return kept


def merge(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, valid: Tensor | None, threshold: float, smaller: bool
) -> tuple[Tensor, Tensor]:
    """Let the best boxes swallow those that they overlap; as :func:`detpost.reference.fusion.merge`.

    Args:
        boxes: (B, N, 4), floating, xyxy, on the CPU.
        scores: (B, N), floating.
        labels: (B, N), integer, or ``None``: one class.
        valid: (B, N), bool, or ``None``: all are.
        threshold: above 0, at most 1; an overlap of as much counts.
        smaller: whether an overlap is a part of the smaller box, and not of the union.

    Returns:
        Which boxes stay (B, N), bool. Boxes (B, N, 4), those that stay grown; float32, or float64 if they are.
    """
    boxes, ready_scores, labels, valid = _ready(boxes, scores, labels, valid)
    kept = torch.zeros(boxes.shape[:2], dtype=torch.bool, device="cpu")
    grown = boxes.clone()
    if kept.numel():
        # At least a number is above the one below it, of the same type.
        number: Any = np.float64 if boxes.dtype == torch.float64 else np.float32
        below = float(np.nextafter(number(threshold), number(-1)))
        _run()(_record(boxes, ready_scores, labels, valid, smaller, kept, grown, below, threshold), None)
    return kept, grown


def merge_as_operator(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, valid: Tensor | None, threshold: float, smaller: bool
) -> tuple[Tensor, Tensor]:
    """Do the same through the registered operator, which compilers and tracers see."""
    found: tuple[Tensor, Tensor] = torch.ops.detpost.native_merge(boxes, scores, labels, valid, threshold, smaller)
    return found


def takes(detections: Detections, *others: Any) -> bool:
    """Tell whether :func:`suppress` takes detections: plain tensors of the usual dtypes that want no gradient."""
    scores, labels, boxes, queries, valid = detections
    return (
        all(type(values) is Tensor for values in detections)
        and scores.dtype == boxes.dtype == torch.float32
        and labels.dtype == queries.dtype == torch.int64
        and valid.dtype == torch.bool
        and not wants_derivative(scores, boxes)
    )


def suppress(detections: Detections, threshold: float, by_class: bool, compact: bool) -> Detections:
    """Suppress as :class:`detpost.nms.NonMaximumSuppression` does, in one pass.

    Args:
        detections: that :func:`takes` takes, on the CPU.
        threshold: in [0, 1].
        by_class: whether detections of different labels leave each other alone.
        compact: whether what is kept moves to the front.

    Returns:
        The detections.
    """
    scores, labels, boxes, queries, valid = (values.contiguous() for values in detections)
    like = torch.empty_like
    found = like(scores), like(labels), like(boxes), like(queries), like(valid)
    if valid.numel():
        kept = torch.zeros_like(valid)
        rows = _ROWS.pack(
            *(*valid.shape, compact, kept.data_ptr()),
            *(values.data_ptr() for values in (scores, labels, boxes, queries, *found)),
        )
        _run()(_record(boxes, None, labels if by_class else None, valid, False, kept, None, threshold, 0.0), rows)
    return Detections(*found)


def _ready(
    boxes: Tensor, scores: Tensor | None, labels: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Bring tensors into what the library reads."""
    if boxes.dtype not in _FLOAT_TYPES or not boxes.is_contiguous():
        boxes = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32)).contiguous()
    if scores is not None and (scores.dtype not in _FLOAT_TYPES or not scores.is_contiguous()):
        scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).contiguous()
    if labels is not None and (labels.dtype != torch.int64 or not labels.is_contiguous()):
        labels = labels.to(torch.int64).contiguous()
    if valid is not None and not valid.is_contiguous():
        valid = valid.contiguous()
    return boxes, scores, labels, valid


def _record(
    boxes: Tensor,
    scores: Tensor | None,
    labels: Tensor | None,
    valid: Tensor | None,
    smaller: bool,
    kept: Tensor,
    grown: Tensor | None,
    threshold: float,
    grown_threshold: float,
) -> bytes:
    return _RECORD.pack(
        *(boxes.shape[0], boxes.shape[1], torch.get_num_threads()),
        *((0, 0) if scores is None else (scores.data_ptr(), _FLOAT_TYPES[scores.dtype])),
        *(0 if values is None else values.data_ptr() for values in (labels, valid)),
        *(boxes.data_ptr(), _FLOAT_TYPES[boxes.dtype], smaller, kept.data_ptr()),
        *(0 if grown is None else grown.data_ptr(), threshold, grown_threshold),
    )


def _keep_fake(
    boxes: Tensor, scores: Tensor | None, labels: Tensor | None, valid: Tensor | None, threshold: float, smaller: bool
) -> Tensor:
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


def _merge_fake(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, valid: Tensor | None, threshold: float, smaller: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(boxes.dtype, torch.float32)
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool), boxes.new_empty(boxes.shape, dtype=wide)


library.register(
    "native_nms(Tensor boxes, Tensor? scores, Tensor? labels, Tensor? valid, float threshold, bool smaller) -> Tensor",
    keep,
    _keep_fake,
)
library.register(
    "native_merge(Tensor boxes, Tensor scores, Tensor? labels, Tensor? valid, float threshold, bool smaller) "
    "-> (Tensor, Tensor)",
    merge,
    _merge_fake,
)
