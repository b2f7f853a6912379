"""Composes the four sample images that detpost ships, from test digits, with their ground truth.

python scripts/make_samples.py --out detpost/zoo/samples
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
import digit_scenes

# Name, (height, width), digits, seed. The seeds were chosen by eye, for pictures a person reads at a glance.
SAMPLES = (
    ("garden.png", (128, 160), 3, 26),
    ("lake.png", (240, 320), 5, 8),
    ("pagoda.png", (256, 192), 4, 21),
    ("petals.png", (200, 200), 6, 12),
)
READABLE = digit_scenes.Recipe(min_digit=24.0, max_digit=56.0)
app = typer.Typer(add_completion=False)


@app.command()
def main(out: Annotated[Path, typer.Option(help="Directory to write.")]) -> None:
    """Write the PNGs and ground_truth.json."""
    out.mkdir(parents=True, exist_ok=True)
    digits = digit_scenes.split_digits()[1]
    scenes = []
    for name, size, count, seed in SAMPLES:
        scene = digit_scenes.compose(np.random.default_rng(seed), digits, size, READABLE, count)
        Image.fromarray(scene.image).save(out / name, optimize=True)
        scenes.append(scene)
    truth = digit_scenes.coco_ground_truth(scenes, [name for name, *_ in SAMPLES])
    (out / "ground_truth.json").write_text(json.dumps(truth, indent=1) + "\n")


if __name__ == "__main__":
    app()
