"""The decode by ``decode.cpp``, as a PyTorch operator and as a plain call."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from ctypes import c_char_p, c_void_p, cast

import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.kernels.cpu import library
from detpost.kernels.cpu.selection import DTYPES
from detpost.spec import BOX_FORMAT_CODES, DecodeSpec

__all__ = ["address", "decode", "decode_as_operator", "plan"]

_SIZE_TYPES = {torch.float32: 1, torch.int32: 2, torch.int64: 3}
# The numbers of decode_call.h.
_SIGMOID, _SOFTMAX, _SCORES = 0, 1, 2
_SIDES_NOT_NEGATIVE = 3
_BACKGROUNDS = {"none": 0, "first": 1, "last": 2}
_SWAPPED, _PAIRS, _NEEDED = 1, 2, 4
# Addresses and whole numbers in the order of DecodeCall, and the threshold.
_RECORD = struct.Struct("=24qd")
# Likewise of Plan in _tensors.cpp.
_PLAN = struct.Struct("=9qd")


@functools.cache
def _run() -> Callable[[bytes], None]:
    run: Callable[[bytes], None] = library.function("detpost_decode", c_char_p)
    return run


def address() -> int | None:
    """Give the address of the kernel, for what calls it without :mod:`ctypes`; ``None`` where there is no library."""
    return None if library.missing() is not None else cast(_run(), c_void_p).value  # type: ignore[arg-type]


def plan(
    spec: DecodeSpec,
    *,
    top_k: int | None = None,
    takes_scores: bool = False,
    out_format: str = "xyxy",
    sides_not_negative: bool = False,
    swapped_sizes: bool = False,
    takes_pairs: bool = False,
    needs_sizes: bool = False,
) -> bytes:
    """Pack what a decode does for :mod:`detpost.kernels.direct`, and what drop-ins have otherwise.

    Args:
        spec: what the decode does.
        top_k: how many to keep instead, up to 2**62; 0 keeps as many as there are queries.
        takes_scores: whether scores come in, and no logits.
        out_format: ``"xywh"`` gives boxes that come as cxcywh without computing their corners.
        sides_not_negative: whether a box of negative width or height counts as one of none.
        swapped_sizes: whether image sizes are (width, height).
        takes_pairs: whether image sizes may come as a list of pairs of numbers.
        needs_sizes: whether there must be image sizes.

    Returns:
        The record.
    """
    threshold = spec.score_threshold
    return _PLAN.pack(
        min(spec.top_k if top_k is None else top_k, 2**62),
        _SCORES if takes_scores else _SOFTMAX if spec.activation == "softmax" else _SIGMOID,
        spec.selection == "per_query",
        _BACKGROUNDS[spec.background],
        _SIDES_NOT_NEGATIVE if sides_not_negative else BOX_FORMAT_CODES[spec.box_format],
        spec.clip,
        BOX_FORMAT_CODES[out_format],
        swapped_sizes * _SWAPPED | takes_pairs * _PAIRS | needs_sizes * _NEEDED,
        threshold is not None,
        threshold or 0.0,
    )


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
            *(logits.data_ptr(), classes, DTYPES[logits.dtype], _SOFTMAX if softmax else _SIGMOID, per_query),
            *(batch, queries, classes, kept, background),
            *(boxes.data_ptr(), 4, sizes_at, size_type, box_format, clip, BOX_FORMAT_CODES["xyxy"]),
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
