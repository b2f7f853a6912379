"""Exact greedy non-maximum suppression with static shapes.

DETR-family detectors need none: their queries compete inside the network. It is an option for those whose training did
not quite teach that (few epochs, one-to-many heads, tiled images).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detpost import kernels
from detpost.detections import Detections

__all__ = ["NonMaximumSuppression", "nms"]


def nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Say which boxes greedy non-maximum suppression keeps.

    Boxes are taken by score descending, then index ascending, NaN scores last; a box is dropped where its IoU with a
    kept one before it (of the same label) is greater than the threshold. Equal to ``torchvision.ops.nms`` of each image
    and label apart, on the CPU, bit for bit of the IoU: a box whose IoU is not a number (zero areas, NaN, infinities)
    neither drops another nor is dropped.

    Args:
        boxes: (B, N, 4), floating, xyxy in any unit; compared as float32, or float64 if they are.
        scores: (B, N), floating.
        iou_threshold: in [0, 1].
        labels: (B, N), integer; boxes of different labels never drop each other. ``None``: one class.
        valid: (B, N), bool; boxes that are not valid drop none and are not kept. ``None``: all are.

    Returns:
        (B, N), bool, in the order of ``boxes``. Carries no gradient.

    Raises:
        TypeError: tensors of a wrong dtype, or a threshold that is no number.
        ValueError: shapes that do not fit, tensors on different devices, or a threshold outside [0, 1].

    Source:
        Neubeck and Van Gool, "Efficient Non-Maximum Suppression", ICPR 2006.

    Example:
        >>> boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [20.0, 0.0, 30.0, 10.0]]])
        >>> nms(boxes, torch.tensor([[0.8, 0.9, 0.3]]), iou_threshold=0.5)
        tensor([[False,  True,  True]])
    """
    _check(boxes, scores, labels, valid)
    return kernels.nms(boxes, scores, labels, valid, _checked_threshold(iou_threshold))


class NonMaximumSuppression(nn.Module):
    """Clear ``valid`` of the detections that greedy non-maximum suppression drops: Detections in, Detections out.

    Slots are taken in their order, which is best first as every post-processor here gives them. Scores and boxes stay
    differentiable.

    Args:
        iou_threshold: a detection is dropped where its IoU with a kept one before it is greater; in [0, 1].
        class_agnostic: whether detections of different labels drop each other too.
        compact: move what is kept to the front, its order unchanged; otherwise every detection stays in its slot.

    Raises:
        TypeError: a threshold that is no number.
        ValueError: a threshold outside [0, 1].

    Example:
        >>> from detpost import DecodeSpec, DetectionPostProcessor
        >>> post = DetectionPostProcessor(DecodeSpec(top_k=2))
        >>> suppress = NonMaximumSuppression(0.7)
        >>> logits, boxes = torch.tensor([[[2.0], [1.0]]]), torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]]])
        >>> suppress(post(logits, boxes)).valid
        tensor([[ True, False]])
    """

    def __init__(self, iou_threshold: float, class_agnostic: bool = False, compact: bool = False) -> None:
        super().__init__()
        self._threshold = _checked_threshold(iou_threshold)
        self.iou_threshold = iou_threshold
        self.class_agnostic = class_agnostic
        self.compact = compact

    def forward(self, detections: Detections) -> Detections:
        """Suppress.

        Args:
            detections: of B images in K slots, best first.

        Returns:
            Detections of the same shapes; slots that are not valid read score 0, label -1, query -1, box 0 0 0 0.

        Raises:
            TypeError: anything but Detections.
        """
        if not isinstance(detections, Detections):
            raise TypeError(
                f"detections must be Detections; got {type(detections).__name__}: detpost.nms.nms takes plain tensors"
            )
        return kernels.suppress(detections, self._threshold, not self.class_agnostic, self.compact)

    def extra_repr(self) -> str:
        """Show the arguments in ``repr``."""
        return f"{self.iou_threshold}, class_agnostic={self.class_agnostic}, compact={self.compact}"


def _checked_threshold(iou_threshold: float) -> float:
    if isinstance(iou_threshold, bool) or not isinstance(iou_threshold, (int, float)):
        raise TypeError(f"iou_threshold must be a number in [0, 1]; got {iou_threshold!r}")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in [0, 1]; got {iou_threshold}")
    return float(iou_threshold)


def _check(boxes: Tensor, scores: Tensor, labels: Tensor | None, valid: Tensor | None) -> None:
    for name, value, shape in (("boxes", boxes, "(B, N, 4)"), ("scores", scores, "(B, N)")):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating tensor of shape {shape}; got {what}")
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise ValueError(
            f"boxes must have shape (B, N, 4); got {tuple(boxes.shape)}: unsqueeze(0) makes one image a batch"
        )
    if labels is not None and (not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex()):
        what = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an integer tensor of shape (B, N); got {what}")
    if valid is not None and (not isinstance(valid, Tensor) or valid.dtype != torch.bool):
        what = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"valid must be a bool tensor of shape (B, N); got {what}")
    for name, values in (("scores", scores), ("labels", labels), ("valid", valid)):
        if values is None:
            continue
        if values.shape != boxes.shape[:2]:
            raise ValueError(f"{name} must have shape (B, N) = {tuple(boxes.shape[:2])}; got {tuple(values.shape)}")
        if values.device != boxes.device:
            raise ValueError(f"{name} are on {values.device} and boxes on {boxes.device}: move one with .to()")
