"""Result files of a detection run, made one image at a time from its rows and moved into place whole."""

from __future__ import annotations

import contextlib
import csv
import filecmp
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detpost.boxes import convert
from detpost.runs.batches import beside_of, names_beside
from detpost.runs.coco import match_categories
from detpost.runs.parquet import TableWriter, import_pyarrow, schema, table_of
from detpost.runs.yolo import YOLO, write_labels

__all__ = [
    "CSV_HEADER",
    "FORMATS",
    "PARQUET",
    "Report",
    "Rows",
    "Skipped",
    "check_formats",
    "csv_rows",
    "detections_of",
    "replaced",
]

FORMATS = ("coco", "jsonl", "csv", "parquet", YOLO)
PARQUET = "detections.parquet"
# Of each detection; which image it is of comes first.
CSV_HEADER = ("label", "label_name", "score", "x1", "y1", "x2", "y2")
# Rows that become one table of Arrow at a time.
_TABLE_ROWS = 512

# Gives the rows of a run, in order and as the journal has them; asked again for each file that is made of them.
Rows = Callable[[], Iterator[dict[str, Any]]]


class Skipped(NamedTuple):
    """An image without a result.

    Args:
        file_name: its relative path.
        reason: one line.
    """

    file_name: str
    reason: str


def check_formats(formats: Sequence[str]) -> None:
    """Refuse formats that there are not, none at all, and those whose package is missing."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"unknown format {unknown[0] if unknown else ''!r}: take one of {', '.join(FORMATS)}")
    if "parquet" in formats:
        import_pyarrow()


class Report:
    """The result files.

    Args:
        rows: of the run, sorted by file name.
        known: what the run says of itself: ``class_names``, and what else a Parquet file is to say.
        truth: the annotation file whose categories the COCO file refers to, if any.
        categories: how classes find their category there, as :func:`detpost.coco.match_categories` takes it.
        unread: folders that could not be looked into, and why.
    """

    def __init__(
        self,
        rows: Rows,
        known: Mapping[str, Any],
        truth: Mapping[str, Any] | None,
        categories: str,
        unread: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._rows = rows
        self._known = known
        self.images = 0
        self.skipped = [Skipped(*each) for each in unread]
        self.detections = 0
        self.uncategorised = 0
        self._beside: set[str] = set()
        self.class_names = {int(label): name for label, name in known["class_names"].items()}
        if truth is None:
            self.categories: dict[int, int] | None = None
            self.category_rows = [{"id": label, "name": name} for label, name in sorted(self.class_names.items())]
        else:
            self.categories = match_categories(self.class_names, truth["categories"], categories)
            self.category_rows = list(truth["categories"])

    def write(self, folder: Path, formats: Sequence[str]) -> tuple[tuple[Path, ...], bool]:
        """Write the files and give their paths, and whether any of them is new or other than before."""
        self._count()
        writers: dict[str, Callable[[Any], None]] = {}
        if "coco" in formats:
            writers.update({"images.json": self._images, "detections.json": self._coco})
        if "jsonl" in formats:
            writers.update({"detections.jsonl": self._jsonl})
        if "csv" in formats:
            writers.update({"detections.csv": self._csv})
        if self.skipped:
            writers.update({"skipped.csv": self._skipped_csv})
        else:
            (folder / "skipped.csv").unlink(missing_ok=True)
        written = [_replace(folder / name, writer) for name, writer in writers.items()]
        paths = [folder / name for name in writers]
        if "parquet" in formats:
            with replaced(folder / PARQUET) as (file, changed):
                self._parquet(file)
            paths, written = [*paths, folder / PARQUET], [*written, *changed]
        if YOLO in formats:
            self._warn_of_boxes_alone("YOLO text")
            changed = [write_labels(self._rows(), folder, self.class_names)]
            paths, written = [*paths, folder / YOLO], [*written, *changed]
        return tuple(paths), any(written)

    def _count(self) -> None:
        for row in self._rows():
            self.images = self.images + 1
            if "error" in row:
                self.skipped.append(Skipped(row["file_name"], row["error"]))
                continue
            self.detections = self.detections + len(row["scores"])
            self._beside = self._beside | {*names_beside(row)}
            if self.categories is not None:
                missing = sum(label not in self.categories for label in row["labels"])
                self.uncategorised = self.uncategorised + missing

    def _images(self, file: Any) -> None:
        kept = ("file_name", "width", "height")
        file.write('{"images": [\n')
        for place, row in enumerate(self._rows()):
            image = {"id": row["image_id"], **{name: row[name] for name in kept if name in row}}
            file.write((",\n" if place else "") + json.dumps(image))
        file.write(f'\n],\n"categories": {json.dumps(self.category_rows)}}}\n')

    def _coco(self, file: Any) -> None:
        separator = "\n"
        file.write("[")
        for row in self._rows():
            if "error" in row:
                continue
            boxes = torch.tensor(row["boxes"], dtype=torch.float32, device="cpu").reshape(-1, 4)
            corners = convert(boxes, "xyxy", "xywh").tolist()
            beside = beside_of(row)
            for place, (score, label, box) in enumerate(zip(row["scores"], row["labels"], corners, strict=True)):
                category = label if self.categories is None else self.categories.get(label)
                if category is None:
                    continue
                result = {"image_id": row["image_id"], "category_id": category, "bbox": box, "score": score}
                result |= {name: values[place] for name, values in beside.items()}
                if "keypoints" in result:  # COCO's results have x, y, v in one row
                    result |= {"keypoints": [number for point in result["keypoints"] for number in point]}
                file.write(separator + json.dumps(result))
                separator = ",\n"
        file.write("\n]\n")

    def _jsonl(self, file: Any) -> None:
        for row in self._rows():
            image: dict[str, Any] = {
                name: row[name] for name in ("image_id", "file_name", "width", "height", "error") if name in row
            }
            if "error" not in row:
                image = {**image, "detections": detections_of(row)}
            file.write(json.dumps(image) + "\n")

    def _csv(self, file: Any) -> None:
        self._warn_of_boxes_alone("CSV")
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image_id", "file_name", *CSV_HEADER])
        for row in self._rows():
            table.writerows([row["image_id"], row["file_name"], *values] for values in csv_rows(row))

    def _warn_of_boxes_alone(self, what: str) -> None:
        if self._beside:
            left_out = ", ".join(sorted(self._beside))
            warnings.warn(f"{what} holds boxes and no {left_out}: coco and jsonl hold them", stacklevel=3)

    def _parquet(self, file: Any) -> None:
        table = TableWriter(file, schema(self._known))
        try:
            for rows in _batches(self._rows(), _TABLE_ROWS):
                table.add(table_of(rows))
            table.close()
        except BaseException:
            table.abandon()
            raise

    def _skipped_csv(self, file: Any) -> None:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([("file_name", "reason"), *self.skipped])


def detections_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the detections of a row of the journal as JSON lines have them."""
    values = zip(row["labels"], row["names"], row["scores"], row["boxes"], strict=True)
    found = [dict(zip(("label", "label_name", "score", "box"), each, strict=True)) for each in values]
    beside = beside_of(row)
    return [{**each, **{name: of[place] for name, of in beside.items()}} for place, each in enumerate(found)]


