"""Batches through the network, and what came out as rows of the journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from detpost.export.heads import name_in_results
from detpost.runs.tiles import Tiling, detect_tiles

if TYPE_CHECKING:
    from detpost.detector import Detector
    from detpost.runs.reading import Loaded

__all__ = ["beside_of", "detect_batch", "failure_text", "names_beside"]

# What a row holds of each detection whatever the detector; its other lists are beside the boxes.
_OF_BOXES = frozenset({"scores", "labels", "boxes", "names"})

# What a network or a processor raises on an image that it cannot take, as one a pixel wide.
_CANNOT_TAKE = (RuntimeError, ValueError, ZeroDivisionError)

# Detects in images that were read.
Run = Callable[[Sequence["Loaded"]], list[dict[str, Any]]]


def detect_batch(
    detector: Detector,
    batch: Sequence[Loaded],
    ids: Mapping[str, int],
    alone_may_fail: bool,
    tiling: Tiling | None = None,
    inputs: int = 1,
) -> list[dict[str, Any]]:
    """Detect in a batch.

    Args:
        detector: the detector.
        batch: what was read.
        ids: the number of each image.
        alone_may_fail: whether images have gone through before, so that one that does not go through is the image's
            fault and must not end a run over a million others.
        tiling: how the images were cut; ``None`` where they were not, and go through the network together.
        inputs: most that go through it at once where they were.

    Returns:
        A row for each image: its name, number, size and time of the last change, and what was found or why not.

    Raises:
        RuntimeError, ValueError, ZeroDivisionError: no image has gone through yet, and none of these does.
    """
    run = partial(_detect, detector) if tiling is None else partial(_detect_cut, detector, tiling, inputs)
    outcomes = _outcomes(run, batch)
    tried = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    failures = [outcome for outcome in tried if isinstance(outcome, Exception)]
    if failures and len(failures) == len(tried) and not alone_may_fail:
        raise failures[0]  # the model fails, not the image
    return [_row(loaded, outcome, ids[loaded.name]) for loaded, outcome in zip(batch, outcomes, strict=True)]


def failure_text(error: Exception, size: tuple[int, int]) -> str:
    """Say on one line that an image of this (height, width) does not go through, and what was raised."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"the detector cannot take {size[1]} x {size[0]} pixels: {reason[:200]}"


def beside_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Give what a row of the journal holds of each detection beside its box, by its name in results."""
    return {name_in_results(name): row[name] for name in names_beside(row)}


def names_beside(row: Mapping[str, Any]) -> list[str]:
    """Name what a row of the journal holds of each detection beside its box."""
    return [name for name in row if isinstance(row[name], list) and name not in _OF_BOXES]


def _outcomes(run: Run, batch: Sequence[Loaded]) -> list[dict[str, Any] | Exception | str]:
    """Give what was found in each image, what it raised, or why it could not be read."""
    found = iter(_predict(run, [loaded for loaded in batch if loaded.ready is not None]))
    return [
        next(found) if loaded.ready is not None else loaded.failure[0] if loaded.failure else loaded.error
        for loaded in batch
    ]


def _predict(run: Run, images: Sequence[Loaded]) -> list[dict[str, Any] | Exception]:
    """Run the detector; where a batch does not go through, each image alone."""
    if not images:
        return []
    try:
        return [*run(images)]
    except torch.OutOfMemoryError:
        raise
    except _CANNOT_TAKE as error:
        if len(images) == 1:
            return [error]
    return [outcome for image in images for outcome in _predict(run, [image])]


def _detect(detector: Detector, images: Sequence[Loaded]) -> list[dict[str, Any]]:
    return detector.predict_ready([loaded.ready for loaded in images if loaded.ready is not None], encode_masks=True)


def _detect_cut(detector: Detector, tiling: Tiling, inputs: int, images: Sequence[Loaded]) -> list[dict[str, Any]]:
    whole = [(loaded.ready, loaded.tiles) for loaded in images if loaded.ready is not None]
    return detect_tiles(detector, whole, tiling, inputs)


def _row(loaded: Loaded, outcome: dict[str, Any] | Exception | str, image_id: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "file_name": loaded.name,
        "image_id": image_id,
        "size": loaded.size,
        "mtime_ns": loaded.mtime_ns,
    }
    if isinstance(outcome, str):
        return {**row, "error": outcome}
    height, width = loaded.failure[1] if loaded.failure else loaded.ready.size if loaded.ready else (0, 0)
    if isinstance(outcome, Exception):
        return {**row, "error": failure_text(outcome, (height, width))}
    values = {name: outcome[name].tolist() for name in ("scores", "labels", "boxes")}
    beside = {
        {"segmentations": "masks"}.get(name, name): _plain(found)
        for name, found in outcome.items()
        if name not in {*_OF_BOXES, "label_names"}
    }
    return {**row, "width": width, "height": height, "names": outcome["label_names"], **values, **beside}


def _plain(values: Any) -> Any:
    """Give what JSON holds."""
    return values.tolist() if hasattr(values, "tolist") else values
