"""Greedy suppression and merging by ``nms.cpp``, as PyTorch operators and as plain calls."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.kernels.cpu import native
from detpost.reference.derivatives import wants_derivative

__all__ = ["keep", "keep_as_operator", "suppress", "takes_detections"]

# Addresses and whole numbers in the order of nms.cpp's Call, and two thresholds.
_RECORD = struct.Struct("=21q2d")
_FLOAT_TYPES = {torch.float32: 1, torch.float64: 2}
_NO_DETECTIONS = (0,) * 9


@functools.cache
def _run() -> Callable[[bytes], None]:
    run: Callable[[bytes], None] = native.function("detpost_nms")
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
    batch, count, _ = boxes.shape
    kept = torch.empty((batch, count), dtype=torch.bool, device="cpu")
    if batch and count:
        _run()(
            _RECORD.pack(
                *_inputs(boxes, scores, labels, valid, smaller),
                *(0, kept.data_ptr(), *_NO_DETECTIONS),
                *(threshold, 0.0),
            )
        )
    return kept


def keep_as_operator(
    boxes: Tensor, scores: Tensor | None, labels: Tensor | None, valid: Tensor | None, threshold: float, smaller: bool
) -> Tensor:
    """Say the same through the registered operator, which compilers and tracers see."""
    kept: Tensor = torch.ops.detpost.native_nms(boxes, scores, labels, valid, threshold, smaller)
    return kept


def takes_detections(detections: Detections) -> bool:
    """Whether :func:`suppress` takes detections: of the usual dtypes, with nothing that wants a gradient."""
    scores, labels, boxes, queries, valid = detections
    return (
        scores.dtype == boxes.dtype == torch.float32
        and labels.dtype == queries.dtype == torch.int64
        and valid.dtype == torch.bool
        and not wants_derivative(scores, boxes)
    )


def suppress(detections: Detections, threshold: float, by_class: bool, compact: bool) -> Detections:
    """Suppress as :class:`detpost.nms.NonMaximumSuppression` does, in one pass.

    Args:
        detections: that :func:`takes_detections` takes, on the CPU.
        threshold: in [0, 1].
        by_class: whether detections of different labels leave each other alone.
        compact: whether what is kept moves to the front.

    Returns:
        The detections.
    """
    scores, labels, boxes, queries, valid = (
        values if values.is_contiguous() else values.contiguous() for values in detections
    )
    like = torch.empty_like
    found = like(scores), like(labels), like(boxes), like(queries), like(valid)
    kept = found[4] if not compact else like(valid)
    if valid.numel():
        _run()(
            _RECORD.pack(
                *_inputs(boxes, None, labels if by_class else None, valid, False),
                *(0, kept.data_ptr(), scores.data_ptr(), labels.data_ptr(), queries.data_ptr(), compact),
                *(values.data_ptr() for values in found),
                *(threshold, 0.0),
            )
        )
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


def _inputs(
    boxes: Tensor, scores: Tensor | None, labels: Tensor | None, valid: Tensor | None, smaller: bool
) -> tuple[int, ...]:
    return (
        *(boxes.shape[0], boxes.shape[1], torch.get_num_threads(), boxes.data_ptr(), _FLOAT_TYPES[boxes.dtype]),
        *((0, 0) if scores is None else (scores.data_ptr(), _FLOAT_TYPES[scores.dtype])),
        *(0 if values is None else values.data_ptr() for values in (labels, valid)),
        smaller,
    )


def _keep_fake(
    boxes: Tensor, scores: Tensor | None, labels: Tensor | None, valid: Tensor | None, threshold: float, smaller: bool
) -> Tensor:
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


_OPERATORS: Any = torch.library.Library("detpost", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPERATORS.define(
    "native_nms(Tensor boxes, Tensor? scores, Tensor? labels, Tensor? valid, float threshold, bool smaller) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OPERATORS.impl("native_nms", keep, "CPU")
torch.library.register_fake("detpost::native_nms", _keep_fake, lib=_OPERATORS)
