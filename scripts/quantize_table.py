"""Puts the tiny detector in fewer bits, by `detpost quantize` and by stock tools: AP, size and time in one table.

    python scripts/quantize_table.py

Calibration scenes are of the digits that training has seen, those that AP is measured on of the others, with a seed of
their own. Times are medians over runs that take turns, on one thread.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
import digit_scenes

from detpost.export import to_onnx
from detpost.export.lowering import prepared
from detpost.export.runtime import onnx_session
from detpost.runs.evaluate import evaluate_model
from detpost.runs.quantize import quantize
from detpost.verify.on_images import OnImages

app = typer.Typer(add_completion=False)


def compose(folder: Path, count: int, seed: int, digits: digit_scenes.Digits) -> tuple[Path, ...]:
    """Write scenes of mixed sizes, and their ground truth as `truth.json`."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    scenes = [digit_scenes.compose(random, digits, digit_scenes.random_size(random)) for _ in range(count)]
    names = [f"{number:04}.png" for number in range(count)]
    for scene, name in zip(scenes, names, strict=True):
        Image.fromarray(scene.image).save(folder / name)
    (folder / "truth.json").write_text(json.dumps(digit_scenes.coco_ground_truth(scenes, names)))
    return tuple(folder / name for name in names)


def stock_static(source: Path, out: Path, images: OnImages, **options: Any) -> Path:
    """What ONNX Runtime's static quantiser makes of the file."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = images.arrays()

        def get_next(self) -> Any:
            return next(self.left, None)

    model = prepared(onnx.load(source))
    onnx.save(model, out.with_suffix(".float.onnx"))
    kept = [node.name for node in model.graph.node if node.name.startswith("detpost/")]
    quantize_static(
        out.with_suffix(".float.onnx"),
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=kept,
        **options,
    )
    return out


def stock_dynamic(source: Path, out: Path) -> Path:
    """What ONNX Runtime's dynamic quantiser makes of the file."""
    from onnxruntime.quantization import quantize_dynamic

    onnx.save(prepared(onnx.load(source)), out.with_suffix(".float.onnx"))
    quantize_dynamic(out.with_suffix(".float.onnx"), out)
    return out


def times(files: dict[str, Path], feed: dict[str, Any], rounds: int) -> dict[str, float]:
    """Give the median seconds of each file, which take turns."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    sessions = {name: onnxruntime.InferenceSession(str(path), options) for name, path in files.items()}
    taken: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(rounds):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run(None, feed)
            taken[name].append(time.perf_counter() - began)
    return {name: float(np.median(values)) for name, values in taken.items()}


@app.command()
def main(
    calibration: Annotated[int, typer.Option(min=8, help="Scenes to calibrate on.")] = 200,
    scenes: Annotated[int, typer.Option(min=8, help="Scenes to measure AP on.")] = 300,
    rounds: Annotated[int, typer.Option(min=3, help="Runs of each file.")] = 60,
    source: Annotated[Path | None, typer.Option(help="The float file; exported from tiny by default.")] = None,
) -> None:
    """Print the table in Markdown."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seen, unseen = digit_scenes.split_digits()
        images = compose(folder / "calibration", calibration, 501, seen)
        compose(folder / "test", scenes, 502, unseen)
        whole = source or to_onnx("tiny", folder / "float.onnx").path
        on_images = OnImages(whole, images)
        truth = folder / "calibration" / "truth.json"
        mine: dict[str, Callable[[Path], Path]] = {
            "`quantize --precision int8`": lambda out: (
                quantize(whole, out, "int8", images, annotations=truth, progress=_say).written.path
            ),
            "`quantize --precision fp16`": lambda out: (
                quantize(whole, out, "fp16", images, annotations=truth, progress=_say).written.path
            ),
            "`quantize --precision bf16`": lambda out: (
                quantize(whole, out, "bf16", images, annotations=truth, progress=_say).written.path
            ),
            "stock static int8, decode left out": lambda out: stock_static(whole, out, on_images),
            "stock static int8 of Conv alone": lambda out: stock_static(
                whole, out, on_images, op_types_to_quantize=["Conv"]
            ),
            "stock dynamic int8": lambda out: stock_dynamic(whole, out),
        }
        files = {"float32": whole}
        for place, (label, make) in enumerate(mine.items()):
            _say(label)
            files[label] = make(folder / f"made{place}.onnx")
        feed = next(OnImages(whole, images[:1]).arrays())
        seconds = times(files, feed, rounds)
        print("| file | AP | difference | size | time |\n| --- | --- | --- | --- | --- |")
        base = None
        for label, path in files.items():
            copy = folder / "one.onnx"  # stock tools keep the metadata, by which evaluate opens a file
            onnx.save(onnx.load(path), copy)
            onnx_session(copy)
            truth_of_test = folder / "test" / "truth.json"
            precision = evaluate_model(truth_of_test, folder / "test", model=str(copy), device="cpu")[0].metrics["AP"]
            base = precision if base is None else base
            size, ratio = path.stat().st_size / whole.stat().st_size, seconds[label] / seconds["float32"]
            print(f"| {label} | {precision:.4f} | {precision - base:+.4f} | {size:.3f} | {ratio:.2f} |", flush=True)


def _say(line: str) -> None:
    print(f"... {line}", file=sys.stderr)


if __name__ == "__main__":
    app()
