import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detpost.losses import BoundaryLoss, GeneralizedSurfaceLoss, boundary_loss, generalized_surface_loss
from tests.mixin import OperatorTests, one_line
from tests.reference import boundary_losses as reference

FIELDS = {
    "seed": st.integers(0, 2**31),
    "sides": st.lists(st.integers(2, 9), min_size=2, max_size=3),
    "density": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    "spacing": st.sampled_from([None, (0.3, 1.0, 2.5)]),
    "include_background": st.booleans(),
}


def pair(seed, sides, density):
    generator = np.random.default_rng(seed)
    truth = (generator.random((2, 3, *sides)) < density).astype(np.float64)
    return generator.random((2, 3, *sides)), truth


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


@settings(max_examples=50, deadline=None)
@given(**FIELDS)
def test_boundary_loss_has_the_authors_values(seed, sides, density, spacing, include_background):
    predicted, truth = pair(seed, sides, density)
    steps = spacing and spacing[: len(sides)]
    channels = range(0 if include_background else 1, 3)
    expected = reference.boundary_loss(predicted, truth, steps or (1,) * len(sides), channels)
    actual = boundary_loss(*tensors(predicted, truth), include_background=include_background, spacing=steps)
    np.testing.assert_allclose(float(actual), expected, rtol=1e-6, atol=1e-6)
    chosen = boundary_loss(*tensors(predicted, truth), idc=list(channels), spacing=steps)
    torch.testing.assert_close(chosen, actual, rtol=0, atol=0)


@settings(max_examples=50, deadline=None)
@given(weights=st.sampled_from([None, (0.5, 2.0, 1.0)]), **FIELDS)
def test_generalized_surface_loss_has_the_authors_values(seed, sides, density, spacing, include_background, weights):
    predicted, truth = pair(seed, sides, density)
    steps = spacing and spacing[: len(sides)]
    first = 0 if include_background else 1
    own = weights and weights[first:]
    expected = reference.generalized_surface_loss(predicted, truth, steps or (1,) * len(sides), range(first, 3), own)
    options = {"include_background": include_background, "spacing": steps, "class_weights": own}
    actual = generalized_surface_loss(*tensors(predicted, truth), **options)
    np.testing.assert_allclose(float(actual), expected, rtol=1e-5, atol=1e-6)


def test_given_distances_take_the_place_of_the_targets():
    predicted, truth = pair(3, (5, 6), 0.5)
    distances = np.random.default_rng(0).normal(size=truth.shape)
    expected = reference.generalized_surface_loss(predicted, truth, (1, 1), (1, 2), None, distances)
    loss = GeneralizedSurfaceLoss()
    given_ = loss(*tensors(predicted, truth), torch.from_numpy(distances))
    np.testing.assert_allclose(float(given_), expected, rtol=1e-12)
    assert not torch.isclose(given_, loss(*tensors(predicted, truth)))


