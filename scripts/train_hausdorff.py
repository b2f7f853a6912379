"""Train a small U-Net with each boundary term and its schedule, on tasks where the boundary matters, and compare.

    python scripts/train_hausdorff.py                 # thin strokes, five seeds: some minutes on two cores
    python scripts/train_hausdorff.py --task coins    # coins side by side
    python scripts/train_hausdorff.py --task brain    # white matter in 3-D; needs pip install nilearn
    python scripts/train_hausdorff.py --quick         # seconds, to see that it runs

All data is real and comes inside packages. `strokes`: scikit-learn's handwritten digits, enlarged to strokes of two
to four pixels and laid over crops of scikit-image's photographs; the reference is where the ink is, digits and
the parts of the photographs are split into training and held-out. `coins`: scikit-image's coins; the reference is a
watershed of the edge image from two brightness markers, holes filled; the lower two rows are held out. `brain`:
nilearn's MNI152 template, blurred and with noise; the reference is its white-matter map above 0.5, the back half is
held out.

Every loss gets the same network, start, batches and number of steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from detpost.losses import (
    BoundaryLoss,
    GeneralizedSurfaceLoss,
    HausdorffDTLoss,
    HausdorffERLoss,
    HausdorffERLoss3D,
    HausdorffSchedule,
    LogHausdorffDTLoss,
)
from detpost.metrics import average_surface_distance, hausdorff_distance, surface_dice

EPOCHS = 10
Batch = tuple[Tensor, Tensor]


class Task(NamedTuple):
    """What is learnt, and on what it is measured.

    Attributes:
        sample: images (count, 1, ...) and class ids (count, 1, ...) for training, from a generator.
        images: (N, 1, ...), held out.
        masks: (N, 1, ...), their class ids.
        tile: side of the tiles that the held-out images are measured in.
        batch: images in a step.
        steps: how many steps make a run.
    """

    sample: Callable[[int, torch.Generator], Batch]
    images: Tensor
    masks: Tensor
    tile: int
    batch: int
    steps: int


class Scores(NamedTuple):
    """Means over the held-out tiles; distances in elements."""

    dice: float
    hd95: float
    assd: float
    surface_dice: float
    tiles_without_distance: int  # an empty prediction has no distance; such tiles are counted, not averaged


class UNet(nn.Module):
    """Two poolings, group norm, (B, 1, ...) to logits (B, 2, ...) in 2-D or 3-D; sides are multiples of 4."""

    def __init__(self, axes: int = 2, width: int = 4) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2) if axes == 2 else nn.MaxPool3d(2)
        self.first, self.second = _block(axes, 1, width), _block(axes, width, 2 * width)
        self.third = _block(axes, 2 * width, 4 * width)
        self.fourth, self.fifth = _block(axes, 6 * width, 2 * width), _block(axes, 3 * width, width)
        self.head = _convolution(axes)(width, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of background and object."""
        fine = self.first(image)
        middle = self.second(self.pool(fine))
        coarse = self.third(self.pool(middle))
        middle = self.fourth(torch.cat([middle, nn.functional.interpolate(coarse, scale_factor=2.0)], 1))
        fine = self.fifth(torch.cat([fine, nn.functional.interpolate(middle, scale_factor=2.0)], 1))
        return self.head(fine)


def _convolution(axes: int) -> type[nn.Module]:
    return nn.Conv2d if axes == 2 else nn.Conv3d


