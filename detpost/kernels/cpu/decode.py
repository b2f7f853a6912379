"""The decode by ``decode.cpp``, as a PyTorch operator and as a plain call."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from ctypes import c_char_p

import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.kernels.cpu import library
from detpost.kernels.cpu.selection import DTYPES
from detpost.spec import BOX_FORMAT_CODES, DecodeSpec

__all__ = ["decode", "decode_as_operator"]

_SIZE_TYPES = {torch.float32: 1, torch.int32: 2, torch.int64: 3}
# Addresses and whole numbers in the order of DecodeCall, and the threshold.
_RECORD = struct.Struct("=21qd")


@functools.cache
def _run() -> Callable[[bytes], None]:
    run: Callable[[bytes], None] = library.function("detpost_decode", c_char_p)
    return run


def decode(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Detections:
    """Decode as :class:`detpost.DetectionPostProcessor` does, in one pass and without a gradient.

    Args:
        logits: (B, Q, C), float32, float16 or bfloat16, on the CPU; Q * C below 2**31, C up to 2**23.
        boxes: (B, Q, 4), floating but not float64, on the CPU.
        image_sizes: (B, 2), (height, width) in pixels, or ``None``.
        spec: what the decode does.

    Returns:
        The detections.
    """
    return Detections(*_decode(logits, boxes, image_sizes, *_spec_arguments(spec, logits.shape[2])))


def decode_as_operator(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Detections:
    """Decode through the registered operator, which compilers and tracers see; as :func:`decode` otherwise."""
    arguments = _spec_arguments(spec, logits.shape[2])
    return Detections(*torch.ops.detpost.native_decode(logits, boxes, image_sizes, *arguments))


def _spec_arguments(spec: DecodeSpec, classes: int) -> tuple[int, bool, bool, int, int, bool, float | None]:
    softmax, per_query = spec.activation == "softmax", spec.selection == "per_query"
    background, box_format = spec.background_channel(classes), BOX_FORMAT_CODES[spec.box_format]
    return spec.top_k, softmax, per_query, background, box_format, spec.clip, spec.score_threshold


def _decode(
    logits: Tensor,
    boxes: Tensor,
    image_sizes: Tensor | None,
    top_k: int,
    softmax: bool,
    per_query: bool,
    background: int,
    box_format: int,
    clip: bool,
    threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, queries, classes = logits.shape
    kept = min(top_k, queries if per_query else queries * classes)
    if not logits.is_contiguous():
        logits = logits.contiguous()
    if boxes.dtype != torch.float32 or not boxes.is_contiguous():
        boxes = boxes.to(torch.float32).contiguous()
    size_type, sizes_at = 0, 0
    if image_sizes is not None:
        if image_sizes.dtype not in _SIZE_TYPES:
            image_sizes = image_sizes.to(torch.float32)
        if not image_sizes.is_contiguous():
            image_sizes = image_sizes.contiguous()
        size_type, sizes_at = _SIZE_TYPES[image_sizes.dtype], image_sizes.data_ptr()
    like = torch.empty_like  # half the time of making the same from a shape
    score_like, index_like, box_like, valid_like = _templates(batch, kept)
    scores, labels, corners = like(score_like), like(index_like), like(box_like)
    chosen, valid = like(index_like), like(valid_like)
    if batch and kept:
        record = _RECORD.pack(
            *(logits.data_ptr(), DTYPES[logits.dtype], softmax, per_query, batch, queries, classes, kept, background),
            *(boxes.data_ptr(), sizes_at, size_type, box_format, clip),
            *(scores.data_ptr(), labels.data_ptr(), corners.data_ptr(), chosen.data_ptr(), valid.data_ptr()),
            *(torch.get_num_threads(), threshold is not None, threshold or 0.0),
        )
        _run()(record)
    return scores, labels, corners, chosen, valid


@functools.lru_cache(maxsize=64)
def _templates(batch: int, kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors that the outputs are made like; never written or given out."""
    # Whatever the default device is: the kernel writes to where these are.
    return (
        torch.empty((batch, kept), dtype=torch.float32, device="cpu"),
        torch.empty((batch, kept), dtype=torch.int64, device="cpu"),
        torch.empty((batch, kept, 4), dtype=torch.float32, device="cpu"),
        torch.empty((batch, kept), dtype=torch.bool, device="cpu"),
    )


def _decode_fake(
    logits: Tensor,
    boxes: Tensor,
    image_sizes: Tensor | None,
    top_k: int,
    softmax: bool,
    per_query: bool,
    background: int,
    box_format: int,
    clip: bool,
    threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    candidates = logits.shape[1] if per_query else logits.shape[1] * logits.shape[2]
    shape = (logits.shape[0], min(top_k, candidates))
    scores = logits.new_empty(shape, dtype=torch.float32)
    labels = logits.new_empty(shape, dtype=torch.int64)
    corners = logits.new_empty((*shape, 4), dtype=torch.float32)
    return scores, labels, corners, torch.empty_like(labels), logits.new_empty(shape, dtype=torch.bool)


library.register(
    "native_decode(Tensor logits, Tensor boxes, Tensor? image_sizes, int top_k, bool softmax, bool per_query, "
    "int background, int box_format, bool clip, float? threshold) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _decode,
    _decode_fake,
)
