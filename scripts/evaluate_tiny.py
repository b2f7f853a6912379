"""Measures a detector's COCO average precision on composed scenes of the test digits.

    python scripts/evaluate_tiny.py --model detpost/zoo/tiny

The scenes come from a seed of their own and from the 500 test digits, none of which training has seen.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
import digit_scenes

from detpost import DetectionPostProcessor
from detpost.nms import NonMaximumSuppression

ROOT = Path(__file__).resolve().parent.parent
SCENE_SEED = 990_001  # training scenes come from [seed, number], which no single integer repeats
app = typer.Typer(add_completion=False)


@torch.no_grad()
def detect(
    model_directory: Path, images: list[np.ndarray], batch: int, device: str, nms: float | None = None
) -> list[dict[str, Any]]:
    """Run the detector over RGB images, with NMS where asked: COCO results, the images numbered from 1."""
    from transformers import AutoModelForObjectDetection, RTDetrImageProcessor

    model = AutoModelForObjectDetection.from_pretrained(model_directory, dtype=torch.float32).to(device).eval()
    processor = RTDetrImageProcessor.from_pretrained(model_directory)
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=100)
    suppress = torch.nn.Identity() if nms is None else NonMaximumSuppression(nms)
    results: list[dict[str, Any]] = []
    for start in track(range(0, len(images), batch), description="evaluating"):
        chunk = images[start : start + batch]
        inputs = processor(images=[Image.fromarray(image) for image in chunk], return_tensors="pt").to(device)
        outputs = model(**inputs)
        sizes = torch.tensor([image.shape[:2] for image in chunk], device=device)  # (B, 2) as (height, width)
        detections = suppress(post(outputs.logits, outputs.pred_boxes, sizes))
        results += detections.to_coco(list(range(start + 1, start + 1 + len(chunk))))
    return results


def recall_at_half(truth: dict[str, Any], results: list[dict[str, Any]], threshold: float) -> dict[str, float]:
    """Recall and precision of the detections above a score threshold, matched by label at IoU >= 0.5."""
    found = total = shown = 0
    for image in truth["images"]:
        wanted = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        offered = [r for r in results if r["image_id"] == image["id"] and r["score"] > threshold]
        total, shown = total + len(wanted), shown + len(offered)
        for result in sorted(offered, key=lambda r: -r["score"]):
            ious = [
                intersection_over_union(result["bbox"], a["bbox"]) if a["category_id"] == result["category_id"] else 0.0
                for a in wanted
            ]
            if ious and max(ious) >= 0.5:
                wanted.pop(int(np.argmax(ious)))
                found += 1
    return {"recall": found / max(total, 1), "precision": found / max(shown, 1)}


def intersection_over_union(a: list[float], b: list[float]) -> float:
    """IoU of two xywh boxes."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inside = max(width, 0.0) * max(height, 0.0)
    return inside / (a[2] * a[3] + b[2] * b[3] - inside)


def score(truth: dict[str, Any], results: list[dict[str, Any]], threshold: float = 0.5) -> dict[str, float]:
    """COCO AP, AP50, AP75 and AR100, with recall and precision at one score threshold."""
    from faster_coco_eval import COCO, COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO(truth)
        evaluation = COCOeval_faster(annotations, annotations.loadRes(results), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = evaluation.stats
    measures = {"AP": stats[0], "AP50": stats[1], "AP75": stats[2], "AR100": stats[8]}
    at_threshold = recall_at_half(truth, results, threshold)
    return {name: round(float(value), 4) for name, value in {**measures, **at_threshold}.items()}


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="A directory of train_tiny.py.")] = ROOT / "detpost/zoo/tiny",
    images: Annotated[int, typer.Option(min=1, help="Scenes to compose.")] = 500,
    batch: Annotated[int, typer.Option(min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = SCENE_SEED,
    square: Annotated[bool, typer.Option("--square", help="All scenes 128x128, not of mixed sizes.")] = False,
    nms: Annotated[float | None, typer.Option(help="Greedy NMS by class above this IoU.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the measures here.")] = None,
) -> None:
    """Print AP, AP50, AP75, AR100, and recall and precision at IoU 0.5 above score 0.5."""
    digits, rng = digit_scenes.split_digits()[1], np.random.default_rng(seed)
    scenes = []
    for _ in track(range(images), description="composing"):
        size = (128, 128) if square else digit_scenes.random_size(rng)
        scenes.append(digit_scenes.compose(rng, digits, size, digit_scenes.EVALUATION))
    started = time.perf_counter()
    results = detect(model, [scene.image for scene in scenes], batch, device, nms)
    seconds = time.perf_counter() - started
    measures = score(digit_scenes.coco_ground_truth(scenes), results)
    table = Table(title=f"{images} scenes, {sum(len(s.labels) for s in scenes)} digits, {seconds:.1f} s")
    for name in measures:
        table.add_column(name)
    table.add_row(*(f"{value:.3f}" for value in measures.values()))
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({"images": images, "seed": seed, **measures}, indent=2) + "\n")


if __name__ == "__main__":
    app()
