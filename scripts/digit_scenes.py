"""Composes scenes of real handwritten digits on real photographs, with their boxes: the tiny detector's data.

The digits are scikit-learn's `load_digits` (1797 scans of 8x8 cells), split into train and test digits *before* any
scene is made, so that no scene of the test set shows a digit that training has seen. The backgrounds are random crops
of the two photographs that scikit-learn ships.

A box is tight around the ink: the smallest pixel rectangle that holds every pixel where the digit covers more than
`VISIBLE` of what lies under it. Cards and tiles behind a digit are not part of its box.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

SPLIT_SEED = 20260711
TEST_DIGITS = 500
VISIBLE = 0.1
MARGIN = 2  # empty cells around the 8x8 scan, so that a rotated or sheared digit keeps its corners
CELLS = 8

COUNTS = np.array([4, 5, 5, 5, 4, 3, 2, 1]) / 29  # chances of one to eight digits

BILINEAR = Image.Resampling.BILINEAR
FILTERS = (Image.Resampling.NEAREST, BILINEAR, Image.Resampling.BICUBIC)


class Digits(NamedTuple):
    """Scans of digits and what they show.

    Attributes:
        images: (N, 8, 8) float32 ink between 0 and 1.
        labels: (N,) int64, the digit.
        indices: (N,) int64, the row of `load_digits` that each came from.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray


class Scene(NamedTuple):
    """One composed picture and what is in it.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        boxes: (N, 4) float32, xyxy in pixels.
        labels: (N,) int64.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Recipe:
    """What a scene may look like; sizes are in pixels of a scene whose shorter side is 128.

    Attributes:
        min_digit: Height of the smallest pasted scan.
        max_digit: Height of the largest pasted scan.
        warp: Share of digits that are rotated, sheared and stretched a little.
        empty: Share of scenes without any digit.
        plain: Share of backgrounds that are one colour instead of a photograph.
    """

    min_digit: float = 14.0
    max_digit: float = 64.0
    warp: float = 0.0
    empty: float = 0.0
    plain: float = 0.0


TRAINING = Recipe(min_digit=13.0, max_digit=68.0, warp=0.5, empty=0.01, plain=0.04)
EVALUATION = Recipe()


@functools.cache
def split_digits() -> tuple[Digits, Digits]:
    """Split the scans into train and test digits, stratified, always the same way."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = (data.images / 16.0).astype(np.float32)
    labels = data.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_DIGITS, random_state=SPLIT_SEED, stratify=labels
    )
    return tuple(Digits(images[rows], labels[rows], rows) for rows in (np.sort(train), np.sort(test)))


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    """Give the two photographs that scikit-learn ships, 640x427."""
    from sklearn.datasets import load_sample_images

    return tuple(Image.fromarray(np.ascontiguousarray(image)) for image in load_sample_images().images)


def _background(rng: np.random.Generator, width: int, height: int, plain: float) -> np.ndarray:
    """Give a photograph's crop of random scale, flipped and re-lit at random: (height, width, 3) float32 in 0..255."""
    if rng.random() < plain:
        flat = np.broadcast_to(rng.uniform(0, 255, 3).astype(np.float32), (height, width, 3))
        slope = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None] * rng.uniform(-40, 40)
        return np.clip(flat + slope, 0, 255)
    photo = photographs()[rng.integers(2)]
    largest = min(photo.width / width, photo.height / height)
    # The scale is drawn in its logarithm: close-ups and whole views come equally often.
    scale = np.exp(rng.uniform(np.log(min(0.45, largest)), np.log(largest)))
    crop_width, crop_height = width * scale, height * scale
    left, top = rng.uniform(0, photo.width - crop_width), rng.uniform(0, photo.height - crop_height)
    crop = photo.resize((width, height), BILINEAR, box=(left, top, left + crop_width, top + crop_height))
    pixels = np.asarray(crop, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.15:
        pixels = pixels[::-1]
    if rng.random() < 0.15:
        pixels = pixels[..., rng.permutation(3)]
    if rng.random() < 0.08:
        pixels = np.repeat(pixels.mean(2, keepdims=True), 3, axis=2)
    contrast, brightness = rng.uniform(0.6, 1.25), rng.uniform(-45, 45)
    if rng.random() < 0.3:
        contrast, brightness = 1.0, 0.0
    return np.clip((pixels - 127.5) * contrast + 127.5 + brightness, 0, 255)


def _render(rng: np.random.Generator, digit: np.ndarray, height: int, width: int, warp: bool) -> np.ndarray:
    """Enlarges an 8x8 scan to (height, width), perhaps warped a little: float32 coverage in 0..1.

    A warped digit may need more room than its tile, so its result is larger by the margin on each side.
    """
    kind = FILTERS[rng.choice(3, p=(0.25, 0.4, 0.35))]
    if not warp:
        scan = Image.fromarray(digit)
        return np.clip(np.asarray(scan.resize((width, height), kind)), 0, 1)
    padded = np.pad(digit, MARGIN)
    full = CELLS + 2 * MARGIN
    out_width, out_height = round(width * full / CELLS), round(height * full / CELLS)
    angle, shear = np.deg2rad(rng.uniform(-13, 13)), rng.uniform(-0.18, 0.18)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]])
    matrix = matrix @ np.diag([full / out_width, full / out_height])
    offset = full / 2 - matrix @ (out_width / 2, out_height / 2)
    data = (*matrix[0], offset[0], *matrix[1], offset[1])
    warped = Image.fromarray(padded).transform((out_width, out_height), Image.Transform.AFFINE, data, kind)
    return np.clip(np.asarray(warped), 0, 1)


