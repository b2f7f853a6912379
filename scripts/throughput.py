"""Measures how much of the network's own rate `detpost detect` keeps, on JPEG files of 1 to 12 megapixels.

    python scripts/throughput.py                                    # the shipped detector and an RT-DETR of 640 pixels
    python scripts/throughput.py --model tiny --backend eager --draw
    python scripts/throughput.py --threads 1                        # the network on one core, the others for reading

The network alone gets one batch of ready tensors again and again; the command gets a folder. They take turns, and the
median of the turns' ratios is given: other users of a machine slow both down. Loading the model is in neither. The two
columns of processor time are of the network alone and of the command, milliseconds an image; where both use all cores,
their ratio is the one that images a second would have without other users.
"""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from detpost.detector import Detector
from detpost.export import to_onnx, to_openvino
from detpost.runs.detect import detect

SIZES = {1: (864, 1152), 3: (1500, 2000), 6: (2112, 2816), 12: (3000, 4000)}
MODELS = ("tiny", "kornia:rtdetr_r18vd@random")
BACKENDS = ("eager", "onnx", "openvino")
# Different photographs of a size; the files are copies of these, which cost as much to decode.
PHOTOGRAPHS = 4
app = typer.Typer(add_completion=False)


class Turn(NamedTuple):
    """Images a second and processor seconds an image, of the network alone and of the command."""

    alone: tuple[float, float]
    command: tuple[float, float]
    waits: dict[str, float]


@app.command()
def main(
    model: Annotated[list[str] | None, typer.Option(help="Detectors; by default two.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="eager, onnx, openvino; all by default.")] = None,
    megapixels: Annotated[list[int] | None, typer.Option(help="Of the images: 1, 3, 6, 12.")] = None,
    batch: Annotated[int, typer.Option(help="Images that go through the network at once.")] = 8,
    seconds: Annotated[float, typer.Option(help="That each takes at least in a turn.")] = 4.0,
    turns: Annotated[int, typer.Option(help="For each row.")] = 3,
    threads: Annotated[int | None, typer.Option(help="PyTorch's own; all cores by default.")] = None,
    draw: Annotated[
        bool, typer.Option("--draw", help="Draw, too, on images of which every one has detections.")
    ] = False,
    draft: Annotated[bool, typer.Option("--draft", help="Decode JPEG files at a reduced scale.")] = False,
) -> None:
    """Print the table."""
    threads = threads or torch.get_num_threads()
    table = Table(
        "model", "backend", "MP", "network/s", "command/s", "ratio", "CPU ms", "CPU ms", "CPU ratio", "waited for"
    )
    # A process of its own for each row: OpenVINO keeps cores for models that are gone.
    alone = ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,), max_tasks_per_child=1
    )
    with tempfile.TemporaryDirectory() as folder, alone as pool:
        place = Path(folder)
        for name in model or MODELS:
            for kind in backend or BACKENDS:
                source = opened_by(name, kind, place)
                for size in megapixels or SIZES:
                    given = (source, photographs(place, size), place, batch, seconds, turns, draw, draft)
                    measured = pool.submit(race, *given).result()
                    table.add_row(name, kind, str(size), *row(measured))
                    print(" ".join((name, kind, str(size), *row(measured))), flush=True)
    Console(width=140).print(table)
    print(f"{processor()}, {threads} threads of PyTorch, batch {batch}")


def opened_by(name: str, backend: str, place: Path) -> str:
    """Give what the command is to load: a file is exported once."""
    if backend == "eager":
        return name
    write, ending = {"onnx": (to_onnx, ".onnx"), "openvino": (to_openvino, ".xml")}[backend]
    path = place / f"{name.partition(':')[0]}{ending}"
    write(name, path)
    return str(path)


def photographs(place: Path, megapixels: int) -> Path:
    """Write JPEG files like photographs: detail of every size and noise, about two bits a pixel."""
    folder = place / f"{megapixels}"
    if folder.exists():
        return folder
    folder.mkdir()
    for number in range(PHOTOGRAPHS):
        Image.fromarray(photograph(*SIZES[megapixels], number)).save(folder / f"{number}.jpg", quality=90)
    return folder


def photograph(height: int, width: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Make one, (height, width, 3)."""
    random = np.random.default_rng(seed)
    pixels = 128 + random.normal(0, 4, (height, width, 1)).astype(np.float32)
    for cells in (4, 16, 64, 256, 1024):
        coarse = random.normal(0, 60 / cells**0.35, (max(2, height * cells // width), cells, 3)).astype(np.float32)
        planes = [Image.fromarray(coarse[:, :, channel]).resize((width, height), Image.BICUBIC) for channel in range(3)]
        pixels = pixels + np.stack([np.asarray(plane) for plane in planes], 2)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def race(
    source: str, folder: Path, place: Path, batch: int, seconds: float, turns: int, draw: bool, draft: bool
) -> list[Turn]:
    """Let the network alone and the command take turns."""
    detector = Detector.load(source, device="cpu")
    files = sorted(folder.glob("?.jpg"))
    images, sizes, mask = detector.prepare.batch([detector.ready(path) for path in (files * batch)[:batch]])

    def alone() -> Any:
        with torch.no_grad():
            return detector.find(images, sizes, mask)

    scores = alone().detections.scores
    count = max(2, round(seconds * rate_of(alone, 1.0)))  # batches
    names = [folder / f"copy-{number:05}.jpg" for number in range(count * batch)]
    for number, name in enumerate(names):
        if not name.exists():
            name.hardlink_to(files[number % len(files)])
    threshold = scores[:, 10].mean().item() if draw else 0.5
    options = {"batch_size": batch, "draw": draw, "draft": draft, "threshold": threshold}
    return [turn(alone, source, names, place / "out", options) for _ in range(turns)]


def rate_of(call: Callable[[], Any], least: float) -> float:
    """Give calls a second, over at least so many seconds."""
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < least:
        call()
        count += 1
    return count / passed


def turn(alone: Callable[[], Any], source: str, names: list[Path], out: Path, options: dict[str, Any]) -> Turn:
    """Measure each once."""
    images, batches = len(names), len(names) // options["batch_size"]
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(batches):
        alone()
    of_network = images / (time.perf_counter() - wall), (time.process_time() - processor) / images
    told: list[tuple[float, float]] = []
    summary = detect(
        names,
        out,
        model=source,
        device="cpu",
        fresh=True,
        progress=lambda *_: told.append((time.perf_counter(), time.process_time())),
        **options,
    )
    wall, processor = (after - before for before, after in zip(told[0], told[-1], strict=True))
    return Turn(of_network, (images / wall, processor / images), dict(summary.seconds))


def row(turns: list[Turn]) -> list[str]:
    """Give the medians."""
    alone, command = (
        [statistics.median(getattr(turn, who)[what] for turn in turns) for what in (0, 1)]
        for who in ("alone", "command")
    )
    ratio = statistics.median(turn.command[0] / turn.alone[0] for turn in turns)
    of_processors = statistics.median(turn.alone[1] / turn.command[1] for turn in turns)
    waits = {stage: sum(turn.waits[stage] for turn in turns) for stage in turns[0].waits}
    return [
        f"{alone[0]:.1f}",
        f"{command[0]:.1f}",
        f"{ratio:.2f}",
        f"{1e3 * alone[1]:.0f}",
        f"{1e3 * command[1]:.0f}",
        f"{of_processors:.2f}",
        ", ".join(f"{stage} {value / sum(waits.values()):.2f}" for stage, value in waits.items()),
    ]


def processor() -> str:
    """Name the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    sys.exit(app())
