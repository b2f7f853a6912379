"""In place of RF-DETR's ``PostProcess``: the same constructor, the same call, the same results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from detpost import kernels
from detpost.detections import Detections
from detpost.integrations.conventions import (
    MisfitError,
    check_outputs,
    check_sizes,
    check_threshold,
    read_outputs,
)
from detpost.postprocess import DetectionPostProcessor
from detpost.spec import DecodeSpec

__all__ = ["PostProcess"]


class AssertedMisfitError(MisfitError, AssertionError):
    """Shapes that do not fit: RF-DETR asserts that there is one size for each image."""


class PostProcess(nn.Module):
    """Turn RF-DETR's raw outputs into one dict per image.

    Each dict has ``queries`` beside what the original gives: the index of the query that made each detection, by which
    anything else that the model says per query can be gathered. :meth:`heads` is the place to do so; as it is, it gives
    the original's masks and keypoints.

    Args:
        num_select: how many (query, class) pairs to keep, at least 1.
        num_keypoints_per_class: how many keypoints each class has.
        trace_alpha: how much uncertain keypoints lower the score; see :class:`detpost.heads.RFDETRKeypoints`.
        upsample_masks_to_image_size: whether masks come in the size of the image, or in the network's own.

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
        # A box of negative width or height is one of none.
        self._direct = kernels.DirectDecode(self.decode.spec, sides_not_negative=True, needs_sizes=True)

    def forward(
        self, outputs: Mapping[str, Any], target_sizes: Tensor, score_threshold: float | None = None
    ) -> list[dict[str, Tensor]]:
        """Decode a batch.

        Args:
            outputs: ``pred_logits`` (B, Q, C) and ``pred_boxes`` (B, Q, 4), cxcywh in units of the image; where the
                model has them, ``pred_masks`` (B, Q, h, w) or ``pred_keypoints`` (B, Q, classes * N, D).
            target_sizes: (B, 2), (height, width) of each image in pixels.
            score_threshold: with ``pred_masks``, keep ``score > score_threshold`` alone, as the original does; boxes
                and keypoints keep K detections whatever it says.

        Returns:
            For each image ``scores`` (K,), ``labels`` (K,), ``boxes`` (K, 4), xyxy in pixels and clipped to the image,
            and ``queries`` (K,), with K = min(num_select, Q * C), and what :meth:`heads` adds. Slots of NaN read label
            -1 and score 0; with masks or keypoints they are left out.

        Raises:
            ValueError: shapes that do not fit (a ``RuntimeError`` too, and of sizes an ``AssertionError``, as in the
                original), or masks and keypoints at once.
            TypeError: outputs without logits or boxes (a ``KeyError`` too), or tensors of a wrong dtype.
        """
        if not isinstance(outputs, Mapping):
            raise TypeError(f"outputs must be a mapping with pred_logits and pred_boxes; got {type(outputs).__name__}")
        logits, boxes = read_outputs(outputs)
        boxes_alone = outputs.get("pred_masks") is None and outputs.get("pred_keypoints") is None

        def otherwise(*_: Any) -> list[dict[str, Tensor]]:
            return self._checked(outputs, logits, boxes, target_sizes, score_threshold)

        if boxes_alone and score_threshold is None and type(self).heads is PostProcess.heads:
            return self._direct.dicts(logits, boxes, target_sizes, otherwise, all_slots=True)
        return otherwise()

    def _checked(
        self,
        outputs: Mapping[str, Any],
        logits: Any,
        boxes: Any,
        target_sizes: Tensor,
        score_threshold: float | None,
    ) -> list[dict[str, Tensor]]:
        """Check what is not a plain call of boxes alone, and decode it."""
        if outputs.get("pred_masks") is not None and outputs.get("pred_keypoints") is not None:
            raise ValueError("expected pred_masks or pred_keypoints; got both: RF-DETR has no such model")
        check_outputs(logits, boxes, "pred_", AssertedMisfitError)
        check_sizes(target_sizes, logits, "target_sizes", error=AssertedMisfitError)
        if score_threshold is not None:
            check_threshold(score_threshold, "score_threshold")
        with torch.no_grad():
            return self._decode(outputs, logits, boxes, target_sizes, score_threshold)

    def _decode(
        self,
        outputs: Mapping[str, Any],
        logits: Tensor,
        boxes: Tensor,
        target_sizes: Tensor,
        score_threshold: float | None,
    ) -> list[dict[str, Tensor]]:
        masks = outputs.get("pred_masks")
        if masks is not None and masks.ndim == 4 and masks.shape[1] != logits.shape[1]:
            raise MisfitError(f"pred_masks must be of {logits.shape[1]} queries; got {masks.shape[1]}")
        found = self._direct.decode(logits, boxes, target_sizes, self._decode_positive)
        if masks is None and outputs.get("pred_keypoints") is None:
            names = ("scores", "labels", "boxes", "queries")
            rows = [dict(zip(names, image, strict=True)) for image in zip(*found[:4], strict=True)]
        else:
            if masks is not None and score_threshold is not None:
                found = found._replace(valid=found.valid & (found.scores > score_threshold))
            rows = found.to_list()
        return [row | extra for row, extra in zip(rows, self.heads(outputs, found, target_sizes, rows), strict=True)]

    def _decode_positive(self, logits: Tensor, boxes: Tensor, target_sizes: Tensor) -> Detections:
        positive = torch.cat((boxes[..., :2], boxes[..., 2:].clamp(min=0)), dim=-1)
        return cast(Detections, self.decode(logits, positive, target_sizes))

    def heads(
        self, outputs: Mapping[str, Any], found: Detections, target_sizes: Tensor, rows: Sequence[Mapping[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        """Say what to add to each image's dict, or put in place of what is there. Override it for a head of your own.

        Args:
            outputs: all that the model gave.
            found: all K slots of the batch; ``valid`` holds the score threshold where one applies.
            target_sizes: (B, 2), (height, width).
            rows: for each image what is returned so far; its ``queries`` index dimension 1 of ``outputs``.

        Returns:
            For each image ``masks`` (D, 1, height, width), bool, where the model gave ``pred_masks``; ``keypoints``
            (D, N, 3), ``keypoint_precision_cholesky`` (D, N, 3) and ``scores`` (D,) where it gave ``pred_keypoints``;
            else nothing.
        """
        masks, keypoints = outputs.get("pred_masks"), outputs.get("pred_keypoints")
        if masks is not None:
            return [{"masks": image} for image in self._masks(masks, found, target_sizes, rows)]
        if keypoints is not None:
            return self._keypoints(keypoints, found, target_sizes)
        return [{} for _ in rows]

    def _masks(
        self, masks: Tensor, found: Detections, target_sizes: Tensor, rows: Sequence[Mapping[str, Tensor]]
    ) -> list[Tensor]:
        if self.upsample_masks_to_image_size:
            from detpost.heads import masks_per_image

            return masks_per_image(found, masks, target_sizes)
        return [(image[row["queries"]] > 0).unsqueeze(1) for image, row in zip(masks, rows, strict=True)]

    def _keypoints(self, keypoints: Tensor, found: Detections, target_sizes: Tensor) -> list[dict[str, Tensor]]:
        if not any(self.num_keypoints_per_class):  # no class has any: none come out, as in the original
            none = found.boxes.new_zeros((0, 3))
            return [
                {"keypoints": none.expand(count, 0, 3), "keypoint_precision_cholesky": none.expand(count, 0, 3)}
                for count in map(int, found.valid.sum(dim=1))
            ]
        from detpost.heads import RFDETRKeypoints

        decode = RFDETRKeypoints(self.num_keypoints_per_class, self.trace_alpha).to(keypoints.device)
        names = ("keypoints", "scores", "keypoint_precision_cholesky")
        return [
            {name: values[valid] for name, values in zip(names, image, strict=True)}
            for *image, valid in zip(*decode(found, keypoints, target_sizes), found.valid, strict=True)
        ]
