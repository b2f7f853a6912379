"""Anything that :func:`detpost.export.verify` compares, behind one of two faces: a post-processor or a detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.images import Preprocessing
from detpost.postprocess import DetectionPostProcessor
from detpost.spec import DecodeSpec, presets

if TYPE_CHECKING:
    from detpost.detector import Detector
    from detpost.images import Prepare

__all__ = ["Artifact", "Found", "open_artifact"]

Decode = Callable[[Tensor, Tensor, Tensor], Detections]

NO_QUERIES = -2


@dataclass(frozen=True)
class Found:
    """Detections, and the raw outputs they came from where the artifact gives them."""

    detections: Detections
    raw: tuple[Tensor, Tensor, Tensor, DecodeSpec] | None = None


@dataclass(frozen=True)
class Artifact:
    """An opened artifact.

    Args:
        name: for the report.
        kind: which of the two faces it has.
        decode: of a post-processor: logits, boxes, image sizes to detections.
        detect: of a detector: uint8 images to what it found, prepared as it says itself or as it is told.
        shape: (Q, C) where it is fixed.
        batch: the batch size where it is fixed.
        preprocessing: of a detector, how images become its input, where that is known.
        prepare_as: where that is an assumption, makes what ``detect`` takes of another preprocessing.
    """

    name: str
    kind: Literal["post-processor", "detector"]
    decode: Decode | None = None
    detect: Callable[[Sequence[Tensor], Prepare | None], Found] | None = None
    shape: tuple[int, int] | None = None
    batch: int | None = None
    preprocessing: Preprocessing | None = None
    prepare_as: Callable[[Preprocessing], Prepare] | None = None


def open_artifact(source: Any) -> Artifact:
    """Open a file, a module, a preset's name, or a source that :meth:`detpost.Detector.load` takes."""
    if isinstance(source, DetectionPostProcessor):
        return Artifact("DetectionPostProcessor", "post-processor", decode=_no_grad(source))
    if isinstance(source, str) and source in presets():
        return Artifact(
            f"preset {source}", "post-processor", decode=_no_grad(DetectionPostProcessor.from_preset(source))
        )
    if isinstance(source, (str, Path)) and Path(source).suffix in _FILES:
        return _FILES[Path(source).suffix](Path(source))
    return _open_detector(source)


def _no_grad(module: DetectionPostProcessor) -> Decode:
    def decode(logits: Tensor, boxes: Tensor, image_sizes: Tensor) -> Detections:
        with torch.no_grad():
            return module(logits, boxes, image_sizes)  # type: ignore[no-any-return]

    return decode


def _open_detector(source: Any) -> Artifact:
    from detpost.detector import Detector

    detector = source if isinstance(source, Detector) else Detector.load(source, device="cpu", threshold=0.0)

    def detect(images: Sequence[Tensor], prepare: Prepare | None = None) -> Found:
        batch, sizes, mask = (prepare or detector.prepare)(_filled(images, detector.batch))
        with torch.no_grad():
            found = detector.run(batch, sizes, mask)
        return Found(Detections(*(part[: len(images)] for part in found)))

    return _artifact_of(detector, str(source), detect)


def _artifact_of(detector: Detector, name: str, detect: Callable[..., Found]) -> Artifact:
    return Artifact(
        name,
        "detector",
        detect=detect,
        batch=detector.batch,
        preprocessing=detector.preprocessing,
        prepare_as=detector.prepare_as,
    )


def _filled(images: Sequence[Tensor], batch: int | None) -> Sequence[Tensor]:
    """Repeat the last image where a detector is fixed to a larger batch."""
    return [*images, *[images[-1]] * ((batch or len(images)) - len(images))]


