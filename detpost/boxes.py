"""Boxes as plain tensors: formats, scaling, clipping, flips, matrix transforms and the letterbox inverse.

Every function takes boxes of shape (..., 4) in any floating dtype, returns a new tensor of the same shape and dtype,
never changes its input, and is differentiable. Coordinates are continuous: pixel column ``i`` covers ``[i, i + 1)``, so
an image of width W spans ``[0, W]`` and mirroring maps ``x`` to ``W - x``.

A companion argument (an image size, a width, a matrix) is given once for all boxes or once per leading index: its
leading shape must be a prefix of the boxes' leading shape, as (B, 2) is for boxes (B, Q, 4).
"""

from __future__ import annotations

from numbers import Real
from typing import get_args

import torch
from torch import Tensor

from detpost.spec import BoxFormat

__all__ = ["BoxFormat", "clip", "convert", "hflip", "scale", "transform", "unletterbox", "vflip"]

Size = Tensor | tuple[float, float]


def convert(boxes: Tensor, src: BoxFormat, dst: BoxFormat) -> Tensor:
    """Convert boxes between ``xyxy`` (corners), ``xywh`` (corner and size) and ``cxcywh`` (centre and size).

    Args:
        boxes: (..., 4), floating, in any unit.
        src: format of ``boxes``.
        dst: wanted format.

    Returns:
        (..., 4), the same dtype and unit.

    Raises:
        ValueError: an unknown format, or a last dimension that is not 4.
        TypeError: boxes that are not a floating tensor.

    Example:
        >>> convert(torch.tensor([[0.5, 0.5, 0.2, 0.4]]), "cxcywh", "xyxy")
        tensor([[0.4000, 0.3000, 0.6000, 0.7000]])
    """
    _check_boxes(boxes)
    for name, value in (("src", src), ("dst", dst)):
        if value not in get_args(BoxFormat):
            raise ValueError(f"{name} must be one of {', '.join(get_args(BoxFormat))}; got {value!r}")
    if src == dst:
        return boxes.clone()
    first, second = boxes[..., :2], boxes[..., 2:]
    # Straight routes, not through a common format: each route rounds once per number.
    if (src, dst) == ("cxcywh", "xyxy"):
        half = 0.5 * second
        parts = (first - half, first + half)
    elif (src, dst) == ("cxcywh", "xywh"):
        parts = (first - 0.5 * second, second)
    elif (src, dst) == ("xywh", "xyxy"):
        parts = (first, first + second)
    elif (src, dst) == ("xywh", "cxcywh"):
        parts = (first + 0.5 * second, second)
    elif (src, dst) == ("xyxy", "cxcywh"):
        parts = (0.5 * (first + second), second - first)
    else:
        parts = (first, second - first)
    return torch.cat(parts, dim=-1)


def scale(boxes: Tensor, image_sizes: Size) -> Tensor:
    """Scale normalised boxes to pixels.

    Args:
        boxes: (..., 4), floating, in units of the image (0 to 1), any format.
        image_sizes: (height, width) in pixels, a pair of numbers or a tensor of shape (..., 2), integer or floating.

    Returns:
        (..., 4), pixels, the format of ``boxes``.

    Raises:
        ValueError: shapes that do not fit, or another device.
        TypeError: boxes that are not floating, or sizes that are neither numbers nor a real tensor.

    Example:
        >>> scale(torch.tensor([[0.0, 0.25, 0.5, 1.0]]), (100, 200))
        tensor([[  0.,  25., 100., 100.]])
    """
    _check_boxes(boxes)
    height, width = _height_width(boxes, image_sizes)
    return boxes * torch.stack((width, height, width, height), dim=-1)


def clip(boxes: Tensor, image_sizes: Size) -> Tensor:
    """Clip xyxy boxes in pixels to their image.

    Args:
        boxes: (..., 4), floating, xyxy in pixels.
        image_sizes: (height, width) in pixels, a pair of numbers or a tensor of shape (..., 2).

    Returns:
        (..., 4) with x in [0, width] and y in [0, height].

    Raises:
        ValueError: shapes that do not fit, or another device.
        TypeError: boxes that are not floating, or sizes that are neither numbers nor a real tensor.

    Example:
        >>> clip(torch.tensor([[-5.0, 10.0, 250.0, 90.0]]), (80, 200))
        tensor([[  0.,  10., 200.,  80.]])
    """
    _check_boxes(boxes)
    height, width = _height_width(boxes, image_sizes)
    return torch.minimum(boxes.clamp(min=0), torch.stack((width, height, width, height), dim=-1))


