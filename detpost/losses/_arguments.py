"""Checks of the arguments that the losses share: each failure is one line with what came and the way out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from detpost import kernels

REDUCTIONS = ("mean", "sum", "none")
# Side lengths of an element: one number, one per spatial axis, or a sequence of these for each image.
Spacing: TypeAlias = float | Sequence[float] | Sequence[Sequence[float]]


class ShapeMismatchError(ValueError, AssertionError):
    """Shapes that do not belong together; an ``AssertionError`` too, as MONAI raises it."""


def check_reduction(reduction: str) -> None:
    """Refuse a reduction that no loss here knows."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of 'mean', 'sum', 'none'; got {reduction!r}")


def check_floating(name: str, value: Tensor) -> None:
    """Refuse a prediction that cannot carry a gradient."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}: convert it with torch.as_tensor")
    if not value.is_floating_point():
        raise ValueError(f"{name} must have a floating dtype; got {value.dtype}: pass {name}.float()")
    if value.numel() == 0:
        raise ValueError(f"{name} must hold at least one element; got shape {tuple(value.shape)}")


def class_numbers(ids: Tensor, num_classes: int) -> Tensor:
    """Return 0 ... num_classes - 1 as (C,) int64 on the ids' device, and refuse ids outside that range.

    The test reads values without breaking ``torch.compile``: it is one opaque operator, whose result (always 0) is
    added to the numbers so that no compiler may drop it. On the CPU it raises a ``ValueError`` that shows the ids. On
    an accelerator it is an asynchronous device-side assertion, as ``cross_entropy`` has it, without synchronisation. An
    exported graph leaves it out (ONNX has no assertion); there an id out of range belongs to no class.
    """
    numbers = torch.arange(num_classes, device=ids.device)
    if kernels.writes_graph():
        return numbers
    nothing: Tensor = _refuse_ids_out_of_range(ids, num_classes)
    return numbers + nothing


@torch.library.custom_op("detpost::refuse_ids_out_of_range", mutates_args=())
def _refuse_ids_out_of_range(ids: Tensor, num_classes: int) -> Tensor:
    expected = f"target must hold class ids in [0, {num_classes})"
    fix = "map ignored elements to a class, or give pred one channel per class"
    if ids.device.type == "cpu":
        lowest, highest = kernels.id_range(ids)
        if lowest < 0 or highest >= num_classes:
            raise ValueError(f"{expected}; got ids from {lowest} to {highest}: {fix}")
    else:
        in_range = (ids.amin() >= 0) & (ids.amax() < num_classes)
        torch._assert_async(in_range, f"{expected}; got an id outside it: {fix}")
    return torch.zeros((), dtype=torch.int64, device=ids.device)


@_refuse_ids_out_of_range.register_fake
def _(ids: Tensor, num_classes: int) -> Tensor:
    return ids.new_zeros((), dtype=torch.int64)


def spacing_per_axis(spacing: float | Sequence[float] | None, axes: int) -> tuple[float, ...]:
    """Read ``spacing`` as one positive number per spatial axis."""
    if spacing is None:
        return (1.0,) * axes
    steps = (float(spacing),) * axes if isinstance(spacing, int | float) else tuple(float(step) for step in spacing)
    if len(steps) != axes:
        raise ValueError(f"spacing must be one number or one per spatial axis ({axes}); got {len(steps)}: {steps}")
    if not all(math.isfinite(step) and step > 0 for step in steps):
        raise ValueError(f"spacing must be positive and finite; got {steps}: pass the voxel's side lengths")
    return steps


def spacings(spacing: Spacing | None, images: int, axes: int) -> tuple[tuple[float, ...], ...]:
    """Read ``spacing`` as one positive number per spatial axis: once for all images, or for each where they differ."""
    given: Any = _listed(spacing)
    if not isinstance(given, list | tuple) or not any(isinstance(_listed(part), list | tuple) for part in given):
        return (spacing_per_axis(given, axes),)
    if len(given) != images:
        raise ValueError(f"spacing must hold one sequence for each image ({images}); got {len(given)}")
    each = tuple(spacing_per_axis(_listed(part), axes) for part in given)
    return each[:1] if len(set(each)) == 1 else each


def _listed(value: Any) -> Any:
    """Turn what an array or a tensor holds into lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def by_image(function: Callable[..., Tensor], each: tuple[tuple[float, ...], ...], *batches: Tensor) -> Tensor:
    """Call ``function(*batches, spacing)``, image by image where these have spacings of their own."""
    if len(each) == 1:
        return function(*batches, each[0])
    parts = [function(*(batch[i : i + 1] for batch in batches), spacing) for i, spacing in enumerate(each)]
    return torch.cat(parts)
