from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from detpost.kernels.aten import losses as plain
from detpost.kernels.triton import erosion as triton_erosion
from detpost.kernels.triton.erosion import erode, erosion_gradient, takes
from tests.kernels.triton.harness import (
    INTERPRETED,
    _plain_references,  # noqa: F401
    assert_compiles,
    assert_passes_interpreted,
    assert_plain,
    compiled_whole,
    in_the_ordinary_process,
    on_each_device,
    replayed,
    written_arguments,
)
from tests.losses.exact_cases import ALPHA_AND_K, case
from tests.losses.exact_cases import hold as hold_to_exact
from tests.losses.fields import KINDS, example

WEIGHTS = [1.0, 4.0, 9.0]


def ours(pred, target, weights, keep_field, grad=None):
    """The sum, the dilations, and the gradient for a given or a random gradient of the sum."""
    classes = torch.arange(pred.shape[1], device=pred.device)
    total, dilations, limits = erode(pred, target, classes, weights, keep_field)
    grad = torch.rand(total.shape).to(pred.device) if grad is None else grad
    gradient = erosion_gradient(grad, pred, target, classes, weights, dilations, limits)
    return total, dilations, grad, gradient


def hold(pred, target, keep_field, device, weights=WEIGHTS, grad=None):
    assert takes(pred.to(device), target.to(device))
    total, dilations, grad, gradient = (
        value.cpu() for value in ours(pred.to(device), target.to(device), weights, keep_field, grad)
    )
    leaf = pred.clone().requires_grad_()
    classes = torch.arange(pred.shape[1])
    outputs = plain._Erosion.apply(leaf, target, classes, weights, pred.ndim - 2, keep_field)
    (expected,) = torch.autograd.grad(outputs[0], leaf, grad)
    assert total.shape == outputs[0].shape
    torch.testing.assert_close(total, outputs[0].detach(), rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(
        dilations, torch.stack(outputs[1 : 1 + len(weights)]), rtol=1e-5, atol=1e-5, equal_nan=True
    )
    finite = expected.nan_to_num()
    scale = max(1.0, float(finite.abs().max()))
    torch.testing.assert_close(gradient / scale, expected / scale, rtol=1e-5, atol=1e-5, equal_nan=True)


def small(kind, sides):
    pred, target = example(kind, sides, torch.float32)
    return (pred[:1, :2], target[:1]) if INTERPRETED else (pred, target)


@on_each_device
def test_the_reference_is_no_kernel(device):
    pred, target = (value.to(device) for value in small("random", (4, 5)))
    assert_plain(plain._Erosion.apply, pred, target, torch.arange(pred.shape[1], device=device), WEIGHTS, 2, False)


@in_the_ordinary_process
@pytest.mark.slow
def test_everything_under_the_interpreter():
    assert_passes_interpreted(__file__, at_least=21)


@on_each_device
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_the_plain_ones(kind, device):
    """Among the kinds are fields full of ties for the extremes, whose gradient is shared."""
    hold(*small(kind, (6, 7)), KINDS.index(kind) % 2 == 0, device)


@on_each_device
@pytest.mark.parametrize("sides", [(5, 6), (5, 4, 5)], ids=str)
def test_values_and_gradients_are_the_exact_ones(sides, device):
    """In exact arithmetic; elements that tie for an extreme up to rounding share its gradient."""
    given = case(sides)
    alpha, k = ALPHA_AND_K[sides]
    handed_out = given.cotangent.squeeze(2).transpose(0, 1).contiguous().to(device)
    weights = [float(i + 1) ** alpha for i in range(k)]
    total, _, _, gradient = ours(given.pred.to(device), given.target.to(device), weights, True, handed_out)
    hold_to_exact(total.cpu().transpose(0, 1).unsqueeze(2), gradient.cpu(), given)


@on_each_device
@pytest.mark.parametrize("sides", [(1, 1), (1, 7), (7, 1), (2, 3, 4), (1, 3, 1)], ids=str)
def test_every_border_and_rank(sides, device):
    hold(*small("random", sides), len(sides) == 3, device)


@on_each_device
def test_fields_shared_by_programs_of_several_blocks(device, monkeypatch):
    monkeypatch.setattr(triton_erosion, "_MAX_PROGRAMS", 2)
    pred, target = small("soft blobs", (37, 41))  # three blocks for two programs
    hold(pred[:, :1], target, False, device, weights=[1.0, 4.0])
    hold(pred[:, :1], target, True, device, weights=[2.0])


@on_each_device
def test_any_strides_and_id_dtypes(device):
    pred, target = small("hard blobs", (5, 4))
    hold(pred.transpose(2, 3), target.transpose(2, 3).to(torch.uint8), False, device, weights=[1.0])


@on_each_device
def test_huge_predictions_stay_finite_and_what_is_not_finite_is_seen(device):
    pred, target = small("random", (3, 4))
    hold(torch.where(pred < 0.3, -3e38, pred), target, False, device)
    hold(torch.where(pred < 0.3, math.nan, pred), target, False, device)
    for grad in (math.inf, math.nan):
        _, _, _, gradient = ours(
            pred.to(device), target.to(device), [1.0], False, torch.full((*pred.shape[:2], 1, 1), grad, device=device)
        )
        assert gradient.isnan().all()


@on_each_device
def test_compiles_whole(device):
    pred, target = (value.to(device) for value in small("random", (4, 5)))
    grad = torch.rand(*pred.shape[:2], 1, 1, device=device)
    expected = ours(pred * 2, target, [1.0], False, grad)
    actual = compiled_whole(lambda *raw: ours(raw[0] * 2, raw[1], [1.0], False, raw[2]))(pred, target, grad)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@on_each_device
def test_what_is_not_taken_is_said(device):
    pred, target = torch.zeros(1, 2, 3, 4, device=device), torch.zeros(1, 1, 3, 4, dtype=torch.long, device=device)
    assert takes(pred, target)
    assert not takes(pred.double(), target)
    assert not takes(pred.half(), target)
    assert not takes(pred[0], target)
    assert not takes(pred[:0], target)
    assert not takes(pred[:, :1].expand(1, 65536, 3, 4), target)
    assert not takes(pred.to("meta"), target.to("meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("sides", [(256, 256), (64, 64, 64)], ids=str)
def test_real_sizes_on_a_gpu(sides):
    for kind in ("random", "soft blobs", "hard blobs"):
        pred, target = example(kind, sides, torch.float32)
        hold(pred, target, False, "cuda", weights=[float(i + 1) ** 2 for i in range(10)])


@pytest.mark.gpu
def test_replays_from_a_cuda_graph():
    pred, target = (value.cuda() for value in example("random", (50, 60), torch.float32))
    grad = torch.rand(*pred.shape[:2], 1, 1, device="cuda")
    expected = ours(pred, target, WEIGHTS, False, grad)
    actual = replayed(lambda *raw: ours(raw[0], raw[1], WEIGHTS, False, raw[2]), pred, target, grad)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@in_the_ordinary_process
def test_one_launch_per_erosion_which_a_compiler_sees_leave_its_inputs_alone(monkeypatch):
    pred, ids = torch.empty(1, 2, 8, 9, device="meta"), torch.empty(1, 1, 8, 9, dtype=torch.long, device="meta")
    grad = torch.empty(1, 2, 1, 1, device="meta")
    forward = ["next_greatest_ptr", "next_least_ptr", "out_ptr"]
    summed = ["limits_ptr", *forward, "sums_ptr"]
    backward = ["next_parts_ptr", "out_ptr"]
    assert written_arguments(
        lambda *raw: ours(raw[0], raw[1], WEIGHTS, False, raw[2]), [pred, ids, grad], monkeypatch
    ) == [forward, summed, summed, ["limits_ptr", "sums_ptr"], backward, backward, backward, ["out_ptr"]]


@in_the_ordinary_process
@pytest.mark.parametrize("axes", [2, 3])
def test_compiles_for_a_gpu(axes, tmp_path, monkeypatch):
    field, sides = "*fp32", ["i32"] * 8
    shared = {"AXES": axes, "PROGRAMS": 64, "BLOCK": triton_erosion._BLOCK}
    types = [field, "*i64", "*i64", field, "*i32", *[field] * 4, "*i32", field, "fp32", *sides]
    for first, starts, ends, keep in ((1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 0, 0), (0, 0, 1, 1)):
        flags = {"FIRST": bool(first), "STARTS": bool(starts), "ENDS": bool(ends), "KEEP": bool(keep)}
        assert_compiles(triton_erosion._erode_kernel, types, flags | shared, 4, tmp_path, monkeypatch)
    types = [field, field, field, field, "*u8", "*i64", *[field] * 7, "fp32", *sides]
    for starts, ends, is_field in ((1, 0, 1), (0, 0, 0), (0, 1, 0)):
        flags = {"STARTS": bool(starts), "ENDS": bool(ends), "IS_FIELD": bool(is_field)}
        assert_compiles(triton_erosion._gradient_kernel, types, flags | shared, 4, tmp_path, monkeypatch)
