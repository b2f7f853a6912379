"""Measures what tiles find that the whole image hides: small digits in composed scenes of 12 megapixels.

    python scripts/evaluate_tiles.py            # recall, precision and images a second, with each way to merge
    python scripts/evaluate_tiles.py --sahi     # and sahi on the same model and images, turn by turn

The scenes are those of `evaluate_tiny.py`, from other seeds and larger: 40 test digits each, 55 to 140 pixels high.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
import digit_scenes
from evaluate_tiny import recall_at_half

from detpost.runs.detect import detect
from detpost.runs.tiles import Tiling
from detpost.zoo import TINY

RECIPE = digit_scenes.Recipe(min_digit=3.0, max_digit=6.0)
app = typer.Typer(add_completion=False)


@app.command()
def main(
    scenes: Annotated[int, typer.Option(help="How many.")] = 4,
    tiles: Annotated[int, typer.Option(help="Pixels.")] = 640,
    batch: Annotated[int, typer.Option(help="Tiles that go through the network at once.")] = 16,
    sahi: Annotated[bool, typer.Option("--sahi", help="Run sahi as well, which has to be installed.")] = False,
    rounds: Annotated[int, typer.Option(help="With --sahi, turns that each takes.")] = 5,
) -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        truth = make_scenes(place / "images", scenes)
        table = Table("", "detections", "recall", "precision", "images/s")
        ways = {"whole": None, **{name: Tiling(tiles, merge=name) for name in ("nms", "nmm", "wbf")}}
        run(place, Tiling(tiles), batch)  # what is done once in a process
        for name, tiling in ways.items():
            table.add_row(name, *measured(place, truth, tiling, batch))
        Console().print(table)
        if sahi:
            race(place, truth, tiles, batch, rounds)


def make_scenes(folder: Path, count: int) -> dict[str, Any]:
    """Write the scenes as JPEG files and give their ground truth."""
    folder.mkdir()
    digits, made = digit_scenes.split_digits()[1], []
    for number in range(count):
        made.append(digit_scenes.compose(np.random.default_rng([7, number]), digits, (3000, 4000), RECIPE, 40))
        Image.fromarray(made[-1].image).save(folder / f"{number:03}.jpg", quality=92)
    return digit_scenes.coco_ground_truth(made, [f"{number:03}.jpg" for number in range(count)])


def run(place: Path, tiling: Tiling | None, batch: int) -> Any:
    """Detect in the scenes."""
    return detect([place / "images"], place / "out", device="cpu", fresh=True, tiling=tiling, batch_size=batch)


def measured(place: Path, truth: dict[str, Any], tiling: Tiling | None, batch: int) -> list[str]:
    """Give a row of the table."""
    began = time.perf_counter()
    summary = run(place, tiling, batch)
    rate = summary.images / (time.perf_counter() - began)
    found = recall_at_half(truth, json.loads((place / "out" / "detections.json").read_text()), 0.5)
    return [str(summary.detections), f"{found['recall']:.3f}", f"{found['precision']:.3f}", f"{rate:.2f}"]


def race(place: Path, truth: dict[str, Any], tiles: int, batch: int, rounds: int) -> None:
    """Let both run in turns, in wall-clock and in processor seconds an image."""
    import torch
    from sahi import AutoDetectionModel
    from sahi.predict import get_sliced_prediction
    from transformers import RTDetrImageProcessor, RTDetrV2ForObjectDetection

    model = RTDetrV2ForObjectDetection.from_pretrained(TINY, dtype=torch.float32).eval()
    processor = RTDetrImageProcessor.from_pretrained(TINY)
    theirs = AutoDetectionModel.from_pretrained(
        "huggingface", model=model, processor=processor, confidence_threshold=0.5, device="cpu"
    )
    paths = sorted(map(str, (place / "images").iterdir()))
    options = {"slice_height": tiles, "slice_width": tiles, "batch_size": batch, "verbose": 0}

    def sliced() -> list[dict[str, Any]]:
        results = []
        for number, path in enumerate(paths, start=1):
            for each in get_sliced_prediction(path, theirs, **options).object_prediction_list:
                box = [float(side) for side in each.bbox.to_xywh()]
                score, label = float(each.score.value), int(each.category.name)
                results.append({"image_id": number, "bbox": box, "score": score, "category_id": label})
        return results

    found = recall_at_half(truth, sliced(), 0.5)
    print(f"sahi: recall {found['recall']:.3f}, precision {found['precision']:.3f}")
    run(place, Tiling(tiles), batch)
    turns = [(timed(sliced), timed(lambda: run(place, Tiling(tiles), batch))) for _ in range(rounds)]
    for place_of, name in enumerate(("wall-clock", "processor")):
        seconds = [statistics.median(turn[who][place_of] for turn in turns) / len(paths) for who in (0, 1)]
        ratios = sorted(turn[0][place_of] / turn[1][place_of] for turn in turns)
        print(
            f"{name} seconds an image: sahi {seconds[0]:.2f}, detpost {seconds[1]:.2f}; "
            f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f} in {rounds} turns)"
        )


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Give the wall-clock and the processor seconds of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


if __name__ == "__main__":
    app()
