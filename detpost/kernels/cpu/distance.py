"""The distance transform, and the loss that it weighs, by ``distance.cpp``, as PyTorch operators."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from detpost.kernels.cpu import library

__all__ = ["boundary_distance", "squared_distance", "weighted_error"]


@functools.cache
def _run_distance() -> Any:
    return library.function(
        "detpost_distance",
        *(c_void_p, c_int64, c_int64, c_int64, c_int64, c_float, c_float, c_float, c_int, c_float, c_void_p, c_int),
    )


@functools.cache
def _run_weighted_error() -> Any:
    return library.function(
        "detpost_weighted_error",
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64),
        *(c_double, c_double, c_float, c_int, c_void_p, c_int),
    )


def squared_distance(inside: Tensor, steps: Sequence[float]) -> Tensor:
    """Square the distance of each element to the nearest False of its field; infinite where there is none.

    Args:
        inside: (B, C, *spatial), bool, on the CPU.
        steps: lengths of an element along each spatial axis.

    Returns:
        (B, C, *spatial), float32.
    """
    found: Tensor = torch.ops.detpost.native_distance(inside, steps, False)
    return found


def boundary_distance(values: Tensor, steps: Sequence[float]) -> Tensor:
    """Square the distance of each element to the nearest one on the other side of 0.5; 0 where there is none.

    Args:
        values: (B, C, *spatial), float32, on the CPU.
        steps: lengths of an element along each spatial axis.

    Returns:
        (B, C, *spatial), float32.
    """
    found: Tensor = torch.ops.detpost.native_distance(values, steps, True)
    return found


def _distance(values: Tensor, steps: Sequence[float], both_sides: bool) -> Tensor:
    return _distances(values.contiguous(), steps, both_sides, 0.5)


def _distances(values: Tensor, steps: Sequence[float], both_sides: bool, threshold: float) -> Tensor:
    squared = torch.empty(values.shape, dtype=torch.float32, device="cpu")
    depth, height, width = (1, *values.shape[2:])[-3:]
    lengths = (1.0, *steps)[-3:]
    if values.numel():
        _run_distance()(
            *(values.data_ptr(), values.shape[0] * values.shape[1], depth, height, width, *lengths),
            *(both_sides, threshold, squared.data_ptr(), torch.get_num_threads()),
        )
    return squared


def _distance_fake(values: Tensor, steps: Sequence[float], both_sides: bool) -> Tensor:
    return torch.empty(values.shape, dtype=torch.float32, device=values.device)


# The greatest float32 whose sigmoid is not above one half in float32.
_HALF_LOGIT = 2.0**-23
_CHUNK = 1 << 14


def weighted_error(
    values: Tensor, truth: Tensor, steps: Sequence[float], unit: float, alpha: float, limit: float, sigmoid: bool
) -> tuple[Tensor, Tensor]:
    """Sum the squared error of each field, weighted with the distances to both boundaries.

    Args:
        values: (B, C, *spatial), float32, on the CPU: probabilities, or logits with ``sigmoid``.
        truth: (B, C, *spatial), float32.
        steps: lengths of an element along each spatial axis, in ``unit``.
        unit: what the distances are multiplied with.
        alpha: exponent of the distances.
        limit: differences beyond it count as that much, and have no slope.
        sigmoid: whether a sigmoid is applied to ``values``.

    Returns:
        Sums (B, C), float32, and the gradient of each with respect to its own field of ``values`` (B, C, *spatial).
    """
    found: tuple[Tensor, Tensor] = torch.ops.detpost.native_weighted_error(
        values, truth, steps, unit, alpha, limit, sigmoid
    )
    return found


def _weighted_error(
    values: Tensor, truth: Tensor, steps: Sequence[float], unit: float, alpha: float, limit: float, sigmoid: bool
) -> tuple[Tensor, Tensor]:
    values, truth = values.contiguous(), truth.contiguous()
    of_values = _distances(values, steps, True, _HALF_LOGIT if sigmoid else 0.5)
    of_truth = _distances(truth, steps, True, 0.5)
    fields, elements = values.shape[0] * values.shape[1], values[0, 0].numel() if values.numel() else 0
    chunks = max(1, -(-elements // _CHUNK))
    sums = torch.zeros((*values.shape[:2], chunks), dtype=torch.float64, device="cpu")
    if values.numel():
        _run_weighted_error()(
            *(values.data_ptr(), truth.data_ptr(), of_truth.data_ptr(), of_values.data_ptr(), fields, elements, chunks),
            *(alpha / 2, unit**alpha, limit, sigmoid, sums.data_ptr(), torch.get_num_threads()),
        )
    return sums.sum(dim=2).to(torch.float32), of_values


def _weighted_error_fake(
    values: Tensor, truth: Tensor, steps: Sequence[float], unit: float, alpha: float, limit: float, sigmoid: bool
) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape[:2]), torch.empty(values.shape, dtype=values.dtype, device=values.device)


library.register("native_distance(Tensor values, float[] steps, bool both_sides) -> Tensor", _distance, _distance_fake)
library.register(
    "native_weighted_error(Tensor values, Tensor truth, float[] steps, float unit, float alpha, float limit, "
    "bool sigmoid) -> (Tensor, Tensor)",
    _weighted_error,
    _weighted_error_fake,
)
