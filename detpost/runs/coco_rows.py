"""Ground truth and results, checked row by row before an evaluation in C++ gets to see them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detpost.runs.coco import brief, is_id, read_annotations

__all__ = ["ground_truth", "result_rows"]

# Beyond it a polygon's outline, which is drawn in memory at five steps a pixel, takes gigabytes.
_FARTHEST = 1_000_000


def ground_truth(path: str | Path, iou_type: str) -> tuple[dict[str, Any], list[str]]:
    """Read a ground truth, with what an evaluation needs of each annotation filled in and everything else left out.

    Args:
        path: a COCO annotation file.
        iou_type: ``"bbox"`` or ``"segm"``.

    Returns:
        ``images``, ``annotations`` and ``categories``; and what the reader should know.

    Raises:
        OSError: it is missing.
        ValueError: it is not what it should be, in one line that names the row and the value.
    """
    truth = read_annotations(path)
    rows = truth["annotations"]
    if not rows:
        raise ValueError(f"{path} has no annotations: there is nothing to measure against")
    images = {image["id"]: image for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    lost = [row for row in rows if not _is_in(row, "image_id", images) or not _is_in(row, "category_id", categories)]
    if lost:
        raise ValueError(
            f"{path}: {len(lost)} annotations are of no image or category of it, the first is {brief(lost[0])}"
        )
    shapes = ("bbox", "segmentation") if iou_type == "segm" else ("bbox",)
    _refuse_missing(rows, shapes, str(path))
    filled = [
        {"id": number, "iscrowd": 0, **_kept(row, "id", "image_id", "category_id", "iscrowd", "area", *shapes)}
        for number, row in enumerate(rows, start=1)
    ]
    for number, row in enumerate(filled, start=1):
        fault = _annotation_fault(row, images[row["image_id"]])
        if fault:
            raise ValueError(f"{path}: the {fault[0]} of annotation {number} must be {fault[1]}")
    filled = [{"area": row["bbox"][2] * row["bbox"][3], **row} for row in filled]
    notes = []
    if any(row["id"] == 0 for row in filled):
        notes.append(f"{path} has an annotation with id 0, which COCO's evaluation takes for no match: number from 1")
    return {**truth, "annotations": filled}, notes


def result_rows(rows: Any, source: str, iou_type: str) -> list[dict[str, Any]]:
    """Check results, and give copies, because an evaluation writes into them.

    Args:
        rows: what a results file holds.
        source: what to call it in a message.
        iou_type: ``"bbox"`` or ``"segm"``.

    Returns:
        The rows, with what an evaluation needs.

    Raises:
        ValueError: they are not what they should be, in one line that names the row and the value.
    """
    if isinstance(rows, Mapping) or not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{source} is not a COCO results file: it must be a list of objects")
    shapes = {"bbox": ("bbox", "segmentation"), "segm": ("segmentation",)}[iou_type]
    for number, row in enumerate(rows, start=1):
        lacking = [name for name in ("image_id", "category_id", "score") if name not in row]
        if not any(row.get(shape) for shape in shapes):
            lacking = [*lacking, " or ".join(shapes)]
        if lacking:
            raise ValueError(f"{source}: result {number} has no {' and no '.join(lacking)}; it has {brief([*row])}")
        fault = _result_fault(row, shapes)
        if fault:
            raise ValueError(f"{source}: the {fault[0]} of result {number} must be {fault[1]}")
    # Whether a row's box comes from its mask is decided by the first row: keep boxes only where every row has one.
    boxes = all("bbox" in row for row in rows)
    kept = ("image_id", "category_id", "score", *(shape for shape in shapes if shape != "bbox" or boxes))
    return [_kept(row, *kept) for row in rows]


def _kept(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names if name in row}


def _is_in(row: Mapping[str, Any], name: str, known: Iterable[int]) -> bool:
    value = row.get(name)
    return is_id(value) and value in known  # type: ignore[operator]


def _refuse_missing(rows: Sequence[Mapping[str, Any]], shapes: Sequence[str], source: str) -> None:
    lacking = [(row, name) for row in rows for name in shapes if row.get(name) in (None, [])]
    if lacking:
        row, name = lacking[0]
        count = sum(other == name for _, other in lacking)
        raise ValueError(f"{source}: {count} annotations have no {name}, the first has {brief([*row])}")


# What is wrong in a row: the name of a value; what it must be, and what came.
Fault = tuple[str, str] | None


def _annotation_fault(row: Mapping[str, Any], image: Mapping[str, Any]) -> Fault:
    if not is_box(row["bbox"]):
        return "bbox", f"x, y, width, height; got {brief(row['bbox'])}"
    if "area" in row and not is_number(row["area"]):
        return "area", f"a number; got {brief(row['area'])}"
    if not isinstance(row["iscrowd"], int) or row["iscrowd"] not in (0, 1):
        return "iscrowd", f"0 or 1; got {brief(row['iscrowd'])}"
    if "segmentation" not in row:
        return None
    return _segmentation_fault(row["segmentation"], image)


def _result_fault(row: Mapping[str, Any], shapes: Sequence[str]) -> Fault:
    for name in ("image_id", "category_id"):
        if not is_id(row[name]):
            return name, f"a whole number; got {brief(row[name])}"
    if not is_number(row["score"]):
        return "score", f"a number; got {brief(row['score'])}"
    if "bbox" in row and "bbox" in shapes and not is_box(row["bbox"]):
        return "bbox", f"x, y, width, height; got {brief(row['bbox'])}"
    # A box of its own makes a mask idle.
    if row.get("segmentation") and ("bbox" not in shapes or "bbox" not in row):
        return _run_length_fault(row["segmentation"], (str, bytes))
    return None


def _segmentation_fault(value: Any, image: Mapping[str, Any]) -> Fault:
    if isinstance(value, Mapping):
        return _run_length_fault(value, (str, bytes, list))
    if not isinstance(value, list) or not all(map(_is_polygon, value)):
        wanted = f"a list of polygons (x, y, x, y, ... of at least 3 points) or run lengths; got {brief(value)}"
        return "segmentation", wanted
    if not all(_is_side(image.get(name)) for name in ("width", "height")):
        return "segmentation", f"run lengths where its image has no width and height; image {image['id']} has none"
    return None


def _is_polygon(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= 6
        and len(value) % 2 == 0
        and all(is_number(number) and abs(number) <= _FARTHEST for number in value)
    )


def _run_length_fault(value: Any, kinds: tuple[type, ...]) -> Fault:
    """Look for run lengths that do not fill their image: the intersection in C++ would never end."""
    given: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    size: Any = given.get("size")
    counts: Any = given.get("counts")
    wanted = f"run lengths, a size (height, width) and counts that add up to it; got {brief(value)}"
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(map(_is_side, size)):
        return "segmentation", wanted
    if not any(isinstance(counts, kind) for kind in kinds):
        form = "text or a list" if list in kinds else "text"
        return "segmentation", f"run lengths whose counts are {form}; got {brief(counts)}"
    lengths: Any = counts if isinstance(counts, list) else _lengths(counts)
    if lengths is None or not all(is_id(length) and length >= 0 for length in lengths):
        return "segmentation", wanted
    return None if sum(lengths) == size[0] * size[1] else ("segmentation", wanted)


def _lengths(counts: str | bytes) -> list[int] | None:
    """Undo COCO's compression: 5 bits a character, lowest first; each length less the last but one."""
    encoded = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    characters = np.frombuffer(encoded, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(~characters & 0x20)  # of each number
    if not counts or characters.min() < 0 or characters.max() > 63 or len(last) == 0 or last[-1] + 1 != len(characters):
        return None
    first = np.concatenate(([0], last[:-1] + 1))
    if (last - first).max() > 6:  # more than 32 bits
        return None
    place = np.arange(len(characters)) - np.repeat(first, last - first + 1)
    values = np.add.reduceat((characters & 0x1F) << (5 * place), first)
    signed = np.where(characters[last] & 0x10, values - (1 << (5 * (last - first + 1))), values)
    # The first three stand as they are; from the fourth on each is added to the last but one.
    odd, even = np.cumsum(signed[1::2]), np.concatenate((signed[:1], np.cumsum(signed[2::2])))
    lengths: list[int] = np.stack((even[: len(odd)], odd), 1).ravel().tolist()
    return [*lengths, *even[len(odd) :].tolist()]


def is_number(value: Any) -> bool:
    """Tell a finite number from everything else, a whole one beyond the range of floats included."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_box(value: Any) -> bool:
    """Tell four numbers from everything else."""
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(map(is_number, value))


def _is_side(value: Any) -> bool:
    return is_id(value) and 0 < value < 2**16  # their product fits the 32 bits that it gets