LOSSES = [boundary_loss, generalized_surface_loss]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "other_act"])
def test_activations_and_class_ids_are_those_of_the_caller(loss, activation):
    logits, ids = torch.randn(2, 3, 5, 6), torch.randint(3, (2, 1, 5, 6))
    one_hot = torch.nn.functional.one_hot(ids[:, 0], 3).movedim(-1, 1)
    by_hand = {"sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(1), "other_act": torch.tanh}[activation]
    options = {activation: torch.tanh if activation == "other_act" else True, "to_onehot_y": True}
    torch.testing.assert_close(loss(logits, ids, **options), loss(by_hand(logits), one_hot))


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions_agree(loss):
    predicted, truth = tensors(*pair(1, (5, 6), 0.5))
    each = loss(predicted, truth, reduction="none")
    assert each.shape == ((2, 2, 1, 1) if loss is boundary_loss else (2,))
    torch.testing.assert_close(each.sum(), loss(predicted, truth, reduction="sum"))
    torch.testing.assert_close(each.mean(), loss(predicted, truth))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    predicted, truth = tensors(*pair(2, (4, 5, 6), 0.5))
    half = predicted.to(dtype).requires_grad_()
    value = loss(half, truth.to(dtype))
    value.backward()
    assert value.dtype == torch.float32
    assert half.grad.dtype == dtype
    torch.testing.assert_close(value, loss(half.detach().float(), truth.float()))


@pytest.mark.parametrize("module", [BoundaryLoss, GeneralizedSurfaceLoss])
@pytest.mark.parametrize("fill", [0.0, 1.0], ids=["empty", "full"])
def test_a_target_without_a_boundary_gives_finite_values_and_gradients(module, fill):
    predicted = torch.rand(2, 1, 6, 7, requires_grad=True)
    value = module(include_background=True)(predicted, torch.full((2, 1, 6, 7), fill))
    value.backward()
    assert value.isfinite()
    assert predicted.grad.isfinite().all()
    if module is BoundaryLoss and fill == 0:
        assert value == 0
        assert not predicted.grad.any()


def test_the_modules_hand_on_what_they_hold():
    predicted, truth = tensors(*pair(4, (5, 6), 0.5))
    options = {"include_background": True, "sigmoid": True, "reduction": "sum", "spacing": (2.0, 0.5)}
    actual = BoundaryLoss(**options, batch=True)(predicted, truth)
    assert torch.equal(actual, boundary_loss(predicted, truth, **options, batch=True))
    actual = GeneralizedSurfaceLoss(**options, class_weights=(1, 2, 3))(predicted, truth)
    assert torch.equal(actual, generalized_surface_loss(predicted, truth, **options, class_weights=(1, 2, 3)))


class _TwoFields(OperatorTests):
    def arguments(self, dtype):
        truth = torch.zeros(1, 2, 5, 6, dtype=dtype)
        truth[:, 1, 1:4, 2:5] = 1
        truth[:, 0] = 1 - truth[:, 1]
        return torch.rand(1, 2, 5, 6, dtype=dtype) * 0.8 + 0.1, truth.bool()

    def output_dtype(self, dtype):
        return dtype if dtype in (torch.float32, torch.float64) else torch.float32

    def cardinalities(self):
        flat = torch.rand(3, 2, 4, 5), torch.ones(3, 2, 4, 5)
        deep = torch.rand(3, 2, 4, 5, 2), torch.ones(3, 2, 4, 5, 2)
        return [(flat, ()), (deep, ())]

    def exceptions(self):
        good = torch.rand(1, 2, 4, 5)
        return [
            ((torch.rand(4, 5), good), ValueError, r"got shape \(4, 5\)"),
            ((good, good[:, :1]), ValueError, "input's shape"),
            ((good, good.numpy()), TypeError, "got ndarray"),
            ((good.long(), good), ValueError, "floating dtype"),
        ]


class TestBoundaryLoss(_TwoFields):
    operator = staticmethod(boundary_loss)

    def features(self):
        row = torch.tensor([[[[0.0, 0.0, 1.0, 1.0, 1.0]]]]).repeat(1, 2, 1, 1)
        return [((row, row), torch.tensor(-0.6)), ((1 - row, row), torch.tensor(0.6))]


class TestGeneralizedSurfaceLoss(_TwoFields):
    operator = staticmethod(generalized_surface_loss)

    def features(self):
        row = torch.tensor([[[[0.0, 0.0, 1.0, 1.0, 1.0]]]]).repeat(1, 2, 1, 1)
        return [((1 - row, row), torch.tensor(1.0)), ((torch.full_like(row, 0.5), row), torch.tensor(0.75))]


@pytest.mark.parametrize(
    ("call", "kind", "pattern"),
    [
        (lambda x: boundary_loss(x, x, idc=[2]), ValueError, r"channels in \[0, 2\); got \[2\]"),
        (lambda x: boundary_loss(x, x, idc=[]), ValueError, r"got \[\]"),
        (lambda x: generalized_surface_loss(x, x, class_weights=[1, 2]), ValueError, r"kept \(1\); got \(2,\)"),
        (lambda x: generalized_surface_loss(x, x, distances=x[:, :1]), ValueError, "distances must have"),
        (lambda x: generalized_surface_loss(x, x, distances=[1]), TypeError, "got list"),
        (lambda x: BoundaryLoss(sigmoid=True, softmax=True), ValueError, "at most one"),
        (lambda x: GeneralizedSurfaceLoss(reduction="all"), ValueError, "got 'all'"),
    ],
)
def test_bad_arguments_are_one_clear_line(call, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        call(torch.rand(1, 2, 4, 5))
    one_line(error)
