"""A network that gives masks, with its post-processor behind it: images in, detections and their masks out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from detpost.detections import Detections
from detpost.heads._gather import by_query
from detpost.postprocess import DetectionPostProcessor, raw_outputs

__all__ = ["SegmenterModule"]


class SegmenterModule(nn.Module):
    """As :class:`detpost.postprocess.DetectorModule`, for networks whose outputs have ``pred_masks`` (B, Q, h, w).

    Args:
        model: images (B, 3, H, W) to a mapping.
        post: the post-processor.

    Example:
        >>> import torch
        >>> class Model(nn.Module):
        ...     def forward(self, images):
        ...         found = {"logits": torch.zeros(1, 5, 2), "pred_boxes": torch.full((1, 5, 4), 0.5)}
        ...         return {**found, "pred_masks": torch.zeros(1, 5, 2, 2)}
        >>> module = SegmenterModule(Model(), DetectionPostProcessor.from_preset("rtdetr", top_k=3))
        >>> module(torch.zeros(1, 3, 8, 8))[1].shape
        torch.Size([1, 3, 2, 2])
    """

    def __init__(self, model: nn.Module, post: DetectionPostProcessor) -> None:
        super().__init__()
        self.model: nn.Module = model
        self.post: DetectionPostProcessor = post

    def forward(
        self, images: Tensor, image_sizes: Tensor | None = None, pixel_mask: Tensor | None = None
    ) -> tuple[Detections, Tensor]:
        """Detect.

        Args:
            images: (B, 3, H, W), floating.
            image_sizes: (B, 2), (height, width) of each original image; ``None`` leaves boxes normalised.
            pixel_mask: (B, H, W), 1 where a padded batch holds image; only for models that take one.

        Returns:
            Detections, and the raw masks (B, K, h, w) of their queries.

        Raises:
            TypeError: a model that gives no logits, boxes or masks.
        """
        outputs: Any = self.model(images) if pixel_mask is None else self.model(images, pixel_mask=pixel_mask)
        found: Detections = self.post(*raw_outputs(outputs), image_sizes)
        masks = outputs.get("pred_masks")
        if masks is None:
            raise TypeError(f"the model must give pred_masks; got {', '.join(map(str, outputs))}")
        return found, by_query(masks, found.queries)
