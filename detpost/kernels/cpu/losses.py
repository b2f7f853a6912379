"""The C++ erosions, distances and weighted error as the losses call them, with their derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detpost.kernels.aten.losses import second_gradient
from detpost.kernels.cpu import distance as native_distance
from detpost.kernels.cpu import erosion as native_erosion
from detpost.reference import distance
from detpost.reference import erosion as reference

__all__ = ["boundary_distance", "erosion", "squared_distance", "weighted_error"]


def erosion(
    pred: Tensor, target: Tensor, classes: Tensor, weights: Sequence[float], axes: int, keep_field: bool
) -> Tensor:
    """Sum the stretched erosions as :func:`detpost.reference.erosion.erode`, differentiable in ``pred``."""
    wants_gradient = torch.is_grad_enabled() and pred.requires_grad
    total: Tensor = _Erosion.apply(pred, target.to(torch.int64), classes, weights, axes, keep_field, wants_gradient)[0]
    return total


def squared_distance(inside: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, float]:
    """Square distances as :func:`detpost.reference.distance.squared_distance`."""
    unit = max(spacing)
    return native_distance.squared_distance(inside, [length / unit for length in spacing]), unit


def boundary_distance(field: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, float]:
    """Square distances as :func:`detpost.reference.distance.boundary_distance`."""
    unit = max(spacing)
    values = field if field.dtype == torch.float32 else (field > 0.5).to(torch.float32)
    return native_distance.boundary_distance(values, [length / unit for length in spacing]), unit


def weighted_error(values: Tensor, truth: Tensor, spacing: tuple[float, ...], alpha: float, sigmoid: bool) -> Tensor:
    """Weigh errors as :func:`detpost.reference.distance.weighted_error`, differentiable in ``values``."""
    error: Tensor = _WeightedError.apply(values, truth, spacing, alpha, sigmoid)[0]
    return error


class _Erosion(torch.autograd.Function):
    """The erosions in C++, which goes back through each field right after it, while its erosions are in the cache.

    For a sum over the field, whose gradient is one number times a field, that field is all that is saved. For the field
    itself the gradient depends on what comes back, and the erosions are computed again then.
    """

    @staticmethod
    def forward(
        pred: Tensor,
        target: Tensor,
        classes: Tensor,
        weights: Sequence[float],
        axes: int,
        keep_field: bool,
        wants_gradient: bool,
    ) -> tuple[Tensor, ...]:
        stencil = reference.STENCIL_WEIGHT[axes]
        sums, field, unit = native_erosion.erosion(
            pred, target, classes, weights, stencil, axes, None, keep_field, wants_gradient and not keep_field
        )
        return field if keep_field else sums.reshape(*sums.shape, *[1] * axes), unit

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pred, target, classes, ctx.weights, ctx.axes, ctx.keep_field, _ = inputs
        total, unit = output
        ctx.mark_non_differentiable(unit)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(pred, target, classes, total, unit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return None, None, None, None, None, None, None
        pred, target, classes, total, unit = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return second_gradient(ctx, pred, target, classes, grads[0]), None, None, None, None, None, None
        poison = (grads[0].sum() + total.sum()) * 0  # as in the plain form; the kernel's own gradients are finite
        if ctx.keep_field:
            stencil = reference.STENCIL_WEIGHT[ctx.axes]
            found = native_erosion.erosion(pred, target, classes, ctx.weights, stencil, ctx.axes, grads[0], False, True)
            return found[2] + poison, None, None, None, None, None, None
        return native_erosion.scaled(unit, grads[0] + poison), None, None, None, None, None, None


class _WeightedError(torch.autograd.Function):
    """The weighted error in C++, with its gradient made in the same pass; of logits where ``sigmoid``.

    The gradient of the sum over a field is one number times a field, and that field is all that is saved.
    """

    @staticmethod
    def forward(
        values: Tensor, truth: Tensor, spacing: tuple[float, ...], alpha: float, sigmoid: bool
    ) -> tuple[Tensor, Tensor]:
        unit = max(spacing)
        steps = [length / unit for length in spacing]
        limit = distance.largest_difference(values, spacing, alpha)
        sums, slopes = native_distance.weighted_error(values, truth, steps, unit, alpha, limit, sigmoid)
        elements = math.prod(values.shape[2:])
        return (sums / elements).reshape(*values.shape[:2], *[1] * (values.dim() - 2)), slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        values, truth, ctx.spacing, ctx.alpha, ctx.sigmoid = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, truth, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        if grads[0] is None:
            return None, None, None, None, None
        values, truth, slopes = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # A gradient of the gradient is wanted: the plain form has one.
            again = distance.weighted_error(values, truth, ctx.spacing, ctx.alpha, ctx.sigmoid, boundary_distance)
            (gradient,) = torch.autograd.grad(again, values, grads[0], create_graph=True)
            return gradient, None, None, None, None
        return native_erosion.scaled(slopes, grads[0] / math.prod(values.shape[2:])), None, None, None, None
