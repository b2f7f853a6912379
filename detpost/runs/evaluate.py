"""COCO average precision and recall, from a results file or a detector."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detpost.runs.coco import brief, read_json
from detpost.runs.coco_rows import ground_truth, result_rows
from detpost.runs.find_images import FoundImages

if TYPE_CHECKING:
    from detpost.runs.detect import Summary

__all__ = ["METRICS", "ClassPrecision", "Evaluation", "evaluate", "evaluate_model"]

IOU_TYPES = ("bbox", "segm")
# COCO's twelve numbers in COCO's order; the counts are those of the default maxDets.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class ClassPrecision:
    """Average precision of one category; -1 where it has no ground truth.

    Args:
        category_id: its id.
        name: its name.
        ap: mean over IoU 0.50 to 0.95.
        ap50: at IoU 0.50.
        ap75: at IoU 0.75.
        annotations: how many ground-truth objects it has, crowds left out.
    """

    category_id: int
    name: str
    ap: float
    ap50: float
    ap75: float
    annotations: int


@dataclass(frozen=True)
class Evaluation:
    """COCO's numbers.

    Args:
        iou_type: ``"bbox"`` or ``"segm"``.
        max_dets: most detections per image and category for the three AR; the last one holds for everything else.
        metrics: the twelve numbers by name, -1 where there is nothing to measure; an AR carries its count in its name.
        classes: every category, in the order of the ids.
        images: how many images were evaluated.
        annotations: how many ground-truth objects they have, crowds included.
        results: how many results were read.
        notes: what the reader should know.
    """

    iou_type: str
    max_dets: tuple[int, int, int]
    metrics: dict[str, float]
    classes: tuple[ClassPrecision, ...]
    images: int
    annotations: int
    results: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Give all of it as JSON text.

        Returns:
            A JSON object with the fields above.
        """
        return json.dumps(asdict(self), indent=1)


def evaluate(
    annotations: str | Path,
    results: str | Path | Sequence[Mapping[str, Any]],
    *,
    iou_type: str = "bbox",
    max_dets: Sequence[int] = (1, 10, 100),
) -> Evaluation:
    """Compute COCO's numbers, equal to those of pycocotools, with faster-coco-eval.

    Args:
        annotations: a COCO ground truth. Annotations without ``id``, ``iscrowd`` or ``area`` get a number, 0 and the
            area of their box.
        results: a COCO results file or its rows: ``image_id``, ``category_id``, ``score`` and ``bbox`` (x, y, width,
            height; pixels), or ``segmentation`` as RLE.
        iou_type: ``"bbox"``, or ``"segm"`` for masks.
        max_dets: three ascending counts.

    Returns:
        The numbers.

    Raises:
        ImportError: faster-coco-eval is not installed; the message names the extra.
        OSError: a file is missing.
        ValueError: a file that is not what it should be, no annotations, or results of images that the ground truth
            does not have.

    Example:
        >>> from detpost.zoo import SAMPLES
        >>> truth = read_json(SAMPLES / "ground_truth.json")
        >>> perfect = [{**row, "score": 1.0} for row in truth["annotations"]]
        >>> round(evaluate(SAMPLES / "ground_truth.json", perfect).metrics["AP"], 6)
        1.0
    """
    if iou_type not in IOU_TYPES:
        raise ValueError(f"unknown iou_type {iou_type!r}: take one of {', '.join(IOU_TYPES)}")
    counts = [int(count) for count in max_dets]
    if len(counts) != 3 or counts != sorted(set(counts)) or counts[0] < 1:
        raise ValueError(f"max_dets must be three ascending counts, as 1 10 100; got {list(max_dets)}")
    truth, notes = ground_truth(annotations, iou_type)
    source = "the results" if not isinstance(results, (str, Path)) else str(results)
    rows = result_rows(read_json(results) if isinstance(results, (str, Path)) else results, source, iou_type)
    known = {image["id"] for image in truth["images"]}
    strangers = sorted({row["image_id"] for row in rows} - known, key=str)
    if strangers:
        raise ValueError(
            f"{source}: {len(strangers)} image ids are not in {annotations}, the first is {strangers[0]!r}"
        )
    categories = {category["id"] for category in truth["categories"]}
    ignored = sum(row["category_id"] not in categories for row in rows)
    if ignored:
        notes = [*notes, f"{ignored} of {len(rows)} results have a category that {annotations} does not have"]
    counter = _run(truth, rows, iou_type, counts)
    return Evaluation(
        iou_type=iou_type,
        max_dets=(counts[0], counts[1], counts[2]),
        metrics=_metrics(counter, counts),
        classes=_classes(counter, truth),
        images=len(truth["images"]),
        annotations=len(truth["annotations"]),
        results=len(rows),
        notes=tuple(notes),
    )


