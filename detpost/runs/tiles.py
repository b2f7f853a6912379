"""Images cut into tiles that overlap, detected tile by tile in batches across images, and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor

from detpost import fusion
from detpost.export.heads import columns_of
from detpost.fusion import Method
from detpost.heads.masks import mask_of_rle, to_rle
from detpost.images import Prepare, PreparedImage, Rows, TensorRows

if TYPE_CHECKING:
    from detpost.detector import Detector

__all__ = ["INPUTS_AT_ONCE", "Tile", "Tiling", "cut", "detect_tiles"]

# Tiles of one image are held until they are through the network.
MOST_TILES = 1024
# A batch of images ends early once it has this many times the tiles that go through the network at once: whatever is
# left over at its end then fills one of so many.
INPUTS_AT_ONCE = 8
# The thresholds of the peers: SAHI's where one box lies in the other, ensemble-boxes' for mean boxes.
_OVERLAPS: Mapping[Method, dict[str, Any]] = {
    "nms": {"threshold": 0.5, "metric": "ios"},
    "nmm": {"threshold": 0.5, "metric": "ios"},
    "wbf": {"threshold": 0.55},
}


@dataclass(frozen=True)
class Tiling:
    """How images are cut, and how what is found becomes one list.

    Args:
        size: of a tile, pixels, in both directions. An image that is no larger is not cut.
        overlap: which part of a tile its neighbour has, too.
        merge: ``"nms"``, ``"nmm"`` or ``"wbf"``, as of :func:`detpost.fusion.merge`.

    Raises:
        ValueError: a size below 16, an overlap outside [0, 0.9], or another merge.

    Source:
        Akyon, Altinuc and Temizel, "Slicing aided hyper inference", ICIP 2022.

    Example:
        >>> Tiling(640, 0.25).corners(640, 1500)
        [(0, 0), (480, 0), (860, 0)]
    """

    size: int
    overlap: float = 0.2
    merge: Method = "nmm"

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ValueError(f"tiles must be at least 16 pixels; got {self.size}")
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(f"overlap must lie within [0, 0.9]; got {self.overlap}")
        if self.merge not in get_args(Method):
            raise ValueError(f"merge must be one of {', '.join(get_args(Method))}; got {self.merge!r}")

    def __str__(self) -> str:
        return f"{self.size} overlap {self.overlap:g} {self.merge}"

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Say where the tiles of an image begin.

        Args:
            height: of the image, pixels.
            width: of the image, pixels.

        Returns:
            (x, y) of the top left corner of each, row by row; the last ones end where the image does. None for an image
            that is not cut.
        """
        if height <= self.size and width <= self.size:
            return []
        return [(left, top) for top in self._starts(height) for left in self._starts(width)]

    def _starts(self, extent: int) -> list[int]:
        step = self.size - int(self.size * self.overlap)
        last = max(0, extent - self.size)
        return [*range(0, last, step), last]


class Tile(NamedTuple):
    """A part of an image.

    Args:
        corner: (x, y) of its top left corner in the image, pixels.
        ready: what the network takes.
    """

    corner: tuple[int, int]
    ready: PreparedImage


def cut(image: Rows, tiling: Tiling, prepare: Prepare) -> tuple[Tile, ...]:
    """Cut an image and prepare its tiles for the network; it is read one row of tiles at a time.

    Args:
        image: of any size.
        tiling: how it is cut.
        prepare: what the network's detector does to each image.

    Returns:
        The tiles, none where the image is no larger than one.

    Raises:
        ValueError: more than 1024 tiles.
    """
    corners = tiling.corners(image.height, image.width)
    if len(corners) > MOST_TILES:
        raise ValueError(f"{len(corners)} tiles of {tiling.size} pixels are more than {MOST_TILES}: take larger ones")
    tiles: list[Tile] = []
    for top in dict.fromkeys(top for _, top in corners):
        strip = image.rows(top, min(top + tiling.size, image.height))  # (3, h, W)
        for left in (left for left, above in corners if above == top):
            part = strip[:, :, left : left + tiling.size]
            # Channels last, as they lie in files: the resize is several times faster so.
            dense = part.permute(1, 2, 0).contiguous().permute(2, 0, 1)
            tiles.append(Tile((left, top), prepare.one(TensorRows(dense))))
    return tuple(tiles)


