import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detpost.losses import HausdorffERLoss, HausdorffERLoss3D, hausdorff_er_loss, hausdorff_er_loss_3d
from tests.losses.fields import KINDS, blobs, example, one_hot
from tests.mixin import OperatorTests, one_line
from tests.reference.hausdorff_er import hausdorff_er_in_place

SMOOTH_KINDS = ["random", "soft blobs", "background only", "not probabilities"]
SHAPES = [(17, 23), (32, 32), (1, 1), (2, 2), (1, 7), (9, 8, 7), (2, 2, 2), (1, 5, 1)]


def value_and_gradient(loss, pred: Tensor, target: Tensor, cotangent: Tensor | None = None) -> tuple[Tensor, Tensor]:
    leaf = pred.clone().requires_grad_()
    value = loss(leaf, target)
    weight = torch.ones_like(value) if cotangent is None else cotangent
    return value.detach(), torch.autograd.grad((value * weight).sum(), leaf)[0]


def fieldwise(values: Tensor) -> Tensor:
    """(B, C), the greatest magnitude of each field."""
    return values.abs().amax(tuple(range(2, values.dim())))


def steady(theirs, pred: Tensor, target: Tensor, cotangent: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Which fields (B, C) of kornia's value and gradient do not hang on rounding.

    Found by moving the prediction by some rounding steps of its dtype, in float64: where fields tie for an extreme, or
    nearly, kornia gives its gradient to others then. Each move has its opposite: of two that tie, each is once ahead.
    """
    step = 16 * torch.finfo(pred.dtype).eps
    moves = torch.rand(3, *pred.shape).double() * 2 - 1
    base, *moved = (
        value_and_gradient(theirs, pred.double() + step * noise, target, cotangent.double())
        for noise in [torch.zeros_like(pred.double()), *moves, *-moves]
    )
    by_field = [(value.squeeze(2).transpose(0, 1), gradient) for value, gradient in [base, *moved]]
    verdicts = []
    for of_base, *of_moved in zip(*by_field, strict=True):
        limit = tolerance * fieldwise(of_base).clamp(min=1)
        verdicts.append(torch.stack([fieldwise(of - of_base) <= limit for of in of_moved]).all(0))
    return verdicts[0], verdicts[1]


@pytest.mark.peers
@pytest.mark.parametrize("sides", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients_are_kornias_where_these_do_not_hang_on_rounding(kind, sides, dtype):
    losses = pytest.importorskip("kornia").losses
    theirs, ours = (
        (losses.HausdorffERLoss, HausdorffERLoss) if len(sides) == 2 else (losses.HausdorffERLoss3D, HausdorffERLoss3D)
    )
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    pred, target = example(kind, sides, dtype)
    weights = torch.rand(3, 2, 1, *sides, dtype=dtype)
    steady_value, steady_gradient = steady(theirs(reduction="none"), pred, target, weights, tolerance)
    for reduction in ("mean", "sum", "none"):
        cotangent = weights if reduction == "none" else torch.tensor(0.7, dtype=dtype)
        expected = value_and_gradient(theirs(reduction=reduction), pred, target, cotangent)
        actual = value_and_gradient(ours(reduction=reduction), pred, target, cotangent)
        if reduction == "none":
            off, scale = (fieldwise(of.squeeze(2).transpose(0, 1)) for of in (actual[0] - expected[0], expected[0]))
            assert (off <= tolerance * scale.clamp(min=1))[steady_value].all()
        elif steady_value.all():
            torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=tolerance)
        # Where a range is small the gradient is a difference of much larger terms: the scale is the field's largest.
        scale = fieldwise(expected[1]).clamp(min=1e-3 if reduction == "mean" else 1)
        assert (fieldwise(actual[1] - expected[1]) <= tolerance * scale)[steady_gradient].all()
    if kind in SMOOTH_KINDS:
        assert torch.stack([steady_value, steady_gradient]).float().mean() > 0.8, "too few fields are compared"


@pytest.mark.peers
@pytest.mark.parametrize(("alpha", "k"), [(1.0, 1), (0.5, 3), (3.0, 14)])
def test_alpha_and_k_mean_what_they_mean_in_kornia(alpha, k):
    theirs = pytest.importorskip("kornia").losses.HausdorffERLoss(alpha=alpha, k=k)
    pred, target = example("soft blobs", (33, 20), torch.float64)
    actual = value_and_gradient(HausdorffERLoss(alpha=alpha, k=k), pred, target)
    torch.testing.assert_close(actual, value_and_gradient(theirs, pred, target), rtol=1e-10, atol=1e-10)


def test_every_erosion_counts():
    """The value that a float64 NumPy computation of the paper's sum gives for two thick mismatches."""
    target = torch.zeros(2, 1, 32, 32, dtype=torch.long)
    target[0, :, 6:26, 6:26] = 1
    foreground = torch.zeros(2, 32, 32)
    foreground[0, 6:26, 6:16] = 0.9
    foreground[1, 4:20, 10:26] = 0.8
    loss = hausdorff_er_loss(torch.stack([1 - foreground, foreground], 1), target)
    torch.testing.assert_close(loss, torch.tensor(12.540735900430166))


class TestHausdorffERLoss(OperatorTests):
    operator = staticmethod(HausdorffERLoss(k=2))

    def arguments(self, dtype):
        return torch.rand(1, 2, 5, 6).to(dtype), torch.randint(2, (1, 1, 5, 6))

    def output_dtype(self, dtype):
        return torch.float64 if dtype == torch.float64 else torch.float32

    def cardinalities(self):
        pred, ids = torch.rand(2, 3, 4, 5), torch.zeros(2, 1, 4, 5, dtype=torch.uint8)
        return [((pred, ids), ()), ((torch.rand(1, 1, 1, 1), ids[:1, :, :1, :1]), ())]

    def features(self):
        ids = blobs(2, 3, (8, 8))
        return [((one_hot(ids, 3).float(), ids), torch.tensor(0.0))]

    def exceptions(self):
        pred, ids = torch.rand(2, 3, 4, 5), torch.zeros(2, 1, 4, 5, dtype=torch.long)
        return [
            ((pred[0], ids), ValueError, r"pred must be \(B, C, H, W\); got shape \(3, 4, 5\)"),
            ((pred[..., None], ids), ValueError, "use HausdorffERLoss3D"),
            ((pred, ids[:1]), ValueError, r"of shape \(2, 1, 4, 5\); got \(1, 1, 4, 5\)"),
            ((pred, ids.expand(2, 3, 4, 5)), ValueError, r"one-hot, pass target.argmax\(1, keepdim=True\)"),
            ((pred, ids.float()), ValueError, r"got torch.float32: pass target.long\(\)"),
            ((pred, ids.bool()), ValueError, r"got torch.bool: pass target.long\(\)"),
            ((pred, ids + 3), ValueError, r"class ids in \[0, 3\); got ids from 3 to 3"),
            ((pred, ids - 1), ValueError, "got ids from -1 to -1"),
            ((pred.long(), ids), ValueError, r"pred must have a floating dtype; got torch.int64: pass pred.float\(\)"),
            ((pred[:0], ids[:0]), ValueError, "at least one element"),
            ((pred, None), TypeError, "got NoneType"),
        ]


class TestHausdorffERLoss3D(OperatorTests):
    operator = staticmethod(HausdorffERLoss3D(k=2, reduction="none"))

    def arguments(self, dtype):
        return torch.rand(1, 2, 3, 4, 3).to(dtype), torch.randint(2, (1, 1, 3, 4, 3))

    def output_dtype(self, dtype):
        return torch.float64 if dtype == torch.float64 else torch.float32

    def cardinalities(self):
        return [((torch.rand(2, 3, 4, 5, 6), torch.zeros(2, 1, 4, 5, 6, dtype=torch.int32)), (3, 2, 1, 4, 5, 6))]

    def features(self):
        ids = blobs(1, 2, (4, 5, 6))
        return [((one_hot(ids, 2).float(), ids), torch.zeros(2, 1, 1, 4, 5, 6))]

    def exceptions(self):
        pred, ids = torch.rand(1, 2, 3, 3, 3), torch.zeros(1, 1, 3, 3, 3, dtype=torch.long)
        return [((pred[0], ids), ValueError, "use HausdorffERLoss$"), ((pred, ids + 2), ValueError, r"\[0, 2\)")]


def test_functions_are_the_modules():
    pred, target = example("soft blobs", (9, 9), torch.float32)
    torch.testing.assert_close(
        hausdorff_er_loss(pred, target, 1.5, 3, "sum"), HausdorffERLoss(1.5, 3, "sum")(pred, target)
    )
    pred, target = example("soft blobs", (6, 5, 6), torch.float32)
    assert torch.equal(hausdorff_er_loss_3d(pred, target, k=3), HausdorffERLoss3D(k=3)(pred, target))


@pytest.mark.parametrize(
    "arguments", [{"k": 0}, {"k": 2.0}, {"k": True}, {"alpha": float("nan")}, {"reduction": "avg"}]
)
def test_bad_arguments_fail_at_construction_in_one_line(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))) as error:
        HausdorffERLoss(**arguments)
    one_line(error)


