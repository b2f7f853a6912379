"""Detections drawn on images, with supervision's annotators."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from detpost.detections import import_supervision

__all__ = ["draw"]

# Labels are unreadable on small images: those are enlarged until the longer side has about this many pixels.
_LEGIBLE_SIDE = 640


def draw(image: Tensor, found: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Draw one image's detections.

    Args:
        image: (3, H, W), uint8, RGB.
        found: an entry of what :meth:`detpost.Detector.predict` gives.

    Returns:
        (H * n, W * n, 3), uint8, RGB, with a box and the class name and score of each detection; small images are
        enlarged by a whole number n.

    Raises:
        ImportError: supervision is not installed; the message names the extra.
    """
    supervision = import_supervision("drawing")
    times = max(1, _LEGIBLE_SIDE // max(image.shape[-2:]))
    scene = image.permute(1, 2, 0).repeat_interleave(times, 0).repeat_interleave(times, 1).contiguous().numpy()
    names = np.array(found["label_names"], str)
    detections = supervision.Detections(
        xyxy=(found["boxes"] * times).to(torch.float32).reshape(-1, 4).numpy(),
        confidence=found["scores"].numpy(),
        class_id=found["labels"].numpy().astype(int),
        data={"class_name": names},
    )
    captions = [f"{name} {score:.2f}" for name, score in zip(names, found["scores"].tolist(), strict=True)]
    # Annotators draw on the array they are given; supervision's colours are BGR, as OpenCV's.
    canvas = np.ascontiguousarray(scene[:, :, ::-1])
    thickness = max(1, round(max(canvas.shape[:2]) / 400))
    canvas = supervision.BoxAnnotator(thickness=thickness).annotate(canvas, detections)
    canvas = supervision.LabelAnnotator(
        text_scale=max(0.4, max(canvas.shape[:2]) / 1600), text_padding=3, smart_position=True
    ).annotate(canvas, detections, labels=captions)
    return np.ascontiguousarray(canvas[:, :, ::-1])