def csv_rows(row: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Give a row of the journal as lines of CSV; none where it has an error."""
    if "error" not in row:
        values = zip(row["labels"], row["names"], row["scores"], row["boxes"], strict=True)
        yield from ([*each, *box] for *each, box in values)


def _batches(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch


@contextlib.contextmanager
def replaced(path: Path, text: bool = False) -> Iterator[tuple[Any, list[bool]]]:
    """Write a file beside its place and move it there whole; leave it alone where it is the same already.

    Args:
        path: its place.
        text: whether it is text, in UTF-8; binary otherwise.

    Yields:
        The open file, and a list that has, once it is closed, whether it is new or other than before.
    """
    part = path.with_name(f".{path.name}.part")
    changed: list[bool] = []
    try:
        # A file name in no valid encoding is written in the bytes that it has.
        options: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""} if text else {}
        with part.open("w" if text else "wb", **options) as file:
            yield file, changed
            file.flush()
            os.fsync(file.fileno())
        if path.is_file() and filecmp.cmp(part, path, shallow=False):
            changed.append(False)
            part.unlink()
            return
        os.replace(part, path)
        changed.append(True)
    except BaseException:  # a disk that is full is not to be kept so
        part.unlink(missing_ok=True)
        raise


def _replace(path: Path, write: Callable[[Any], None]) -> bool:
    with replaced(path, text=True) as (file, changed):
        write(file)
    return changed[0]