def _open_onnx(path: Path) -> Artifact:
    from detpost.export.artifact import read_metadata
    from detpost.export.feed import Feed
    from detpost.export.runtime import onnx_inputs, onnx_session

    session = onnx_session(path)
    metadata = read_metadata(session.get_modelmeta().custom_metadata_map, path)
    kinds = onnx_inputs(session)
    outputs = [value.name for value in session.get_outputs()]
    if metadata["io"] != "detpost":
        raise ValueError(f"{path} has the names of {metadata['io']} runners: verify an export with io='detpost'")

    def run(feed: dict[str, Any]) -> tuple[Detections, dict[str, Tensor]]:
        values = dict(zip(outputs, map(torch.from_numpy, session.run(outputs, feed)), strict=True))
        queries = values.get("queries", torch.full_like(values["labels"], NO_QUERIES))
        found = Detections(values["scores"], values["labels"], values["boxes"], queries, values["valid"])
        return found, values

    if "pred_logits" in kinds:
        shape = kinds["pred_logits"][0]
        fixed = None if shape[1] is None or shape[2] is None else (shape[1], shape[2])

        def decode(logits: Tensor, boxes: Tensor, image_sizes: Tensor) -> Detections:
            feed = {"pred_logits": logits.numpy(), "pred_boxes": boxes.numpy(), "image_sizes": image_sizes.numpy()}
            return run(feed)[0]

        return Artifact(str(path), "post-processor", decode=decode, shape=fixed, batch=shape[0])
    from detpost.detector import Detector

    detector = Detector.load(path, threshold=0.0)
    feed = Feed.of(path, metadata, kinds)
    spec = DecodeSpec(**metadata["spec"])

    def detect(images: Sequence[Tensor], prepare: Prepare | None = None) -> Found:
        batch, sizes, _ = (prepare or detector.prepare)(_filled(images, detector.batch))
        found, values = run(feed(batch, sizes))
        kept = Detections(*(part[: len(images)] for part in found))
        if "pred_logits" not in values:
            return Found(kept)
        logits, boxes = (values[name][: len(images)] for name in ("pred_logits", "pred_boxes"))
        return Found(kept, (logits, boxes, sizes[: len(images)], spec))

    return _artifact_of(detector, str(path), detect)


def _open_package(path: Path) -> Artifact:
    from detpost.export.package import open_package

    opened = open_package(path)
    if opened.metadata["inputs"][0] != "pred_logits":
        return _open_detector(path)

    def decode(logits: Tensor, boxes: Tensor, image_sizes: Tensor) -> Detections:
        found = opened.run(*(value.to(opened.device) for value in (logits, boxes, image_sizes)))
        return Detections(*(found[name].cpu() for name in Detections._fields))

    return Artifact(str(path), "post-processor", decode=decode, shape=_shape(opened.metadata))


def _open_openvino(path: Path) -> Artifact:
    from detpost.export.openvino import open_openvino

    opened = open_openvino(path)
    shape = opened.inputs.get("pred_logits")
    if shape is None:
        return _open_detector(path)

    def decode(logits: Tensor, boxes: Tensor, image_sizes: Tensor) -> Detections:
        feed = {"pred_logits": logits.numpy(), "pred_boxes": boxes.numpy(), "image_sizes": image_sizes.numpy()}
        found = {name: torch.from_numpy(value) for name, value in opened.run(feed).items()}
        queries = found.get("queries", torch.full_like(found["labels"], NO_QUERIES))
        return Detections(found["scores"], found["labels"], found["boxes"], queries, found["valid"])

    queries, classes = shape[1:]
    fixed = None if queries is None or classes is None else (queries, classes)
    return Artifact(str(path), "post-processor", decode=decode, shape=fixed, batch=shape[0])


def _shape(metadata: dict[str, Any]) -> tuple[int, int] | None:
    found = metadata.get("shape")
    return None if found is None else (int(found[0]), int(found[1]))


_FILES: dict[str, Callable[[Path], Artifact]] = {
    ".onnx": _open_onnx,
    ".pt2": _open_package,
    ".xml": _open_openvino,
}
