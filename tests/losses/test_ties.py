"""Elements that tie for a field's extreme share its gradient, whatever rounds how: held to exact arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from detpost.kernels.cpu import library
from tests.losses.exact_cases import ALPHA_AND_K, SIDES, case, hold, loss_of, value_and_gradient
from tests.losses.fields import example
from tests.reference.exact_erosion import WEIGHTS, exact_erosions

needs_native = pytest.mark.skipif(library.missing() is not None, reason=f"the C++ kernels are {library.missing()}")


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("aten", torch.float64), ("aten", torch.float32), pytest.param("native", torch.float32, marks=needs_native)],
    ids=["double", "plain", "native"],
)
def test_values_and_gradients_are_the_exact_ones(kernel, dtype, sides, monkeypatch):
    monkeypatch.setenv("DETPOST_KERNEL", kernel)
    hold(*value_and_gradient(loss_of(sides), case(sides), dtype), case(sides))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sides", [(8, 9), (5, 4, 5)], ids=str)
def test_the_form_with_every_derivative_has_the_exact_first_one(sides, dtype):
    """Functorch's transforms take it; forward and backward, against the same gradient."""
    given, loss = case(sides), loss_of(sides)
    value, pull = torch.func.vjp(lambda pred: loss(pred, given.target), given.pred.to(dtype))
    (gradient,) = pull(given.cotangent.to(dtype))
    hold(value, gradient, given)
    direction = torch.randn(given.pred.shape, dtype=dtype)
    _, change = torch.func.jvp(lambda pred: loss(pred, given.target), (given.pred.to(dtype),), (direction,))
    along = (change * given.cotangent).sum((2, *range(3, change.dim()))).T  # (B, 2)
    expected = (gradient * direction).sum(tuple(range(2, direction.dim())))
    scale = gradient.abs().amax(tuple(range(2, direction.dim()))) * direction[0, 0].numel() + 1
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(along / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.slow  # one or two minutes each for PyTorch's operators: a plane in one precision, a volume in the other
@pytest.mark.parametrize(
    ("kernel", "dtype", "sides"),
    [
        ("aten", torch.float64, (8, 9)),
        ("aten", torch.float32, (5, 4, 5)),
        pytest.param("native", torch.float32, (8, 9), marks=needs_native),
        pytest.param("native", torch.float32, (5, 4, 5), marks=needs_native),
    ],
    ids=["double", "plain volume", "native", "native volume"],
)
def test_compiled_values_and_gradients_are_the_exact_ones(kernel, dtype, sides, monkeypatch):
    monkeypatch.setenv("DETPOST_KERNEL", kernel)
    torch._dynamo.reset()
    compiled = torch.compile(loss_of(sides), fullgraph=True)
    hold(*value_and_gradient(compiled, case(sides), dtype), case(sides))


@needs_native
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.slow
def test_every_level_of_instructions_gives_the_exact_gradient(level, tmp_path):
    """A level that the processor has not is the next lower one."""
    given = case((8, 9))
    torch.save(given[:3], tmp_path / "given.pt")
    code = f"""
import torch
from detpost.losses import hausdorff_er_loss
pred, target, cotangent = torch.load({str(tmp_path / "given.pt")!r})
leaf = pred.requires_grad_()
value = hausdorff_er_loss(leaf, target, {ALPHA_AND_K[8, 9][0]}, {ALPHA_AND_K[8, 9][1]}, "none")
torch.save((value.detach(), *torch.autograd.grad(value, leaf, cotangent)), {str(tmp_path / "found.pt")!r})
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"DETPOST_NATIVE": level, "DETPOST_KERNEL": "native"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    hold(*torch.load(tmp_path / "found.pt"), given)


def orders(axes: int) -> dict[str, tuple[list[int], bool]]:
    """The taps in which a sum may come, the element itself in the middle, and whether multiply-adds are fused."""
    memory = list(range(2 * axes + 1))
    outward = [axes, *memory[:axes], *memory[axes + 1 :]]
    pairs = [tap for axis in range(axes) for tap in (axis, 2 * axes - axis)] + [axes]
    return {
        "fused": (memory, True),
        "not fused": (memory, False),
        "backwards": (memory[::-1], True),
        "outward": (outward, False),
        "in pairs": (pairs, False),
    }


def dilated(field: np.ndarray, order: list[int], fused: bool) -> np.ndarray:
    """Dilate in float32."""
    padded, axes, weight = np.pad(field, 1), field.ndim, np.float32(float(WEIGHTS[field.ndim]))
    inner = [slice(1, -1)] * axes

    def tap(number: int) -> np.ndarray:
        place = list(inner)
        if number < axes:
            place[number] = slice(0, -2)
        elif number > axes:
            place[2 * axes - number] = slice(2, None)
        return padded[tuple(place)]

    total = tap(order[0]) * weight
    for number in order[1:]:
        if fused:  # exact in float64, then rounded once
            total = (total.astype(np.float64) + tap(number).astype(np.float64) * float(weight)).astype(np.float32)
        else:
            total = total + tap(number) * weight
    return total


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hard blobs", "equal", "quantised", "thick", "round"])
@pytest.mark.parametrize("sides", [(22, 19), (9, 10, 9)], ids=str)
def test_rounding_tears_no_tie_farther_apart_than_what_counts_as_one(kind, sides):
    """However a sum is ordered, over 16 erosions: at most a third of what is allowed, so that there is room."""
    worst = 0.0
    for _ in range(2):
        pred, target = example(kind, sides, torch.float32, batch=1, classes=2)
        truth = (target[0, 0] == 0).float()
        erosions = exact_erosions(pred[0, 0].numpy(), truth.numpy(), 16, torch.finfo(torch.float32).eps)
        for order, fused in orders(len(sides)).values():
            field = (pred[0, 0] - truth).square().numpy()
            for erosion in erosions:
                if erosion.extent == 0:
                    break
                dilation = dilated(field, order, fused)
                tied = dilation[(erosion.dilation == erosion.dilation.max()).astype(bool)]
                worst = max(worst, float(dilation.max() - tied.min()) / float(erosion.slack))
                lower = max(dilation.min(), np.float32(0.5))
                field = (np.maximum(dilation, lower) - lower) / (dilation.max() - lower)
    assert worst < 1 / 3
