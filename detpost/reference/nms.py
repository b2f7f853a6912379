"""Exact greedy non-maximum suppression with static shapes, in PyTorch's own operators: what every kernel is held to.

Greedy suppression walks down the scores and keeps a box unless a kept one before it overlaps it too much. Shapes and
control flow depend on the number of boxes alone, so the same graph is compiled, exported and captured.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from detpost.detections import Detections, clear_invalid
from detpost.reference.selection import select_top_k

__all__ = ["compacted", "keep", "keep_ranked", "overlap", "suppress", "walk"]

# Overlaps grow with the square of what they cover: longer lists are walked in chunks of about this many boxes.
_CHUNK = 320

Select = Callable[[Tensor, int], Tensor]
Walk = Callable[[Tensor, Tensor], Tensor]


def walk(overlaps: Tensor, free: Tensor) -> Tensor:
    """Say which boxes stay: those that are free and that no box before them that stays overlaps.

    Args:
        overlaps: (B, n, n), bool: whether two boxes overlap too much.
        free: (B, n), bool.

    Returns:
        (B, n), bool.
    """
    kept = []
    for place in range(int(free.shape[1])):
        stays = free[:, place : place + 1]  # (B, 1)
        free = free & ~(overlaps[:, place] & stays)
        kept.append(stays)
    return torch.cat(kept, dim=1)


def keep(
    boxes: Tensor,
    scores: Tensor | None,
    labels: Tensor | None,
    valid: Tensor | None,
    threshold: float,
    smaller: bool = False,
    select: Select = select_top_k,
    walk: Walk = walk,
) -> Tensor:
    """Say which boxes stay; as :func:`detpost.nms.nms`.

    Args:
        boxes: (B, N, 4), floating, xyxy.
        scores: (B, N), floating, or ``None``: the boxes come best first.
        labels: (B, N), integer, or ``None``: one class.
        valid: (B, N), bool, or ``None``: all are.
        threshold: in [0, 1].
        smaller: whether an overlap is a part of the smaller box, and not of the union.
        select: gives the indices of the best of each row, in the order of :func:`select_top_k`.
        walk: gives what :func:`walk` gives.

    Returns:
        (B, N), bool.
    """
    valid = torch.ones_like(boxes[..., 0], dtype=torch.bool) if valid is None else valid
    if scores is None:
        return keep_ranked(boxes.detach(), labels, valid, threshold, smaller, walk)
    order = select(scores.detach(), max(1, int(scores.shape[1])))
    kept = keep_ranked(
        boxes.detach().gather(1, order.unsqueeze(-1).expand(-1, -1, 4)),
        None if labels is None else labels.gather(1, order),
        valid.gather(1, order),
        threshold,
        smaller,
        walk,
    )
    return torch.zeros_like(kept).scatter(1, order, kept)


def suppress(detections: Detections, kept: Tensor, compact: bool) -> Detections:
    """Clear the slots of detections (B, K) that are not kept (B, K), or move those that are to the front."""
    scores, labels, corners, queries, _ = detections
    if compact:
        order = compacted(kept)
        corners = corners.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
        scores, labels, queries = (values.gather(1, order) for values in (scores, labels, queries))
        kept = kept.gather(1, order)
    return clear_invalid(scores, labels, corners, queries, kept)


def compacted(kept: Tensor) -> Tensor:
    """Order slots (B, K) with those that are kept first, each part as it was: (B, K), int64."""
    places = int(kept.shape[1])
    slot = torch.arange(places, dtype=torch.int32, device=kept.device)
    # Unique integers: any runtime's top-k gives the one order.
    return torch.where(kept, 2 * places - slot, places - slot).topk(places, dim=1).indices


def keep_ranked(
    boxes: Tensor,
    labels: Tensor | None,
    valid: Tensor,
    threshold: float,
    smaller: bool = False,
    walk: Walk = walk,
) -> Tensor:
    """Walk boxes (B, K, 4) that come best first, in chunks; give the kept ones (B, K)."""
    places = int(boxes.shape[1])  # a number while tracing, too: the walk is unrolled
    if places == 0:
        return valid.clone()
    width = -(-places // -(-places // _CHUNK))
    sides = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).permute(2, 0, 1).contiguous()  # (4, B, K)
    kept: list[Tensor] = []
    free = valid  # (B, K - start): valid, and not dropped by an earlier chunk
    for start in range(0, places, width):
        size = min(width, places - start)
        rest = slice(start, places)
        over = overlap(sides[:, :, start : start + size].unsqueeze(-1), sides[:, :, rest].unsqueeze(-2), smaller)
        overlaps = over > _not_above(threshold, over.dtype)  # (B, size, K - start)
        if labels is not None:
            overlaps = overlaps & (labels[:, start : start + size].unsqueeze(-1) == labels[:, rest].unsqueeze(-2))
        stays = walk(overlaps[:, :, :size], free[:, :size])
        kept.append(stays)
        if start + size < places:
            drops = (overlaps[:, :, size:] & stays.unsqueeze(-1)).any(dim=1)
            free = free[:, size:] & ~drops
    return torch.cat(kept, dim=1)


def overlap(first: Tensor, second: Tensor, smaller: bool = False) -> Tensor:
    """Give the part that boxes (4, ...) share of their union, or of the smaller one; NaN where that has no area.

    The same operations in the same order as torchvision's, so that an IoU at a threshold falls on the same side.
    """
    left, top, right, bottom = first.unbind(0)
    other_left, other_top, other_right, other_bottom = second.unbind(0)
    width = (torch.minimum(right, other_right) - torch.maximum(left, other_left)).clamp(min=0)
    height = (torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)).clamp(min=0)
    shared = width * height
    area = (right - left) * (bottom - top)
    other_area = (other_right - other_left) * (other_bottom - other_top)
    return shared / (torch.minimum(area, other_area) if smaller else area + other_area - shared)


def _not_above(threshold: float, dtype: torch.dtype) -> float:
    """Give the greatest number of ``dtype`` not above: comparing floats with it is comparing them as doubles.

    torchvision compares a float32 IoU with the double threshold, torch with the threshold rounded to float32.
    """
    if dtype == torch.float64:
        return threshold
    nearest = np.float32(threshold)
    return float(np.nextafter(nearest, np.float32(-1)) if float(nearest) > threshold else nearest)
