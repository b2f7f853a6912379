"""Put the decodes installed here to the conformance suite: the table of docs/conformance.md.

    python scripts/conformance.py                # the table, to the terminal
    python scripts/conformance.py --output FILE  # as Markdown, with what each does otherwise
    python scripts/conformance.py --only kornia

Each is asked about the families that it decodes. A library's list of what it found becomes the first slots of a row.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detpost import DecodeSpec, DetectionPostProcessor, Detections
from detpost.export import open_openvino, to_onnx, to_openvino
from detpost.export.runtime import onnx_session
from detpost.verify.conformance import ConformReport, conform

Inputs = Mapping[str, Any]
Run = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Contender:
    """A decode: its name, the family that it is asked about (``None``: every spec), and how it is called."""

    name: str
    preset: str | None
    run: Run


@dataclass(frozen=True)
class RawOutputs:
    """What transformers' post-processing reads from a model's output."""

    logits: Tensor
    pred_boxes: Tensor


def spec_of(inputs: Inputs) -> DecodeSpec:
    return DecodeSpec(**json.loads(inputs["spec"]))


def tensors(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    logits, boxes, sizes = (torch.from_numpy(inputs[name]) for name in ("pred_logits", "pred_boxes", "image_sizes"))
    return logits, boxes, sizes


def padded(found: Sequence[Mapping[str, Tensor]], slots: int) -> dict[str, np.ndarray]:
    """List of one dict an image, as rows of slots."""
    given = {
        "labels": np.full((len(found), slots), -1),
        "boxes": np.zeros((len(found), slots, 4)),
        "scores": np.zeros((len(found), slots)),
        "valid": np.zeros((len(found), slots), dtype=bool),
    }
    for row, image in enumerate(found):
        count = min(slots, len(image["scores"]))
        for name in ("labels", "boxes", "scores"):
            given[name][row, :count] = image[name][:count].float().numpy()
        given["valid"][row, :count] = True
    return given


def slots_of(inputs: Inputs) -> int:
    spec, (_, queries, classes) = spec_of(inputs), inputs["pred_logits"].shape
    return min(spec.top_k, queries * (classes if spec.selection == "flat" else 1))


def with_detpost(kernel: str) -> Run:
    def run(inputs: Inputs) -> Detections:
        before = os.environ.get("DETPOST_KERNEL")
        os.environ["DETPOST_KERNEL"] = kernel
        try:
            return DetectionPostProcessor(spec_of(inputs))(*tensors(inputs))
        finally:
            del os.environ["DETPOST_KERNEL"]
            if before is not None:
                os.environ["DETPOST_KERNEL"] = before

    return run


def with_file(ending: str, ties: str = "exact") -> Run:
    def run(inputs: Inputs) -> dict[str, np.ndarray]:
        logits = inputs["pred_logits"].astype(np.float32)  # the file's own dtype; exact
        feed = {"pred_logits": logits, "pred_boxes": inputs["pred_boxes"], "image_sizes": inputs["image_sizes"]}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "post.onnx")
            post = DetectionPostProcessor(spec_of(inputs))
            to_onnx(post, path, num_queries=logits.shape[1], num_classes=logits.shape[2], queries=True, ties=ties)
            if ending == "onnx":
                session = onnx_session(path)
                names = [output.name for output in session.get_outputs()]
                return dict(zip(names, session.run(names, feed), strict=True))
            to_openvino(path, Path(folder, "post.xml"))
            return dict(open_openvino(Path(folder, "post.xml")).run(feed))

    return run


def with_transformers(class_name: str) -> Run:
    processor = getattr(importlib.import_module("transformers"), class_name)()

    def run(inputs: Inputs) -> dict[str, np.ndarray]:
        logits, boxes, sizes = tensors(inputs)
        spec = spec_of(inputs)
        threshold = -1.0 if spec.score_threshold is None else spec.score_threshold
        outputs = RawOutputs(logits.float(), boxes)
        found = processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
        return padded(found, slots_of(inputs))

    return run


def with_kornia() -> Run:
    from kornia.models.rt_detr.post_processor import DETRPostProcessor

    def run(inputs: Inputs) -> dict[str, np.ndarray]:
        logits, boxes, sizes = tensors(inputs)
        threshold = spec_of(inputs).score_threshold
        post = DETRPostProcessor(
            confidence_threshold=threshold or 0.0,
            num_classes=logits.shape[2],
            num_top_queries=slots_of(inputs),
            confidence_filtering=threshold is not None,
        )
        rows = post(logits.float(), boxes, sizes)  # an image: labels, scores, boxes as x, y, width, height
        found = []
        for row in rows:
            corners = torch.cat([row[:, 2:4], row[:, 2:4] + row[:, 4:6]], dim=1)
            found.append({"labels": row[:, 0], "scores": row[:, 1], "boxes": corners})
        return padded(found, slots_of(inputs))

    return run


def with_rfdetr() -> Run:
    from rfdetr.models.postprocess import PostProcess

    def run(inputs: Inputs) -> dict[str, np.ndarray]:
        logits, boxes, sizes = tensors(inputs)
        spec = spec_of(inputs)
        found = PostProcess(num_select=slots_of(inputs))({"pred_logits": logits.float(), "pred_boxes": boxes}, sizes)
        threshold = -1.0 if spec.score_threshold is None else spec.score_threshold
        kept = [{name: value[image["scores"] > threshold] for name, value in image.items()} for image in found]
        return padded(kept, slots_of(inputs))

    return run


def plain(inputs: Inputs) -> dict[str, Tensor]:
    """Give the decode that everyone writes: sigmoid, topk, gather."""
    spec, (logits, boxes, sizes) = spec_of(inputs), tensors(inputs)
    scores, flat = logits.float().sigmoid().flatten(1).topk(slots_of(inputs))
    center, size = boxes.gather(1, (flat // logits.shape[2])[..., None].expand(-1, -1, 4)).split(2, dim=-1)
    corners = torch.cat([center - size / 2, center + size / 2], -1) * sizes.flip(1).repeat(1, 2)[:, None]
    valid = torch.ones_like(scores, dtype=torch.bool) if spec.score_threshold is None else scores > spec.score_threshold
    return {"labels": flat % logits.shape[2], "boxes": corners, "scores": scores, "valid": valid}


def contenders() -> Iterator[tuple[str, str | None, Callable[[], Run]]]:
    for kernel, name in (("native", "C++"), ("numpy", "NumPy"), ("aten", "PyTorch's operators")):
        yield f"detpost, {name}", None, lambda kernel=kernel: with_detpost(kernel)
    yield "detpost's file in ONNX Runtime", None, lambda: with_file("onnx")
    yield "detpost's file in ONNX Runtime, --ties onnx", None, lambda: with_file("onnx", "onnx")
    yield "detpost's file in OpenVINO", None, lambda: with_file("xml")
    yield "sigmoid, torch.topk, gather", "rtdetr", lambda: plain
    yield "kornia DETRPostProcessor", "rtdetr", with_kornia
    yield "transformers RTDetrImageProcessor", "rtdetr", lambda: with_transformers("RTDetrImageProcessor")
    yield (
        "transformers DeformableDetrImageProcessor",
        "deformable_detr",
        lambda: with_transformers("DeformableDetrImageProcessor"),
    )
    yield "transformers DetrImageProcessor", "detr", lambda: with_transformers("DetrImageProcessor")
    yield "transformers YolosImageProcessor", "yolos", lambda: with_transformers("YolosImageProcessor")
    yield "RF-DETR PostProcess", "rfdetr", with_rfdetr


def markdown(reports: Mapping[str, tuple[str | None, ConformReport]]) -> str:
    lines = ["| decode | asked about | cases that agree | indices | labels | order | scores | boxes | valid |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, (preset, report) in reports.items():
        agreeing = f"{sum(case.ok for case in report.cases)} of {len(report.cases)}"
        shares = " | ".join(f"{min(share, 0.999 if share < 1 else 1):.1%}" for share in report.shares.values())
        lines += [f"| {name} | {preset or 'every spec'} | {agreeing} | {shares} |"]
    for name, (_, report) in reports.items():
        if report.differences or not report.ok:
            lines += ["", f"**{name}**", ""]
            lines += [f"- {each.words} ({len(each.cases)} of {len(report.cases)} cases)" for each in report.differences]
            failures = [case for case in report.cases if case.failure]
            lines += [f"- no answer in {len(failures)} cases: {failures[0].failure}"] if failures else []
            rest = [case for case in report.cases if not (case.ok or case.explained or case.failure)]
            lines += [f"- not explained: {case.name}: {case.example}" for case in rest]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="part of a name")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    reports = {}
    for name, preset, make in contenders():
        if arguments.only and arguments.only.lower() not in name.lower():
            continue
        print(f"asking {name}", file=sys.stderr)
        try:
            run = make()
        except ImportError as error:
            print(f"  not installed: {error}", file=sys.stderr)
            continue
        reports[name] = preset, conform(run, preset)
    table = markdown(reports)
    print(table) if arguments.output is None else arguments.output.write_text(table)


if __name__ == "__main__":
    main()
