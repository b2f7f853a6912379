"""The derivative of a decode, straight back from what was kept to the raw outputs, in a few operators.

For sigmoid heads on a processor, where no compiler or tracer watches: a kernel decodes, and of a decode only what is
gathered has a gradient. A gradient of that gradient is the reference form's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.reference import decode as reference
from detpost.spec import DecodeSpec

__all__ = ["Kept", "back", "decode", "takes"]


class Kept(NamedTuple):
    """What a decode keeps for the way back.

    Args:
        logits: (B, Q, C), not float64.
        boxes: (B, Q, 4), not float64.
        image_sizes: (B, 2), or ``None``.
        labels: (B, K), int64.
        queries: (B, K), int64.
        valid: (B, K), bool.
        spec: what the decode did: sigmoid, without clipping.
    """

    logits: Tensor
    boxes: Tensor
    image_sizes: Tensor | None
    labels: Tensor
    queries: Tensor
    valid: Tensor
    spec: DecodeSpec


_Decode = Callable[[Tensor, Tensor, Tensor | None, DecodeSpec], Detections]
_Back = Callable[[Kept, Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]


def takes(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> bool:
    """Tell whether :func:`decode` serves; elsewhere PyTorch finds the derivative operator by operator."""
    if spec.activation != "sigmoid" or spec.clip or boxes.dtype == torch.float64:
        return False
    return image_sizes is None or not image_sizes.requires_grad


def decode(
    logits: Tensor,
    boxes: Tensor,
    image_sizes: Tensor | None,
    spec: DecodeSpec,
    *,
    without_gradient: _Decode,
    back: _Back,
) -> Detections:
    """Decode as :func:`detpost.reference.decode.decode`, differentiable backwards as often as is asked for.

    Args:
        logits: (B, Q, C), not float64.
        boxes: (B, Q, 4), not float64.
        image_sizes: (B, 2), without a gradient, or ``None``.
        spec: what the decode does: sigmoid, without clipping.
        without_gradient: the decode of tensors that have no gradient.
        back: as :func:`back`.

    Returns:
        The detections.
    """
    found: tuple[Tensor, ...] = _DecodeWithGradient.apply(logits, boxes, image_sizes, spec, without_gradient, back)
    return Detections(*found)


class _DecodeWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *raw, without_gradient, _ = inputs
        return tuple(without_gradient(*raw))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, boxes, image_sizes, ctx.spec, _, ctx.back = inputs
        scores, labels, corners, queries, valid = output
        # As where PyTorch finds the derivative: scores are of the logits alone, and corners of the boxes.
        needed = ctx.needs_input_grad
        scores_alone = [] if needed[0] else [scores]
        corners_alone = [] if needed[1] else [corners]
        ctx.mark_non_differentiable(labels, queries, valid, *scores_alone, *corners_alone)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, boxes, image_sizes, labels, queries, valid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, boxes, image_sizes, labels, queries, valid = ctx.saved_tensors
        kept = Kept(logits, boxes, image_sizes, labels, queries, valid, ctx.spec)
        of_scores, of_boxes = grads[0], grads[2]
        needs_logits, needs_boxes = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            gradients = _again(kept, (needs_logits, needs_boxes), of_scores, of_boxes)
        else:
            gradients = ctx.back(kept, of_scores if needs_logits else None, of_boxes if needs_boxes else None)
        return (*gradients, None, None, None, None)


def back(kept: Kept, of_scores: Tensor | None, of_boxes: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Take gradients back to the raw outputs.

    Args:
        kept: of the decode.
        of_scores: the gradients of the scores (B, K), float32; ``None``: nobody asks for those of the logits.
        of_boxes: of the corners (B, K, 4), float32, likewise.

    Returns:
        The gradients of the logits and of the boxes; ``None`` where nobody asks.
    """
    logits, boxes, image_sizes, labels, queries, valid, spec = kept
    if not valid.all():
        labels, queries = labels.clamp(min=0), queries.clamp(min=0)
        of_scores = None if of_scores is None else torch.where(valid, of_scores, 0.0)
        of_boxes = None if of_boxes is None else torch.where(valid.unsqueeze(-1), of_boxes, 0.0)
    return (
        None if of_scores is None else _back_to_logits(of_scores, logits, queries, labels),
        None if of_boxes is None else _back_to_boxes(of_boxes, boxes, image_sizes, queries, spec),
    )


def _back_to_logits(grads: Tensor, logits: Tensor, queries: Tensor, labels: Tensor) -> Tensor:
    """Take gradients of scores (B, K) to the logits (B, Q, C)."""
    classes = logits.shape[2]
    rows = logits.flatten(1)
    places = queries * classes + labels
    scores = rows.gather(1, places).to(torch.float64).sigmoid()  # as forwards: 1 - score is lost in float32
    slopes = torch.ops.aten.sigmoid_backward(grads.to(torch.float64), scores).to(logits.dtype)
    found: Tensor = torch.ops.aten.gather_backward(slopes, rows, 1, places, False)
    return found.view(logits.shape)


def _back_to_boxes(
    grads: Tensor, boxes: Tensor, image_sizes: Tensor | None, queries: Tensor, spec: DecodeSpec
) -> Tensor:
    """Take gradients of corners (B, K, 4) to the boxes (B, Q, 4)."""
    if spec.box_format == "xywh":
        first, second = torch.split(grads, 2, dim=-1)
        grads = torch.cat((first + second, second), dim=-1)
    elif spec.box_format == "cxcywh":
        # The sum of both corners' gradients for the centre, half of their difference for the extent: whole rows at a
        # time, which a processor adds several times as fast as pairs of columns.
        others = grads.index_select(-1, torch.tensor((2, 3, 0, 1), device=grads.device))
        own, other = grads.new_tensor((1.0, 1.0, 0.5, 0.5)), grads.new_tensor((1.0, 1.0, -0.5, -0.5))
        grads = torch.addcmul(grads * own, others, other)
    if image_sizes is not None:
        height_width = image_sizes.to(grads.dtype).unsqueeze(1)  # (B, 1, 2)
        grads = grads * torch.cat((height_width, height_width), dim=-1).flip(-1)
    batch, count, _ = boxes.shape
    rows, flat = reference.flat_rows(queries, count), grads.reshape(-1, 4).to(boxes.dtype)
    found: Tensor = torch.ops.aten.index_select_backward(flat, [batch * count, 4], 0, rows)
    return found.view(boxes.shape)


def _again(
    kept: Kept, needed: tuple[bool, bool], of_scores: Tensor | None, of_boxes: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Give gradients that have a gradient: of the reference form with the pairs that were chosen."""
    logits, boxes, image_sizes, _, _, valid, spec = kept
    labels, queries = kept.labels.clamp(min=0), kept.queries.clamp(min=0)
    keys = logits.detach().flatten(1).gather(1, queries * logits.shape[2] + labels)
    chosen = queries, labels, torch.where(valid, keys, math.nan)
    steps = reference.Steps(select_pairs=lambda *_: chosen)
    again = reference.decode(logits, boxes, image_sizes, spec, steps)
    outputs = [(value, of) for value, of in ((again.scores, of_scores), (again.boxes, of_boxes)) if of is not None]
    values, grads = zip(*outputs, strict=True)
    inputs = [value for value, is_needed in zip((logits, boxes), needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(values, inputs, grads, create_graph=True, allow_unused=True))
    return next(found) if needed[0] else None, next(found) if needed[1] else None
