"""The whole way once, on real input: detect, draw, export, run elsewhere, compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.detector import Detector
from detpost.images import read_image
from detpost.postprocess import DetectionPostProcessor, DetectorModule
from detpost.verify.matching import Match, match_detections

__all__ = ["Demo", "ImageResult", "run_demo"]

THRESHOLD = 0.5
# Its queries were not quite taught to compete: now and then two report one digit, with boxes that all but agree.
NMS = 0.7


@dataclass(frozen=True)
class ImageResult:
    """What became of one image.

    Args:
        name: file name of the image.
        found: an entry of what :meth:`detpost.Detector.predict` gives.
        picture: the annotated PNG.
        match: PyTorch's detections against ONNX Runtime's, before non-maximum suppression.
        decode_identical: whether eager's decode of the graph's own raw outputs chose the same queries and labels.
    """

    name: str
    found: dict[str, Any]
    picture: Path
    match: Match
    decode_identical: bool

    @property
    def ok(self) -> bool:
        """Whether both comparisons hold."""
        return self.match.ok and self.decode_identical

    @property
    def dropped(self) -> int:
        """How many boxes non-maximum suppression dropped."""
        return self.match.first - len(self.found["scores"])


@dataclass(frozen=True)
class Demo:
    """What :func:`run_demo` made.

    Args:
        images: one result per image.
        model: the exported ONNX file.
        detections: the file of COCO results.
        exporter: what exported the network.
        nms: of boxes of one class whose IoU is greater, the best alone was kept.
    """

    images: tuple[ImageResult, ...]
    model: Path
    detections: Path
    exporter: str
    nms: float = NMS

    @property
    def ok(self) -> bool:
        """Whether every image agrees."""
        return all(image.ok for image in self.images)


def run_demo(out: Path, images: Sequence[Path], progress: Any = None) -> Demo:
    """Detect with the tiny detector, draw, export, run in ONNX Runtime and compare.

    Args:
        out: folder for ``tiny.onnx``, ``detections.json`` and one PNG per image; made where missing.
        images: at least one.
        progress: called with one line before each long step.

    Returns:
        What was made.

    Raises:
        ImportError: an optional package is missing; the message names the extra.
        OSError: an image that cannot be read.
    """
    from detpost.export import to_onnx

    say = progress or (lambda _: None)
    say("loading the tiny detector")
    detector = Detector.load("tiny", device="cpu", threshold=THRESHOLD, nms=NMS)
    pixels = [read_image(path) for path in images]
    say(f"detecting in {len(pixels)} images, then greedy NMS")
    found = detector.predict(pixels)
    out.mkdir(parents=True, exist_ok=True)
    pictures = _write_pictures(out, images, pixels, found)
    results = out / "detections.json"
    results.write_text(json.dumps(_coco(images, found), indent=1) + "\n")
    # The older exporter, which takes seconds: the newer one takes most of a minute.
    exported = to_onnx("tiny", out / "tiny.onnx", queries=True, keep_raw=True, exporter="torchscript", progress=say)
    say("running the file in ONNX Runtime")
    matches, identical = _compare(detector, exported.path, pixels)
    return Demo(
        images=tuple(
            ImageResult(path.name, found[i], pictures[i], matches[i], identical[i]) for i, path in enumerate(images)
        ),
        model=exported.path,
        detections=results,
        exporter=exported.exporter,
    )


def _write_pictures(
    out: Path, images: Sequence[Path], pixels: Sequence[Tensor], found: Sequence[dict[str, Any]]
) -> list[Path]:
    from detpost.runs.drawing import drawn

    pictures: list[Path] = []
    for path, image, row in zip(images, pixels, found, strict=True):
        taken = {picture.name for picture in pictures}
        name = next(n for n in (f"{path.stem}{f'-{i}' if i else ''}.png" for i in range(len(images))) if n not in taken)
        drawn(image, row).save(out / name)
        pictures.append(out / name)
    return pictures


def _coco(images: Sequence[Path], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """COCO results; an image's id is its place in the list, its file name stands beside it."""
    from detpost.boxes import convert

    return [
        {"image_id": index, "category_id": label, "bbox": box, "score": score, "file_name": path.name}
        for index, (path, row) in enumerate(zip(images, found, strict=True), start=1)
        for label, box, score in zip(
            row["labels"].tolist(), convert(row["boxes"], "xyxy", "xywh").tolist(), row["scores"].tolist(), strict=True
        )
    ]


def _compare(detector: Detector, model: Path, pixels: Sequence[Tensor]) -> tuple[list[Match], list[bool]]:
    """Compare the file with eager: whole detectors by matching, the decode of the same raw outputs to the bit."""
    from detpost.export.runtime import onnx_session

    module = detector.run
    assert isinstance(module, DetectorModule)
    batch, sizes, _ = detector.prepare(pixels)
    with torch.no_grad():
        eager = module(batch, sizes)
    session = onnx_session(model)
    names = ["scores", "labels", "boxes", "queries", "valid", "pred_logits", "pred_boxes"]
    values = session.run(names, {"images": batch.numpy(), "image_sizes": sizes.numpy()})
    *fields, logits, boxes = (torch.from_numpy(value) for value in values)
    graph = Detections(*fields)
    decoded: DetectionPostProcessor = module.post
    again = decoded(logits, boxes, sizes)
    identical = [
        all(torch.equal(getattr(graph, name)[i], getattr(again, name)[i]) for name in ("labels", "queries", "valid"))
        and torch.allclose(graph.scores[i], again.scores[i], rtol=0, atol=1e-6)
        and torch.allclose(graph.boxes[i], again.boxes[i], rtol=1e-6, atol=1e-4)
        for i in range(len(pixels))
    ]
    return match_detections(eager, graph, THRESHOLD), identical