def evaluate_model(
    annotations: str | Path,
    images: str | Path,
    *,
    out: str | Path | None = None,
    iou_type: str = "bbox",
    threshold: float = 0.0,
    max_dets: Sequence[int] = (1, 10, 100),
    **options: Any,
) -> tuple[Evaluation, Summary]:
    """Run a detector on the images of a ground truth and compute COCO's numbers.

    Args:
        annotations: a COCO ground truth.
        images: the folder that its file names are relative to, or that holds the files themselves.
        out: folder for the results, to go on in if interrupted; ``None`` keeps nothing.
        iou_type: ``"bbox"``, or ``"segm"`` for the masks of a detector that gives them.
        threshold: detections with ``score > threshold`` count.
        max_dets: three ascending counts.
        options: of :func:`detpost.detect.detect`: ``model``, ``backend``, ``device``, ``batch_size``, ``categories``,
            ``fresh``, ``max_pixels``, ``workers``, ``progress``.

    Returns:
        The numbers, and what the run did.

    Raises:
        ImportError: an optional package is missing; the message names the extra.
        OSError: a file or folder is missing.
        ValueError: as of :func:`evaluate` and :func:`detpost.detect.detect`, or an image that is not in the folder,
            or masks asked of a detector that gives none.

    Example:
        >>> from detpost.zoo import SAMPLES
        >>> found, _ = evaluate_model(SAMPLES / "ground_truth.json", SAMPLES, model="tiny", device="cpu")
        >>> found.metrics["AP50"] > 0.5
        True
    """
    from detpost.runs.detect import detect

    truth, _ = ground_truth(annotations, iou_type)
    found = _images_of(truth["images"], Path(images), annotations)
    _import_faster_coco_eval()  # before hours of detection, not after
    with tempfile.TemporaryDirectory(prefix="detpost-") as temporary:
        folder = Path(out or temporary)
        summary = detect(found, folder, threshold=threshold, formats=("coco",), annotations=annotations, **options)
        rows = read_json(folder / "detections.json")
        if iou_type == "segm" and not all("segmentation" in row for row in rows):
            raise ValueError(f"{options.get('model', 'tiny')} gives no masks: evaluate it on boxes (--iou-type bbox)")
        return evaluate(annotations, rows, iou_type=iou_type, max_dets=max_dets), summary


def _images_of(images: Sequence[Mapping[str, Any]], folder: Path, annotations: str | Path) -> FoundImages:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    names: list[str] = []
    missing: list[str] = []
    for image in images:
        if not isinstance(image.get("file_name"), str):
            raise ValueError(f"{annotations}: image {image['id']} has no file_name but {brief(image.get('file_name'))}")
        name = image["file_name"]
        place = next((n for n in (name, os.path.basename(name)) if os.path.lexists(folder / n)), None)
        (missing if place is None else names).append(place or name)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(images)} images of {annotations} are not in {folder}, the first is {missing[0]!r}"
        )
    return FoundImages(folder, sorted(names))


def _import_faster_coco_eval() -> Any:
    try:
        import faster_coco_eval
    except ImportError:
        raise ImportError("evaluation needs faster-coco-eval: pip install 'detpost[eval]'") from None
    return faster_coco_eval


def _run(truth: dict[str, Any], rows: list[dict[str, Any]], iou_type: str, counts: list[int]) -> Any:
    package = _import_faster_coco_eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of id 0: it is among the notes
        loaded = package.COCO(truth)
        # Versions before 1.8 cannot load no results at all.
        found = loaded.loadRes(rows) if rows else package.COCO({**truth, "annotations": []})
    counter = package.COCOeval_faster(loaded, found, iouType=iou_type)
    counter.params.maxDets = counts
    counter.evaluate()
    counter.accumulate()
    return counter


def _mean(values: np.ndarray[Any, Any]) -> float:
    """Average what was measured: -1 marks what was not, and stands where nothing was."""
    measured = values[values > -1]
    return float(np.mean(measured)) if measured.size else -1.0


def _metrics(counter: Any, counts: Sequence[int]) -> dict[str, float]:
    precision = np.asarray(counter.eval["precision"])  # IoU, recall, category, area, maxDets
    recall = np.asarray(counter.eval["recall"])  # IoU, category, area, maxDets
    at50, at75 = (int(np.argmin(np.abs(np.asarray(counter.params.iouThrs) - value))) for value in (0.5, 0.75))
    values = [
        _mean(precision[:, :, :, 0, -1]),
        _mean(precision[at50, :, :, 0, -1]),
        _mean(precision[at75, :, :, 0, -1]),
        *(_mean(precision[:, :, :, area, -1]) for area in (1, 2, 3)),
        *(_mean(recall[:, :, 0, place]) for place in range(3)),
        *(_mean(recall[:, :, area, -1]) for area in (1, 2, 3)),
    ]
    names = [*METRICS[:6], *(f"AR{count}" for count in counts), *METRICS[9:]]
    return dict(zip(names, values, strict=True))


def _classes(counter: Any, truth: Mapping[str, Any]) -> tuple[ClassPrecision, ...]:
    precision = np.asarray(counter.eval["precision"])
    at50, at75 = (int(np.argmin(np.abs(np.asarray(counter.params.iouThrs) - value))) for value in (0.5, 0.75))
    names = {category["id"]: str(category.get("name", category["id"])) for category in truth["categories"]}
    counted = [row["category_id"] for row in truth["annotations"] if not row["iscrowd"]]
    return tuple(
        ClassPrecision(
            category_id=int(category),
            name=names[category],
            ap=_mean(precision[:, :, place, 0, -1]),
            ap50=_mean(precision[at50, :, place, 0, -1]),
            ap75=_mean(precision[at75, :, place, 0, -1]),
            annotations=counted.count(category),
        )
        for place, category in enumerate(counter.params.catIds)
    )
