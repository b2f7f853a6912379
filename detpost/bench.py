"""Side by side with the installed peers: one process, rotating inputs, medians and ratios."""

from __future__ import annotations

import importlib.util
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Row", "run_benchmark", "write_json", "write_plot"]

Size = tuple[int, ...]

# Images, queries, classes.
DECODE_SIZES: tuple[tuple[int, int, int], ...] = (
    (1, 300, 80),
    (8, 300, 80),
    (1, 300, 365),
    (1, 300, 1203),
    (8, 300, 1203),
    (1, 1750, 34),
)
QUICK_DECODE_SIZES = DECODE_SIZES[:2]
EROSION_SIZES: tuple[Size, ...] = ((4, 3, 128, 128), (4, 2, 256, 256), (1, 2, 64, 64, 64))
DISTANCE_SIZES: tuple[Size, ...] = ((1, 2, 128, 128), (1, 2, 256, 256), (1, 2, 512, 512), (1, 2, 64, 64, 64))
TRANSFORM_SIZES: tuple[Size, ...] = ((512, 512), (128, 128, 128))
KEPT = 300
ROTATED = 8  # inputs that take turns, so that no branch predictor or cache learns one of them

Case = Callable[[int], Any]


@dataclass(frozen=True)
class Row:
    """One contender on one input size.

    Args:
        task: what was timed.
        size: shape of the input.
        name: the contender.
        microseconds: median over the runs.
        ratio: the contender's time over detpost's: how many times slower it is.
    """

    task: str
    size: Size
    name: str
    microseconds: float
    ratio: float


def run_benchmark(quick: bool = False, progress: Callable[[str], None] | None = None) -> list[Row]:
    """Time everything that is installed, on the CPU.

    Args:
        quick: the small sizes and few runs, under a minute on two cores.
        progress: called with one line before each size.

    Returns:
        One row per task, size and contender; detpost's own has ratio 1.
    """
    say = progress or (lambda _: None)
    seconds = 0.3 if quick else 1.5
    rows: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task, size, contenders in _tasks(quick):
            say(f"{task} {'x'.join(map(str, size))}")
            rows += _race(task, size, contenders, seconds)
    return rows


def _tasks(quick: bool) -> Iterator[tuple[str, Size, dict[str, Case]]]:
    for batch, queries, classes in QUICK_DECODE_SIZES if quick else DECODE_SIZES:
        yield "decode", (batch, queries, classes), _decoders(batch, queries, classes)
    for size in EROSION_SIZES[:1] if quick else EROSION_SIZES:
        yield "HausdorffERLoss forward + backward", size, _erosions(size)
    for size in DISTANCE_SIZES[:1] if quick else DISTANCE_SIZES:
        yield "HausdorffDTLoss forward + backward", size, _distances(size)
    for size in TRANSFORM_SIZES[:1] if quick else TRANSFORM_SIZES:
        yield "distance_transform_edt", size, _transforms(size)


def _race(task: str, size: Size, contenders: dict[str, Case], seconds: float) -> list[Row]:
    """Time all contenders in turns, so that a slow spell of the machine hits every one of them."""
    for case in contenders.values():
        case(0)
        case(1)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    spent, turn = 0.0, 0
    while spent < seconds * len(contenders) or turn < 3:
        for name, case in contenders.items():
            start = time.perf_counter()
            case(turn % ROTATED)
            times[name].append(time.perf_counter() - start)
            spent += times[name][-1]
        turn += 1
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [Row(task, size, name, value * 1e6, value / medians["detpost"]) for name, value in medians.items()]


def _installed(*names: str) -> bool:
    try:
        return all(importlib.util.find_spec(name) is not None for name in names)
    except ModuleNotFoundError:  # of a parent package
        return False


def _decoders(batch: int, queries: int, classes: int) -> dict[str, Case]:
    """Logits and boxes to scores, labels and pixel boxes, without gradients."""
    from detpost.postprocess import DetectionPostProcessor

    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(batch, queries, classes, generator=generator) for _ in range(ROTATED)]
    boxes = [torch.rand(batch, queries, 4, generator=generator) for _ in range(ROTATED)]
    sizes = torch.tensor([[480, 640]] * batch)
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=KEPT)
    contenders: dict[str, Case] = {"detpost": _no_grad(lambda i: post(logits[i], boxes[i], sizes))}
    if _installed("transformers"):
        from transformers import RTDetrImageProcessor

        processor = RTDetrImageProcessor()
        contenders |= {
            "transformers": _no_grad(
                lambda i: processor.post_process_object_detection(
                    SimpleNamespace(logits=logits[i], pred_boxes=boxes[i]), threshold=0.0, target_sizes=sizes
                )
            )
        }
    if _installed("kornia"):
        from kornia.models.rt_detr.post_processor import DETRPostProcessor

        theirs = DETRPostProcessor(num_classes=classes, num_top_queries=KEPT, confidence_filtering=False)
        contenders |= {"kornia": _no_grad(lambda i: theirs(logits[i], boxes[i], sizes))}
    if _installed("rfdetr"):
        from rfdetr.models.postprocess import PostProcess

        rfdetr = PostProcess(num_select=KEPT)
        contenders |= {
            "RF-DETR": _no_grad(
                lambda i: rfdetr({"pred_logits": logits[i], "pred_boxes": boxes[i]}, target_sizes=sizes)
            )
        }
    if _installed("tests.reference.rtdetr_inplace"):  # in a checkout: the in-place original, as RT-DETR has it
        from tests.reference.rtdetr_inplace import decode_

        contenders |= {"RT-DETR (in place)": _no_grad(lambda i: decode_(logits[i], boxes[i].clone(), sizes))}
    contenders |= {"read of the logits": _no_grad(lambda i: logits[i].amax())}
    return contenders


