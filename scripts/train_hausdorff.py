"""Train a small U-Net on Dice alone and on Dice with either Hausdorff loss, and compare on held-out coins.

    python scripts/train_hausdorff.py            # a few minutes on two cores
    python scripts/train_hausdorff.py --quick    # seconds, to see that it runs

The image is scikit-image's ``coins``, which comes inside its wheel. It has no annotation: the reference mask is a
watershed of the edge image from two brightness markers, holes filled. The network sees random crops of the upper two
rows of coins in training and is measured on the lower two, which it never sees.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from detpost.losses import hausdorff_dt_loss, hausdorff_er_loss
from detpost.metrics import hausdorff_distance

SPLIT = 150  # the row of pixels, between two rows of coins, where held-out begins
CROP = 96
TILE = 64  # held-out is measured tile by tile


class Scores(NamedTuple):
    """Means over the held-out tiles."""

    dice: float
    hd95: float
    hd: float
    tiles_without_distance: int  # an empty prediction has no distance; such tiles are counted, not averaged


class UNet(nn.Module):
    """Two poolings, group norm, (B, 1, H, W) to logits (B, 2, H, W); sides are multiples of 4."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.second, self.third = _block(1, width), _block(width, 2 * width), _block(2 * width, 4 * width)
        self.fourth, self.fifth = _block(6 * width, 2 * width), _block(3 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of background and coin."""
        fine = self.first(image)
        middle = self.second(nn.functional.max_pool2d(fine, 2))
        coarse = self.third(nn.functional.max_pool2d(middle, 2))
        middle = self.fourth(torch.cat([middle, nn.functional.interpolate(coarse, scale_factor=2.0)], 1))
        fine = self.fifth(torch.cat([fine, nn.functional.interpolate(middle, scale_factor=2.0)], 1))
        return self.head(fine)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.ReLU(),
    )


def load_coins() -> tuple[Tensor, Tensor]:
    """Standardised image (H, W) and reference mask (H, W) of 0 and 1."""
    try:
        import numpy as np
        from scipy.ndimage import binary_fill_holes
        from skimage import data, filters, segmentation
    except ImportError as error:
        raise SystemExit(
            f"this script needs scikit-image and scipy ({error.name}): pip install 'detpost[dev]'"
        ) from error
    gray = data.coins()
    markers = np.where(gray < 30, 1, np.where(gray > 150, 2, 0))
    mask = binary_fill_holes(segmentation.watershed(filters.sobel(gray), markers) == 2)
    image = torch.from_numpy(gray.astype("float32"))
    return (image - image.mean()) / image.std(), torch.from_numpy(mask.astype("int64"))


def dice_loss(probability: Tensor, target: Tensor) -> Tensor:
    """One minus soft Dice of the foreground over the batch."""
    foreground, truth = probability[:, 1], target[:, 0].to(probability.dtype)
    return 1 - (2 * (foreground * truth).sum() + 1) / (foreground.sum() + truth.sum() + 1)


def with_hausdorff(hausdorff: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Dice plus a Hausdorff term scaled to the size of the Dice term, so that neither drowns the other."""

    def loss(probability: Tensor, target: Tensor) -> Tensor:
        dice, distance = dice_loss(probability, target), hausdorff(probability, target)
        return dice + distance * (dice.detach() / distance.detach().clamp(min=1e-6))

    return loss


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Dice": dice_loss,
    "Dice + Hausdorff ER": with_hausdorff(hausdorff_er_loss),
    "Dice + Hausdorff DT": with_hausdorff(lambda p, t: hausdorff_dt_loss(p, t, to_onehot_y=True)),
}


