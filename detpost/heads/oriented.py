"""Oriented boxes: (cx, cy, w, h, angle) of the kept queries, in pixels of the original image, with their corners.

Conventions:

- The angle is in radians and turns the box clockwise as seen on the screen (x to the right, y down): at 0 the side of
  length w lies along x, at pi / 2 it points down. So it is in OpenMMLab's mmrotate and in Ultralytics' ``xywhr``.
- A rectangle turned by pi is itself, so any angle is taken and one in [-pi / 2, pi / 2) comes back. w and h are not
  swapped: w may be the shorter side.
- Scaling follows the oriented DETR heads of the field (Rotated DINO and RT-DETR on mmrotate, RHINO): cx and w times the
  image's width, cy and h times its height, the angle as it is. That undoes their training targets, where w in pixels
  *along the box* was divided by the image's width. It does not treat the normalised box as a shape in a unit square,
  whose angle would change with the image's shape and whose image would be no rectangle.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from detpost.detections import INVALID, Detections
from detpost.heads._gather import by_query, check, check_sizes

__all__ = ["OrientedBoxes", "OrientedDetections"]


class OrientedDetections(NamedTuple):
    """Oriented boxes of B images in K slots, beside the Detections that they belong to.

    Attributes:
        boxes: (B, K, 5), (cx, cy, w, h, angle), the angle in [-pi / 2, pi / 2).
        corners: (B, K, 4, 2), x and y, clockwise on the screen from the corner that is the upper left one at angle 0.
        enclosing: (B, K, 4), xyxy of the smallest upright box around the corners.
    """

    boxes: Tensor
    corners: Tensor
    enclosing: Tensor


_register_namedtuple(OrientedDetections, serialized_type_name="detpost.heads.OrientedDetections")


class OrientedBoxes(nn.Module):
    """Gather, scale and corner oriented boxes.

    Args:
        angle_scale: what the network's angle is multiplied with to give radians: 1 for radians, ``math.pi`` for heads
            whose sigmoid stands for half a turn.

    Raises:
        ValueError: a scale that is 0 or not finite.

    Example:
        >>> from detpost import DetectionPostProcessor
        >>> post, decode = DetectionPostProcessor.from_preset("rtdetr", top_k=1), OrientedBoxes()
        >>> sizes, boxes = torch.tensor([[100, 200]]), torch.tensor([[[0.5, 0.5, 0.2, 0.1, math.pi / 2]]])
        >>> found = post(torch.tensor([[[2.0]]]), boxes[..., :4], sizes)
        >>> decode(found, boxes, sizes).enclosing.round()  # 40 by 10 pixels, standing
        tensor([[[ 95.,  30., 105.,  70.]]])
    """

    def __init__(self, angle_scale: float = 1.0) -> None:
        super().__init__()
        if not math.isfinite(angle_scale) or angle_scale == 0:
            raise ValueError(f"angle_scale must be a number other than 0; got {angle_scale}: 1 for angles in radians")
        self.angle_scale = angle_scale

    def forward(
        self, detections: Detections, oriented_boxes: Tensor, image_sizes: Tensor | None = None
    ) -> OrientedDetections:
        """Decode.

        Args:
            detections: of B images in K slots.
            oriented_boxes: (B, Q, 5), floating, (cx, cy, w, h) in units of the image, and the angle.
            image_sizes: (B, 2), (height, width) in pixels; ``None`` leaves the boxes in units of the image.

        Returns:
            OrientedDetections, float32 (float64 from float64); 0 in slots that are not valid. Differentiable.

        Raises:
            ValueError: shapes that do not fit, or tensors on different devices.
            TypeError: no Detections, or tensors of a wrong dtype.
        """
        check(detections, oriented_boxes, "oriented_boxes", {3: "(B, Q, 5)"})
        if oriented_boxes.shape[2] != 5:
            raise ValueError(f"oriented_boxes must have shape (B, Q, 5); got {tuple(oriented_boxes.shape)}")
        gathered = by_query(oriented_boxes, detections.queries)
        kind = torch.promote_types(gathered.dtype, torch.float32)
        rows = torch.where(detections.valid.unsqueeze(-1), gathered.to(kind), INVALID.box)
        x, y, width, height, angle = rows.unbind(-1)  # (B, K) each
        if image_sizes is not None:
            check_sizes(detections, image_sizes)
            image_height, image_width = image_sizes.to(rows.dtype).unsqueeze(-1).unbind(1)  # (B, 1) each
            x, width, y, height = x * image_width, width * image_width, y * image_height, height * image_height
        if self.angle_scale != 1:
            angle = angle * self.angle_scale
        angle = angle - math.pi * ((angle + math.pi / 2) / math.pi).floor()
        corners = _corners(x, y, width, height, angle)
        return OrientedDetections(
            boxes=torch.stack((x, y, width, height, angle), dim=-1),
            corners=corners,
            enclosing=torch.cat((corners.amin(dim=2), corners.amax(dim=2)), dim=-1),
        )

    def extra_repr(self) -> str:
        """Show the arguments in ``repr``."""
        return f"angle_scale={self.angle_scale}"


def _corners(x: Tensor, y: Tensor, width: Tensor, height: Tensor, angle: Tensor) -> Tensor:
    """Turn half the sides about the centre: five tensors (B, K) -> (B, K, 4, 2)."""
    cosine, sine = angle.cos(), angle.sin()
    along_x, along_y = 0.5 * width * cosine, 0.5 * width * sine
    across_x, across_y = -0.5 * height * sine, 0.5 * height * cosine
    return torch.stack(
        (
            torch.stack((x - along_x - across_x, y - along_y - across_y), dim=-1),
            torch.stack((x + along_x - across_x, y + along_y - across_y), dim=-1),
            torch.stack((x + along_x + across_x, y + along_y + across_y), dim=-1),
            torch.stack((x - along_x + across_x, y - along_y + across_y), dim=-1),
        ),
        dim=2,
    )
