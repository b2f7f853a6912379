"""What several drop-ins do at their edges, between a library's conventions and detpost's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from detpost.detections import Detections

__all__ = [
    "KindError",
    "MisfitError",
    "MissingOutputError",
    "NoPairsError",
    "check_outputs",
    "check_sizes",
    "check_threshold",
    "in_query_order",
    "read_outputs",
    "size_rows",
]


class MisfitError(ValueError, RuntimeError, IndexError):
    """A shape or a number that does not fit: the originals leave it to PyTorch, whose operators raise any of these."""


class KindError(TypeError, AttributeError, NotImplementedError):
    """Something of another kind or dtype, which the originals find out by a method or a kernel that is not there."""


class NoPairsError(TypeError, IndexError, RuntimeError):
    """Sizes that are no pairs at all: a processor finds it out by asking a number for its first entry or its length."""


class MissingOutputError(TypeError, KeyError):
    """A mapping without logits or boxes: a ``KeyError`` in the originals."""

    __str__ = Exception.__str__  # a KeyError's would put its one argument in quotes


def read_outputs(outputs: Any) -> tuple[Tensor, Tensor]:
    """Read ``pred_logits`` and ``pred_boxes`` out of a mapping, or two tensors out of a tuple."""
    if isinstance(outputs, Mapping):
        for name in ("pred_logits", "pred_boxes"):
            if name not in outputs:
                raise MissingOutputError(
                    f"outputs must have pred_logits and pred_boxes; got {', '.join(map(str, outputs)) or 'nothing'}"
                )
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    elif isinstance(outputs, (tuple, list)) and len(outputs) >= 2:
        logits, boxes = outputs[:2]
    else:
        raise KindError(f"outputs must be a mapping with pred_logits and pred_boxes; got {type(outputs).__name__}")
    return logits, boxes


def check_outputs(logits: Any, boxes: Any, prefix: str = "", error: type[ValueError] = MisfitError) -> None:
    """Refuse raw outputs that are no floating (B, Q, C) and (B, Q, 4); ``prefix`` stands before their names."""
    for name, value in (("logits", logits), ("boxes", boxes)):
        if not isinstance(value, Tensor):
            raise KindError(f"{prefix}{name} must be a floating tensor; got {type(value).__name__}")
        if not value.is_floating_point():
            raise KindError(f"{prefix}{name} must be floating; got {value.dtype}: convert with .float()")
    if logits.ndim != 3 or logits.shape[2] == 0:
        raise error(f"{prefix}logits must have shape (B, Q, C), C at least 1; got {tuple(logits.shape)}")
    if boxes.shape != (*logits.shape[:2], 4):
        expected = (*logits.shape[:2], 4)
        raise error(f"{prefix}boxes must have shape (B, Q, 4) = {expected}; got {tuple(boxes.shape)}")


def check_sizes(
    sizes: Any, like: Tensor, name: str, pair: str = "(height, width)", error: type[ValueError] = MisfitError
) -> None:
    """Refuse sizes that are no tensor (B, 2) beside ``like`` (B, ...)."""
    expected = f"{name} must be a tensor (B, 2) = ({len(like)}, 2), one {pair} for each image"
    if not isinstance(sizes, Tensor):
        raise KindError(f"{expected}; got {type(sizes).__name__}")
    if sizes.shape != (len(like), 2):
        raise error(f"{expected}; got shape {tuple(sizes.shape)}")


def check_threshold(threshold: Any, name: str) -> None:
    """Refuse a threshold that is no number; any number is taken, as in the originals."""
    if not isinstance(threshold, (Real, Tensor)):
        raise TypeError(f"{name} must be a number; got {threshold!r}")


def in_query_order(detections: Detections, query_count: int) -> Detections:
    """Put the slots of each image in the order of their queries, those that are not valid last."""
    keys = torch.where(detections.valid, detections.queries, query_count)
    order = keys.argsort(dim=1, stable=True)  # (B, K)
    corners = detections.boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
    return Detections(
        scores=detections.scores.gather(1, order),
        labels=detections.labels.gather(1, order),
        boxes=corners,
        queries=detections.queries.gather(1, order),
        valid=detections.valid.gather(1, order),
    )


def size_rows(sizes: Tensor | Sequence[Any], like: Tensor, name: str) -> Tensor:
    """Make a tensor (B, 2) beside ``like`` (B, ...) of image sizes that came as a tensor or as a list of pairs."""
    expected = f"{name} must have one pair for each of {len(like)} images"
    if not isinstance(sizes, Tensor):
        try:
            pairs = [tuple(pair) for pair in sizes]
        except TypeError:
            raise NoPairsError(f"{expected}; got {sizes!r}") from None
        if any(len(pair) != 2 or not all(isinstance(side, (Real, Tensor)) for side in pair) for pair in pairs):
            raise MisfitError(f"{name} must hold pairs of numbers; got {sizes!r}")
        sides = [(float(height), float(width)) for height, width in pairs]
        sizes = torch.tensor(sides, dtype=torch.float32, device=like.device).reshape(-1, 2)
    if sizes.shape != (len(like), 2):
        raise MisfitError(f"{expected}; got shape {tuple(sizes.shape)}")
    return sizes.to(like.device)
