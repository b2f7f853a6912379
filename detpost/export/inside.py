"""The raw values that someone else's post-processing starts from, found by running it and held to its own answer.

A graph's shape alone does not tell a box before its conversion from one after it. So every value near the outputs is
looked at on one image of noise, and those are taken that, decoded here, give the detections that come out there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from detpost.boxes import convert
from detpost.export.runtime import onnx_values
from detpost.export.surgery import true_inputs
from detpost.export.tail import Tail
from detpost.postprocess import DetectionPostProcessor
from detpost.spec import DecodeSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["InnerValues", "are_normalised", "find_inner_values", "values_in_tail"]

Array = np.ndarray[Any, Any]

IMAGE_SIDE = 640

_MOST_COMPARED = 300
_MOST_TIES = 100
# Two that tie at the last place, or lie at a class's threshold, may differ; a wrong value differs nearly everywhere.
_LEAST_AGREEMENT = 0.95
_TOLERANCE = 1e-5  # of scores: both come of the same values
_TOLERANCES = {"float16": 2e-3}
_BOX_TOLERANCE = 10  # times that, of the image side
_LARGEST_NORMALISED = 2  # boxes of an image of size 1 reach out of it by this at most

_SIGMOID: dict[str, Any] = {"activation": "sigmoid", "background": "none", "selection": "flat"}
_SOFTMAX: dict[str, Any] = {"activation": "softmax", "background": "last", "selection": "per_query"}


@dataclass(frozen=True)
class InnerValues:
    """Raw values inside a graph.

    Args:
        logits_name: of the logits.
        boxes_name: of the boxes.
        logits: (B, Q, C), on an image of noise.
        boxes: (B, Q, 4), likewise.
        notes: what the caller should know.
    """

    logits_name: str
    boxes_name: str
    logits: Array
    boxes: Array
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Reading:
    """A model's own detections in one image, as its outputs may be read: best first.

    Args:
        scores: (K,).
        labels: (K,).
        boxes: (K, 4), of the image's size or of 1, as xyxy unless ``centred``.
        centred: whether boxes are cxcywh.
    """

    scores: Array
    labels: Array
    boxes: Array
    centred: bool = False


@dataclass(frozen=True)
class _Decoded:
    """Detections of raw values decoded here, best first: (K,), (K,), and (K, 4) as xyxy of an image of size 1."""

    scores: Array
    labels: Array
    boxes: Array


def find_inner_values(
    model: onnx.ModelProto, tail: Tail, spec: DecodeSpec, names: Mapping[str, str], folder: Path | None
) -> InnerValues | str:
    """Find the raw values behind a model's own detections.

    Args:
        model: the detector.
        tail: its end.
        spec: how raw values are decoded.
        names: of ``logits`` or ``boxes`` where the caller gives one.
        folder: where external weights lie.

    Returns:
        The values, or why there are none, which is empty where the outputs are no detections.

    Raises:
        ImportError: onnxruntime is missing.
        ValueError: a model that ONNX Runtime does not take.
    """
    values = values_in_tail(model, tail, folder)
    readings = _readings({name: values[name][0] for name in tail.outputs if name in values and values[name].ndim > 1})
    if not readings:
        return ""
    raw = {name: value for name, value in values.items() if _is_raw(value)}
    logits = {name: value for name, value in raw.items() if name == names.get("logits", name)}
    boxes = {name: value for name, value in raw.items() if name == names.get("boxes", name) and value.shape[2] == 4}
    for kind in dict.fromkeys((spec, replace(spec, **_SOFTMAX), replace(spec, **_SIGMOID))):
        search = _Search(logits, boxes, _image_scales(model), kind, tail)
        # An export may clip to the image; what clipping would explain is asked last, since it hides much.
        tried = ((reading, clipped) for clipped in (False, True) for reading in readings)
        found = next(filter(None, (search.first_that_agrees(*each) for each in tried)), None)
        if found is not None and kind != spec:
            return (
                f"inside it, {found.logits_name} and {found.boxes_name} are its raw values, with activation "
                f"{kind.activation} and background {kind.background}: take a preset of that kind"
            )
        if found is not None:
            return found
    return (
        "no values inside it give its own detections: name them with --logits and --boxes, --list shows what there is"
    )


def values_in_tail(model: onnx.ModelProto, tail: Tail, folder: Path | None) -> dict[str, Array]:
    """Give the values near a model's outputs, nearest first, on one image of noise."""
    return onnx_values(model, list(tail.distances), folder)


def _is_raw(value: Array) -> bool:
    return value.ndim == 3 and value.dtype.kind == "f" and min(value.shape) > 0 and bool(np.isfinite(value).all())