def _ink_box(coverage: np.ndarray) -> tuple[int, int, int, int] | None:
    """Give the tight xyxy box of what is visible in a coverage map; None where nothing is."""
    rows, columns = np.flatnonzero((coverage > VISIBLE).any(1)), np.flatnonzero((coverage > VISIBLE).any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _contrasting(rng: np.random.Generator, against: np.ndarray) -> np.ndarray:
    """Give a random colour that a person can tell from `against`; now and then a hard one."""
    wanted = 35.0 if rng.random() < 0.12 else 70.0
    weights = np.array([0.299, 0.587, 0.114])
    colour = rng.uniform(0, 255, 3)
    for _ in range(12):
        if abs((colour - against) @ weights) + 0.25 * np.abs(colour - against).max() > wanted:
            return colour
        style = rng.random()
        if style < 0.55:
            colour = rng.uniform(0, 255, 3)
        elif style < 0.8:
            colour = np.full(3, rng.uniform(0, 255))
        else:  # saturated
            colour = rng.permutation([rng.uniform(180, 255), rng.uniform(0, 255), rng.uniform(0, 60)])
    return np.full(3, 255.0 if against @ weights < 127 else 0.0)


def _paste(rng: np.random.Generator, canvas: np.ndarray, coverage: np.ndarray, left: int, top: int) -> None:
    """Draws one digit on the canvas (in place) in one of several manners."""
    height, width = coverage.shape
    spot = canvas[top : top + height, left : left + width]
    alpha = coverage[..., None]
    under = spot.mean((0, 1))
    manner = rng.random()
    if manner < 0.16:  # the scan itself, opaque: grey, inverted, or in two colours
        kind = rng.random()
        if kind < 0.4:
            paper, ink = np.zeros(3), np.full(3, rng.uniform(200, 255))
        elif kind < 0.65:
            paper, ink = np.full(3, rng.uniform(220, 255)), np.zeros(3)
        else:
            paper = rng.uniform(0, 255, 3)
            ink = _contrasting(rng, paper)
        spot[:] = paper + alpha * (ink - paper)
        return
    if manner < 0.22:  # the brighter (or darker) of the scan and the photograph
        value = 255 * alpha * rng.uniform(0.85, 1.0)
        if under.mean() < 140:
            spot[:] = np.maximum(spot, value)
        elif under.mean() > 160:
            spot[:] = np.minimum(spot, 255 - value)
        else:
            spot[:] = spot + alpha * ((255 if rng.random() < 0.5 else 0) - spot)
        return
    if manner < 0.42:  # a card behind the digit, solid or translucent
        grow = rng.uniform(0.0, 0.18, 4)
        box = _ink_box(coverage)
        if box is not None:
            x0, x1 = left + box[0] - grow[0] * width, left + box[2] + grow[1] * width
            y0, y1 = top + box[1] - grow[2] * height, top + box[3] + grow[3] * height
            x0, y0 = max(0, round(x0)), max(0, round(y0))
            card = canvas[y0 : round(y1), x0 : round(x1)]
            paper = rng.uniform(0, 255, 3) if rng.random() < 0.5 else np.full(3, rng.uniform(0, 255))
            card += (paper - card) * (1.0 if rng.random() < 0.5 else rng.uniform(0.4, 0.9))
            under = spot.mean((0, 1))
    # Firmer strokes: 8x8 scans are grey at their edges, and a pen's line is not.
    gain = 1.0 if rng.random() < 0.6 else rng.uniform(1.1, 1.8)
    opacity = 1.0 if rng.random() < 0.75 else rng.uniform(0.75, 1.0)
    alpha = np.minimum(alpha * gain, 1.0) * opacity
    spot += alpha * (_contrasting(rng, under) - spot)


def _wear(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Give a camera's faults, mild and only sometimes: blur, noise, JPEG. Returns uint8."""
    if rng.random() < 0.2:
        canvas = canvas + rng.uniform(2, 9) * rng.standard_normal(canvas.shape, dtype=np.float32)
    pixels = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    if rng.random() < 0.12:
        pixels = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8))))
    if rng.random() < 0.15:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=int(rng.integers(45, 95)))
        pixels = np.asarray(Image.open(stream))
    return pixels


