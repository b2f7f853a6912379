"""Detections drawn on images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from detpost.image_files import UprightImage

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

__all__ = ["draw", "drawn"]

# Labels are unreadable on small images: those are enlarged until the longer side has about this many pixels.
_LEGIBLE_SIDE = 640
_GOLDEN = 0.6180339887498949

Box = tuple[int, int, int, int]


def draw(image: Tensor, found: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Draw one image's detections.

    Args:
        image: (3, H, W), uint8, RGB.
        found: an entry of what :meth:`detpost.Detector.predict` gives.

    Returns:
        (H * n, W * n, 3), uint8, RGB, with a box and the class name and score of each detection; small images are
        enlarged by a whole number n.
    """
    picture = UprightImage(drawn(image, found))
    return picture.rows(0, picture.height)


def drawn(image: Tensor, found: dict[str, Any]) -> Image.Image:
    """Draw as :func:`draw` does, and give Pillow's image, which files are written from.

    Args:
        image: as for :func:`draw`.
        found: as for :func:`draw`.

    Returns:
        Pillow's image, RGB.
    """
    # Pillow's own drawing touches the pixels of a box and its label alone, and lets other threads run as it encodes.
    from PIL import Image, ImageDraw, ImageFont

    times = max(1, _LEGIBLE_SIDE // max(image.shape[-2:]))
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    if times > 1:
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    side = max(picture.size)
    thickness, font = max(1, round(side / 400)), ImageFont.load_default(max(12, round(side / 60)))
    pen = ImageDraw.Draw(picture)
    rounded = (found["boxes"] * times).to(torch.int64).reshape(-1, 4).tolist()
    boxes: list[Box] = [(left, top, right, bottom) for left, top, right, bottom in rounded]
    colours = [_colour_of(label) for label in found["labels"].tolist()]
    for (left, top, right, bottom), colour in zip(boxes, colours, strict=True):
        # Half of a line's width on each side, as far as the image goes; a box may be turned inside out.
        edges = (min(left, right), min(top, bottom), max(left, right), max(top, bottom))
        outer = [edge + sign * (thickness // 2) for edge, sign in zip(edges, (-1, -1, 1, 1), strict=True)]
        pen.rectangle(outer, outline=colour, width=thickness)
    placed: list[Box] = []
    rows = zip(found["label_names"], found["scores"].tolist(), boxes, colours, strict=True)
    for name, score, box, colour in rows:
        placed.append(_write(pen, font, f"{name} {score:.2f}", box, colour, placed, picture.size))
    return picture


def _colour_of(label: int) -> tuple[int, int, int]:
    """Give a label's colour: neighbouring labels lie far apart on the circle of hues."""
    red, green, blue = colorsys.hsv_to_rgb((0.75 + label * _GOLDEN) % 1, 0.75 if label % 2 else 0.9, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _write(
    pen: ImageDraw.ImageDraw,
    font: Any,
    text: str,
    box: Box,
    colour: tuple[int, int, int],
    placed: Sequence[Box],
    size: tuple[int, int],
) -> Box:
    """Write a label at its box, in the first of a few places where no other is, and say where."""
    padding = 3
    text_left, text_top, text_right, text_bottom = map(round, pen.textbbox((0, 0), text, font=font))
    width, height = text_right - text_left + 2 * padding, text_bottom - text_top + 2 * padding
    left, top, right, bottom = box
    corners = (
        (left, top - height),
        (left, bottom),
        (right - width, top - height),
        (left, top),
        (right - width, bottom),
    )
    places = [_within(x, y, width, height, size) for x, y in corners]
    place = next((place for place in places if not any(_overlap(place, other) for other in placed)), places[0])
    pen.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=colour)
    red, green, blue = colour
    ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 140 else "white"
    pen.text((place[0] + padding - text_left, place[1] + padding - text_top), text, fill=ink, font=font)
    return place


def _within(left: int, top: int, width: int, height: int, size: tuple[int, int]) -> Box:
    """Move a rectangle into the image."""
    left, top = max(0, min(left, size[0] - width)), max(0, min(top, size[1] - height))
    return left, top, left + width, top + height


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
