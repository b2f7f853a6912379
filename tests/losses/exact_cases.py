"""Fields of every kind, and what is exactly right for them: values, and gradients that tied elements share."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detpost.losses import hausdorff_er_loss, hausdorff_er_loss_3d
from tests.losses.fields import KINDS, example
from tests.reference.exact_erosion import exact_erosion

SIDES = [(8, 9), (5, 6), (1, 7), (13, 12), (5, 4, 5), (6, 6, 6)]
# With each shape, another power and number of erosions.
ALPHA_AND_K = dict(zip(SIDES, [(2.0, 10), (2.0, 10), (1.0, 3), (0.5, 10), (2.0, 10), (2.0, 7)], strict=True))


class Case(NamedTuple):
    """Fields of every kind with one shape, and what is exactly right for them."""

    pred: Tensor  # (B, 2, *sides), float32: the same numbers in float64
    target: Tensor
    cotangent: Tensor  # (2, B, 1, *sides)
    field: Tensor  # float64, as the loss has it without a reduction, with every difference told apart
    gradient: Tensor
    tied_field: Tensor  # with what float32 cannot tell apart taken as equal
    tied_gradient: Tensor
    is_clear: Tensor  # (B, 2): whether no difference is near the edge of that


@functools.cache
def case(sides: tuple[int, ...]) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(sum(sides))
        pairs = [example(kind, sides, torch.float32, batch=1, classes=2) for kind in KINDS]
        pred, target = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        cotangent = torch.randint(1, 5, (2, len(pred), 1, *sides)) / 4.0
    alpha, k = ALPHA_AND_K[sides]
    weights = [float(i + 1) ** alpha for i in range(k)]
    found = torch.empty(4, *pred.shape, dtype=torch.float64)
    clear = torch.empty(pred.shape[:2], dtype=torch.bool)
    for image in range(len(pred)):
        for label in range(2):
            given = (
                pred[image, label].numpy(),
                (target[image, 0] == label).numpy(),
                weights,
                cotangent[label, image, 0].numpy(),
            )
            exact, tied = exact_erosion(*given), exact_erosion(*given, eps=torch.finfo(torch.float32).eps)
            parts = (exact.field, exact.gradient, tied.field, tied.gradient)
            found[:, image, label] = torch.from_numpy(np.stack(parts).astype(np.float64))
            clear[image, label] = tied.clearance > 2
    field, gradient, tied_field, tied_gradient = found
    as_lost = functools.partial(lambda value: value.transpose(0, 1).unsqueeze(2))
    return Case(pred, target, cotangent, as_lost(field), gradient, as_lost(tied_field), tied_gradient, clear)


def loss_of(sides: tuple[int, ...]):
    alpha, k = ALPHA_AND_K[sides]
    loss = hausdorff_er_loss if len(sides) == 2 else hausdorff_er_loss_3d
    return lambda pred, target: loss(pred, target, alpha, k, "none")


def value_and_gradient(loss, given: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    leaf = given.pred.to(dtype).requires_grad_()
    value = loss(leaf, given.target)
    return value.detach(), torch.autograd.grad(value, leaf, given.cotangent.to(dtype))[0]


def hold(value: Tensor, gradient: Tensor, given: Case) -> None:
    """Compare with what is right for the precision, field by field: each has a scale of its own."""
    double = value.dtype == torch.float64
    expected, slopes = (given.field, given.gradient) if double else (given.tied_field, given.tied_gradient)
    tolerance = 1e-9 if double else 2e-4
    clear = torch.ones_like(given.is_clear) if double else given.is_clear
    assert clear.float().mean() > 0.8, "too few fields are compared"
    for image, label in clear.nonzero().tolist():
        at = f"{KINDS[image % len(KINDS)]}, class {label}: "
        torch.testing.assert_close(
            value[label, image].double(),
            expected[label, image],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, at=at: at + text,
        )
        scale = max(1.0, float(slopes[image, label].abs().max()))
        torch.testing.assert_close(
            gradient[image, label].double() / scale,
            slopes[image, label] / scale,
            rtol=0,
            atol=tolerance,
            msg=lambda text, at=at: at + text,
        )
