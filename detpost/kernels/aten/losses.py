"""What the losses compute with, in PyTorch's own operators: the erosions with their gradient written out, distances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from detpost.reference import distance
from detpost.reference import erosion as reference

__all__ = ["erosion", "second_gradient", "squared_distance", "squared_distance_by_rows", "squared_distance_nearby"]

# Elements that are worked on at a time, so that they stay in a processor's cache.
_BLOCK: Final = 1 << 16
# Rows to both sides after which it is asked again whether any farther one can be nearer.
_ROWS_PER_LOOK: Final = 4


def squared_distance(inside: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, float]:
    """Square distances as :func:`detpost.reference.distance.squared_distance`, all at once where a compiler fuses."""
    return distance.squared_distance(inside, spacing, 0 if torch.compiler.is_compiling() else None)


def squared_distance_by_rows(inside: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, float]:
    """Do the same in steps that are few and small: for a graph, in which each is a node."""
    return distance.squared_distance(inside, spacing, distance.ROWS_PER_STEP)


def squared_distance_nearby(inside: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, float]:
    """Do the same from near to far, to the bit: most elements of a mask are near its boundary.

    Row by row to both sides, until the distance to a row alone is more than any that is found. That is read, so no
    compiler or tracer can follow.
    """
    return distance.squared_distance(inside, spacing, envelope=_envelope_from_near_to_far)


def _envelope_from_near_to_far(values: Tensor, step: float, rows_per_step: int | None) -> Tensor:
    length, lanes = values.shape[1:]
    width = max(1, min(lanes, _BLOCK // length))
    fields = max(1, _BLOCK // (length * width))
    heights = (torch.arange(length, dtype=torch.float32, device=values.device) * step).square().tolist()

    def lower(block: Tensor) -> Tensor:
        if bool(block.amin().isinf()):  # no boundary at all
            return block
        beyond = F.pad(block, (0, 0, length - 1, length - 1), value=math.inf)
        lowest = block
        for rows in range(1, length):
            if rows % _ROWS_PER_LOOK == 1 and heights[rows] >= float(lowest.amax()):
                return lowest
            before, after = beyond.narrow(1, length - 1 - rows, length), beyond.narrow(1, length - 1 + rows, length)
            lowest = torch.minimum(lowest, torch.minimum(before, after) + heights[rows])
        return lowest

    groups = distance.blocks(values, 0, fields)
    return torch.cat(
        [torch.cat([lower(block) for block in distance.blocks(group, 2, width)], dim=2) for group in groups]
    )


def erosion(
    pred: Tensor, target: Tensor, classes: Tensor, weights: Sequence[float], axes: int, keep_field: bool
) -> Tensor:
    """Sum the stretched erosions as :func:`detpost.reference.erosion.erode`, differentiable in ``pred``."""
    total: Tensor = _Erosion.apply(pred, target, classes, weights, axes, keep_field)[0]
    return total


def second_gradient(ctx: Any, pred: Tensor, target: Tensor, classes: Tensor, grad: Tensor) -> Tensor:
    """Give a gradient that has one itself, through PyTorch's own operators."""
    again = reference.erode_differentiably(pred, target, classes, ctx.weights, ctx.axes, ctx.keep_field)
    (gradient,) = torch.autograd.grad(again, pred, grad, create_graph=True)
    return gradient


class _Erosion(torch.autograd.Function):
    """The erosions with their gradient written out: one saved field per erosion, where autograd would keep eight.

    The sum over erosions is the first output; the other outputs are the saved tensors, which a function that separates
    its context from its forward has to return.
    """

    @staticmethod
    def forward(
        pred: Tensor, target: Tensor, classes: Tensor, weights: Sequence[float], axes: int, keep_field: bool
    ) -> tuple[Tensor, ...]:
        return reference.erode(pred, target, classes, weights, axes, keep_field)

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
        pred, target, classes, *saved = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return second_gradient(ctx, pred, target, classes, grads[0]), None, None, None, None, None
        gradient = reference.erosion_gradient(grads[0], ctx.weights, saved, ctx.axes)
        gradient = gradient * (reference.difference(pred, target, classes) * 2)
        # Where ranges of one rounding step follow each other the slopes can leave float32: finite all the same. But a
        # gradient or a prediction that came in as NaN or inf (a scaled loss that overflowed) must be seen going out.
        poison = (grads[0].sum() + saved[0].sum()) * 0
        return torch.nan_to_num(gradient) + poison, None, None, None, None, None
