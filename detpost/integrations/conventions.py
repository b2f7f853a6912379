"""What several drop-ins do at their edges, between a library's conventions and detpost's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detpost.detections import Detections

__all__ = ["in_query_order", "size_rows"]


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
    if not isinstance(sizes, Tensor):
        pairs = [tuple(map(float, pair)) for pair in sizes]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"{name} must hold pairs; got {sizes!r}")
        sizes = torch.tensor(pairs, dtype=torch.float32, device=like.device).reshape(-1, 2)
    if sizes.ndim != 2 or sizes.shape[1] != 2 or len(sizes) != len(like):
        raise ValueError(f"{name} must have one pair for each of {len(like)} images; got shape {tuple(sizes.shape)}")
    return sizes.to(like.device)