MAGNITUDES = st.sampled_from([0.0, 1e-40, 1e-12, 0.5, 1.0, 1e6, 1e20, 3e38])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sides=st.lists(st.integers(1, 7), min_size=2, max_size=3),
    levels=st.lists(MAGNITUDES, min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    k=st.integers(1, 12),
)
def test_finite_in_finite_out(seed, sides, levels, dtype, k):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, *sides)
    level = torch.tensor(levels)[torch.randint(len(levels), shape, generator=generator)]
    sign = torch.randint(-1, 2, shape, generator=generator)
    largest = min(torch.finfo(dtype).max, 3e38)
    pred = (level * sign).clamp(-largest, largest).to(dtype)
    target = torch.randint(2, (2, 1, *sides), generator=generator)
    loss = hausdorff_er_loss if len(sides) == 2 else hausdorff_er_loss_3d
    value, gradient = value_and_gradient(lambda p, t: loss(p, t, k=k), pred, target)
    assert value.isfinite()
    if dtype == torch.float16:  # a slope beyond 65504 is infinity there, for a GradScaler to see
        wide = value_and_gradient(lambda p, t: loss(p, t, k=k), pred.float(), target)[1]
        assert torch.equal(gradient, wide.to(dtype))
        gradient = wide
    assert gradient.isfinite().all()


