"""The files that web/tests/cases.mjs runs on, and what Python makes of the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from detpost import DecodeSpec, DetectionPostProcessor, Detections, Detector
from detpost.export import Resize, to_onnx
from detpost.export.opened import open_file
from detpost.images import TensorRows, read_image, resize
from detpost.verify.compare import raw_cases
from detpost.zoo import sample_images

THRESHOLD = 0.3

DETECTORS: dict[str, dict[str, Any]] = {
    "tiny.onnx": {"queries": True},
    "scaled-inside.onnx": {"preprocess_inside": "scale"},
    "letterboxed-inside.onnx": {"preprocess_inside": "full", "resize": Resize(letterbox=True)},
    "deepstream.onnx": {"io": "deepstream"},
    "roboflow.onnx": {"io": "roboflow"},
    "batch-of-one.onnx": {"io": "rtdetr", "dynamic_batch": False},
}
# A layout without queries says nothing of them.
DECODES: dict[str, tuple[DecodeSpec, dict[str, Any]]] = {
    "post.onnx": (DecodeSpec.preset("rtdetr"), {"queries": True}),
    "post-softmax.onnx": (DecodeSpec.preset("detr"), {"queries": True}),
    "post-rtdetr.onnx": (DecodeSpec.preset("rtdetr", score_threshold=0.2), {"io": "rtdetr"}),
    "post-efficientnms.onnx": (
        DecodeSpec.preset("rtdetr", score_threshold=0.2),
        {"io": "efficientnms", "queries": True},
    ),
}
QUERIES, CLASSES = 50, 7
# (height, width) of an image, and of what it becomes: smaller, larger, across and down alone, and as it is.
RESIZES = (((97, 131), (40, 64)), ((30, 20), (64, 64)), ((700, 33), (50, 33)), ((64, 500), (64, 31)), ((9, 9), (9, 9)))


def write_package_files(folder: Path) -> dict[str, Any]:
    """Write the files and give what ``expected.json`` says."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = read_image(sample_images()[0])
    picture.permute(1, 2, 0).contiguous().numpy().tofile(folder / "image.bin")
    for name, options in DETECTORS.items():
        to_onnx("tiny", folder / name, **options)
    detectors = [{"file": name, "detections": _found(folder / name, picture)} for name in DETECTORS]
    detector = Detector.load(folder / "tiny.onnx")
    detector.prepare([picture])[0].numpy().tofile(folder / "input.bin")
    _write_others(folder)
    known = {
        "height": picture.shape[1],
        "width": picture.shape[2],
        "threshold": THRESHOLD,
        "names": [[label, name] for label, name in detector.class_names.items()],
        "detectors": detectors,
        **_decodes(folder),
        "resizes": [_resized(folder, place, *sizes) for place, sizes in enumerate(RESIZES)],
    }
    _write_halves(folder)
    (folder / "expected.json").write_text(json.dumps(known))
    return known


def _found(path: Path, picture: torch.Tensor) -> list[dict[str, Any]]:
    row = Detector.load(path, threshold=THRESHOLD).predict(picture)[0]
    parts = zip(row["labels"].tolist(), row["label_names"], row["scores"].tolist(), row["boxes"].tolist(), strict=True)
    return [dict(zip(("label", "name", "score", "box"), part, strict=True)) for part in parts]


def _decodes(folder: Path) -> dict[str, Any]:
    logits, boxes, sizes = (torch.cat(parts) for parts in zip(*_some_raw(), strict=True))
    logits.numpy().tofile(folder / "logits.bin")
    boxes.numpy().tofile(folder / "boxes.bin")
    written = []
    for name, (spec, options) in DECODES.items():
        to_onnx(DetectionPostProcessor(spec), folder / name, num_queries=QUERIES, num_classes=CLASSES, **options)
        opened = open_file(folder / name)
        layout_sizes = sizes.flip(1) if options.get("io") == "rtdetr" else sizes
        feed = dict(zip(opened.inputs, (logits, boxes, layout_sizes), strict=True))
        found = opened.detections(opened.run(feed), sizes)
        rows = [_rows(found, image, "queries" in options) for image in range(len(logits))]
        written.append({"file": name, "detections": rows})
    return {"decodes": written, "logits": [*logits.shape], "boxes": [*boxes.shape], "sizes": sizes.tolist()}


def _some_raw() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    wanted = ("random", "quarter steps", "infinities and both zeros", "a third NaN")
    return [case for name, case in raw_cases(QUERIES, CLASSES) if name in wanted]


def _rows(found: Detections, image: int, queries: bool) -> list[dict[str, Any]]:
    kept = found.valid[image]
    parts = [part[image][kept].tolist() for part in (found.labels, found.queries, found.scores, found.boxes)]
    return [
        {"label": label, "query": query if queries else None, "score": score, "box": box}
        for label, query, score, box in zip(*parts, strict=True)
    ]


def _resized(folder: Path, place: int, size: tuple[int, int], to: tuple[int, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(place)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    source, result = f"resize-{place}.bin", f"resized-{place}.bin"
    image.permute(1, 2, 0).contiguous().numpy().tofile(folder / source)
    resize(TensorRows(image), *to).contiguous().numpy().tofile(folder / result)
    return {"source": source, "result": result, "height": size[0], "width": size[1], "to": to}


def _write_others(folder: Path) -> None:
    model = onnx.load(folder / "tiny.onnx")
    onnx.save_model(
        onnx.load(folder / "tiny.onnx"),
        folder / "outside.onnx",
        save_as_external_data=True,
        location="outside.onnx.data",
        size_threshold=1024,
    )
    del model.metadata_props[:]
    onnx.save_model(model, folder / "plain.onnx")


def _write_halves(folder: Path) -> None:
    with np.errstate(over="ignore"):
        np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32).tofile(folder / "halves.bin")
        generator = np.random.default_rng(0)
        exponents = generator.integers(-28, 18, 20000)
        spread = generator.standard_normal(20000) * 2.0**exponents
        # Halfway between two halves, too.
        halves = np.arange(31744, dtype=np.uint16).view(np.float16).astype(np.float32)
        halfway = (halves[:-1] + halves[1:]) / 2
        values = np.concatenate((spread, halfway, -halfway, [0.0, -0.0, np.inf, -np.inf, 65519.9, 65520.0]))
        values = values.astype(np.float32)
        values.tofile(folder / "floats.bin")
        values.astype(np.float16).view(np.uint16).tofile(folder / "rounded.bin")