def _image_scales(model: onnx.ModelProto) -> tuple[tuple[int, int], ...]:
    """Give what boxes may be multiplied by: nothing, the image's (width, height), or the sizes that are fed."""
    images = [value.type.tensor_type.shape.dim for value in true_inputs(model.graph)]
    sizes = [[dim.dim_value or IMAGE_SIDE for dim in shape[2:]] for shape in images if len(shape) == 4]
    height, width = sizes[0] if sizes else (IMAGE_SIDE, IMAGE_SIDE)
    side = max(height, width)
    return (1, 1), (width, height), (side, side)


@dataclass(frozen=True)
class _Search:
    """Pairs of raw values that may explain a reading.

    Args:
        logits: values that may be logits, nearest to the outputs first.
        boxes: values that may be boxes, likewise.
        scales: what boxes may be multiplied by.
        spec: how they are decoded.
        tail: where they are from.
    """

    logits: Mapping[str, Array]
    boxes: Mapping[str, Array]
    scales: Sequence[tuple[int, int]]
    spec: DecodeSpec
    tail: Tail

    def first_that_agrees(self, reading: _Reading, clipped: bool) -> InnerValues | None:
        """Find the pair nearest to the outputs whose decode gives the reading's detections."""
        for selection in dict.fromkeys((self.spec.selection, "flat", "per_query")):
            for logits_name, logits in self.logits.items():
                # Boxes that the logits have a part in were put in the order of their scores.
                behind = self.tail.behind(logits_name)
                for boxes_name, boxes in self.boxes.items():
                    if boxes_name in behind or boxes.shape[1] != logits.shape[1]:
                        continue
                    decoded = self._decode(logits, boxes, selection, len(reading.scores))
                    tolerance = _TOLERANCES.get(str(logits.dtype), _TOLERANCE)
                    if not _same_scores(reading, decoded, tolerance):
                        break  # other boxes do not change that
                    table = _label_table(reading, decoded, tolerance)
                    if table is None:
                        break
                    scales = self.scales[:1] if are_normalised(reading.boxes) else self.scales[1:]
                    if any(_agree(reading, decoded, table, scale, clipped, tolerance) for scale in scales):
                        notes = self._notes(reading, selection, table)
                        return InnerValues(logits_name, boxes_name, logits, boxes, notes)
        return None

    def _decode(self, logits: Array, boxes: Array, selection: str, count: int) -> _Decoded:
        # More than the reading has: where scores tie at its end, it may hold any of them.
        wide = replace(self.spec, score_threshold=None, clip=False, top_k=count + _MOST_TIES)
        post = DetectionPostProcessor(replace(wide, selection=cast(Any, selection)))
        with torch.no_grad():
            found = post(torch.from_numpy(logits[:1]), torch.from_numpy(boxes[:1]))
        keep = found.valid[0]
        scores, labels, corners = (part[0][keep].double().numpy() for part in (found.scores, found.labels, found.boxes))
        return _Decoded(scores, labels.astype(np.int64), corners)

    def _notes(self, reading: _Reading, selection: str, table: Mapping[int, int]) -> tuple[str, ...]:
        count = len(reading.scores)
        notes = [f"these are inside the file; decoded, they give its own {count} detections in an image of noise"]
        if np.ptp(reading.scores) < _TOLERANCE or np.ptp(reading.boxes, axis=0).max() < _TOLERANCE:
            notes.append("in that image they are all alike: hold the file to its original on photographs before use")
        if selection != self.spec.selection:
            notes.append(f"its own post-processing selected {selection}, where the spec says {self.spec.selection}")
        moved = {ours: theirs for ours, theirs in table.items() if ours != theirs}
        if moved:
            few = ", ".join(f"{ours} was {theirs}" for ours, theirs in sorted(moved.items())[:3])
            notes.append(f"its own labels were other numbers: now they are the channels of the logits ({few})")
        return tuple(notes)


def are_normalised(boxes: Array) -> bool:
    """Tell boxes of an image of size 1 from boxes in pixels."""
    return bool(np.median(np.abs(boxes).max(axis=1)) <= _LARGEST_NORMALISED)


def _same_scores(reading: _Reading, decoded: _Decoded, tolerance: float) -> bool:
    count = len(reading.scores)
    return len(decoded.scores) >= count and bool(np.abs(decoded.scores[:count] - reading.scores).max() <= tolerance)


def _label_table(reading: _Reading, decoded: _Decoded, tolerance: float) -> dict[int, int] | None:
    """Give the reading's label for each label here, told from scores that occur once; ``None`` where none would do.

    Some exports end in a table of category ids.
    """
    near = np.abs(reading.scores[:, None] - decoded.scores) <= tolerance
    alone = np.flatnonzero((near.sum(axis=1) == 1) & (near[:, near.sum(axis=0) == 1].any(axis=1)))
    table: dict[int, int] = {}
    for row in alone.tolist():
        ours, theirs = int(decoded.labels[near[row].argmax()]), int(reading.labels[row])
        if table.setdefault(ours, theirs) != theirs:
            return None
    return table