def _block(axes: int, inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [_convolution(axes)(channels, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def strokes() -> Task:
    """Handwritten digits over photographs: thin, concave, few pixels, beside what looks alike."""
    _, data = _imports("strokes")
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().images.astype("float32"))[:, None] / 16
    photographs = [torch.from_numpy(getattr(data, name)().astype("float32")) for name in ("camera", "brick", "grass")]
    photographs = [(photograph - photograph.mean()) / photograph.std() for photograph in photographs]
    side, half = 40, 256

    def compose(count: int, generator: torch.Generator, held_out: bool) -> Batch:
        def draw(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        images, masks = [], []
        for _ in range(count):
            photograph = photographs[draw(3)][half * held_out : half * (held_out + 1)]
            top, left = draw(half - side + 1), draw(photograph.shape[1] - side + 1)
            image, mask = photograph[top : top + side, left : left + side], torch.zeros(side, side)
            for _ in range(1 + draw(2)):
                number = 1200 + draw(597) if held_out else draw(1200)
                size = 18 + draw(11)
                ink = nn.functional.interpolate(digits[number][None], size=(size, size), mode="bicubic")[0, 0]
                y, x = draw(side - size + 1), draw(side - size + 1)
                mask = torch.maximum(mask, nn.functional.pad(ink, (x, side - size - x, y, side - size - y)))
            sign = 1 if draw(2) else -1
            noise = 0.2 * torch.randn(side, side, generator=generator)
            images.append(image + sign * 1.5 * mask.clamp(0, 1) + noise)
            masks.append(mask > 0.6)
        return torch.stack(images)[:, None], torch.stack(masks)[:, None].long()

    held_out = compose(64, torch.Generator().manual_seed(20261129), True)
    return Task(lambda count, generator: compose(count, generator, False), *held_out, side, 8, 250)


def coins() -> Task:
    """Coins side by side: convex, large, easy."""
    image, mask = load_coins()
    crop = 96

    def sample(count: int, generator: torch.Generator) -> Batch:
        return crops(image[:SPLIT], mask[:SPLIT], count, crop, generator)

    height, width = (side - side % 4 for side in image[SPLIT:].shape)
    window = (slice(SPLIT, SPLIT + height), slice(width))
    return Task(sample, image[window][None, None], mask[window][None, None], 64, 8, 150)


def brain() -> Task:
    """White matter of an averaged brain: thin and folded, in 3-D."""
    try:
        from nilearn.datasets import load_mni152_template, load_mni152_wm_template
    except ImportError as error:
        raise SystemExit("this task needs nilearn: pip install nilearn") from error
    image = torch.from_numpy(load_mni152_template(resolution=2).get_fdata().astype("float32"))
    mask = torch.from_numpy(load_mni152_wm_template(resolution=2).get_fdata() > 0.5).long()
    image = nn.functional.avg_pool3d(image[None, None], 3, stride=1, padding=1)[0, 0]
    image = (image - image.mean()) / image.std()
    image = image + 0.3 * torch.randn(image.shape, generator=torch.Generator().manual_seed(20261129))
    front, back = slice(57, None), slice(1, 57)  # along the second axis, from the back of the head

    def sample(count: int, generator: torch.Generator) -> Batch:
        return crops(image[:, front], mask[:, front], count, 32, generator)

    window = (slice(0, 96), back, slice(0, 92))
    return Task(sample, image[window][None, None], mask[window][None, None], 28, 2, 120)


TASKS: dict[str, Callable[[], Task]] = {"strokes": strokes, "coins": coins, "brain": brain}
SPLIT = 150  # the row of pixels, between two rows of coins, where held-out begins


def _imports(task: str) -> tuple[Any, Any]:
    try:
        import numpy as np
        from skimage import data
    except ImportError as error:
        raise SystemExit(f"the task {task} needs scikit-image ({error.name}): pip install 'detpost[dev]'") from error
    return np, data


def load_coins() -> Batch:
    """Standardised image (H, W) and reference mask (H, W) of 0 and 1."""
    np, data = _imports("coins")
    from scipy.ndimage import binary_fill_holes
    from skimage import filters, segmentation

    gray = data.coins()
    markers = np.where(gray < 30, 1, np.where(gray > 150, 2, 0))
    mask = binary_fill_holes(segmentation.watershed(filters.sobel(gray), markers) == 2)
    image = torch.from_numpy(gray.astype("float32"))
    return (image - image.mean()) / image.std(), torch.from_numpy(mask.astype("int64"))


def crops(image: Tensor, mask: Tensor, count: int, side: int, generator: torch.Generator) -> Batch:
    """Random flipped crops of an image or a volume: (count, 1, side, ...) twice."""
    pairs = []
    for _ in range(count):
        starts = [int(torch.randint(length - side + 1, (), generator=generator)) for length in image.shape]
        flips = [axis for axis in range(image.dim()) if torch.rand((), generator=generator) < 0.5]
        window = tuple(slice(start, start + side) for start in starts)
        pairs.append((image[window].flip(flips)[None], mask[window].flip(flips)[None]))
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


def dice_loss(probability: Tensor, target: Tensor) -> Tensor:
    """Give one minus soft Dice of the foreground over the batch."""
    foreground, truth = probability[:, 1], target[:, 0].to(probability.dtype)
    return 1 - (2 * (foreground * truth).sum() + 1) / (foreground.sum() + truth.sum() + 1)


def cross_entropy(probability: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of probabilities."""
    return nn.functional.nll_loss(probability.clamp(min=1e-7).log(), target[:, 0])


class Objective(nn.Module):
    """Dice, and beside it a term that a schedule weighs, or one at full weight from the start."""

    def __init__(self, term: nn.Module | Callable[..., Tensor] | None, schedule: HausdorffSchedule | None) -> None:
        super().__init__()
        self.term, self.schedule = term, schedule

    def forward(self, probability: Tensor, target: Tensor) -> Tensor:
        """Add what there is."""
        dice = dice_loss(probability, target)
        if self.term is None:
            return dice
        term = self.term(probability, target)
        return dice + term if self.schedule is None else self.schedule(dice, term)

    def end_epoch(self) -> None:
        """Let the schedule set its next weight."""
        if self.schedule is not None:
            self.schedule.step()


def objectives(axes: int) -> dict[str, Callable[[], Objective]]:
    """Each loss by its name, made anew for a run.

    The ratio rule is Karimi and Salcudean's; a signed loss takes the linear one, up to the weight of Dice.
    """
    erosion = HausdorffERLoss if axes == 2 else HausdorffERLoss3D
    half = EPOCHS // 2
    return {
        "Dice": lambda: Objective(None, None),
        "Dice + CE": lambda: Objective(cross_entropy, None),
        "Dice + Hausdorff ER": lambda: Objective(erosion(), HausdorffSchedule()),
        "Dice + Hausdorff DT": lambda: Objective(HausdorffDTLoss(to_onehot_y=True), HausdorffSchedule()),
        "Dice + log Hausdorff DT": lambda: Objective(LogHausdorffDTLoss(to_onehot_y=True), HausdorffSchedule()),
        "Dice + boundary": lambda: Objective(BoundaryLoss(to_onehot_y=True), HausdorffSchedule("linear", 1.0, half)),
        "Dice + generalized surface": lambda: Objective(
            GeneralizedSurfaceLoss(to_onehot_y=True), HausdorffSchedule("linear", 1.0, half)
        ),
    }


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> Scores:
    """Measure on the held-out tiles that hold something of the object."""
    predicted = torch.cat([model(image[None]).argmax(1, keepdim=True) for image in task.images])
    a, b = _tiles(predicted, task.tile), _tiles(task.masks, task.tile)
    held = b.flatten(1).any(1)
    a, b = a[held], b[held]
    axes = tuple(range(1, a.dim()))
    dice = (2 * (a * b).sum(axes) + 1) / (a.sum(axes) + b.sum(axes) + 1)
    hd95, assd = hausdorff_distance(a, b, percentile=95), average_surface_distance(a, b)
    some = hd95.isfinite()
    means = dice.mean(), hd95[some].mean(), assd[some].mean(), surface_dice(a, b, tolerance=1).mean()
    return Scores(*map(float, means), int((~some).sum()))


def _tiles(masks: Tensor, side: int) -> Tensor:
    """Cut (N, 1, ...) into (M, 1, side, ...), what is left over at the edges dropped."""
    axes = masks.dim() - 2
    for axis in range(2, 2 + axes):
        masks = masks.unfold(axis, side, side)
    return masks.reshape(-1, 1, *[side] * axes).float()


def train(
    make: Callable[[], Objective], seed: int, steps: int, task: Task, advance: Callable[[], None]
) -> dict[str, Any]:
    """Train from the same seed on the same batches whatever the loss; returns the model and its scores over time."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, objective = UNet(task.images.dim() - 2), make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    epoch, curve = max(1, steps // EPOCHS), []
    for step in range(1, steps + 1):
        images, targets = task.sample(task.batch, generator)
        optimizer.zero_grad()
        objective(model(images).softmax(1), targets).backward()
        optimizer.step()
        rate.step()
        if step % epoch == 0:
            objective.end_epoch()
        if step % (EPOCHS // 2 * epoch) == 0 or step == steps:
            curve.append((step, evaluate(model, task)))
        advance()
    return {"model": model, "curve": curve}


@torch.no_grad()
def draw(runs: dict[str, list[dict[str, Any]]], task: Task, path: Path) -> None:
    """Held-out image with each run's outline (first seed), and Dice and HD95 over training (mean over seeds)."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib: pip install 'detpost[viz]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = task.images[:4]
    figure = pyplot.figure(figsize=(14, 3 + 1.5 * len(runs)), layout="constrained")
    rows = figure.add_gridspec(len(runs) + 2, 2)
    for row, (name, results) in enumerate(runs.items()):
        axis = figure.add_subplot(rows[row, :])
        axis.imshow(_side_by_side(shown), cmap="gray")
        axis.contour(_side_by_side(task.masks[:4]), [0.5], colors="tab:green", linewidths=1)
        predicted = torch.cat([results[0]["model"](image[None]).argmax(1, keepdim=True) for image in shown])
        axis.contour(_side_by_side(predicted), [0.5], colors="tab:red", linewidths=1)
        axis.set(title=f"{name} (green: reference, red: predicted)", xticks=[], yticks=[])
    for column, (score, title) in enumerate((("dice", "Dice"), ("hd95", "HD95 in elements"))):
        axis = figure.add_subplot(rows[len(runs) :, column])
        for name, results in runs.items():
            curves = torch.tensor([[getattr(scores, score) for _, scores in result["curve"]] for result in results])
            axis.plot([step for step, _ in results[0]["curve"]], curves.nanmean(0), marker=".", label=name)
        axis.set(title=f"{title}, held out", xlabel="step", yscale="linear" if score == "dice" else "log")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _side_by_side(images: Tensor) -> Tensor:
    """Put images (N, 1, H, W), or the middle slices of volumes, beside each other: (H, N * W)."""
    flat = images[:, 0] if images.dim() == 4 else images[:, 0, images.shape[2] // 2]
    return torch.cat(list(flat), 1)


def table_of(title: str, runs: dict[str, list[dict[str, Any]]]) -> Table:
    """Give mean and standard deviation over the seeds after the last step."""
    columns = ("loss", "Dice", "HD95", "ASSD", "surface Dice at 1", "tiles without a distance")
    table = Table(*columns, title=f"held-out {title}, distances in elements")
    for name, results in runs.items():
        last = torch.tensor([result["curve"][-1][1] for result in results])  # (seeds, 5)
        cells = [f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in map(_spread, last[:, :4].T)]
        table.add_row(name, *cells, str(int(last[:, 4].sum())))
    return table


def _spread(scores: Tensor) -> tuple[float, float]:
    """Give mean and deviation (S,) of the seeds that have a distance."""
    known = scores[~scores.isnan()]
    deviation = known.std().item() if len(known) > 1 else 0.0
    return known.mean().item(), deviation


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="strokes")
    parser.add_argument("--steps", type=int, help="optimizer steps per run; the task has its own number")
    parser.add_argument("--seeds", type=int, default=5, help="runs per loss; the table shows mean and deviation")
    parser.add_argument("--first-seed", type=int, default=0, help="seeds count up from this one")
    parser.add_argument("--quick", action="store_true", help="at most 20 steps, one seed")
    parser.add_argument("--out", type=Path, default=Path("demo_out/hausdorff"), help="folder for scores.json, plot.png")
    options = parser.parse_args(arguments)
    for name in ("steps", "seeds"):
        if (given := getattr(options, name)) is not None and given < 1:
            parser.error(f"--{name} must be at least 1; got {given}")
    task = TASKS[options.task]()
    steps, seeds = options.steps or task.steps, options.seeds
    if options.quick:
        steps, seeds = min(steps, 20), 1
    losses = objectives(task.images.dim() - 2)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in losses}
    with Progress(console=console) as progress:
        bars = {name: progress.add_task(name, total=steps * seeds) for name in losses}
        # Seed by seed, so that a run that is cut short has seen every loss alike.
        for seed in range(options.first_seed, options.first_seed + seeds):
            for name, make in losses.items():
                result = train(make, seed, steps, task, lambda bar=bars[name]: progress.advance(bar))
                runs[name].append(result)
            save(options.out / "scores.json", options.task, steps, runs)
    console.print(table_of(options.task, runs))
    draw(runs, task, options.out / "plot.png")
    console.print(f"wrote {options.out / 'scores.json'} and {options.out / 'plot.png'}")


def save(path: Path, task: str, steps: int, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Write every score of every run so far."""
    scores = {name: [[(s, v._asdict()) for s, v in r["curve"]] for r in results] for name, results in runs.items()}
    path.write_text(json.dumps({"task": task, "steps": steps, "scores": scores}, indent=1))


if __name__ == "__main__":
    main()