def test_an_overflow_that_comes_in_is_not_hidden():
    pred, target = example("random", (5, 5), torch.float32)
    for factor in (float("inf"), float("nan")):
        gradient = value_and_gradient(lambda p, t, f=factor: hausdorff_er_loss(p, t) * f, pred, target)[1]
        assert not gradient.isfinite().any()
    value, gradient = value_and_gradient(hausdorff_er_loss, pred.where(pred < 0.9, torch.nan), target)
    assert value.isnan()
    assert not gradient.isfinite().all()


def test_the_in_place_original_fails_gradcheck_where_this_passes():
    pred, target = torch.rand(1, 2, 5, 5, dtype=torch.float64, requires_grad=True), torch.randint(2, (1, 1, 5, 5))
    torch.testing.assert_close(hausdorff_er_loss(pred, target, k=3), hausdorff_er_in_place(pred, target, k=3))
    assert torch.autograd.gradcheck(lambda p: hausdorff_er_loss(p, target, k=3), pred)
    with pytest.raises(RuntimeError, match=r"inplace|Jacobian"):
        torch.autograd.gradcheck(lambda p: hausdorff_er_in_place(p, target, k=3), pred)


def test_vmap_over_predictions():
    preds, target = torch.rand(3, 1, 2, 6, 6), torch.randint(2, (1, 1, 6, 6))
    gradients = torch.func.vmap(torch.func.grad(lambda p: hausdorff_er_loss(p, target, k=2)))(preds)
    for pred, gradient in zip(preds, gradients, strict=True):
        expected = value_and_gradient(lambda p, t: hausdorff_er_loss(p, t, k=2), pred, target)[1]
        torch.testing.assert_close(gradient, expected)
