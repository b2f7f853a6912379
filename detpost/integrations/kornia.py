"""In place of ``kornia.models.rt_detr.DETRPostProcessor``: the same constructor, the same call, the same rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from detpost import boxes as box_ops
from detpost import kernels
from detpost.detections import INVALID, split_by_image
from detpost.integrations.conventions import MisfitError, check_outputs, check_sizes, check_threshold
from detpost.postprocess import DetectionPostProcessor
from detpost.spec import DecodeSpec

__all__ = ["DETRPostProcessor"]


class DETRPostProcessor(nn.Module):
    """Turn RT-DETR's raw outputs into kornia's rows: class, score, x, y, width, height.

    With ``confidence_filtering=False`` or ``filter_as_zero=True`` it returns one tensor and compiles and exports in one
    graph. Otherwise it returns a list, one tensor per image, whose lengths follow the scores.

    Args:
        confidence_threshold: keep ``score > confidence_threshold``; ``None`` is 0 with filtering.
        num_classes: C, the classes of the logits.
        num_top_queries: how many (query, class) pairs to keep.
        confidence_filtering: whether to filter at all.
        filter_as_zero: fill the rows that are filtered out with zeros in place of dropping them.

    Raises:
        TypeError: ``num_classes`` is no int, or the threshold no number.
        ValueError: fewer than one query to keep.

    Source:
        ``kornia/models/rt_detr/post_processor.py`` of kornia 0.9. Where ours differs on purpose stands in
        ``docs/drop-ins.md``.

    Example:
        >>> post = DETRPostProcessor(0.5, num_classes=2, num_top_queries=2)
        >>> logits, boxes = torch.tensor([[[3.0, -3.0]]]), torch.tensor([[[0.5, 0.5, 0.5, 1.0]]])
        >>> post(logits, boxes, torch.tensor([[10, 20]]))[0][:, [0, 2, 3, 4, 5]]  # (height, width)
        tensor([[ 0.,  5.,  0., 10., 10.]])
    """

    def __init__(
        self,
        confidence_threshold: float | None = None,
        num_classes: int = 80,
        num_top_queries: int = 300,
        confidence_filtering: bool = True,
        filter_as_zero: bool = False,
    ) -> None:
        super().__init__()
        if confidence_threshold is not None:
            check_threshold(confidence_threshold, "confidence_threshold")
        if not isinstance(num_classes, int):
            raise TypeError(f"num_classes must be an int; got {num_classes!r}")
        self.confidence_threshold = confidence_threshold
        self.num_classes = num_classes
        self.num_top_queries = num_top_queries
        self.confidence_filtering = confidence_filtering
        self.filter_as_zero = filter_as_zero
        self.decode = DetectionPostProcessor(DecodeSpec(top_k=num_top_queries))
        self._direct = kernels.DirectDecode(self.decode.spec, out_format="xywh", needs_sizes=True)

    @classmethod
    def like(cls, post_processor: Any) -> DETRPostProcessor:
        """Make one with the settings of kornia's own: ``detector.post_processor = DETRPostProcessor.like(...)``.

        Args:
            post_processor: a ``kornia.models.rt_detr.DETRPostProcessor``, such as ``RTDETRDetectorBuilder`` puts in.

        Returns:
            The module.

        Raises:
            TypeError: a module of another kind.
        """
        if isinstance(post_processor, cls):
            return post_processor
        try:
            return cls(
                confidence_threshold=post_processor.confidence_threshold,
                num_classes=post_processor.num_classes,
                num_top_queries=post_processor.num_top_queries,
                confidence_filtering=post_processor.confidence_filtering,
                filter_as_zero=post_processor.box_filtering.filter_as_zero,
            )
        except AttributeError:
            raise TypeError(f"expected kornia's DETRPostProcessor; got {type(post_processor).__name__}") from None

    def forward(self, logits: Tensor, boxes: Tensor, original_sizes: Tensor) -> Tensor | list[Tensor]:
        """Decode a batch.

        Args:
            logits: (B, Q, C), floating, with C = ``num_classes``.
            boxes: (B, Q, 4), floating, cxcywh in units of the image.
            original_sizes: (B, 2), (height, width) of each image in pixels.

        Returns:
            (B, K, 6) with K = min(num_top_queries, Q * C), the dtype of the scores; or a list of B tensors (D, 6).

        Raises:
            ValueError: shapes that do not fit; a ``RuntimeError`` too, as in kornia.
            TypeError: what is no tensor, or tensors of a wrong dtype; an ``AttributeError`` too.
        """
        gives_list = self.confidence_filtering and self.confidence_threshold != 0 and not self.filter_as_zero
        if gives_list and isinstance(logits, Tensor) and logits.shape[-1:] == (self.num_classes,):
            layout = kernels.LABEL_SCORE_BOX
            return self._direct.rows(logits, boxes, original_sizes, self._list, layout, self._threshold())
        if gives_list:
            return self._list(logits, boxes, original_sizes)
        rows, keep = self._rows(logits, boxes, original_sizes)
        if not self.confidence_filtering or self.confidence_threshold == 0:
            return rows
        return torch.where(keep.unsqueeze(-1), rows, 0.0)

    def _list(self, logits: Tensor, boxes: Tensor, original_sizes: Tensor) -> list[Tensor]:
        rows, keep = self._rows(logits, boxes, original_sizes)
        return [image for (image,) in split_by_image(keep, rows)]

    def _rows(self, logits: Tensor, boxes: Tensor, original_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Check what came, and give the rows (B, K, 6) of all slots, and which are kept (B, K)."""
        check_outputs(logits, boxes)
        check_sizes(original_sizes, logits, "original_sizes")
        found = self.decode(logits, boxes, original_sizes)
        if logits.shape[2] != self.num_classes:
            raise MisfitError(f"logits must have num_classes = {self.num_classes} classes; got {logits.shape[2]}")
        # Not from the corners, whose difference would round the width once more.
        chosen = boxes.gather(1, found.queries.clamp(min=0).unsqueeze(-1).expand(-1, -1, 4)).to(found.boxes.dtype)
        corner_and_size = box_ops.scale(box_ops.convert(chosen, "cxcywh", "xywh"), original_sizes)
        corner_and_size = torch.where(found.valid.unsqueeze(-1), corner_and_size, INVALID.box)
        rows = torch.cat((found.labels.unsqueeze(-1), found.scores.unsqueeze(-1), corner_and_size), dim=-1)  # (B, K, 6)
        return rows, found.valid & (found.scores > self._threshold())

    def _threshold(self) -> float:
        return 0.0 if self.confidence_threshold is None else self.confidence_threshold
