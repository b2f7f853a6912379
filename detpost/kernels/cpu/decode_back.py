"""The derivative of a decode by ``decode_back.cpp``: from what was kept straight back to the raw outputs."""

from __future__ import annotations

import functools
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from detpost.kernels.aten.gradient import Kept, back
from detpost.kernels.cpu import library
from detpost.spec import BOX_FORMAT_CODES

__all__ = ["decode_back"]


@functools.cache
def _run() -> Any:
    types = (*[c_void_p] * 7, c_int, *[c_int64] * 4, *[c_void_p] * 2, c_int)
    return library.function("detpost_decode_back", *types)


def decode_back(kept: Kept, of_scores: Tensor | None, of_boxes: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Take gradients back as :func:`detpost.kernels.aten.gradient.back` does; half precision by that."""
    if not kept.logits.dtype == kept.boxes.dtype == torch.float32:
        return back(kept, of_scores, of_boxes)
    back_logits = None if of_scores is None else torch.empty(kept.logits.shape, dtype=torch.float32, device="cpu")
    back_boxes = None if of_boxes is None else torch.empty(kept.boxes.shape, dtype=torch.float32, device="cpu")
    sizes = None if kept.image_sizes is None else kept.image_sizes.to(torch.float32)
    given = (kept.logits, kept.labels, kept.queries, kept.valid, of_scores, of_boxes, sizes)
    held = [None if values is None else values.contiguous() for values in given]
    _run()(
        *(None if values is None else values.data_ptr() for values in held),
        *(BOX_FORMAT_CODES[kept.spec.box_format], *kept.logits.shape, kept.labels.shape[1]),
        *(None if values is None else values.data_ptr() for values in (back_logits, back_boxes)),
        torch.get_num_threads(),
    )
    return back_logits, back_boxes