def _no_grad(case: Case) -> Case:
    def run(turn: int) -> Any:
        with torch.no_grad():
            return case(turn)

    return run


def _blobs(shape: Sequence[int], seed: int) -> Tensor:
    """Smooth random fields within 0..1, which threshold to blobs as segmentation masks are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(shape[0], shape[1], *(max(2, side // 16) for side in shape[2:]), generator=generator)
    mode = "bilinear" if len(shape) == 4 else "trilinear"
    return torch.nn.functional.interpolate(coarse, tuple(shape[2:]), mode=mode)


def _backward(loss: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor], targets: list[Tensor]) -> Case:
    def run(turn: int) -> Any:
        prediction = inputs[turn].detach().requires_grad_()
        loss(prediction, targets[turn]).backward()  # type: ignore[no-untyped-call]
        return prediction.grad

    return run


def _erosions(shape: Size) -> dict[str, Case]:
    import detpost.losses

    name = "HausdorffERLoss" if len(shape) == 4 else "HausdorffERLoss3D"
    inputs = [_blobs(shape, seed) for seed in range(ROTATED)]
    targets = [_blobs(shape, 100 + seed).argmax(dim=1, keepdim=True) for seed in range(ROTATED)]
    contenders = {"detpost": _backward(getattr(detpost.losses, name)(), inputs, targets)}
    if _installed("kornia"):
        import kornia.losses

        contenders |= {"kornia": _backward(getattr(kornia.losses, name)(), inputs, targets)}
    return contenders


def _distances(shape: Size) -> dict[str, Case]:
    import detpost.losses

    inputs = [_blobs(shape, seed) for seed in range(ROTATED)]
    targets = [(_blobs(shape, 100 + seed) > 0.5).float() for seed in range(ROTATED)]
    contenders = {"detpost": _backward(detpost.losses.HausdorffDTLoss(include_background=True), inputs, targets)}
    if _installed("monai", "scipy"):
        from monai.losses import HausdorffDTLoss

        contenders |= {"MONAI": _backward(HausdorffDTLoss(include_background=True), inputs, targets)}
    return contenders


def _transforms(shape: Size) -> dict[str, Case]:
    from detpost.losses import distance_transform_edt

    masks = [_blobs((1, 1, *shape), seed) > 0.4 for seed in range(ROTATED)]
    contenders: dict[str, Case] = {"detpost": _no_grad(lambda i: distance_transform_edt(masks[i]))}
    if _installed("scipy"):
        from scipy import ndimage

        arrays = [mask[0, 0].numpy() for mask in masks]
        contenders |= {"scipy": lambda i: ndimage.distance_transform_edt(arrays[i])}
    return contenders


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the rows with the machine, the versions and the date."""
    peers = ("torch", "numpy", "kornia", "transformers", "rfdetr", "monai", "scipy")
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in peers if _installed(name)},
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw one panel per task: time of each contender over the sizes, on a logarithmic scale."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the plot needs matplotlib: pip install 'detpost[viz]'") from None
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(5.5 * len(tasks), 4.2), layout="constrained")
    for position, task in enumerate(tasks, start=1):
        axes = figure.add_subplot(1, len(tasks), position)
        of_task = [row for row in rows if row.task == task]
        sizes = list(dict.fromkeys(row.size for row in of_task))
        for name in dict.fromkeys(row.name for row in of_task):
            times = {row.size: row.microseconds for row in of_task if row.name == name}
            places = [place for place, size in enumerate(sizes) if size in times]
            axes.plot(places, [times[sizes[place]] for place in places], marker="o", label=name)
        axes.set_xticks(range(len(sizes)), ["x".join(map(str, size)) for size in sizes], rotation=30, ha="right")
        axes.set_yscale("log")
        axes.set_ylabel("median, microseconds")
        axes.set_title(task, fontsize=10)
        axes.legend(fontsize=8)
        axes.grid(visible=True, which="both", alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
