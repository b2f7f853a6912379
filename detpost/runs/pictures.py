"""The folder of annotated pictures: where each goes, and how it gets there whole."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detpost.runs.drawing import drawn
from detpost.runs.find_images import MARKER

__all__ = ["PICTURES", "Pictures", "forget_pictures"]

PICTURES = "pictures"
_PART = ".part"


class Pictures:
    """The tree of the images again, PNG but for JPEG.

    Args:
        out: the folder of the results; the pictures get one of their own in it.
        names: of all images, so that no two share a picture.

    Raises:
        ValueError: the folder holds files of somebody else.
    """

    def __init__(self, out: Path, names: Iterable[str]) -> None:
        self.folder = out / PICTURES
        self._names = frozenset(names)
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / MARKER).exists() and any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} holds files that detpost did not write: take another folder for the results"
            )
        (self.folder / MARKER).touch()
        for part in self.folder.glob(f"{_PART}*"):  # of a run that was killed
            part.unlink(missing_ok=True)

    def place(self, name: str) -> Path:
        """Find the place of an image's picture; no two images share one."""
        return _place(self.folder, name, self._names)

    def put(self, image: Tensor, row: Mapping[str, Any], size: tuple[int, int]) -> None:
        """Draw a picture and move it into place whole; any thread may.

        Args:
            image: (3, H, W), uint8, whole or shrunk.
            row: of the journal.
            size: (height, width) of the whole image, which the row's boxes are in.
        """
        boxes = torch.tensor(row["boxes"], dtype=torch.float32, device="cpu").reshape(-1, 4)
        found = {
            "scores": torch.tensor(row["scores"], dtype=torch.float32, device="cpu"),
            "labels": torch.tensor(row["labels"], dtype=torch.int64, device="cpu"),
            "boxes": boxes if image.shape[1:] == size else _scaled(boxes, size, image),
            "label_names": row["names"],
        }
        path = self.place(row["file_name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{_PART}-{threading.get_ident()}"
        with part.open("wb") as file:
            picture = drawn(image, found)
            if path.suffix.lower() == ".png":
                picture.save(file, "PNG", compress_level=1)  # a third of the time, a sixth more bytes
            else:
                picture.save(file, "JPEG", quality=92)
        os.replace(part, path)

    def remove(self, name: str) -> None:
        """Remove the picture of an image that has no result."""
        self.place(name).unlink(missing_ok=True)


def forget_pictures(out: Path, names: Sequence[str], changed: Sequence[str]) -> None:
    """Remove pictures of what is about to be detected anew without being drawn."""
    folder, taken = out / PICTURES, frozenset(names)
    if (folder / MARKER).exists():
        for name in changed:
            _place(folder, name, taken).unlink(missing_ok=True)


def _place(folder: Path, name: str, taken: frozenset[str]) -> Path:
    if Path(name).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        name = f"{name}.png"
        while name in taken:
            name = f"{name}.png"
    return folder / name


def _scaled(boxes: Tensor, size: tuple[int, int], image: Tensor) -> Tensor:
    from detpost.boxes import scale

    height, width = image.shape[1:]
    return scale(boxes, (height / size[0], width / size[1]))
