"""Selection by ``selection.cpp``, as a PyTorch operator."""

from __future__ import annotations

import functools
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from detpost.kernels.cpu import library

__all__ = ["DTYPES", "select"]

# Of the scores and logits that the kernels read, by their numbers in common.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@functools.cache
def _run() -> Any:
    return library.function("detpost_select", c_void_p, c_int, c_int64, c_int64, c_int64, c_void_p, c_int)


def select(scores: Tensor, k: int) -> Tensor:
    """Select as :func:`detpost.select_top_k` does.

    Args:
        scores: (B, N), float32, float16 or bfloat16, on the CPU; N below 2**31.
        k: how many to keep, at least 1.

    Returns:
        (B, min(k, N)), int64.
    """
    indices: Tensor = torch.ops.detpost.native_select(scores, k)
    return indices


def _select(scores: Tensor, k: int) -> Tensor:
    batch, width = scores.shape
    indices = torch.empty((batch, min(k, width)), dtype=torch.int64, device="cpu")
    if indices.numel():
        rows = scores.contiguous()
        _run()(
            rows.data_ptr(),
            DTYPES[rows.dtype],
            batch,
            width,
            min(k, width),
            indices.data_ptr(),
            torch.get_num_threads(),
        )
    return indices


def _select_fake(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((scores.shape[0], min(k, scores.shape[1])), dtype=torch.int64)


library.register("native_select(Tensor scores, int k) -> Tensor", _select, _select_fake)
