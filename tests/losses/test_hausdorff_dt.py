import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detpost.losses import (
    HausdorffDTLoss,
    LogHausdorffDTLoss,
    distance_transform_edt,
    hausdorff_dt_loss,
    log_hausdorff_dt_loss,
)
from tests.mixin import OperatorTests, one_line

ACTIVATIONS = [{}, {"sigmoid": True}, {"softmax": True}, {"other_act": torch.tanh}]
# alpha, include_background, to_onehot_y, reduction, batch: each pair of values of two options occurs
OPTIONS = [
    (2.0, False, False, "mean", False),
    (2.0, True, True, "none", False),
    (1.3, True, False, "none", True),
    (1.3, False, True, "sum", True),
    (2.0, True, True, "mean", True),
    (1.3, False, False, "sum", False),
]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def masks(sides):
    """A (4, 3, ...) one-hot-like mask with noise, empty, full and single-element fields."""
    target = (torch.rand(4, 3, *sides) < 0.4).float()
    target[1, 0], target[1, 1], target[2] = 0, 1, 0
    target[2].flatten(1)[:, 1] = 1
    return target


def value_and_gradient(loss, pred, target):
    leaf = pred.clone().requires_grad_()
    value = loss(leaf, target)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.peers
@pytest.mark.parametrize("sides", [(9, 14), (6, 5, 7)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda options: next(iter(options), "none"))
def test_values_are_monais(activation, sides):
    losses = pytest.importorskip("monai.losses")
    pred = torch.randn(4, 3, *sides) if activation else torch.rand(4, 3, *sides)
    ids = torch.randint(3, (4, 1, *sides))
    ids[0], ids[1] = 0, 2
    for alpha, background, to_onehot, reduction, batch in OPTIONS:
        arguments = {"alpha": alpha, "include_background": background, "to_onehot_y": to_onehot}
        arguments |= {"reduction": reduction, "batch": batch, **activation}
        target = ids if to_onehot else masks(sides)
        for ours, theirs in (
            (HausdorffDTLoss, losses.HausdorffDTLoss),
            (LogHausdorffDTLoss, losses.LogHausdorffDTLoss),
        ):
            expected = value_and_gradient(theirs(**arguments), pred, target)
            actual = value_and_gradient(ours(**arguments), pred, target)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.peers
def test_single_channel_is_monais():
    losses = pytest.importorskip("monai.losses")
    pred, target = torch.rand(3, 1, 8, 9), masks((8, 9))[:3, :1]
    for options in ({}, {"softmax": True}, {"to_onehot_y": True}, {"include_background": True}):
        expected = losses.HausdorffDTLoss(**options)(pred, target)
        torch.testing.assert_close(HausdorffDTLoss(**options)(pred, target), expected)


def test_an_integer_one_hot_target_gives_what_the_same_floats_give():
    pred, target = torch.rand(4, 3, 8, 9), masks((8, 9))
    for dtype in (torch.long, torch.bool, torch.uint8):
        assert torch.equal(hausdorff_dt_loss(pred, target.to(dtype)), hausdorff_dt_loss(pred, target))


def test_spacing_measures_the_distances_in_its_unit():
    pred, target = torch.rand(4, 3, 6, 5, 7), masks((6, 5, 7))
    plain = hausdorff_dt_loss(pred, target, alpha=1.5)
    torch.testing.assert_close(hausdorff_dt_loss(pred, target, alpha=1.5, spacing=3.0), plain * 3**1.5)
    spacing = (2.0, 0.5, 1.0)
    p, t = pred[2:3, 1:2] > 0.5, target[2:3, 1:2] > 0.5  # one element, so a boundary in both
    distance = [distance_transform_edt(m, spacing) + distance_transform_edt(~m, spacing) for m in (p, t)]
    expected = ((pred - target)[2:3, 1:2] ** 2 * (distance[0] ** 2 + distance[1] ** 2)).mean()
    actual = hausdorff_dt_loss(pred[2:3, 1:2], target[2:3, 1:2], include_background=True, spacing=spacing)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("options", [{}, {"sigmoid": True}, {"reduction": "none", "include_background": True}], ids=str)
def test_each_image_has_its_own_spacing_where_it_is_given(options):
    pred, target = torch.rand(3, 3, 6, 5, 7), masks((6, 5, 7))[:3]
    each = [(0.5, 2.0, 1.0), (1.0, 1.0, 1.0), (3.0, 0.2, 4.0)]
    by_mean = "reduction" not in options
    for dtype in (torch.float32, torch.float64):
        single = [
            value_and_gradient(HausdorffDTLoss(spacing=steps, **options), pred[i : i + 1].to(dtype), target[i : i + 1])
            for i, steps in enumerate(each)
        ]
        value, gradient = value_and_gradient(HausdorffDTLoss(spacing=each, **options), pred.to(dtype), target)
        values = [one for one, _ in single]
        torch.testing.assert_close(value, torch.stack(values).mean() if by_mean else torch.cat(values))
        gradients = torch.cat([one for _, one in single])
        torch.testing.assert_close(gradient, gradients / 3 if by_mean else gradients)


def test_one_graph_with_a_spacing_for_each_image():
    torch._dynamo.reset()
    loss = LogHausdorffDTLoss(spacing=[(0.5, 2.0), (1.0, 3.0)])
    pred, target = torch.rand(2, 3, 6, 5), masks((6, 5))[:2]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradient(compiled, pred, target), value_and_gradient(loss, pred, target))


