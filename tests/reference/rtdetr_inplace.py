"""The decode as the field wrote it, in place: the baseline for values, for what breaks, and for speed.

Everything whose name ends in an underscore writes into its argument.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy_(boxes: Tensor) -> Tensor:
    boxes[..., :2] -= boxes[..., 2:] * 0.5
    boxes[..., 2:] += boxes[..., :2]
    return boxes


def xyxy_to_cxcywh_(boxes: Tensor) -> Tensor:
    boxes[..., 2:] -= boxes[..., :2]
    boxes[..., :2] += boxes[..., 2:] * 0.5
    return boxes


def scale_(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Boxes (B, Q, 4) normalised, image_sizes (B, 2) as (height, width)."""
    boxes *= image_sizes.flip(-1).repeat(1, 2).unsqueeze(1).to(boxes.dtype)
    return boxes


def clip_(boxes: Tensor, height: float, width: float) -> Tensor:
    boxes[..., 0::2].clamp_(0, width)
    boxes[..., 1::2].clamp_(0, height)
    return boxes


def hflip_(boxes: Tensor, width: float) -> Tensor:
    left = width - boxes[..., 2]
    boxes[..., 2] = width - boxes[..., 0]
    boxes[..., 0] = left
    return boxes


def zero_below_(scores: Tensor, threshold: float) -> Tensor:
    scores[scores <= threshold] = 0
    return scores


def decode_(
    logits: Tensor, boxes: Tensor, image_sizes: Tensor, top_k: int = 300, threshold: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode a batch: labels (B, K), boxes (B, K, 4) in pixels, scores (B, K); writes into ``boxes``."""
    classes = logits.shape[-1]
    scale_(cxcywh_to_xyxy_(boxes), image_sizes)
    probabilities = torch.sigmoid(logits).flatten(1)
    scores, flat = torch.topk(probabilities, min(top_k, probabilities.shape[1]), dim=-1)
    labels, queries = flat % classes, flat // classes
    boxes = boxes.gather(1, queries.unsqueeze(-1).repeat(1, 1, 4))
    if threshold is not None:
        zero_below_(scores, threshold)
    return labels, boxes, scores