def _agree(
    reading: _Reading,
    decoded: _Decoded,
    table: Mapping[int, int],
    scale: tuple[int, int],
    clipped: bool,
    tolerance: float,
) -> bool:
    """Tell whether the reading's detections are the decoded ones: scores, labels and boxes."""
    theirs = reading.boxes / np.array([*scale, *scale])
    if reading.centred:
        theirs = convert(torch.from_numpy(theirs), "cxcywh", "xyxy").numpy()
    ours = decoded.boxes
    if clipped:
        reach = 1 - _LARGEST_NORMALISED, _LARGEST_NORMALISED
        if theirs.min() < 0 or theirs.max() > 1 or ours.min() < reach[0] or ours.max() > reach[1]:
            return False
        ours = ours.clip(0, 1)
    labels = np.array([table.get(int(label), int(label)) for label in decoded.labels])
    same = (
        (np.abs(reading.scores[:, None] - decoded.scores) <= tolerance)
        & (reading.labels[:, None] == labels)
        & (np.abs(theirs[:, None] - ours).max(axis=2) <= tolerance * _BOX_TOLERANCE)
    )
    before_the_cut = decoded.scores > reading.scores.min() + tolerance
    both = [same.any(axis=1), *([same.any(axis=0)[before_the_cut]] if before_the_cut.any() else [])]
    return all(found.mean() >= _LEAST_AGREEMENT for found in both)


def _readings(outputs: Mapping[str, Array]) -> list[_Reading]:
    """Give the ways in which outputs of one image may be its detections.

    Args:
        outputs: the first image's part of each output.
    """
    found = [*_separate(outputs), *(reading for rows in outputs.values() for reading in _in_columns(rows))]
    # Corners first: among many boxes of centre and size some are no corners, unless all are in one place.
    may_be_centred = [
        r for r in found if (r.boxes[:, 2:] < r.boxes[:, :2]).any() or np.ptp(r.boxes, axis=0).max() < 1e-3
    ]
    return [*found, *(replace(reading, centred=True) for reading in may_be_centred)]


def _separate(outputs: Mapping[str, Array]) -> Iterator[_Reading]:
    """Read boxes (K, 4), with scores and labels (K,) or (K, 1), or with scores of each class (K, C)."""
    lists = {name: rows.reshape(-1) for name, rows in outputs.items() if rows.size == len(rows) > 0}
    for box_name, boxes in outputs.items():
        if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype.kind != "f":
            continue
        fitting = {name: values for name, values in lists.items() if len(values) == len(boxes)}
        for score_name, scores in fitting.items():
            for label_name, labels in fitting.items():
                if score_name != label_name and scores.dtype.kind == "f" and _are_whole(labels):
                    yield _sorted(scores, labels, boxes)
        for name, classes in outputs.items():
            if name != box_name and classes.ndim == 2 and len(classes) == len(boxes):
                yield from _of_classes(boxes, classes)


def _in_columns(rows: Array) -> Iterator[_Reading]:
    """Read rows (K, 6) of box, score and label in the usual orders, or (K, 4 + C) of box and scores of each class."""
    if rows.ndim != 2 or rows.shape[1] < 5 or rows.dtype.kind != "f":
        return
    if rows.shape[1] == 6:
        for first, score, label in ((0, 4, 5), (0, 5, 4), (2, 1, 0)):
            if _are_whole(rows[:, label]):
                yield _sorted(rows[:, score], rows[:, label], rows[:, first : first + 4])
    yield from _of_classes(rows[:, :4], rows[:, 4:])


def _of_classes(boxes: Array, classes: Array) -> Iterator[_Reading]:
    """Rank all pairs of a box and a class; a class that makes the row's sum 1 is the background."""
    if classes.dtype.kind != "f" or classes.min() < 0 or classes.max() > 1:
        return
    kept = classes[:, :-1] if np.allclose(classes.astype(np.float64).sum(axis=1), 1, atol=1e-2) else classes
    if kept.size:
        pairs = np.argsort(-kept.reshape(-1), kind="stable")[:_MOST_COMPARED]
        yield _sorted(kept.reshape(-1)[pairs], pairs % kept.shape[1], boxes[pairs // kept.shape[1]])


def _are_whole(values: Array) -> bool:
    return bool((values == np.round(values)).all() and (values >= 0).all())


def _sorted(scores: Array, labels: Array, boxes: Array) -> _Reading:
    values = scores.astype(np.float64)
    if values.min() < 0 or values.max() > 1:  # some exports leave the activation to the runner
        values = 1 / (1 + np.exp(-values))
    best = np.argsort(-values, kind="stable")[:_MOST_COMPARED]
    return _Reading(values[best], labels[best].astype(np.int64), boxes[best].astype(np.float64))
