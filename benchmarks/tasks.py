"""What the benchmark times: one table of tasks, their sizes and who takes part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from benchmarks import decode, heads, losses
from benchmarks.inputs import Case, Size

__all__ = ["Task", "task_of", "tasks"]

Make = Callable[[Size, str], dict[str, Case]]

# Images, queries, classes.
DECODE_SIZES: tuple[Size, ...] = (
    (1, 300, 80),
    (8, 300, 80),
    (1, 300, 365),
    (1, 300, 1203),
    (8, 300, 1203),
    (1, 1750, 34),
)
LIST_SIZES: tuple[Size, ...] = ((1, 300, 80), (8, 300, 80), (1, 300, 365), (8, 300, 1203))
SOFTMAX_SIZES: tuple[Size, ...] = ((1, 100, 92), (8, 100, 92), (1, 300, 92), (8, 300, 1204))
GPU_DECODE_SIZES: tuple[Size, ...] = ((1, 300, 80), (32, 300, 80), (8, 300, 1203))
# Images, boxes, classes.
SUPPRESSION_SIZES: tuple[Size, ...] = tuple(
    (images, boxes, classes) for classes in (1, 80) for images, boxes in ((1, 300), (8, 300), (1, 1000), (1, 5000))
)
# Slots, side of a mask's logits, height and width of the image.
MASK_SIZES: tuple[Size, ...] = ((300, 96, 1080, 1920),)
EROSION_SIZES: tuple[Size, ...] = ((4, 3, 128, 128), (4, 2, 256, 256), (1, 2, 64, 64, 64))
DISTANCE_SIZES: tuple[Size, ...] = ((1, 2, 128, 128), (1, 2, 256, 256), (1, 2, 512, 512), (1, 2, 64, 64, 64))
GPU_DISTANCE_SIZES: tuple[Size, ...] = ((4, 3, 256, 256), (1, 2, 64, 64, 64))
SURFACE_SIZES: tuple[Size, ...] = ((1, 1, 512, 512), (1, 1, 128, 128, 128), (1, 1, 256, 256, 256))
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
    make: Make
    with_memory: bool = False
    quick_sizes: int = 1
    is_slow: bool = False


def _kinds(device: str) -> tuple[_Kind, ...]:
    gpu = device == "cuda"
    distance_sizes = GPU_DISTANCE_SIZES if gpu else DISTANCE_SIZES
    shared = (
        _Kind("decode", GPU_DECODE_SIZES if gpu else DECODE_SIZES, decode.padded, quick_sizes=2),
        _Kind("HausdorffERLoss forward + backward", EROSION_SIZES, losses.erosions, with_memory=True),
        _Kind("HausdorffDTLoss forward + backward", distance_sizes, losses.distances, with_memory=True),
        _Kind("distance_transform_edt", TRANSFORM_SIZES, losses.transforms),
        _Kind("distance_transform_edt, noise", ((96, 96, 96),), losses.transforms_of_noise),
    )
    return shared if gpu else (*shared, *_on_the_cpu())


def _on_the_cpu() -> tuple[_Kind, ...]:
    drop_ins = {
        "transformers, sigmoid": LIST_SIZES,
        "transformers, softmax": SOFTMAX_SIZES,
        "transformers, softmax, low threshold": SOFTMAX_SIZES,
        "kornia": LIST_SIZES,
        "RT-DETR": LIST_SIZES,
        "RF-DETR": LIST_SIZES[:2],
        "Ultralytics": LIST_SIZES[:2],
    }
    classes = tuple((1, 300, count) for count in CLASS_SWEEP)
    sides = tuple((1, 2, side, side) for side in SIDE_SWEEP)
    return (
        _Kind("raw outputs to lists, sigmoid", LIST_SIZES, decode.to_lists),
        _Kind("raw outputs to lists, softmax", SOFTMAX_SIZES, decode.softmax_lists),
        *(_Kind(f"drop-in: {name}", sizes, decode.drop_in(name)) for name, sizes in drop_ins.items()),
        _Kind("decode of one image, warm and cold", ((1, 300, 80),), decode.cold),
        _Kind("decode with gradient, forward + backward", ((8, 300, 80),), decode.gradient),
        _Kind("nms", SUPPRESSION_SIZES, heads.suppression),
        _Kind("masks", MASK_SIZES, heads.masks, is_slow=True),
        _Kind("run lengths", MASK_SIZES, heads.run_lengths, is_slow=True),
        _Kind("Hausdorff distance, 95th percentile", SURFACE_SIZES, losses.hausdorff_95),
        _Kind("surface Dice", SURFACE_SIZES, losses.surface_dices),
        _Kind("decode in place, out of place, compiled", ((8, 300, 80),), decode.trade_off, True, is_slow=True),
        _Kind(
            "erosion loss in place, out of place, compiled", ((4, 3, 128, 128),), losses.trade_off, True, is_slow=True
        ),
        _Kind("decode over Q x C", classes, _without_aten(decode.padded), is_slow=True),
        _Kind("HausdorffDTLoss over the image side", sides, _without_aten(losses.distances), is_slow=True),
    )


def _without_aten(make: Make) -> Make:
    """Leave the plain form out of a sweep: how it grows is known, and long to wait for."""
    return lambda size, device: {name: case for name, case in make(size, device).items() if name != "detpost (aten)"}
