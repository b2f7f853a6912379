"""What stands behind the decode: non-maximum suppression, masks, run lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.inputs import ROTATED, Case, Size, is_installed, no_grad, with_kernel
from benchmarks.peers import rfdetr_class

__all__ = ["masks", "run_lengths", "suppression"]


def suppression(size: Size, device: str) -> dict[str, Case]:
    """Greedy suppression of (images, boxes, classes); torchvision takes one image at a time."""
    from detpost.nms import nms

    batch, count, classes = size
    generator = torch.Generator().manual_seed(0)
    boxes, scores, labels = [], [], []
    for _ in range(ROTATED):
        corners = torch.rand(batch, count, 2, generator=generator) * 500
        sides = 20 + 80 * torch.rand(batch, count, 2, generator=generator)
        boxes.append(torch.cat((corners, corners + sides), dim=-1).to(device))
        scores.append(torch.rand(batch, count, generator=generator).to(device))
        labels.append(torch.randint(classes, (batch, count), generator=generator).to(device))
    own = no_grad(lambda i: nms(boxes[i], scores[i], 0.5, None if classes == 1 else labels[i]))
    contenders = {"detpost": own, "detpost (aten)": with_kernel("aten", own)}
    if is_installed("torchvision"):
        from torchvision import ops

        def theirs(turn: int) -> Any:
            images = zip(boxes[turn], scores[turn], labels[turn], strict=True)
            if classes == 1:
                return [ops.nms(box, score, 0.5) for box, score, _ in images]
            return [ops.batched_nms(box, score, label, 0.5) for box, score, label in images]

        contenders |= {"torchvision": no_grad(theirs)}
    return contenders


def _mask_inputs(size: Size) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    slots, side, height, width = size
    generator = torch.Generator().manual_seed(0)
    logits, boxes, masks = [], [], []
    for _ in range(2):  # large: two take turns
        logits.append(3 + torch.rand(1, slots, 1, generator=generator))
        box = 0.2 + 0.5 * torch.rand(1, slots, 4, generator=generator)
        y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
        cx, cy, w, h = box[0, :, :, None, None].unbind(1)
        noise = 0.3 * torch.randn(slots, side, side, generator=generator)
        masks.append((8 * (1 - ((x - cx) / w * 3).square() - ((y - cy) / h * 3).square()) + noise)[None])
        boxes.append(box)
    return logits, boxes, masks, torch.tensor([[height, width]])


def masks(size: Size, device: str) -> dict[str, Case]:
    """Mask logits to masks at image size."""
    from detpost import DetectionPostProcessor
    from detpost.heads import masks_per_image

    logits, boxes, values, sizes = _mask_inputs(size)
    post = DetectionPostProcessor.from_preset("rfdetr", top_k=size[0])
    own = no_grad(lambda i: masks_per_image(post(logits[i % 2], boxes[i % 2], sizes), values[i % 2], sizes)[0])
    contenders = {"detpost": own, "detpost (aten)": with_kernel("aten", own)}
    if rfdetr_class() is not None:
        theirs = rfdetr_class()(num_select=size[0])
        contenders |= {
            "RF-DETR": no_grad(
                lambda i: theirs(
                    {"pred_logits": logits[i % 2], "pred_boxes": boxes[i % 2], "pred_masks": values[i % 2]}, sizes
                )[0]["masks"]
            )
        }
    return contenders


def run_lengths(size: Size, device: str) -> dict[str, Case]:
    """Masks at image size to COCO's compressed run lengths."""
    from detpost.heads import masks_per_image, to_rle
    from detpost.postprocess import DetectionPostProcessor

    logits, boxes, values, sizes = _mask_inputs(size)
    post = DetectionPostProcessor.from_preset("rfdetr", top_k=size[0])
    with torch.no_grad():
        found = [masks_per_image(post(logits[i], boxes[i], sizes), values[i], sizes)[0] for i in range(2)]
    contenders: dict[str, Case] = {"detpost": no_grad(lambda i: to_rle(found[i % 2]))}
    if is_installed("pycocotools"):
        from pycocotools import mask as coco

        def theirs(turn: int) -> Any:
            return [coco.encode(np.asfortranarray(mask)) for mask in found[turn % 2].numpy().astype(np.uint8).squeeze()]

        contenders |= {"pycocotools": theirs}
    return contenders
