"""Run the purity checker over post-processors and Hausdorff losses of installed libraries, and over detpost's own.

    python scripts/audit_peers.py                          # the table, to the terminal
    python scripts/audit_peers.py --output audit.md        # the table to audit.md, every report to audit.json

Every subject gets inputs of the same shapes. What is not installed is listed as such.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detpost.purity import PurityReport, check

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("in-place writes", "own temporaries", "host waits", "moving shapes", "graph breaks", "export", "gradient")
TRANSFORMERS = {  # image processor by family, and whether it is given the focal-loss keyword
    "DetrImageProcessor": "DETR",
    "RTDetrImageProcessor": "RT-DETR",
    "DeformableDetrImageProcessor": "Deformable DETR",
    "ConditionalDetrImageProcessor": "Conditional DETR",
    "YolosImageProcessor": "YOLOS",
    "RfDetrImageProcessor": "RF-DETR",
}


@dataclass(frozen=True)
class Row:
    """One subject: what it is called, and its report, or why there is none."""

    library: str
    name: str
    report: PurityReport | None = None
    missing: str = ""


class RawOutputs:
    """What transformers' post-processing reads from a model's output."""

    def __init__(self, logits: Tensor, pred_boxes: Tensor) -> None:
        self.logits, self.pred_boxes = logits, pred_boxes


def detections() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 50, 16, generator=generator) * 3
    boxes = torch.rand(2, 50, 4, generator=generator) * 0.4 + 0.3
    return logits, boxes, torch.tensor([[480, 640], [320, 200]])


def segmentations(axes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, 16, 16) if axes == 2 else (1, 2, 8, 8, 8)
    pred = torch.randn(shape, generator=generator).softmax(1)
    return pred, (torch.rand((shape[0], 1, *shape[2:]), generator=generator) > 0.5).long()


def version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return f"{package} {installed(package)}"
    except PackageNotFoundError:
        return package


def audited(library: str, name: str, make: Callable[[], tuple[Any, tuple[Any, ...]]]) -> Row:
    """Check one subject; a subject that is not there is a row too."""
    try:
        subject, inputs = make()
    except (ImportError, AttributeError) as error:
        return Row(library, name, missing=f"not installed ({error})" if isinstance(error, ImportError) else "not there")
    except Exception as error:
        return Row(library, name, missing=f"cannot be made: {type(error).__name__}: {error}")
    print(f"checking {library}: {name}", file=sys.stderr)
    return Row(library, name, check(subject, *inputs))


def first_home(modules: tuple[str, ...], name: str) -> Any:
    """Give a class from the first of several modules that has it: libraries move them between releases."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"no {name} in {', '.join(modules)}")


def kornia_rows() -> Iterator[Row]:
    library = version("kornia")

    def post_processor() -> tuple[Any, tuple[Any, ...]]:
        homes = ("kornia.models.rt_detr.post_processor", "kornia.contrib.models.rt_detr.post_processor")
        made = first_home(homes, "DETRPostProcessor")(num_classes=16, num_top_queries=20, confidence_threshold=0.3)
        return made, detections()

    yield audited(library, "DETRPostProcessor", post_processor)
    for name, axes in (("HausdorffERLoss", 2), ("HausdorffERLoss3D", 3)):
        yield audited(
            library, name, lambda name=name, axes=axes: (first_home(("kornia.losses",), name)(k=3), segmentations(axes))
        )


def transformers_rows() -> Iterator[Row]:
    library = version("transformers")
    logits, boxes, sizes = detections()
    for class_name, family in TRANSFORMERS.items():

        def decode(class_name: str = class_name) -> tuple[Any, tuple[Any, ...]]:
            processor = getattr(importlib.import_module("transformers"), class_name)()

            def post_process(logits: Tensor, boxes: Tensor, sizes: Tensor) -> Any:
                outputs = RawOutputs(logits, boxes)
                return processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=sizes)

            return post_process, (logits, boxes, sizes)

        yield audited(library, f"{family} post_process_object_detection", decode)


def rfdetr_rows() -> Iterator[Row]:
    def post_processor() -> tuple[Any, tuple[Any, ...]]:
        homes = ("rfdetr.models.lwdetr", "rfdetr.models.postprocess", "rfdetr.models.post_process")
        made = first_home(homes, "PostProcess")(num_select=20)
        logits, boxes, sizes = detections()
        return (lambda a, b, c: made({"pred_logits": a, "pred_boxes": b}, c)), (logits, boxes, sizes)

    yield audited(version("rfdetr"), "PostProcess", post_processor)