def _overlaps(box: list[int], others: list[list[int]]) -> bool:
    """Tell whether a box covers more than a tenth of another, or is covered so by one."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    for other in others:
        across = min(box[2], other[2]) - max(box[0], other[0])
        down = min(box[3], other[3]) - max(box[1], other[1])
        if across > 0 and down > 0:
            smaller = min(area, (other[2] - other[0]) * (other[3] - other[1]))
            if across * down > 0.1 * smaller:
                return True
    return False


def compose(
    rng: np.random.Generator,
    digits: Digits,
    size: tuple[int, int] = (128, 128),
    recipe: Recipe = EVALUATION,
    count: int | None = None,
) -> Scene:
    """Composes one scene.

    Args:
        rng: Where all chance comes from.
        digits: The scans to draw from.
        size: (height, width) of the scene.
        recipe: What it may look like.
        count: How many digits to try to place; drawn at random when None. Fewer appear where there is no room.

    Returns:
        The picture with its boxes and labels.
    """
    height, width = size
    unit = min(size) / 128
    canvas = np.array(_background(rng, width, height, recipe.plain), dtype=np.float32)
    if count is None:
        count = 0 if rng.random() < recipe.empty else int(rng.choice(np.arange(1, 9), p=COUNTS))
    boxes: list[list[int]] = []
    labels: list[int] = []
    for _ in range(count):
        which = int(rng.integers(len(digits.labels)))
        # Small digits are the harder ones, so the logarithm is what is uniform. Crowded scenes have smaller digits.
        largest = min(recipe.max_digit, 1.6 * 128 / np.sqrt(count))
        tall = unit * np.exp(rng.uniform(np.log(recipe.min_digit), np.log(largest)))
        wide = tall * (np.exp(rng.uniform(-0.22, 0.22)) if rng.random() < 0.35 else 1.0)
        warp = rng.random() < recipe.warp
        coverage = _render(rng, digits.images[which], round(tall), round(wide), warp)
        ink = _ink_box(coverage)
        if ink is None:
            continue
        if warp:
            coverage = coverage[ink[1] : ink[3], ink[0] : ink[2]]
            ink = (0, 0, coverage.shape[1], coverage.shape[0])
        if coverage.shape[0] > height or coverage.shape[1] > width:
            continue
        for _ in range(12):
            left = int(rng.integers(width - coverage.shape[1] + 1))
            top = int(rng.integers(height - coverage.shape[0] + 1))
            box = [ink[0] + left, ink[1] + top, ink[2] + left, ink[3] + top]
            if not _overlaps(box, boxes):
                _paste(rng, canvas, coverage, left, top)
                boxes.append(box)
                labels.append(int(digits.labels[which]))
                break
    return Scene(_wear(rng, canvas), np.array(boxes, dtype=np.float32).reshape(-1, 4), np.array(labels, dtype=np.int64))


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    """Give a scene's (height, width): mostly 128x128, otherwise some other size and shape, down to 96 and up to 320."""
    if rng.random() < 0.6:
        return 128, 128
    area, aspect = np.exp(rng.uniform(np.log(112), np.log(256))), np.exp(rng.uniform(-0.4, 0.4))
    height, width = round(area / np.sqrt(aspect)), round(area * np.sqrt(aspect))
    return max(96, min(height, 320)), max(96, min(width, 320))


def coco_ground_truth(scenes: list[Scene], names: list[str] | None = None) -> dict[str, Any]:
    """Give the scenes' boxes as a COCO dataset, images numbered from 1 and categories named by their digit."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    names = names or [f"{number:04d}.png" for number in range(1, len(scenes) + 1)]
    for number, (scene, name) in enumerate(zip(scenes, names, strict=True), start=1):
        height, width = scene.image.shape[:2]
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for (x0, y0, x1, y1), label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": digit, "name": str(digit)} for digit in range(10)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}