def hflip(boxes: Tensor, width: float | Tensor) -> Tensor:
    """Mirror xyxy boxes left to right, as the image was mirrored; the result is ordered (x1 <= x2).

    Args:
        boxes: (..., 4), floating, xyxy in pixels.
        width: width of the image in pixels: a number, or a tensor whose shape is a prefix of the boxes' leading shape.

    Returns:
        (..., 4), xyxy in pixels.

    Raises:
        ValueError: shapes that do not fit, or another device.
        TypeError: boxes that are not floating.

    Example:
        >>> hflip(torch.tensor([[10.0, 20.0, 30.0, 40.0]]), 100)
        tensor([[70., 20., 90., 40.]])
    """
    _check_boxes(boxes)
    x1, y1, x2, y2 = boxes.unbind(-1)
    extent = _per_box(boxes, width, "width")
    left, right = extent - x2, extent - x1
    return torch.stack((torch.minimum(left, right), y1, torch.maximum(left, right), y2), dim=-1)


def vflip(boxes: Tensor, height: float | Tensor) -> Tensor:
    """Mirror xyxy boxes top to bottom, as the image was mirrored; the result is ordered (y1 <= y2).

    Args:
        boxes: (..., 4), floating, xyxy in pixels.
        height: height of the image in pixels: a number, or a tensor whose shape is a prefix of the boxes' leading
            shape.

    Returns:
        (..., 4), xyxy in pixels.

    Raises:
        ValueError: shapes that do not fit, or another device.
        TypeError: boxes that are not floating.

    Example:
        >>> vflip(torch.tensor([[10.0, 20.0, 30.0, 40.0]]), 100)
        tensor([[10., 60., 30., 80.]])
    """
    _check_boxes(boxes)
    x1, y1, x2, y2 = boxes.unbind(-1)
    extent = _per_box(boxes, height, "height")
    top, bottom = extent - y2, extent - y1
    return torch.stack((x1, torch.minimum(top, bottom), x2, torch.maximum(top, bottom)), dim=-1)


def transform(boxes: Tensor, matrix: Tensor) -> Tensor:
    """Carry xyxy boxes through a 3x3 affine map or homography and take the enclosing upright box.

    All four corners are carried and then re-ordered, so a flip, a rotation or a shear still gives x1 <= x2, y1 <= y2.

    Args:
        boxes: (..., 4), floating, xyxy in pixels.
        matrix: (3, 3), or (..., 3, 3) with a leading shape that is a prefix of the boxes'; maps column vectors
            (x, y, 1) of the source to the target. A homography must not put a corner on its horizon (there the
            quotient by the third coordinate is not finite).

    Returns:
        (..., 4), xyxy in pixels of the target.

    Raises:
        ValueError: shapes that do not fit, or another device.
        TypeError: boxes or a matrix that are not floating tensors.

    Example:
        >>> mirror = torch.tensor([[-1.0, 0.0, 100.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> transform(torch.tensor([[10.0, 20.0, 30.0, 40.0]]), mirror)
        tensor([[70., 20., 90., 40.]])
    """
    _check_boxes(boxes)
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        raise TypeError(f"matrix must be a floating tensor of shape (..., 3, 3); got {_describe(matrix)}")
    if matrix.shape[-2:] != (3, 3):
        raise ValueError(
            f"matrix must have shape (..., 3, 3); got {tuple(matrix.shape)}: a 2x3 affine needs the row (0, 0, 1) added"
        )
    rows = _align(boxes, matrix.to(boxes.dtype), trailing=2, name="matrix")  # (..., 1, 3, 3) against boxes (..., Q, 4)
    x1, y1, x2, y2 = boxes.unbind(-1)
    x = torch.stack((x1, x2, x2, x1), dim=-1)  # (..., 4 corners)
    y = torch.stack((y1, y1, y2, y2), dim=-1)
    # Written out, not as a matmul: tf32 or bf16 matmul settings must not touch coordinates.
    target = [rows[..., i, 0, None] * x + rows[..., i, 1, None] * y + rows[..., i, 2, None] for i in range(3)]
    target_x, target_y = target[0] / target[2], target[1] / target[2]
    return torch.stack(
        (target_x.amin(dim=-1), target_y.amin(dim=-1), target_x.amax(dim=-1), target_y.amax(dim=-1)), dim=-1
    )


