"""What the benchmark times: each task at its sizes, with every contender that is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__all__ = ["ROTATED", "Case", "Size", "Task", "is_installed", "task_of", "tasks"]

Size = tuple[int, ...]
Case = Callable[[int], Any]

KEPT = 300
ROTATED = 8  # inputs that take turns, so that no branch predictor or cache learns one of them

# Images, queries, classes.
DECODE_SIZES: tuple[Size, ...] = (
    (1, 300, 80),
    (8, 300, 80),
    (1, 300, 365),
    (1, 300, 1203),
    (8, 300, 1203),
    (1, 1750, 34),
)
GPU_DECODE_SIZES: tuple[Size, ...] = ((1, 300, 80), (32, 300, 80), (8, 300, 1203))
EROSION_SIZES: tuple[Size, ...] = ((4, 3, 128, 128), (4, 2, 256, 256), (1, 2, 64, 64, 64))
DISTANCE_SIZES: tuple[Size, ...] = ((1, 2, 128, 128), (1, 2, 256, 256), (1, 2, 512, 512), (1, 2, 64, 64, 64))
GPU_DISTANCE_SIZES: tuple[Size, ...] = ((4, 3, 256, 256), (1, 2, 64, 64, 64))
TRANSFORM_SIZES: tuple[Size, ...] = ((512, 512), (128, 128, 128))
CLASS_SWEEP = (10, 40, 160, 640, 2560)
SIDE_SWEEP = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Task:
    """One thing to time at one size.

    Args:
        name: what it is.
        size: shape of the input.
        contenders: each takes the number of the input; ``"detpost"`` is among them.
        with_memory: whether peak memory is measured too.
    """

    name: str
    size: Size
    contenders: dict[str, Case] = field(repr=False)
    with_memory: bool = False


def tasks(device: str = "cpu", quick: bool = False, only: str | None = None) -> Iterator[Task]:
    """Make the tasks one by one.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        quick: the first size of each alone, and no sweeps.
        only: the name of one task; ``None`` makes all.

    Yields:
        The tasks.

    Raises:
        ValueError: no task has the name.
    """
    names = [kind.name for kind in _kinds(device)]
    if only not in (None, *names):
        raise ValueError(f"no task {only!r}: take one of {', '.join(names)}")
    for kind in _kinds(device):
        if only not in (None, kind.name) or (quick and kind.is_slow):
            continue
        for size in kind.sizes[: kind.quick_sizes] if quick else kind.sizes:
            yield Task(kind.name, size, kind.make(size, device), kind.with_memory and not quick)


def task_of(name: str, size: Size) -> Task:
    """Make the task of a name at any size, on the CPU."""
    kind = next(kind for kind in _kinds("cpu") if kind.name == name)
    return Task(name, size, kind.make(size, "cpu"), kind.with_memory)


@dataclass(frozen=True)
class _Kind:
    name: str
    sizes: tuple[Size, ...]
    make: Callable[[Size, str], dict[str, Case]]
    with_memory: bool = False
    quick_sizes: int = 1
    is_slow: bool = False


def _kinds(device: str) -> tuple[_Kind, ...]:
    gpu = device == "cuda"
    classes = tuple((1, 300, count) for count in CLASS_SWEEP)
    sides = tuple((1, 2, side, side) for side in SIDE_SWEEP)
    distance_sizes = GPU_DISTANCE_SIZES if gpu else DISTANCE_SIZES
    return (
        _Kind("decode", GPU_DECODE_SIZES if gpu else DECODE_SIZES, _decoders, quick_sizes=2),
        _Kind("HausdorffERLoss forward + backward", EROSION_SIZES, _erosions, with_memory=True),
        _Kind("HausdorffDTLoss forward + backward", distance_sizes, _distances, with_memory=True),
        _Kind("distance_transform_edt", TRANSFORM_SIZES, _transforms),
        _Kind("decode in place, out of place, compiled", ((8, 300, 80),), _decode_trade_off, True, is_slow=True),
        _Kind(
            "erosion loss in place, out of place, compiled", ((4, 3, 128, 128),), _erosion_trade_off, True, is_slow=True
        ),
        _Kind("decode over Q x C", classes, _without_aten(_decoders), is_slow=True),
        _Kind("HausdorffDTLoss over the image side", sides, _without_aten(_distances), is_slow=True),
    )


def _without_aten(make: Callable[[Size, str], dict[str, Case]]) -> Callable[[Size, str], dict[str, Case]]:
    """Leave the plain form out of a sweep: how it grows is known, and long to wait for."""
    return lambda size, device: {name: case for name, case in make(size, device).items() if name != "detpost (aten)"}


def is_installed(*names: str) -> bool:
    """Whether all of these modules can be imported."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in names)
    except ModuleNotFoundError:  # of a parent package
        return False


