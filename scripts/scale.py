"""Measures what `detpost detect` takes by the stage, in time and in memory, from 1,000 to 100,000 images.

    python scripts/scale.py                          # 1,000, 10,000 and 100,000 images; the table of docs/scale.md
    python scripts/scale.py --count 1000 --count 4000

Images are small (96 x 72, JPEG), and the detector is a decode of fixed raw outputs, five detections an image: what is
measured is everything but the network, which costs the same for each image however many there are. Each count has a
process of its own. Memory is the most that the process held during a stage (Linux's VmHWM).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from detpost import DecodeSpec, DetectionPostProcessor, Detector
from detpost.images import FixedSize, Preprocessing
from detpost.runs.detect import detect
from detpost.runs.find_images import find_images
from detpost.runs.merge import merge

STAGES = ("find", "images", "parquet", "again", "merge")
# Files of one content are links to it; a file system allows no more than some tens of thousands to one.
CONTENTS = 50
app = typer.Typer(add_completion=False)


@app.command()
def main(
    count: Annotated[list[int] | None, typer.Option(help="Images; 1,000, 10,000 and 100,000 by default.")] = None,
    batch: Annotated[int, typer.Option(help="Images that go through the network at once.")] = 32,
    one: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print the table."""
    if one is not None:
        print(json.dumps(stages_of(one, batch)))
        return
    table = Table("images", "", *STAGES, "files, MB")
    for number in count or (1_000, 10_000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            make_images(Path(folder) / "images", number)
            command = [sys.executable, __file__, "--one", folder, "--batch", str(batch)]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
        measured = json.loads(ran.stdout.splitlines()[-1])
        seconds = [f"{measured[stage]['seconds']:.1f}" for stage in STAGES]
        megabytes = [f"{measured[stage]['megabytes']:.0f}" for stage in STAGES]
        table.add_row(f"{number:,}", "s", *seconds, f"{measured['written']:.0f}")
        table.add_row("", "MB", *megabytes, "")
        print(number, measured, flush=True)
    Console(width=120).print(table)


def make_images(folder: Path, count: int) -> None:
    """Write small images, a thousand to a folder."""
    random = np.random.default_rng(0)
    contents = [folder / f"content-{number}.jpg" for number in range(CONTENTS)]
    folder.mkdir()
    for content in contents:
        Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8)).resize((96, 72)).save(content)
    for number in range(count):
        place = folder / f"{number // 1000:03}" / f"{number % 1000:03}.jpg"
        place.parent.mkdir(exist_ok=True)
        place.hardlink_to(contents[number % CONTENTS])
    for content in contents:
        content.unlink()


def detector() -> Detector:
    """Give a detector whose network is fixed raw outputs: five detections an image."""
    spec = DecodeSpec(top_k=5)
    post = DetectionPostProcessor(spec)
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(1, 100, 10, generator=generator) * 3  # all above the threshold
    boxes = torch.rand(1, 100, 4, generator=generator)

    def run(images: torch.Tensor, image_sizes: torch.Tensor, pixel_mask: torch.Tensor | None) -> Any:
        size = len(images)
        return post(logits.expand(size, -1, -1), boxes.expand(size, -1, -1), image_sizes)

    names = {label: f"class {label}" for label in range(10)}
    return Detector(run, FixedSize(Preprocessing(32, 32)), names, torch.device("cpu"), 0.5, spec=spec)


def stages_of(place: Path, batch: int) -> dict[str, Any]:
    """Measure each stage in this process."""
    made = detector()
    Detector.load = classmethod(lambda *_, **__: made)  # type: ignore[method-assign, assignment]
    measured: dict[str, Any] = {}
    found = stage(measured, "find", lambda: find_images([place / "images"]))
    seen: list[float] = []

    def told(done: int, total: int) -> None:
        if done == total:  # what follows makes the file of the results
            measured["images"] = {"seconds": time.perf_counter() - seen[0], "megabytes": peak()}
            begin()
            seen.append(time.perf_counter())

    begin()
    seen.append(time.perf_counter())
    options: dict[str, Any] = {"batch_size": batch, "device": "cpu", "formats": ("parquet",)}
    detect(found, place / "out", progress=told, **options)
    measured["parquet"] = {"seconds": time.perf_counter() - seen[-1], "megabytes": peak()}
    stage(measured, "again", lambda: detect(found, place / "out", **options))
    stage(measured, "merge", lambda: merge([place / "out"], formats=["coco", "csv"]))
    measured["written"] = sum(path.stat().st_size for path in (place / "out").iterdir()) / 1e6
    shutil.rmtree(place / "out")
    return measured


def stage(measured: dict[str, Any], name: str, call: Callable[[], Any]) -> Any:
    """Measure a call."""
    begin()
    began = time.perf_counter()
    result = call()
    measured[name] = {"seconds": time.perf_counter() - began, "megabytes": peak()}
    return result


def begin() -> None:
    """Begin to count anew the most memory that this process holds."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Give the most memory that this process held since then, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


if __name__ == "__main__":
    app()