def detect_tiles(
    detector: Detector, images: Sequence[tuple[PreparedImage, Sequence[Tile]]], tiling: Tiling, batch_size: int
) -> list[dict[str, Any]]:
    """Detect in images whole and in their tiles, which go through the network together, and merge what is found.

    Args:
        detector: the detector.
        images: each whole, and its tiles.
        tiling: how they were cut.
        batch_size: most that go through the network at once, of whatever image.

    Returns:
        As :meth:`detpost.Detector.predict_ready` gives it, with encoded masks.

    Raises:
        ValueError: a detector that gives more than boxes, and a merge that makes new boxes.
    """
    inputs = [ready for whole, tiles in images for ready in (whole, *(tile.ready for tile in tiles))]
    found = [
        row
        for start in range(0, len(inputs), batch_size)
        for row in detector.predict_ready(inputs[start : start + batch_size], encode_masks=True)
    ]
    merged: list[dict[str, Any]] = []
    for whole, tiles in images:
        of_image, found = found[: 1 + len(tiles)], found[1 + len(tiles) :]
        corners = [(0, 0), *(tile.corner for tile in tiles)]
        merged.append(_merged(of_image, corners, whole.size, tiling.merge) if tiles else of_image[0])
    return merged


def _merged(
    found: Sequence[Mapping[str, Any]], corners: Sequence[tuple[int, int]], size: tuple[int, int], method: Method
) -> dict[str, Any]:
    """Make one list of an image's; the (height, width) is of the whole image."""
    beside = [name for name in found[0] if name not in ("scores", "labels", "label_names", "boxes")]
    if beside and method != "nms":
        raise ValueError(f"{method} makes new boxes and cannot make {', '.join(beside)} for them: merge by nms")
    # Each tile stands for a model of an ensemble; by the greatest score an object that one of them saw keeps its own.
    kept = fusion.merge(found, corners, method, confidence="max", **_OVERLAPS[method])
    lengths = [len(image["label_names"]) for image in found]
    places = [(image, slot) for image, length in enumerate(lengths) for slot in range(length)]
    chosen = [places[query] for query in kept["queries"].tolist()]
    return {
        "scores": kept["scores"],
        "labels": kept["labels"],
        "label_names": [found[image]["label_names"][slot] for image, slot in chosen],
        "boxes": kept["boxes"],
        **{
            name: [_moved(name, found[image][name][slot], corners[image], size) for image, slot in chosen]
            for name in beside
        },
    }


def _moved(name: str, value: Any, corner: tuple[int, int], size: tuple[int, int]) -> Any:
    """Bring what a tile gives of a detection beside its box into the image, as JSON holds it."""
    if name == "segmentations":
        return _moved_mask(value, corner, size)
    columns = columns_of(name)
    # Of an oriented box, what follows its centre are lengths.
    moves = [0.0] * len(columns)
    for axis, by in zip(("x", "y"), corner, strict=True):
        if axis in columns:
            first = columns.index(axis)
            moves = [*moves[:first], float(by), *moves[first + 1 :]]
    moved: Tensor = value + (torch.tensor(moves) if value.ndim else 0.0)
    return moved.tolist()


def _moved_mask(rle: Mapping[str, Any], corner: tuple[int, int], size: tuple[int, int]) -> Mapping[str, Any]:
    if tuple(rle["size"]) == size:
        return rle
    mask = torch.from_numpy(mask_of_rle(rle["counts"], rle["size"]))  # (h, w)
    (left, top), (height, width) = corner, mask.shape
    sides = (left, size[1] - left - width, top, size[0] - top - height)
    whole = to_rle(torch.nn.functional.pad(mask, sides)[None])[0]
    return {**whole, "counts": whole["counts"].decode()}
