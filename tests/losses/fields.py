"""Predictions and targets for the erosion losses, many of them full of ties for a field's extremes."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = [
    "random",
    "soft blobs",
    "hard blobs",
    "background only",
    "equal",
    "quantised",
    "not probabilities",
    "thick",
    "round",
]


def blobs(batch: int, classes: int, sides: tuple[int, ...]) -> Tensor:
    """One box per class and image, later classes over earlier ones: (B, 1, *sides) ids."""
    ids = torch.zeros(batch, 1, *sides, dtype=torch.long)
    for image in range(batch):
        for label in range(1, classes):
            starts = [int(torch.randint(0, side // 2 + 1, ())) for side in sides]
            stops = [int(torch.randint(side // 2, side + 1, ())) for side in sides]
            ids[(image, 0, *map(slice, starts, stops))] = label
    return ids


def balls(batch: int, classes: int, sides: tuple[int, ...]) -> Tensor:
    """A ball in the middle of each image, alike in every direction, all of one class: (B, 1, *sides) ids."""
    axes = [torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1) for side in sides]
    distance = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0)
    radius = torch.rand(batch, 1, *[1] * len(sides)) * 0.5 + 0.7
    return (distance < radius.square()).long() * (classes - 1)


def one_hot(ids: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(ids[:, 0], classes).movedim(-1, 1)


def example(
    kind: str, sides: tuple[int, ...], dtype: torch.dtype, batch: int = 2, classes: int = 3
) -> tuple[Tensor, Tensor]:
    """A prediction (B, C, *sides) and class ids (B, 1, *sides)."""
    pred, target = torch.rand(batch, classes, *sides, dtype=dtype), blobs(batch, classes, sides)
    if kind == "soft blobs":
        return (one_hot(blobs(batch, classes, sides), classes) * 4 + pred).softmax(1), target
    if kind == "hard blobs":
        return one_hot(blobs(batch, classes, sides), classes).to(dtype), target
    if kind == "background only":
        return pred, torch.zeros_like(target)
    if kind == "equal":
        return torch.full_like(pred, 0.9), torch.zeros_like(target)
    if kind == "quantised":  # puts dilations exactly on the threshold
        return torch.randint(0, 3, pred.shape).to(dtype) * 0.5, target
    if kind == "thick":  # errors of a few levels nearly everywhere, which last
        return 1 - torch.randint(0, 2, pred.shape).to(dtype) * 0.125, torch.zeros_like(target)
    if kind == "round":
        return one_hot(balls(batch, classes, sides), classes).to(dtype), torch.zeros_like(target)
    return (pred * 20, target) if kind == "not probabilities" else (pred, target)