@contextlib.contextmanager
def _forced(kernel: str) -> Iterator[None]:
    before = os.environ.get("DETPOST_KERNEL")
    os.environ.update(DETPOST_KERNEL=kernel)
    try:
        yield
    finally:
        os.environ.pop("DETPOST_KERNEL")
        os.environ.update({} if before is None else {"DETPOST_KERNEL": before})


def _with_kernel(kernel: str, case: Case) -> Case:
    def run(turn: int) -> Any:
        with _forced(kernel):
            return case(turn)

    return run


def _no_grad(case: Case) -> Case:
    def run(turn: int) -> Any:
        with torch.no_grad():
            return case(turn)

    return run


def _raw_outputs(size: Size, device: str) -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, queries, classes = size
    logits = [torch.randn(batch, queries, classes, generator=generator).to(device) for _ in range(ROTATED)]
    boxes = [torch.rand(batch, queries, 4, generator=generator).to(device) for _ in range(ROTATED)]
    return logits, boxes, torch.tensor([[480, 640]] * batch, device=device)


def _decoders(size: Size, device: str) -> dict[str, Case]:
    """Logits and boxes to scores, labels and pixel boxes, without gradients."""
    from detpost.postprocess import DetectionPostProcessor

    logits, boxes, sizes = _raw_outputs(size, device)
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=KEPT)
    own = _no_grad(lambda i: post(logits[i], boxes[i], sizes))
    contenders: dict[str, Case] = {"detpost": own, "detpost (aten)": _with_kernel("aten", own)}
    if device == "cpu":
        contenders |= {"detpost (numpy)": _with_kernel("numpy", own)}
    else:
        from detpost.export import CudaGraph

        graph = CudaGraph(post, (logits[0], boxes[0], sizes), clone=False)
        contenders |= {"detpost (CUDA graph)": _no_grad(lambda i: graph(logits[i], boxes[i], sizes))}
        read = CudaGraph(_Read(), (logits[0],), clone=False)
        contenders |= {"read of the logits (CUDA graph)": _no_grad(lambda i: read(logits[i]))}
    if is_installed("transformers"):
        from transformers import RTDetrImageProcessor

        processor = RTDetrImageProcessor()
        contenders |= {
            "transformers": _no_grad(
                lambda i: processor.post_process_object_detection(
                    SimpleNamespace(logits=logits[i], pred_boxes=boxes[i]), threshold=0.0, target_sizes=sizes
                )
            )
        }
    if is_installed("kornia"):
        from kornia.models.rt_detr.post_processor import DETRPostProcessor

        theirs = DETRPostProcessor(num_classes=size[2], num_top_queries=KEPT, confidence_filtering=False)
        contenders |= {"kornia": _no_grad(lambda i: theirs(logits[i], boxes[i], sizes))}
    if is_installed("rfdetr"):
        from rfdetr.models.postprocess import PostProcess

        rfdetr = PostProcess(num_select=KEPT)
        contenders |= {
            "RF-DETR": _no_grad(
                lambda i: rfdetr({"pred_logits": logits[i], "pred_boxes": boxes[i]}, target_sizes=sizes)
            )
        }
    if is_installed("tests.reference.rtdetr_inplace"):  # in a checkout: the in-place original, as RT-DETR has it
        from tests.reference.rtdetr_inplace import decode_

        contenders |= {"RT-DETR (in place)": _no_grad(lambda i: decode_(logits[i], boxes[i].clone(), sizes))}
    contenders |= {"read of the logits": _no_grad(lambda i: logits[i].amax())}
    return contenders


