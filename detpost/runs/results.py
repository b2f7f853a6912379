"""Result files of a detection run, made from its journal one image at a time and moved into place whole."""

from __future__ import annotations

import csv
import filecmp
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detpost.boxes import convert
from detpost.runs.coco import match_categories
from detpost.runs.journal import Journal

__all__ = ["FORMATS", "Report", "Skipped"]

FORMATS = ("coco", "jsonl", "csv")


class Skipped(NamedTuple):
    """An image without a result.

    Args:
        file_name: its relative path.
        reason: one line.
    """

    file_name: str
    reason: str


class Report:
    """The result files.

    Args:
        journal: of the run.
        names: the images that belong into the files, in order.
        given_ids: the id of each image; ``None`` takes the journal's.
        truth: the annotation file whose categories the COCO file refers to, if any.
        categories: how classes find their category there, as :func:`detpost.coco.match_categories` takes it.
    """

    def __init__(
        self,
        journal: Journal,
        names: Sequence[str],
        given_ids: Mapping[str, int] | None,
        truth: Mapping[str, Any] | None,
        categories: str,
        unread: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.journal = journal
        self.names = names
        self.given_ids = given_ids
        self.skipped = [Skipped(*each) for each in unread]
        self.detections = 0
        self.uncategorised = 0
        assert journal.header is not None
        self.class_names = {int(label): name for label, name in journal.header["class_names"].items()}
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
        return tuple(folder / name for name in writers), any(written)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for row in self.journal.rows(self.names):
            given = self.given_ids
            yield row if given is None else {**row, "image_id": given[row["file_name"]]}

    def _count(self) -> None:
        for row in self._rows():
            if "error" in row:
                self.skipped.append(Skipped(row["file_name"], row["error"]))
                continue
            self.detections = self.detections + len(row["scores"])
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
            for score, label, box in zip(row["scores"], row["labels"], corners, strict=True):
                category = label if self.categories is None else self.categories.get(label)
                if category is None:
                    continue
                result = {"image_id": row["image_id"], "category_id": category, "bbox": box, "score": score}
                file.write(separator + json.dumps(result))
                separator = ",\n"
        file.write("\n]\n")

    def _jsonl(self, file: Any) -> None:
        for row in self._rows():
            image: dict[str, Any] = {
                name: row[name] for name in ("image_id", "file_name", "width", "height", "error") if name in row
            }
            if "error" not in row:
                values = zip(row["labels"], row["names"], row["scores"], row["boxes"], strict=True)
                names = ("label", "label_name", "score", "box")
                image = {**image, "detections": [dict(zip(names, each, strict=True)) for each in values]}
            file.write(json.dumps(image) + "\n")

    def _csv(self, file: Any) -> None:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image_id", "file_name", "label", "label_name", "score", "x1", "y1", "x2", "y2"])
        for row in self._rows():
            if "error" not in row:
                values = zip(row["labels"], row["names"], row["scores"], row["boxes"], strict=True)
                table.writerows([row["image_id"], row["file_name"], *each, *box] for *each, box in values)

    def _skipped_csv(self, file: Any) -> None:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([("file_name", "reason"), *self.skipped])


def _replace(path: Path, write: Callable[[Any], None]) -> bool:
    """Write a file beside its place and move it there whole; leave it alone where it is the same already."""
    part = path.with_name(f".{path.name}.part")
    # A file name in no valid encoding is written in the bytes that it has.
    with part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    if path.is_file() and filecmp.cmp(part, path, shallow=False):
        part.unlink()
        return False
    os.replace(part, path)
    return True