def crops(image: Tensor, mask: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random flipped crops of the training part: (count, 1, CROP, CROP) twice."""
    pairs = []
    for _ in range(count):
        top = int(torch.randint(SPLIT - CROP + 1, (), generator=generator))
        left = int(torch.randint(image.shape[1] - CROP + 1, (), generator=generator))
        flips = [axis for axis in (0, 1) if torch.rand((), generator=generator) < 0.5]
        window = (slice(top, top + CROP), slice(left, left + CROP))
        pairs.append((image[window].flip(flips)[None], mask[window].flip(flips)[None]))
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


@torch.no_grad()
def predict(model: nn.Module, image: Tensor) -> Tensor:
    """Foreground (H, W) of a whole image, in one pass over its part that the network's poolings divide."""
    height, width = (side - side % 4 for side in image.shape)
    return model(image[None, None, :height, :width]).argmax(1)[0]


def evaluate(model: nn.Module, image: Tensor, mask: Tensor) -> Scores:
    """Dice, HD95 and HD in pixels on the held-out part, averaged over its tiles."""
    predicted = predict(model, image[SPLIT:])
    truth = mask[SPLIT : SPLIT + predicted.shape[0], : predicted.shape[1]]
    a, b = (_tiles(part) for part in (predicted, truth))
    dice = (2 * (a * b).sum((1, 2, 3)) + 1) / (a.sum((1, 2, 3)) + b.sum((1, 2, 3)) + 1)
    hd95, hd = hausdorff_distance(a, b, percentile=95), hausdorff_distance(a, b)
    some = hd.isfinite()
    return Scores(float(dice.mean()), float(hd95[some].mean()), float(hd[some].mean()), int((~some).sum()))


def _tiles(mask: Tensor) -> Tensor:
    """Cut (H, W) into (N, 1, TILE, TILE), what is left over at the edges dropped."""
    return mask.unfold(0, TILE, TILE).unfold(1, TILE, TILE).reshape(-1, 1, TILE, TILE).float()


def train(
    name: str, seed: int, steps: int, data: tuple[Tensor, Tensor], advance: Callable[[], None]
) -> dict[str, object]:
    """Train from the same seed on the same crops whatever the loss; returns the model and its scores over time."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = UNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    every, curve = max(1, steps // 10), []
    for step in range(1, steps + 1):
        images, targets = crops(*data, 8, generator)
        optimizer.zero_grad()
        LOSSES[name](model(images).softmax(1), targets).backward()
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            curve.append((step, evaluate(model, *data)))
        advance()
    return {"model": model, "curve": curve}


def draw(runs: dict[str, list[dict[str, object]]], data: tuple[Tensor, Tensor], path: Path) -> None:
    """Held-out image with each run's outline (first seed), and Dice and HD95 over training (mean over seeds)."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib: pip install 'detpost[viz]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    image, mask = data
    figure, (top, bottom) = pyplot.subplots(2, len(runs), figsize=(5 * len(runs), 6), layout="constrained")
    bottom[-1].axis("off")
    panels = bottom[:2]
    for axis, (name, results) in zip(top, runs.items(), strict=True):
        axis.imshow(image[SPLIT:], cmap="gray")
        axis.contour(mask[SPLIT:], [0.5], colors="tab:green", linewidths=1)
        axis.contour(predict(results[0]["model"], image[SPLIT:]), [0.5], colors="tab:red", linewidths=1)
        axis.set(title=f"{name}\n(green: reference, red: predicted)", xticks=[], yticks=[])
        for panel, score in zip(panels, ("dice", "hd95"), strict=True):
            curves = torch.tensor([[getattr(scores, score) for _, scores in result["curve"]] for result in results])
            panel.plot([step for step, _ in results[0]["curve"]], curves.nanmean(0), marker=".", label=name)
    panels[0].set(title="Dice, held out", xlabel="step")
    panels[1].set(title="HD95 in pixels, held out", xlabel="step", yscale="log")
    bottom[-1].legend(*panels[1].get_legend_handles_labels(), loc="center")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps per run")
    parser.add_argument("--seeds", type=int, default=3, help="runs per loss; the table shows mean and spread")
    parser.add_argument("--quick", action="store_true", help="20 steps, one seed")
    parser.add_argument("--out", type=Path, default=Path("demo_out/hausdorff"), help="folder for scores.json, plot.png")
    options = parser.parse_args(arguments)
    steps, seeds = (min(options.steps, 20), 1) if options.quick else (options.steps, options.seeds)
    data = load_coins()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    runs: dict[str, list[dict[str, object]]] = {name: [] for name in LOSSES}
    with Progress(console=console) as progress:
        for name in LOSSES:
            task = progress.add_task(name, total=steps * seeds)
            for seed in range(seeds):
                runs[name].append(train(name, seed, steps, data, lambda task=task: progress.advance(task)))
    table = Table("loss", "Dice", "HD95 (px)", "HD (px)", "tiles without a distance", title="held-out coins")
    for name, results in runs.items():
        last = torch.tensor([result["curve"][-1][1] for result in results])  # (seeds, 4)
        spread = last.std(0, correction=0)
        cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(last.nanmean(0)[:3], spread[:3], strict=True)]
        table.add_row(name, *cells, str(int(last[:, 3].sum())))
    console.print(table)
    scores = {name: [[(s, v._asdict()) for s, v in r["curve"]] for r in results] for name, results in runs.items()}
    (options.out / "scores.json").write_text(json.dumps({"steps": steps, "seeds": seeds, "scores": scores}, indent=1))
    draw(runs, data, options.out / "plot.png")
    console.print(f"wrote {options.out / 'scores.json'} and {options.out / 'plot.png'}")


if __name__ == "__main__":
    main()
