"""FiftyOne: a detector for ``dataset.apply_model``, and the results of a run as a field of a dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detpost.heads.masks import mask_of_rle

__all__ = ["add_results", "model", "read_results"]

_COLUMNS = ["file_name", "width", "height", "boxes", "scores", "label_names", "masks", "error"]
# Rows that are held at once, and samples that are written to the database together.
_ROWS = 256


def model(detector: Any, batch_size: int = 8) -> Any:
    """Make a model that ``dataset.apply_model`` takes.

    Args:
        detector: a :class:`detpost.Detector`; its threshold decides what is kept.
        batch_size: most images that go through the network at once.

    Returns:
        A ``fiftyone.core.models.Model``. Its ``predict`` takes a uint8 image (H, W, 3), RGB, and gives
        ``fiftyone.Detections``; ``predict_all`` takes a list of them.

    Raises:
        ImportError: FiftyOne is not installed.

    Example:
        ::

            from detpost.integrations import fiftyone

            dataset.apply_model(fiftyone.model(detpost.Detector.load("tiny")), label_field="digits", batch_size=8)
    """
    fiftyone = _import_fiftyone()
    from fiftyone.core.models import Model

    class DetectorModel(Model):  # type: ignore[misc]
        """A detector behind FiftyOne's interface."""

        media_type = "image"
        ragged_batches = True
        transforms = None
        preprocess = False

        def predict(self, arg: Any) -> Any:
            return self.predict_all([arg])[0]

        def predict_all(self, args: Sequence[Any]) -> list[Any]:
            images = [np.array(image) for image in args]
            found = detector.predict(images, batch_size=batch_size)
            return [_of_prediction(fiftyone, *each) for each in zip(found, images, strict=True)]

    return DetectorModel()


def read_results(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Read the results of a run, a few hundred images at a time.

    Args:
        path: ``detections.parquet``, or the folder of results that has it.

    Yields:
        The file name and ``fiftyone.Detections`` of each image, ``None`` for one without a result; boxes relative to
        the image, masks within their boxes.

    Raises:
        ImportError: FiftyOne or pyarrow is not installed.
        OSError: no such file.
    """
    fiftyone = _import_fiftyone()
    for row in _rows(Path(path)):
        yield row["file_name"], None if row["error"] is not None else _of_row(fiftyone, row)


def add_results(samples: Any, path: str | Path, label_field: str, root: str | Path) -> int:
    """Put the results of a run into a field of a dataset or view.

    Args:
        samples: the dataset; samples are found by their ``filepath``.
        path: as :func:`read_results` takes it.
        label_field: of the samples.
        root: the folder that the run was over, which its file names are relative to.

    Returns:
        How many samples were given detections; images without a result leave theirs alone.

    Raises:
        ImportError: FiftyOne or pyarrow is not installed.
        OSError: no such file.
        ValueError: no image of the results is among the samples.
    """
    there = set(samples.values("filepath"))
    folder, added, first = os.path.abspath(root), 0, ""
    waiting: dict[str, Any] = {}
    for name, found in read_results(path):
        place = os.path.join(folder, name)
        first = first or place
        if place in there and found is not None:
            waiting.update({place: found})
            added = added + 1
        if len(waiting) == _ROWS:
            samples.set_values(label_field, waiting, key_field="filepath")
            waiting = {}
    if waiting:
        samples.set_values(label_field, waiting, key_field="filepath")
    if first and not added:
        raise ValueError(
            f"no image of {path} with a result is among the samples, as {first}: name the run's folder as root"
        )
    return added


def _import_fiftyone() -> Any:
    try:
        import fiftyone
    except ImportError:
        raise ImportError("FiftyOne is not installed: pip install fiftyone") from None
    return fiftyone


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError("Parquet needs pyarrow: pip install 'detpost[parquet]'") from None
    place = path / "detections.parquet" if path.is_dir() else path
    with parquet.ParquetFile(place) as file:
        for batch in file.iter_batches(_ROWS, columns=_COLUMNS):
            yield from batch.to_pylist()


def _of_prediction(fiftyone: Any, found: Mapping[str, Any], image: npt.NDArray[Any]) -> Any:
    """Give a prediction's labels; masks, where there are any, are (D, H, W), bool."""
    height, width = image.shape[:2]
    masks = found.get("masks")
    return _labels(
        fiftyone,
        (height, width),
        found["boxes"].tolist(),
        found["scores"].tolist(),
        found["label_names"],
        None if masks is None else [mask.numpy() for mask in masks],
    )


def _of_row(fiftyone: Any, row: Mapping[str, Any]) -> Any:
    masks = row["masks"]
    decoded = None if masks is None else [mask_of_rle(mask["counts"], mask["size"]) for mask in masks]
    size = (row["height"], row["width"])
    return _labels(fiftyone, size, row["boxes"], row["scores"], row["label_names"], decoded)


def _labels(
    fiftyone: Any,
    size: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    names: Sequence[str],
    masks: Sequence[npt.NDArray[np.bool_]] | None,
) -> Any:
    height, width = size
    labels = []
    for place, ((left, top, right, bottom), score, name) in enumerate(zip(boxes, scores, names, strict=True)):
        relative = [left / width, top / height, (right - left) / width, (bottom - top) / height]
        inside = {} if masks is None else {"mask": _within(masks[place], (left, top, right, bottom))}
        labels.append(fiftyone.Detection(label=name, bounding_box=relative, confidence=score, **inside))
    return fiftyone.Detections(detections=labels)


def _within(mask: npt.NDArray[np.bool_], box: tuple[float, float, float, float]) -> npt.NDArray[np.bool_]:
    """Cut a mask (H, W) to the pixels that its box touches, at least one, as FiftyOne holds it."""
    height, width = mask.shape
    left, top = (min(max(0, int(value)), side - 1) for value, side in zip(box[:2], (width, height), strict=True))
    right, bottom = max(left + 1, int(np.ceil(box[2]))), max(top + 1, int(np.ceil(box[3])))
    return mask[top:bottom, left:right]
