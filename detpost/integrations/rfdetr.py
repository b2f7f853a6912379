"""In place of RF-DETR's ``PostProcess``: the same constructor, the same call, the same boxes; heads through a hook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detpost.detections import Detections
from detpost.postprocess import DetectionPostProcessor, raw_outputs
from detpost.spec import DecodeSpec

__all__ = ["PostProcess"]


class PostProcess(nn.Module):
    """Turn RF-DETR's raw outputs into one dict per image.

    Each dict has ``queries`` beside what the original gives: the index of the query that made each detection, by which
    anything else that the model says per query (masks, keypoints, embeddings) is gathered. :meth:`heads` is the place
    to do so.

    Args:
        num_select: how many (query, class) pairs to keep, at least 1.
        num_keypoints_per_class: kept for :meth:`heads`.
        trace_alpha: kept for :meth:`heads`.
        upsample_masks_to_image_size: kept for :meth:`heads`.

    Source:
        ``rfdetr/models/postprocess.py`` of rfdetr 1.11. Where ours differs on purpose stands in ``docs/drop-ins.md``.

    Example:
        >>> post = PostProcess(num_select=2)
        >>> outputs = {
        ...     "pred_logits": torch.tensor([[[3.0, -3.0], [1.0, 2.0]]]),
        ...     "pred_boxes": torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.9, 0.5, 0.4, 0.2]]]),
        ... }
        >>> image = post(outputs, torch.tensor([[10, 20]]))[0]  # (height, width)
        >>> image["labels"], image["queries"], image["boxes"]
        (tensor([0, 1]), tensor([0, 1]), tensor([[ 0.,  0., 20., 10.],
                [14.,  4., 20.,  6.]]))
    """

    def __init__(
        self,
        num_select: int = 300,
        num_keypoints_per_class: Sequence[int] | None = None,
        trace_alpha: float = 0.2,
        upsample_masks_to_image_size: bool = True,
    ) -> None:
        super().__init__()
        self.num_select = num_select
        self.num_keypoints_per_class = list(num_keypoints_per_class or [])
        self.trace_alpha = trace_alpha
        self.upsample_masks_to_image_size = upsample_masks_to_image_size
        self.decode = DetectionPostProcessor(DecodeSpec.preset("rfdetr", top_k=num_select))

    @torch.no_grad()
    def forward(
        self, outputs: Mapping[str, Any], target_sizes: Tensor, score_threshold: float | None = None
    ) -> list[dict[str, Tensor]]:
        """Decode a batch.

        Args:
            outputs: ``pred_logits`` (B, Q, C) and ``pred_boxes`` (B, Q, 4), cxcywh in units of the image; whatever else
                it holds is for :meth:`heads`.
            target_sizes: (B, 2), (height, width) of each image in pixels.
            score_threshold: with ``pred_masks``, keep ``score > score_threshold`` alone, as the original does; boxes by
                themselves keep K detections whatever it says.

        Returns:
            For each image ``scores`` (K,), ``labels`` (K,), ``boxes`` (K, 4), xyxy in pixels and clipped to the image,
            and ``queries`` (K,), with K = min(num_select, Q * C), and what :meth:`heads` adds.

        Raises:
            ValueError: shapes that do not fit, or masks and keypoints at once.
            TypeError: outputs without logits or boxes, or tensors of a wrong dtype.
        """
        if outputs.get("pred_masks") is not None and outputs.get("pred_keypoints") is not None:
            raise ValueError("expected pred_masks or pred_keypoints; got both: RF-DETR has no such model")
        logits, boxes = raw_outputs(outputs)
        # A box of negative width or height is one of none.
        found = self.decode(logits, torch.cat((boxes[..., :2], boxes[..., 2:].clamp(min=0)), dim=-1), target_sizes)
        names = ("scores", "labels", "boxes", "queries")
        rows = [dict(zip(names, image, strict=True)) for image in zip(*found[:4], strict=True)]
        if outputs.get("pred_masks") is not None and score_threshold is not None:
            found = found._replace(valid=found.valid & (found.scores > score_threshold))
            rows = found.to_list()
        return [row | extra for row, extra in zip(rows, self.heads(outputs, found, target_sizes, rows), strict=True)]

    def heads(
        self, outputs: Mapping[str, Any], found: Detections, target_sizes: Tensor, rows: Sequence[Mapping[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        """Say what to add to each image's dict; override it for masks and keypoints.

        Args:
            outputs: all that the model gave, ``pred_masks`` (B, Q, h, w) and ``pred_keypoints`` included.
            found: all K slots of the batch; ``valid`` holds the score threshold where one applies.
            target_sizes: (B, 2), (height, width).
            rows: for each image what is returned so far; its ``queries`` index dimension 1 of ``outputs``.

        Returns:
            For each image what to add. Here: ``mask_logits`` (D, h, w), the raw masks of the kept queries, where the
            model gave masks, else nothing.
        """
        masks = outputs.get("pred_masks")
        if masks is None:
            return [{} for _ in rows]
        return [
            {"mask_logits": image.index_select(0, row["queries"].clamp(min=0))}
            for image, row in zip(masks, rows, strict=True)
        ]
