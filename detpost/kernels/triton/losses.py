"""The Triton erosions and distances as the losses call them, with their derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detpost.kernels.aten.losses import second_gradient
from detpost.kernels.triton import distance as triton_distance
from detpost.kernels.triton import erosion as triton_erosion

__all__ = ["boundary_distance", "erosion"]


def erosion(
    pred: Tensor, target: Tensor, classes: Tensor, weights: Sequence[float], axes: int, keep_field: bool
) -> Tensor:
    """Sum the stretched erosions as :func:`detpost.reference.erosion.erode`, differentiable in ``pred``."""
    total: Tensor = _Erosion.apply(pred, target, classes, weights, axes, keep_field)[0]
    return total


def boundary_distance(field: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, float]:
    """Square distances as :func:`detpost.reference.distance.boundary_distance`."""
    squared, unit = triton_distance.squared_boundary_distance(field > 0.5, spacing)
    return torch.nan_to_num(squared, posinf=0.0), unit


class _Erosion(torch.autograd.Function):
    """The erosions in Triton, one launch per erosion each way."""

    @staticmethod
    def forward(
        pred: Tensor, target: Tensor, classes: Tensor, weights: Sequence[float], axes: int, keep_field: bool
    ) -> tuple[Tensor, ...]:
        return triton_erosion.erode(pred, target, classes, weights, keep_field)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pred, target, classes, ctx.weights, ctx.axes, ctx.keep_field = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(pred, target, classes, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None, None]:
        if grads[0] is None:
            return None, None, None, None, None, None
        pred, target, classes, dilations, limits = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return second_gradient(ctx, pred, target, classes, grads[0]), None, None, None, None, None
        gradient = triton_erosion.erosion_gradient(grads[0], pred, target, classes, ctx.weights, dilations, limits)
        return gradient, None, None, None, None, None