def monai_rows() -> Iterator[Row]:
    library = version("monai")
    for name in ("HausdorffDTLoss", "LogHausdorffDTLoss"):

        def loss(name: str = name) -> tuple[Any, tuple[Any, ...]]:
            pred, ids = segmentations(2)
            return getattr(importlib.import_module("monai.losses"), name)(include_background=True), (
                pred,
                torch.cat([1 - ids, ids], 1).float(),
            )

        yield audited(library, name, loss)


def reference_rows() -> Iterator[Row]:
    """Give the in-place references: every function of tests/reference whose name ends in an underscore."""
    logits, boxes, sizes = detections()
    known: dict[str, tuple[Any, ...]] = {
        "decode_": (logits, boxes, sizes, 20, 0.3),
        "cxcywh_to_xyxy_": (boxes,),
        "xyxy_to_cxcywh_": (boxes,),
        "scale_": (boxes, sizes),
        "clip_": (boxes, 480.0, 640.0),
        "hflip_": (boxes, 640.0),
        "zero_below_": (logits.sigmoid(), 0.3),
    }
    for path in sorted((ROOT / "tests" / "reference").glob("*inplace*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            continue
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, inputs in known.items():
            if hasattr(module, name):
                made = (getattr(module, name), inputs)
                yield audited("reference", name, lambda made=made: made)


def detpost_rows() -> Iterator[Row]:
    library = version("detpost")

    def post_processor(preset: str) -> tuple[Any, tuple[Any, ...]]:
        import detpost

        return detpost.DetectionPostProcessor.from_preset(preset, top_k=20, score_threshold=0.3), detections()

    for preset in ("rtdetr", "rfdetr", "detr"):
        yield audited(library, f"DetectionPostProcessor ({preset})", lambda preset=preset: post_processor(preset))
    for name, axes in (("HausdorffERLoss", 2), ("HausdorffERLoss3D", 3)):
        yield audited(
            library,
            name,
            lambda name=name, axes=axes: (first_home(("detpost.losses",), name)(k=3), segmentations(axes)),
        )
    for name in ("HausdorffDTLoss", "LogHausdorffDTLoss"):

        def loss(name: str = name) -> tuple[nn.Module, tuple[Tensor, ...]]:
            pred, ids = segmentations(2)
            made: nn.Module = first_home(("detpost.losses",), name)(include_background=True)
            return made, (pred, torch.cat([1 - ids, ids], 1).float())

        yield audited(library, name, loss)


def cells(report: PurityReport) -> list[str]:
    """Give one row of the table: numbers of distinct lines, and what the stages say."""

    def lines(*rules: str, note: bool = False) -> str:
        found = {(f.file, f.line) for f in report.findings if f.rule in rules and (f.severity == "note") == note}
        return str(len(found))

    writes = ("DP001", "DP002", "DP003", "DP004", "DP005", "DP006", "DP007")
    export = report.stages.get("export", "-")
    gradient = report.stages.get("backward", "-")
    return [
        lines(*writes),
        lines(*writes, note=True),
        lines("DP010", "DP011"),
        lines("DP020"),
        lines("DP030"),
        "yes" if export == "ok" else "no" if export.startswith("refused") else export,
        gradient
        if gradient in ("ok", "nothing differentiable")
        else "fails"
        if gradient.startswith("fails")
        else gradient,
    ]


def table(rows: list[Row]) -> str:
    head = ["library", "subject", "verdict", *COLUMNS]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for row in rows:
        if row.report is None:
            lines.append(f"| {row.library} | {row.name} | {row.missing} | {' | '.join('' for _ in COLUMNS)} |")
            continue
        raised = any(finding.rule == "DP090" for finding in row.report.findings)
        verdict = "raises" if raised else "pure" if row.report.clean else "ok" if row.report.ok else "not pure"
        lines.append(f"| {' | '.join([row.library, row.name, verdict, *cells(row.report)])} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, help="markdown file; a JSON file of the same name goes beside it")
    parser.add_argument("--verbose", action="store_true", help="print every report in full")
    options = parser.parse_args()
    groups = (kornia_rows, transformers_rows, rfdetr_rows, monai_rows, reference_rows, detpost_rows)
    rows = [row for group in groups for row in group()]
    text = f"Numbers are distinct source lines, found with torch {torch.__version__} on the CPU.\n\n{table(rows)}\n"
    if options.verbose:
        print("\n".join(str(row.report) for row in rows if row.report is not None), end="\n\n")
    if options.output is None:
        print(text)
        return 0
    options.output.write_text(text, encoding="utf-8")
    reports = [
        {"library": row.library, "subject": row.name, "missing": row.missing}
        | ({"report": row.report.to_dict()} if row.report is not None else {})
        for row in rows
    ]
    options.output.with_suffix(".json").write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
