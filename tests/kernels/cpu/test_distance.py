"""The distance transform and its loss in C++, held to SciPy and to the plain PyTorch form."""

import pytest
import scipy.ndimage
import torch

from detpost.kernels.cpu import library
from detpost.losses import distance_transform_edt, hausdorff_dt_loss
from tests.kernels.cpu.gradients import value_and_gradients

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"the C++ kernels are {library.missing()}")


@pytest.fixture
def forced(monkeypatch):
    return lambda kind: monkeypatch.setenv("DETPOST_KERNEL", kind)


def test_operators_keep_their_contract_with_the_compiler():
    field = torch.rand(2, 3, 6, 7)
    test = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.detpost.native_distance, (field, [1.0, 1.0], True), test_utils=test)
    arguments = (field, torch.ones_like(field), [1.0, 0.5], 2.0, 2.0, 1e6, True)
    torch.library.opcheck(torch.ops.detpost.native_weighted_error, arguments, test_utils=test)


@pytest.mark.parametrize("shape", [(37, 53), (1, 70), (70, 1), (130, 16), (9, 20, 33), (1, 1, 5)])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("spacing", [None, (0.7, 2.0, 1.3)])
def test_distances_are_scipys(forced, shape, share, spacing):
    forced("native")
    mask = torch.rand(2, 2, *shape) < share
    steps = None if spacing is None else spacing[: len(shape)]
    found = distance_transform_edt(mask, steps)
    for image in range(2):
        for channel in range(2):
            expected = scipy.ndimage.distance_transform_edt(mask[image, channel].numpy(), sampling=steps)
            torch.testing.assert_close(
                found[image, channel], torch.from_numpy(expected).float(), rtol=1e-6 if steps else 2e-7, atol=1e-6
            )


@pytest.mark.parametrize("kind", ["one zero", "two far zeros", "stripe", "rising"])
def test_long_ways_to_the_nearest_zero(forced, kind):
    mask = torch.ones(1, 1, 700, 513, dtype=torch.bool)
    if kind == "one zero":
        mask[0, 0, 3, 500] = False
    elif kind == "two far zeros":
        mask[0, 0, 0, 0] = mask[0, 0, 699, 512] = False
    elif kind == "stripe":
        mask[0, 0, 350] = False
    else:
        mask = torch.arange(513)[None, None, None] > torch.arange(700)[None, None, :, None] * 0.01
    forced("native")
    expected = torch.from_numpy(scipy.ndimage.distance_transform_edt(mask[0, 0].numpy()))
    found = distance_transform_edt(mask)[0, 0].double()
    assert torch.equal(found.square().round(), expected.square().round())
    assert (found.square() - expected.square()).abs().max() < 0.1  # the square root alone rounds


@pytest.mark.parametrize("shape", [(2, 3, 30, 41), (1, 2, 9, 20, 11)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_the_distance_loss_is_the_plain_one(forced, shape, share):
    pred, target = torch.rand(shape), (torch.rand(shape) < share).float()
    found = {}
    for kind in ("aten", "native"):
        forced(kind)
        options = {"include_background": True, "spacing": (2.0, 0.5, 1.0)[: len(shape) - 2]}
        for name, given in {"": {}, "sigmoid": {"sigmoid": True}, "alpha": {"alpha": 1.5, "batch": True}}.items():
            prediction = (pred - 0.5) * 4 if name == "sigmoid" else pred * share * 2
            for reduction in ("mean", "none"):
                case = {**options, **given, "reduction": reduction}
                found[kind, name, reduction] = value_and_gradients(hausdorff_dt_loss, prediction, target, **case)
    assert len(found) == 12
    for (_, *case), value in found.items():
        torch.testing.assert_close(value, found["aten", *case], rtol=1e-5, atol=1e-7, msg=lambda m, c=case: f"{c}: {m}")


def test_a_target_with_a_gradient_and_second_gradients_go_the_plain_way(forced):
    pred, target = torch.randn(1, 2, 8, 8), torch.rand(1, 2, 8, 8)

    def slopes(kind):
        forced(kind)
        given, truth = pred.clone().requires_grad_(), target.clone().requires_grad_()
        loss = hausdorff_dt_loss(given, truth, sigmoid=True, include_background=True)
        first = torch.autograd.grad(loss, (given, truth))
        loss = hausdorff_dt_loss(given, target, sigmoid=True, include_background=True)
        (again,) = torch.autograd.grad(loss, given, create_graph=True)
        return (*first, torch.autograd.grad(again.square().sum(), given)[0])

    expected = slopes("aten")
    assert all(part.abs().max() > 0 for part in expected)
    torch.testing.assert_close(slopes("native"), expected)
