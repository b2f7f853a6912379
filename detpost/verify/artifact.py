"""Anything that :func:`detpost.export.verify` compares, behind one of two faces: a post-processor or a detector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.export.formats import has_ending
from detpost.export.heads import Head, raw_names, recorded_heads
from detpost.export.layouts import recorded_layout
from detpost.heads.found import Found as Whole
from detpost.images import Preprocessing, Untouched
from detpost.postprocess import DetectionPostProcessor
from detpost.spec import DecodeSpec, presets

if TYPE_CHECKING:
    from detpost.detector import Detector
    from detpost.export.feed import InputKind
    from detpost.export.opened import OpenedFile
    from detpost.images import Prepare

__all__ = ["Artifact", "Found", "open_artifact"]

Decode = Callable[[Tensor, Tensor, Tensor], Detections]


@dataclass(frozen=True)
class Found:
    """Detections, the raw outputs they came from where the artifact gives them, and all that it gives with them."""

    detections: Detections
    raw: tuple[Tensor, Tensor, Tensor, DecodeSpec] | None = None
    whole: Whole | None = None
    raw_masks: Tensor | None = None


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
        resizes: of a detector, whether it resizes images itself, in its own runtime.
        find: of a post-processor that gives more than boxes: as ``decode``, to all that it gives, and the raw values
            of its heads by name.
        spec: with it, what the decode does.
        heads: with it, what is given beside boxes.
        warning: of a file whose decode is in fewer bits, what that means.
    """

    name: str
    kind: Literal["post-processor", "detector"]
    decode: Decode | None = None
    detect: Callable[[Sequence[Tensor], Prepare | None], Found] | None = None
    shape: tuple[int, int] | None = None
    batch: int | None = None
    preprocessing: Preprocessing | None = None
    prepare_as: Callable[[Preprocessing], Prepare] | None = None
    resizes: bool = False
    find: Callable[[Tensor, Tensor, Tensor], tuple[Whole, dict[str, Tensor]]] | None = None
    spec: DecodeSpec | None = None
    heads: tuple[Head, ...] = ()
    warning: str = ""


def open_artifact(source: Any, allow_pickle: bool = False) -> Artifact:
    """Open a file, a module, a preset's name, or a source that :meth:`detpost.Detector.load` takes."""
    if isinstance(source, DetectionPostProcessor):
        return Artifact("DetectionPostProcessor", "post-processor", decode=_no_grad(source))
    if isinstance(source, str) and source in presets():
        return Artifact(
            f"preset {source}", "post-processor", decode=_no_grad(DetectionPostProcessor.from_preset(source))
        )
    if isinstance(source, (str, Path)) and has_ending(source):
        return replace(_open_file(Path(source)), warning=_warning_of(Path(source)))
    return _open_detector(source, allow_pickle)


def _warning_of(path: Path) -> str:
    """Say of an ONNX file whose decode is in fewer bits what that means."""
    if path.suffix != ".onnx":
        return ""
    from detpost.export.rounded import decode_in_fewer_bits, decode_warning
    from detpost.export.weights import read_onnx

    nodes = decode_in_fewer_bits(read_onnx(path).model)
    return decode_warning(nodes) if nodes else ""


def _no_grad(module: DetectionPostProcessor) -> Decode:
    def decode(logits: Tensor, boxes: Tensor, image_sizes: Tensor) -> Detections:
        with torch.no_grad():
            return module(logits, boxes, image_sizes)  # type: ignore[no-any-return]

    return decode


def _open_detector(source: Any, allow_pickle: bool) -> Artifact:
    from detpost.detector import Detector

    detector = source
    if not isinstance(source, Detector):
        detector = Detector.load(source, device="cpu", threshold=0.0, allow_pickle=allow_pickle)

    def detect(images: Sequence[Tensor], prepare: Prepare | None = None) -> Found:
        batch, sizes, mask = (prepare or detector.prepare)(_filled(images, detector.batch))
        with torch.no_grad():
            whole = detector.find(batch, sizes, mask).first(len(images))
        return Found(whole.detections, whole=whole)

    return _artifact_of(detector, str(source), detect)


