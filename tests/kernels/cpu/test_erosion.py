"""The erosion loss in C++, held to the plain PyTorch form."""

import pytest
import torch

from detpost.kernels.cpu import library
from detpost.losses import hausdorff_er_loss, hausdorff_er_loss_3d
from tests.kernels.cpu.gradients import value_and_gradients

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"the C++ kernels are {library.missing()}")


@pytest.fixture
def forced(monkeypatch):
    return lambda kind: monkeypatch.setenv("DETPOST_KERNEL", kind)


def test_operators_keep_their_contract_with_the_compiler():
    field = torch.rand(2, 3, 6, 7)
    test = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.detpost.native_scaled, (field, torch.rand(2, 3, 1, 1)), test_utils=test)
    for keep, want in ((True, False), (False, True), (False, False)):
        arguments = (field, torch.randint(3, (2, 1, 6, 7)), torch.arange(3), [1.0, 4.0], 0.2, 2, None, keep, want)
        torch.library.opcheck(torch.ops.detpost.native_erosion, arguments, test_utils=test)


def blobs(*shape):
    """Probabilities with thick and thin errors, flat regions and shared extremes."""
    coarse = torch.rand(*shape[:2], *(-(-side // 4) for side in shape[2:]))
    fine = torch.nn.functional.interpolate(coarse, size=shape[2:])
    return (fine * 4).round().div(4).mul(0.98).add(0.01)


@pytest.mark.parametrize("make", [torch.rand, blobs, torch.zeros, torch.ones], ids=lambda make: make.__name__)
@pytest.mark.parametrize("shape", [(2, 3, 33, 47), (1, 2, 1, 16), (2, 2, 17, 1), (1, 2, 9, 20, 11), (1, 1, 3, 1, 40)])
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "k": 3}, {"reduction": "sum", "alpha": 0.5, "k": 1}])
def test_the_erosion_loss_is_the_plain_one(forced, make, shape, options):
    pred = make(*shape)
    pred = pred / pred.sum(1, keepdim=True).clamp(min=1)
    target = (torch.rand(shape[0], 1, *shape[2:]) < 0.4).long().clamp(max=shape[1] - 1)
    loss = hausdorff_er_loss if len(shape) == 4 else hausdorff_er_loss_3d
    forced("aten")
    expected = value_and_gradients(loss, pred, target, **options)
    forced("native")
    found = value_and_gradients(loss, pred, target, **options)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    scale = float(expected[1].abs().max())
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5 * max(scale, 1e-3))


def test_a_gradient_of_the_gradient_is_the_plain_one(forced):
    pred, target = torch.rand(1, 2, 6, 6), torch.randint(2, (1, 1, 6, 6))

    def second(kind):
        forced(kind)
        given = pred.clone().requires_grad_()
        (first,) = torch.autograd.grad(hausdorff_er_loss(given, target, k=2), given, create_graph=True)
        return torch.autograd.grad(first.square().sum(), given)[0]

    expected = second("aten")
    assert expected.abs().max() > 0
    torch.testing.assert_close(second("native"), expected)
