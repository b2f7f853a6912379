"""Versions of one detector run on the same images: prepared once, run as often as a search asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from detpost.detections import Detections
from detpost.export.feed import Feed
from detpost.images import PreparedImage, Untouched

if TYPE_CHECKING:
    import onnx

    from detpost.detector import Detector

__all__ = ["OnImages", "as_arrays", "detect_all"]

_MOST_BYTES_HELD = 2**30
_BATCH = 8


class OnImages:
    """Images as a file takes them, and a way to run versions of that file on them.

    Args:
        path: an ``.onnx`` file of detpost's, or an ``.xml`` one.
        images: the images' files.
        batch: most images at once.

    Raises:
        ValueError: a file that is no whole detector, or no images.
    """

    def __init__(self, path: Path, images: Sequence[Path], batch: int = _BATCH) -> None:
        from detpost.detector import detector_of_file
        from detpost.export.opened import open_file

        if not images:
            raise ValueError("no images: name a folder that has some")
        opened = open_file(path)
        self.path, self.images, self.metadata = path, tuple(images), opened.metadata
        self.detector = detector_of_file(opened, threshold=0.0)
        self._feed = Feed.of(path, opened.metadata, opened.inputs)
        # Images that a file resizes itself keep their sizes, and one batch has one size.
        self.batch = self.detector.batch or (1 if isinstance(self.detector.prepare, Untouched) else batch)
        self._held: list[PreparedImage] = []

    def feeds(self) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor, int]]:
        """Give by batch what the file takes, images and sizes, and how many images are no repetition of the last."""
        for start in range(0, len(self.images), self.batch):
            ready = self._ready(start, min(start + self.batch, len(self.images)))
            filled = [*ready, *[ready[-1]] * ((self.detector.batch or len(ready)) - len(ready))]
            batch, sizes, _ = self.detector.prepare.batch(filled)
            yield self._feed(batch, sizes), batch, sizes, len(ready)

    def arrays(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """Give the same as NumPy arrays: what calibration reads."""
        for feed, *_ in self.feeds():
            yield {name: value.numpy() for name, value in feed.items()}

    def detect(self, model: onnx.ModelProto | None = None) -> list[dict[str, np.ndarray[Any, Any]]]:
        """Give all detections of each image.

        Args:
            model: what to run; ``None`` runs the file itself.
        """
        return [found for found, _ in self.watch(model)]

    def watch(
        self, model: onnx.ModelProto | None = None, values: Sequence[str] = ()
    ) -> Iterator[tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]]:
        """Give the detections of each image, and values beside them.

        Args:
            model: what to run; ``None`` runs the file itself.
            values: outputs of the model whose first axis is the batch, or that hold all of it.
        """
        from detpost.export.opened import open_file, opened_session
        from detpost.export.runtime import onnx_session

        opened = (
            open_file(self.path)
            if model is None
            else opened_session(onnx_session(model.SerializeToString()), self.metadata, self.path)
        )
        for feed, images, sizes, count in self.feeds():
            found = opened.run(feed)
            detections = opened.detections(found, sizes, images)
            beside = {name: found[name].numpy() for name in values}
            for place, each in enumerate(as_arrays(detections)[:count]):
                yield each, {name: _row(value, place, len(images)) for name, value in beside.items()}

    def _ready(self, start: int, end: int) -> list[PreparedImage]:
        if end <= len(self._held):
            return self._held[start:end]
        ready = [self.detector.ready(path) for path in self.images[start:end]]
        bytes_of_all = ready[0].pixels.nbytes * len(self.images) if ready else 0
        if start == len(self._held) and bytes_of_all <= _MOST_BYTES_HELD:
            self._held = [*self._held, *ready]
        return ready


def _row(value: np.ndarray[Any, Any], place: int, batch: int) -> np.ndarray[Any, Any]:
    return value[place] if value.ndim and value.shape[0] == batch else value


def as_arrays(detections: Detections) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Give the valid detections of each image as NumPy arrays."""
    return [{name: value.detach().cpu().numpy() for name, value in each.items()} for each in detections.to_list()]


def detect_all(detector: Detector, images: Sequence[Path]) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Give all detections of each image of any detector, whatever runs it.

    Args:
        detector: with a threshold of 0.
        images: the images' files.
    """
    step = detector.batch or _BATCH
    rows: list[Mapping[str, Any]] = []
    for start in range(0, len(images), step):
        rows += detector.predict_ready([detector.ready(path) for path in images[start : start + step]])
    return [{name: row[name].numpy() for name in ("scores", "labels", "boxes")} for row in rows]