def _artifact_of(detector: Detector, name: str, detect: Callable[..., Found]) -> Artifact:
    return Artifact(
        name,
        "detector",
        detect=detect,
        batch=detector.batch,
        preprocessing=detector.preprocessing,
        prepare_as=detector.prepare_as,
        resizes=isinstance(detector.prepare, Untouched),
    )


def _filled(images: Sequence[Tensor], batch: int | None) -> Sequence[Tensor]:
    """Repeat the last image where a detector is fixed to a larger batch."""
    return [*images, *[images[-1]] * ((batch or len(images)) - len(images))]


def _open_file(path: Path) -> Artifact:
    from detpost.export.opened import open_file

    opened = open_file(path)
    if opened.is_post_processor:
        return _bare_decode(opened)
    from detpost.detector import detector_of_file
    from detpost.export.feed import Feed

    detector = detector_of_file(opened, threshold=0.0)
    feed = Feed.of(path, opened.metadata, opened.inputs)

    def detect(images: Sequence[Tensor], prepare: Prepare | None = None) -> Found:
        batch, sizes, _ = (prepare or detector.prepare)(_filled(images, detector.batch))
        values = opened.run(feed(batch, sizes))
        whole = opened.found(values, sizes, batch).first(len(images))
        if "pred_logits" not in values:
            return Found(whole.detections, whole=whole)
        logits, boxes = (values[name][: len(images)] for name in ("pred_logits", "pred_boxes"))
        raw = (logits, boxes, sizes[: len(images)], DecodeSpec(**opened.metadata["spec"]))
        return Found(whole.detections, raw, whole, values.get("pred_masks"))

    return _artifact_of(detector, str(path), detect)


def raw_of_heads(inputs: Mapping[str, InputKind], batch: int) -> dict[str, Tensor]:
    """Make up what a bare decode takes beside logits and boxes: the same numbers each time, masks of 12 by 10."""
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Tensor] = {}
    for name, (shape, dtype) in inputs.items():
        if name in raw_names():
            sizes = [
                batch,
                *(free if size is None else size for size, free in zip(shape[1:], (0, 12, 10), strict=False)),
            ]
            found |= {name: torch.randn(sizes, generator=generator).to(dtype)}
    return found


def _bare_decode(opened: OpenedFile) -> Artifact:
    layout = recorded_layout(opened.metadata)

    def decode(logits: Tensor, boxes: Tensor, image_sizes: Tensor) -> Detections:
        sizes = image_sizes.flip(1) if layout.sizes_order == "wh" else image_sizes
        given = {"pred_logits": logits, "pred_boxes": boxes, **({layout.sizes: sizes} if layout.sizes else {})}
        given |= raw_of_heads(opened.inputs, len(logits))
        return Detections(*(part.cpu() for part in opened.detections(opened.run(given), image_sizes)))

    def find(logits: Tensor, boxes: Tensor, image_sizes: Tensor) -> tuple[Whole, dict[str, Tensor]]:
        sizes = image_sizes.flip(1) if layout.sizes_order == "wh" else image_sizes
        extra = raw_of_heads(opened.inputs, len(logits))
        given = {"pred_logits": logits, "pred_boxes": boxes, **({layout.sizes: sizes} if layout.sizes else {}), **extra}
        return opened.found(opened.run(given), image_sizes).first(len(logits)), extra

    batch, queries, classes = opened.inputs["pred_logits"][0]
    fixed = None if queries is None or classes is None else (queries, classes)
    spec = DecodeSpec(**opened.metadata["spec"])
    heads = recorded_heads(opened.metadata)
    return Artifact(
        str(opened.path),
        "post-processor",
        decode=decode,
        shape=fixed,
        batch=batch,
        find=find if heads else None,
        spec=spec,
        heads=heads,
    )
