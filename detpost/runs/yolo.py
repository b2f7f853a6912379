"""Detections as YOLO text: a file of lines for each image, as Ultralytics writes and FiftyOne reads them."""

from __future__ import annotations

import filecmp
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from detpost.boxes import convert

__all__ = ["YOLO", "write_labels"]

YOLO = "yolo"


def write_labels(rows: Iterable[Mapping[str, Any]], folder: Path, class_names: Mapping[int, str]) -> bool:
    """Write ``yolo/labels/NAME.txt`` for each image and ``yolo/data.yaml``, which names the classes.

    A line is the label, the centre, width and height of the box in units of the image, and the score. An image in which
    nothing is found has an empty file, one that was skipped has none. Of images whose names differ by their ending
    alone the first in order has ``NAME.txt``, the others ``NAME.ENDING.txt``.

    Args:
        rows: of the journal, sorted by file name.
        folder: for the results.
        class_names: by label.

    Returns:
        Whether anything is new or other than before.

    Warns:
        UserWarning: images whose names differ by their ending alone.
    """
    place, part = folder / YOLO, folder / f".{YOLO}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        (part / "labels").mkdir(parents=True)
        names = "".join(f"  {label}: {json.dumps(name)}\n" for label, name in sorted(class_names.items()))
        (part / "data.yaml").write_text(f"names:\n{names}" if names else "names: {}\n", encoding="utf-8")
        alike = sum(_write(row, part / "labels") for row in rows if "error" not in row)
        if alike:
            warnings.warn(
                f"{alike} images have another's name but for its ending: their labels are in NAME.ENDING.txt",
                stacklevel=2,
            )
        if place.is_dir() and _are_same(part, place):
            return False
        shutil.rmtree(place, ignore_errors=True)
        os.replace(part, place)
        return True
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(row: Mapping[str, Any], labels: Path) -> bool:
    """Write the file of an image, and tell whether another has its name."""
    # Names out of a dataset's column may lead anywhere.
    steps = [step.replace("\0", "_") for step in row["file_name"].split("/") if step not in ("", ".", "..")]
    name = PurePosixPath(*steps) if steps else PurePosixPath("_")
    short = str(name.with_suffix(".txt"))
    others = (f"{name}{f'.{number}' if number else ''}.txt" for number in itertools.count())
    path = next(path for each in itertools.chain([short], others) if not (path := labels / each).exists())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(_lines(row)), encoding="utf-8")
    return path != labels / short


def _lines(row: Mapping[str, Any]) -> Iterator[str]:
    corners = torch.tensor(row["boxes"], dtype=torch.float64, device="cpu").reshape(-1, 4)
    size = corners.new_tensor([row["width"], row["height"]] * 2)
    boxes = (convert(corners, "xyxy", "cxcywh") / size).tolist()
    for label, box, score in zip(row["labels"], boxes, row["scores"], strict=True):
        yield f"{label} {' '.join(f'{number:.6g}' for number in (*box, score))}\n"


def _are_same(one: Path, other: Path) -> bool:
    """Tell whether two folders hold the same files."""
    files = [
        sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in (one, other)
    ]
    return files[0] == files[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in files[0])
