"""Inputs that take turns, and what a contender's call is wrapped in."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ROTATED",
    "Case",
    "Size",
    "backward",
    "blobs",
    "forced",
    "is_installed",
    "no_grad",
    "raw_outputs",
    "with_kernel",
]

Size = tuple[int, ...]
Case = Callable[[int], Any]

ROTATED = 8  # inputs that take turns, so that no branch predictor or cache learns one of them


def is_installed(*names: str) -> bool:
    """Tell whether all of these modules can be imported."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in names)
    except ModuleNotFoundError:  # of a parent package
        return False


@contextlib.contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Force one form of the kernels."""
    before = os.environ.get("DETPOST_KERNEL")
    os.environ.update(DETPOST_KERNEL=kernel)
    try:
        yield
    finally:
        os.environ.pop("DETPOST_KERNEL")
        os.environ.update({} if before is None else {"DETPOST_KERNEL": before})


def with_kernel(kernel: str, case: Case) -> Case:
    """Run a case with one form of the kernels."""

    def run(turn: int) -> Any:
        with forced(kernel):
            return case(turn)

    return run


def no_grad(case: Case) -> Case:
    """Run a case without gradients."""

    def run(turn: int) -> Any:
        with torch.no_grad():
            return case(turn)

    return run


def raw_outputs(size: Size, device: str = "cpu") -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Make logits (B, Q, C), boxes (B, Q, 4) in cxcywh, one of each per turn, and image sizes (B, 2)."""
    generator = torch.Generator().manual_seed(0)
    batch, queries, classes = size
    logits = [torch.randn(batch, queries, classes, generator=generator).to(device) for _ in range(ROTATED)]
    boxes = [torch.rand(batch, queries, 4, generator=generator).to(device) for _ in range(ROTATED)]
    return logits, boxes, torch.tensor([[480, 640]] * batch, device=device)


def blobs(shape: Sequence[int], seed: int, device: str = "cpu") -> Tensor:
    """Make smooth random fields within 0..1, which threshold to blobs as segmentation masks are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(shape[0], shape[1], *(max(2, side // 16) for side in shape[2:]), generator=generator)
    mode = "bilinear" if len(shape) == 4 else "trilinear"
    return torch.nn.functional.interpolate(coarse, tuple(shape[2:]), mode=mode).to(device)


def backward(loss: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor], targets: list[Tensor]) -> Case:
    """Make a case that goes forward and back."""

    def run(turn: int) -> Any:
        prediction = inputs[turn].detach().requires_grad_()
        loss(prediction, targets[turn]).backward()  # type: ignore[no-untyped-call]
        return prediction.grad

    return run
