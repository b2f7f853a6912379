"""In place of the original RT-DETR's ``RTDETRPostProcessor``: the same constructor, the same call, the same results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from detpost import kernels
from detpost.detections import Detections
from detpost.heads._gather import lookup_table
from detpost.integrations.conventions import MisfitError, check_outputs, check_sizes, in_query_order, read_outputs
from detpost.postprocess import DetectionPostProcessor
from detpost.spec import DecodeSpec

__all__ = ["COCO_CATEGORY_IDS", "RTDETRPostProcessor"]

# COCO numbers its 80 categories from 1 to 90, with gaps.
_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_CATEGORY_IDS: tuple[int, ...] = tuple(category for category in range(1, 91) if category not in _UNUSED)


class RTDETRPostProcessor(nn.Module):
    """Turn RT-DETR's ``pred_logits`` and ``pred_boxes`` into detections, as its own post-processor does.

    After :meth:`deploy` it returns tensors and compiles and exports in one graph.

    Args:
        num_classes: C, the classes of the logits. Without focal loss it says nothing: the last class of the logits is
            then "no object", and is never reported.
        use_focal_loss: score by sigmoid and rank (query, class) pairs; else by softmax over the classes, with the best
            class of each query, in the order of the queries where there are no more than ``num_top_queries``.
        num_top_queries: how many to keep.
        remap_mscoco_category: give COCO's category ids (1 to 90) for labels 0 to 79. Not after :meth:`deploy`.

    Raises:
        ValueError: ``remap_mscoco_category`` with more classes than COCO has.

    Source:
        ``src/zoo/rtdetr/rtdetr_postprocessor.py`` of ``rtdetr_pytorch`` and ``rtdetrv2_pytorch`` at
        https://github.com/lyuwenyu/RT-DETR. Where ours differs on purpose stands in ``docs/drop-ins.md``.

    Example:
        >>> post = RTDETRPostProcessor(num_classes=2, num_top_queries=1).deploy()
        >>> outputs = {
        ...     "pred_logits": torch.tensor([[[-3.0, 3.0]]]),
        ...     "pred_boxes": torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]),
        ... }
        >>> labels, boxes, scores = post(outputs, torch.tensor([[20, 10]]))  # (width, height)
        >>> labels, boxes
        (tensor([[1]]), tensor([[[ 0.,  0., 20., 10.]]]))
    """

    # What RT-DETR's configuration system fills in from the top of a YAML file.
    __share__: ClassVar[list[str]] = ["num_classes", "use_focal_loss", "num_top_queries", "remap_mscoco_category"]

    category_ids: Tensor

    def __init__(
        self,
        num_classes: int = 80,
        use_focal_loss: bool = True,
        num_top_queries: int = 300,
        remap_mscoco_category: bool = False,
    ) -> None:
        super().__init__()
        if remap_mscoco_category and num_classes > len(COCO_CATEGORY_IDS):
            raise ValueError(
                f"remap_mscoco_category needs num_classes of at most {len(COCO_CATEGORY_IDS)}; got {num_classes}"
            )
        self.num_classes = int(num_classes)
        self.use_focal_loss = use_focal_loss
        self.num_top_queries = num_top_queries
        self.remap_mscoco_category = remap_mscoco_category
        self.deploy_mode = False
        self.decode = DetectionPostProcessor(
            DecodeSpec.preset("rtdetr" if use_focal_loss else "detr", top_k=num_top_queries)
        )
        self._direct = kernels.DirectDecode(self.decode.spec, swapped_sizes=True, needs_sizes=True)
        # Not persistent: a checkpoint of the original loads without a missing key.
        self.register_buffer("category_ids", lookup_table(COCO_CATEGORY_IDS), persistent=False)

    def forward(
        self, outputs: Mapping[str, Any], orig_target_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | list[dict[str, Tensor]]:
        """Decode a batch.

        Args:
            outputs: ``pred_logits`` (B, Q, C) and ``pred_boxes`` (B, Q, 4), cxcywh in units of the image.
            orig_target_sizes: (B, 2), **(width, height)** of each image in pixels.

        Returns:
            For each image ``labels`` (K,), ``boxes`` (K, 4), xyxy in pixels, and ``scores`` (K,), with
            K = min(num_top_queries, Q * C) (without focal loss: min(num_top_queries, Q)). After :meth:`deploy` the
            tuple (labels (B, K), boxes (B, K, 4), scores (B, K)).

        Raises:
            ValueError: shapes that do not fit; a ``RuntimeError`` too, as in the original.
            TypeError: outputs without logits or boxes (a ``KeyError`` too), or tensors of a wrong dtype.
        """
        logits, boxes = read_outputs(outputs)

        def otherwise(*_: Any) -> list[dict[str, Tensor]]:
            return self._lists(self._detections(logits, boxes, orig_target_sizes))

        if self.deploy_mode:
            found = self._detections(logits, boxes, orig_target_sizes)
            return found.labels, found.boxes, found.scores
        if self.remap_mscoco_category or not isinstance(logits, Tensor) or logits.ndim != 3 or not self._fits(logits):
            return otherwise()
        by_query = self._keeps_query_order(logits)
        names = ("labels", "boxes", "scores")
        return self._direct.dicts(logits, boxes, orig_target_sizes, otherwise, names, all_slots=True, by_query=by_query)

    def _lists(self, found: Detections) -> list[dict[str, Tensor]]:
        labels = found.labels
        if self.remap_mscoco_category:
            labels = torch.where(found.valid, self.category_ids[labels.clamp(min=0)], -1)
        return [
            {"labels": label, "boxes": box, "scores": score}
            for label, box, score in zip(labels, found.boxes, found.scores, strict=True)
        ]

    def _fits(self, logits: Tensor) -> bool:
        return not self.use_focal_loss or logits.shape[2] == self.num_classes

    def _keeps_query_order(self, logits: Tensor) -> bool:
        return not self.use_focal_loss and logits.shape[1] <= self.num_top_queries

    def _detections(self, logits: Any, boxes: Any, orig_target_sizes: Any) -> Detections:
        """Check, and decode into all slots, in the order in which they are given out."""
        check_outputs(logits, boxes, "pred_")
        check_sizes(orig_target_sizes, logits, "orig_target_sizes", "(width, height)")
        if not self._fits(logits):
            raise MisfitError(f"pred_logits must have num_classes = {self.num_classes} classes; got {logits.shape[2]}")
        found = self._direct.decode(logits, boxes, orig_target_sizes, self._decode_swapped)
        return in_query_order(found, logits.shape[1]) if self._keeps_query_order(logits) else found

    def _decode_swapped(self, logits: Tensor, boxes: Tensor, orig_target_sizes: Tensor) -> Detections:
        return cast(Detections, self.decode(logits, boxes, orig_target_sizes.flip(-1)))

    def deploy(self) -> RTDETRPostProcessor:
        """Return tensors from now on, and switch to evaluation mode.

        Returns:
            This module.
        """
        self.deploy_mode = True
        return self.eval()

    @property
    def iou_types(self) -> tuple[str, ...]:
        """What RT-DETR's evaluator measures of these results."""
        return ("bbox",)

    def extra_repr(self) -> str:
        """Show the constructor's arguments in ``repr``."""
        return (
            f"use_focal_loss={self.use_focal_loss}, num_classes={self.num_classes}, "
            f"num_top_queries={self.num_top_queries}"
        )
