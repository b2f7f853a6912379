"""The erosion loss by ``erosion.cpp``, as PyTorch operators, and what the losses do to whole fields."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from detpost.kernels.cpu import library

__all__ = ["erosion", "id_range", "scaled"]


@functools.cache
def _run_erosion() -> Any:
    return library.function(
        "detpost_erosion",
        *(c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64, c_int, c_float),
        *(c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int),
    )


@functools.cache
def _run_scale() -> Any:
    return library.function("detpost_scale", c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int)


@functools.cache
def _run_range() -> Any:
    return library.function("detpost_range", c_void_p, c_int64, c_void_p)


def erosion(
    pred: Tensor,
    target: Tensor,
    classes: Tensor,
    weights: Sequence[float],
    stencil_weight: float,
    axes: int,
    cotangent: Tensor | None,
    want_field: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Erode every field, and go back through it in the same pass while its erosions are in the cache.

    Args:
        pred: (B, C, *spatial), float32, on the CPU.
        target: (B, 1, *spatial), int64.
        classes: (C,), 0 ... C - 1: the check of the ids is a part of a compiled graph through it alone.
        weights: of each erosion's result in the sum.
        stencil_weight: of each tap of the stencil.
        axes: 2 or 3.
        cotangent: gradient of the summed field (B, C, *spatial), float32; ``None`` is 1 everywhere.
        want_field: whether the field is wanted, else its sums.
        want_gradient: whether the gradient is wanted.

    Returns:
        Sums over each field (B, C), float32; the field (B, C, *spatial); the gradient of ``sum(field * cotangent)``
        with respect to ``pred`` (B, C, *spatial), finite. Of the last two, what is not wanted has shape (0,).
    """
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.detpost.native_erosion(
        pred, target, classes, weights, stencil_weight, axes, cotangent, want_field, want_gradient
    )
    return found


def _erosion(
    pred: Tensor,
    target: Tensor,
    classes: Tensor,
    weights: Sequence[float],
    stencil_weight: float,
    axes: int,
    cotangent: Tensor | None,
    want_field: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    pred, target = pred.contiguous(), target.contiguous()
    batch, channels, *sides = pred.shape
    depth, height, width = (1, *sides)[-3:]
    steps = (c_double * len(weights))(*weights)
    totals = torch.empty((batch, channels), dtype=torch.float64, device="cpu")
    field = torch.empty_like(pred) if want_field else pred.new_empty(0)
    gradient = torch.empty_like(pred) if want_gradient else pred.new_empty(0)
    given = cotangent.contiguous() if cotangent is not None else None
    if pred.numel():
        _run_erosion()(
            *(pred.data_ptr(), target.data_ptr(), batch, channels, depth, height, width, axes, stencil_weight),
            *(steps, len(weights), totals.data_ptr(), field.data_ptr() if want_field else None),
            *(given.data_ptr() if given is not None else None, gradient.data_ptr() if want_gradient else None),
            torch.get_num_threads(),
        )
    return totals.to(torch.float32), field, gradient


def _erosion_fake(
    pred: Tensor,
    target: Tensor,
    classes: Tensor,
    weights: Sequence[float],
    stencil_weight: float,
    axes: int,
    cotangent: Tensor | None,
    want_field: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    whole = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    nothing = pred.new_empty(0)
    return (
        pred.new_empty(pred.shape[:2]),
        whole if want_field else nothing,
        torch.empty_like(whole) if want_gradient else torch.empty_like(nothing),
    )


def scaled(values: Tensor, factors: Tensor) -> Tensor:
    """Multiply each field by a factor of its own; what leaves float32 becomes its greatest number, and NaN stays.

    Args:
        values: (B, C, *spatial), float32, on the CPU.
        factors: (B, C, 1, ...), float32.

    Returns:
        (B, C, *spatial), float32.
    """
    found: Tensor = torch.ops.detpost.native_scaled(values, factors)
    return found


def _scaled(values: Tensor, factors: Tensor) -> Tensor:
    values, factors = values.contiguous(), factors.to(torch.float32).contiguous()
    out = torch.empty_like(values)
    fields = factors.numel()
    if values.numel():
        _run_scale()(
            *(
                values.data_ptr(),
                factors.data_ptr(),
                fields,
                values.numel() // fields,
                out.data_ptr(),
                torch.get_num_threads(),
            )
        )
    return out


def _scaled_fake(values: Tensor, factors: Tensor) -> Tensor:
    return torch.empty(values.shape, dtype=values.dtype, device=values.device)


def id_range(ids: Tensor) -> tuple[int, int]:
    """Give the least and the greatest of int64 ids on the CPU, at least one."""
    ids = ids.contiguous()
    found = (c_int64 * 2)()
    _run_range()(ids.data_ptr(), ids.numel(), found)
    return found[0], found[1]


library.register(
    "native_erosion(Tensor pred, Tensor target, Tensor classes, float[] weights, float stencil_weight, int axes, "
    "Tensor? cotangent, bool want_field, bool want_gradient) -> (Tensor, Tensor, Tensor)",
    _erosion,
    _erosion_fake,
)
library.register("native_scaled(Tensor values, Tensor factors) -> Tensor", _scaled, _scaled_fake)