class _Read(torch.nn.Module):
    """The floor: what any decode has to do at the least."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.amax()


def _blobs(shape: Sequence[int], seed: int, device: str = "cpu") -> Tensor:
    """Smooth random fields within 0..1, which threshold to blobs as segmentation masks are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(shape[0], shape[1], *(max(2, side // 16) for side in shape[2:]), generator=generator)
    mode = "bilinear" if len(shape) == 4 else "trilinear"
    return torch.nn.functional.interpolate(coarse, tuple(shape[2:]), mode=mode).to(device)


def _backward(loss: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor], targets: list[Tensor]) -> Case:
    def run(turn: int) -> Any:
        prediction = inputs[turn].detach().requires_grad_()
        loss(prediction, targets[turn]).backward()  # type: ignore[no-untyped-call]
        return prediction.grad

    return run


def _class_inputs(shape: Size, device: str) -> tuple[list[Tensor], list[Tensor]]:
    inputs = [_blobs(shape, seed, device) for seed in range(ROTATED)]
    return inputs, [_blobs(shape, 100 + seed, device).argmax(dim=1, keepdim=True) for seed in range(ROTATED)]


def _erosions(shape: Size, device: str) -> dict[str, Case]:
    import detpost.losses

    name = "HausdorffERLoss" if len(shape) == 4 else "HausdorffERLoss3D"
    inputs, targets = _class_inputs(shape, device)
    own = _backward(getattr(detpost.losses, name)(), inputs, targets)
    contenders = {"detpost": own, "detpost (aten)": _with_kernel("aten", own)}
    if is_installed("kornia"):
        import kornia.losses

        contenders |= {"kornia": _backward(getattr(kornia.losses, name)().to(device), inputs, targets)}
    return contenders


def _distances(shape: Size, device: str) -> dict[str, Case]:
    import detpost.losses

    inputs = [_blobs(shape, seed, device) for seed in range(ROTATED)]
    targets = [(_blobs(shape, 100 + seed, device) > 0.5).float() for seed in range(ROTATED)]
    own = _backward(detpost.losses.HausdorffDTLoss(include_background=True), inputs, targets)
    contenders = {"detpost": own, "detpost (aten)": _with_kernel("aten", own)}
    if is_installed("monai", "scipy"):
        from monai.losses import HausdorffDTLoss

        contenders |= {"MONAI": _backward(HausdorffDTLoss(include_background=True), inputs, targets)}
    return contenders


def _transforms(shape: Size, device: str) -> dict[str, Case]:
    from detpost.losses import distance_transform_edt

    masks = [_blobs((1, 1, *shape), seed, device) > 0.4 for seed in range(ROTATED)]
    contenders: dict[str, Case] = {"detpost": _no_grad(lambda i: distance_transform_edt(masks[i]))}
    if is_installed("scipy"):
        from scipy import ndimage

        arrays = [mask[0, 0].cpu().numpy() for mask in masks]
        contenders |= {"scipy": lambda i: ndimage.distance_transform_edt(arrays[i])}
    return contenders


def _decode_trade_off(size: Size, device: str) -> dict[str, Case]:
    """The same decode written in place, out of place, and out of place and compiled."""
    from detpost.postprocess import DetectionPostProcessor

    logits, boxes, sizes = _raw_outputs(size, device)
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=KEPT)
    compiled = torch.compile(DetectionPostProcessor.from_preset("rtdetr", top_k=KEPT), fullgraph=True)
    own = _no_grad(lambda i: post(logits[i], boxes[i], sizes))
    contenders: dict[str, Case] = {
        "detpost": own,
        "detpost, out of place": _with_kernel("aten", own),
        "detpost, compiled": _with_kernel("aten", _no_grad(lambda i: compiled(logits[i], boxes[i], sizes))),
    }
    if is_installed("tests.reference.rtdetr_inplace"):
        from tests.reference.rtdetr_inplace import decode_

        contenders |= {"in place": _no_grad(lambda i: decode_(logits[i], boxes[i].clone(), sizes))}
    return contenders


def _erosion_trade_off(shape: Size, device: str) -> dict[str, Case]:
    """The same loss written in place, out of place, and out of place and compiled.

    The one in place is run forward alone: it writes over what its own backward needs.
    """
    from detpost.losses import HausdorffERLoss

    inputs, targets = _class_inputs(shape, device)
    loss = HausdorffERLoss()
    compiled = torch.compile(HausdorffERLoss(), fullgraph=True)
    own = _no_grad(lambda i: loss(inputs[i], targets[i]))
    contenders: dict[str, Case] = {
        "detpost": own,
        "detpost, out of place": _with_kernel("aten", own),
        "detpost, compiled": _with_kernel("aten", _no_grad(lambda i: compiled(inputs[i], targets[i]))),
    }
    if is_installed("tests.reference.hausdorff_er"):
        from tests.reference.hausdorff_er import hausdorff_er_in_place

        contenders |= {"in place": _no_grad(lambda i: hausdorff_er_in_place(inputs[i], targets[i]))}
    return contenders
