"""Weighted box fusion by ``fusion.cpp``, as a PyTorch operator and as a plain call."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from ctypes import c_char_p

import torch
from torch import Tensor

from detpost.kernels.cpu import library

__all__ = ["fuse", "fuse_as_operator"]

# Addresses and whole numbers in the order of fusion.cpp's Call, and the threshold.
_RECORD = struct.Struct("=11qd")
_DOUBLE = 2


@functools.cache
def _run() -> Callable[[bytes], None]:
    run: Callable[[bytes], None] = library.function("detpost_fuse", c_char_p)
    return run


def fuse(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, valid: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Fuse clusters of boxes that overlap; as :func:`detpost.reference.fusion.fuse`.

    Args:
        boxes: (B, N, 4), float64, xyxy, on the CPU.
        scores: (B, N), float64: what the boxes are ordered and weighed by.
        labels: (B, N), integer, or ``None``: one class.
        valid: (B, N), bool, or ``None``: all are.
        threshold: a box joins a cluster whose IoU with it is greater.

    Returns:
        Owners (B, N), int64; fused boxes (B, N, 4) and mean scores (B, N), float64.
    """
    boxes, scores = boxes.detach().contiguous(), scores.detach().contiguous()
    labels = None if labels is None else labels.to(torch.int64).contiguous()
    valid = None if valid is None else valid.contiguous()
    batch, count = scores.shape
    owners = torch.full((batch, count), -1, dtype=torch.int64, device="cpu")
    fused, means = boxes.clone(), scores.clone()
    if owners.numel():
        record = _RECORD.pack(
            *(batch, count, torch.get_num_threads(), scores.data_ptr(), _DOUBLE),
            *(0 if values is None else values.data_ptr() for values in (labels, valid)),
            *(boxes.data_ptr(), owners.data_ptr(), fused.data_ptr(), means.data_ptr(), threshold),
        )
        _run()(record)
    return owners, fused, means


def fuse_as_operator(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, valid: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same through the registered operator, which compilers and tracers see."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.detpost.native_fuse(boxes, scores, labels, valid, threshold)
    return found


def _fuse_fake(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, valid: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    owners = scores.new_empty(scores.shape, dtype=torch.int64)
    return owners, boxes.new_empty(boxes.shape), scores.new_empty(scores.shape)


library.register(
    "native_fuse(Tensor boxes, Tensor scores, Tensor? labels, Tensor? valid, float threshold) "
    "-> (Tensor, Tensor, Tensor)",
    fuse,
    _fuse_fake,
)