@pytest.mark.peers
def test_shapes_that_do_not_fit_are_an_assertion_error_as_in_monai():
    monai = pytest.importorskip("monai.losses")
    pred, ids = torch.rand(2, 3, 4, 5), torch.zeros(2, 2, 4, 5)
    for options in ({}, {"to_onehot_y": True}):
        with pytest.raises(AssertionError):
            monai.HausdorffDTLoss(**options)(pred, ids)
        for kind in (AssertionError, ValueError):
            with pytest.raises(kind) as error:
                HausdorffDTLoss(**options)(pred, ids)
            one_line(error)


def test_functions_are_the_modules():
    pred, ids = torch.randn(2, 3, 8, 9), torch.randint(3, (2, 1, 8, 9))
    options = {"softmax": True, "to_onehot_y": True, "reduction": "none", "spacing": (1.0, 2.0), "batch": True}
    assert torch.equal(hausdorff_dt_loss(pred, ids, **options), HausdorffDTLoss(**options)(pred, ids))
    assert torch.equal(log_hausdorff_dt_loss(pred, ids, **options), LogHausdorffDTLoss(**options)(pred, ids))


@pytest.mark.parametrize("options", [{}, {"softmax": True}, {"to_onehot_y": True}], ids=str)
def test_an_option_that_a_single_channel_ignores_is_told(options):
    with pytest.warns(UserWarning, match="single channel"):
        hausdorff_dt_loss(torch.rand(1, 1, 3, 3), torch.ones(1, 1, 3, 3), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hausdorff_dt_loss(torch.rand(1, 1, 3, 3), torch.ones(1, 1, 3, 3), include_background=True)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"sigmoid": True, "softmax": True}, ValueError),
        ({"softmax": True, "other_act": torch.tanh}, ValueError),
        ({"other_act": 3}, TypeError),
        ({"reduction": None}, ValueError),
    ],
)
def test_bad_arguments_fail_at_construction_in_one_line(options, kind):
    for loss in (HausdorffDTLoss, LogHausdorffDTLoss):
        with pytest.raises(kind) as error:
            loss(**options)
        one_line(error)


class TestHausdorffDTLoss(OperatorTests):
    operator = staticmethod(HausdorffDTLoss(to_onehot_y=True, softmax=True))

    def arguments(self, dtype):
        return torch.randn(1, 3, 6, 5).to(dtype), torch.randint(3, (1, 1, 6, 5))

    def output_dtype(self, dtype):
        return torch.float64 if dtype == torch.float64 else torch.float32

    def cardinalities(self):
        return [((torch.rand(2, 2, 1, 1), torch.zeros(2, 1, 1, 1)), ())]

    def features(self):
        ids = torch.randint(3, (2, 1, 6, 6))
        return [((100.0 * (ids == torch.arange(3)[:, None, None]), ids), torch.tensor(0.0))]

    def exceptions(self):
        pred, ids = torch.rand(2, 3, 4, 5), torch.zeros(2, 1, 4, 5, dtype=torch.long)
        return [
            ((pred[0], ids), ValueError, r"input must be .* got shape \(3, 4, 5\)"),
            ((pred, ids.expand(2, 3, 4, 5)), ValueError, r"class ids of shape \(2, 1, 4, 5\); got \(2, 3, 4, 5\)"),
            ((pred, ids + 3), ValueError, r"class ids in \[0, 3\); got ids from 3 to 3"),
            ((pred.long(), ids), ValueError, r"input must have a floating dtype"),
            ((pred, None), TypeError, "got NoneType"),
        ]


class TestLogHausdorffDTLoss(TestHausdorffDTLoss):
    operator = staticmethod(LogHausdorffDTLoss(to_onehot_y=True, softmax=True, spacing=(1.0, 2.0)))


def test_class_ids_without_to_onehot_y_are_refused():
    with pytest.raises(ValueError, match="to_onehot_y=True") as error:
        hausdorff_dt_loss(torch.rand(2, 3, 4, 5), torch.zeros(2, 1, 4, 5))
    one_line(error)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sides=st.lists(st.integers(1, 6), min_size=2, max_size=3),
    levels=st.lists(st.sampled_from([0.0, 1e-40, 0.5, 1.0, 1e6, 1e20, 3e38]), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    options=st.sampled_from([*ACTIVATIONS, {"reduction": "sum"}, {"alpha": 4.0}, {"spacing": 0.1}]),
)
def test_finite_in_finite_out(seed, sides, levels, dtype, options):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, *sides)
    level = torch.tensor(levels)[torch.randint(len(levels), shape, generator=generator)]
    largest = min(torch.finfo(dtype).max, 3e38)
    sign = torch.randint(-1, 2, shape, generator=generator)
    pred = (level * sign).clamp(-largest, largest)
    target = torch.randint(2, shape, generator=generator)
    for loss in (hausdorff_dt_loss, log_hausdorff_dt_loss):
        value, gradient = value_and_gradient(lambda p, t, f=loss: f(p, t, **options), pred.to(dtype), target)
        assert value.isfinite()
        if dtype != torch.float16:
            assert gradient.isfinite().all()
            continue
        # A slope beyond 65504 is infinity in float16, and a GradScaler must see it: finite before that rounding.
        wide = value_and_gradient(lambda p, t, f=loss: f(p, t, **options), pred.to(dtype).float(), target)[1]
        assert wide.isfinite().all()
        assert torch.equal(gradient, wide.to(dtype))