def unletterbox(boxes: Tensor, image_sizes: Size, input_size: Size, centered: bool = True) -> Tensor:
    """Carry xyxy boxes from a letterboxed network input back to the original image.

    A letterbox scales the image by ``min(input_height / height, input_width / width)`` and pads the rest.

    Args:
        boxes: (..., 4), floating, xyxy in pixels of the network input.
        image_sizes: (height, width) of the original image in pixels, a pair of numbers or a tensor of shape (..., 2).
        input_size: (height, width) of the network input in pixels, likewise.
        centered: whether the padding was split between both sides; if not, it was all on the right and the bottom.

    Returns:
        (..., 4), xyxy in pixels of the original image; not clipped.

    Raises:
        ValueError: shapes that do not fit, or another device.
        TypeError: boxes that are not floating, or sizes that are neither numbers nor a real tensor.

    Example:
        >>> unletterbox(torch.tensor([[160.0, 0.0, 480.0, 640.0]]), (1280, 640), (640, 640))
        tensor([[   0.,    0.,  640., 1280.]])
    """
    _check_boxes(boxes)
    height, width = _height_width(boxes, image_sizes)
    input_height, input_width = _height_width(boxes, input_size)
    ratio = torch.minimum(input_height / height, input_width / width)
    share = 0.5 if centered else 0.0
    pad_x, pad_y = share * (input_width - width * ratio), share * (input_height - height * ratio)
    pad = torch.stack((pad_x, pad_y, pad_x, pad_y), dim=-1)
    return (boxes - pad) / ratio.unsqueeze(-1)


def _check_boxes(boxes: Tensor) -> None:
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point():
        raise TypeError(f"boxes must be a floating tensor of shape (..., 4); got {_describe(boxes)}")
    if boxes.ndim == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must have shape (..., 4); got {tuple(boxes.shape)}")


def _describe(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _align(boxes: Tensor, value: Tensor, trailing: int, name: str) -> Tensor:
    """Give ``value`` (prefix..., trailing dims) the rank that broadcasts over boxes (prefix..., more..., 4)."""
    if value.device != boxes.device:
        raise ValueError(f"{name} is on {value.device} and boxes on {boxes.device}: move one with .to()")
    prefix, own = value.shape[: value.ndim - trailing], value.shape[value.ndim - trailing :]
    leading = boxes.shape[:-1]
    if len(prefix) > len(leading) or any(p not in (1, n) for p, n in zip(prefix, leading, strict=False)):
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} does not fit boxes of shape {tuple(boxes.shape)}: "
            f"its leading shape must be a prefix of {tuple(leading)}"
        )
    return value.reshape((*prefix, *[1] * (len(leading) - len(prefix)), *own))


def _per_box(boxes: Tensor, value: float | Tensor, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return _align(boxes, value.to(boxes.dtype), trailing=0, name=name)
    if not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number or a tensor; got {value!r}")
    # full and not as_tensor: it fills on the device, where as_tensor would copy from the host.
    return torch.full([1] * (boxes.ndim - 1), value, dtype=boxes.dtype, device=boxes.device)


def _height_width(boxes: Tensor, image_sizes: Size) -> tuple[Tensor, Tensor]:
    if isinstance(image_sizes, Tensor):
        if image_sizes.dtype == torch.bool or image_sizes.is_complex():
            raise TypeError(f"image sizes must be integer or floating; got {image_sizes.dtype}")
        if image_sizes.ndim == 0 or image_sizes.shape[-1] != 2:
            raise ValueError(f"image sizes must be (height, width), shape (..., 2); got {tuple(image_sizes.shape)}")
        height, width = _align(boxes, image_sizes.to(boxes.dtype), trailing=1, name="image sizes").unbind(-1)
        return height, width
    if not isinstance(image_sizes, (tuple, list)) or len(image_sizes) != 2:
        raise TypeError(f"image sizes must be a (height, width) pair or a tensor (..., 2); got {image_sizes!r}")
    height, width = (_per_box(boxes, value, name) for value, name in zip(image_sizes, ("height", "width"), strict=True))
    return height, width
