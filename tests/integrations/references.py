"""What the originals do, written plainly from their behaviour: the drop-ins are held to these where they are absent.

They choose by ``torch.topk`` or ``sort``, so they are asked about outputs without ties alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def outputs(batch=3, queries=40, classes=7, seed=0, spread=9.0):
    """Raw outputs whose scores cover (0, 1) and differ, with boxes that leave the image."""
    generator = torch.Generator().manual_seed(seed)
    count = batch * queries * classes
    logits = torch.linspace(-spread, spread, count)[torch.randperm(count, generator=generator)]
    boxes = torch.rand(batch, queries, 4, generator=generator) * 1.4 - 0.2
    return {"pred_logits": logits.reshape(batch, queries, classes), "pred_boxes": boxes}


SIZES = torch.tensor([[480, 640], [33, 77], [1000, 10]])  # (height, width)


def corners(boxes: Tensor) -> Tensor:
    x, y, width, height = boxes.unbind(-1)
    return torch.stack((x - width / 2, y - height / 2, x + width / 2, y + height / 2), dim=-1)


def rtdetr(raw, sizes_wh, focal=True, top=300):
    """RT-DETR's labels, boxes and scores, (B, K) each; its softmax over the classes, its boxes always in pixels."""
    logits, boxes = raw["pred_logits"], corners(raw["pred_boxes"]) * torch.cat((sizes_wh, sizes_wh), 1)[:, None]
    if focal:
        scores, flat = logits.sigmoid().flatten(1).topk(top)
        queries, labels = flat // logits.shape[2], flat % logits.shape[2]
    else:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        if scores.shape[1] <= top:
            return labels, boxes, scores
        scores, queries = scores.topk(top)
        labels = labels.gather(1, queries)
    return labels, torch.stack([rows[index] for rows, index in zip(boxes, queries, strict=True)]), scores


def rfdetr(raw, sizes_hw, select=300):
    """RF-DETR's boxes: one dict per image, and the queries that made them."""
    results = []
    for logits, boxes, (height, width) in zip(raw["pred_logits"], raw["pred_boxes"], sizes_hw.tolist(), strict=True):
        probabilities = logits.sigmoid().flatten()
        order = probabilities.argsort(descending=True, stable=True)[:select]
        queries = order // logits.shape[1]
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:].clamp(min=0)), dim=1)  # no box has less than no width
        pixels = corners(boxes)[queries] * torch.tensor([width, height, width, height])
        clipped = torch.minimum(pixels.clamp(min=0), torch.tensor([width, height, width, height]))
        results.append(
            {
                "scores": probabilities[order],
                "labels": order % logits.shape[1],
                "boxes": clipped.to(boxes.dtype),
                "queries": queries,
            }
        )
    return results


def ultralytics(preds, shapes, conf=0.25, classes=None, max_det=300):
    """Ultralytics 8.3's rows from (B, Q, 4 + C)."""
    results = []
    for image, (height, width) in zip(preds, shapes, strict=True):
        scores, labels = image[:, 4:].max(-1)
        keep = scores > conf
        if classes is not None:
            keep &= torch.tensor([label in classes for label in labels.tolist()])
        pixels = corners(image[:, :4]) * torch.tensor([width, height, width, height])
        rows = torch.cat((pixels, scores[:, None], labels[:, None]), dim=1)[keep]
        results.append(rows[rows[:, 4].argsort(descending=True)][:max_det])
    return results
