"""The integer softmax: its bits, its distance from softmax, its limits and its derivatives."""

import decimal
import math

import numpy as np
import pytest
import torch

from detpost.reference import softmax

CLASSES = (1, 2, 5, 92, 128, 129, 256, 257, 1204, 4097, 8193, 70_000)


def adversarial_rows(classes, rows=64):
    """Rows in which most classes stand where a coarse sum would err the same way each time, and ordinary ones."""
    generator = torch.Generator().manual_seed(classes)
    ordinary = torch.randn(rows, classes, generator=generator) * torch.linspace(0.1, 20, rows).unsqueeze(1)
    # All but one of the classes equal, between 0 and 30 below the greatest.
    peaked = torch.zeros(rows, classes) - torch.linspace(0, 30, rows).unsqueeze(1)
    peaked = torch.where(torch.arange(classes) == classes // 2, 0.0, peaked)
    steps = (torch.randn(rows, classes, generator=generator) * 3).mul(8).round().div(8)
    return torch.cat((ordinary, peaked, peaked + 1000.125, steps))


def by_integers(logits):
    """The scores of float32 rows (N, C) from the module's text, in integers of any length and NumPy's float32."""
    one = np.float32(1)
    found = []
    for row in logits.numpy():
        gap = row.max() - row
        steps = np.minimum(np.floor(gap.astype(np.float64) * 2**22), 2**28).astype(np.int64)
        coarse = np.array(softmax.COARSE, np.float32)[steps >> 18]
        fine = np.array(softmax.FINE, np.float32)[(steps >> 10) & 255]
        weight = (coarse * fine) * (one - ((steps & 1023) * 2.0**-22).astype(np.float32))
        bits, count = softmax.limbs(len(row))
        sums = [0] * count
        for value in weight:
            numerator, denominator = float(value).as_integer_ratio()
            fixed = (numerator << (bits * count)) // denominator
            for place in reversed(range(1, count)):
                fixed, limb = fixed >> bits, fixed & ((1 << bits) - 1)
                sums[place] += limb
            sums[0] += fixed
        assert max(sums) <= 2**24
        total = np.float32(0)
        for limb in reversed(sums):
            total = np.float32((np.float32(limb) + total) * 2.0**-bits)
        found.append(weight * (one / np.maximum(total, one)))
    return torch.from_numpy(np.stack(found))


@pytest.mark.parametrize("classes", [c for c in CLASSES if c < 2000])
def test_scores_are_the_bits_that_the_text_describes(classes):
    logits = adversarial_rows(classes, rows=8)
    assert torch.equal(softmax.scores(logits), by_integers(logits))


@pytest.mark.parametrize("classes", CLASSES)
def test_scores_are_within_2e_7_of_softmax(classes):
    logits = adversarial_rows(classes, rows=64 if classes < 8192 else 8)
    error = softmax.scores(logits).double() - logits.double().softmax(dim=-1)
    assert float(error.abs().max()) < 2e-7


def test_small_probabilities_keep_their_digits():
    logits = torch.stack((torch.zeros(500), -torch.linspace(0, 63.9, 500)), dim=1)
    expected = logits.double().softmax(dim=-1)
    # Each logit's own rounding, half a step of 2**-18 near 64, is the most of it.
    assert torch.allclose(softmax.scores(logits).double(), expected, rtol=4e-6, atol=0)


@pytest.mark.parametrize("classes", [5, 92, 300, 1204])
def test_neither_the_order_of_classes_nor_the_batch_changes_a_bit(classes):
    logits = adversarial_rows(classes)
    found = softmax.scores(logits)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(0))
    assert torch.equal(softmax.scores(logits[:, order]), found[:, order])
    assert torch.equal(torch.cat([softmax.scores(row) for row in logits.split(7)]), found)
    assert torch.equal(softmax.scores(logits.T.contiguous().T), found)


def test_inductor_gives_the_same_bits():
    logits = torch.cat((adversarial_rows(92), torch.tensor([math.nan, math.inf, -math.inf]).repeat(4, 31)[:, :92]))
    found = torch.compile(softmax.scores, fullgraph=True)(logits)
    assert torch.equal(found.nan_to_num(7), softmax.scores(logits).nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_scores_the_numbers_that_it_holds(dtype):
    logits = adversarial_rows(92).to(torch.bfloat16).to(torch.float16).to(dtype)
    assert torch.equal(softmax.scores(logits), softmax.scores(logits.to(torch.float32)))


def test_float64_logits_are_told_apart_by_their_difference():
    logits = torch.tensor([[2.0**40, 2.0**40 - 0.25]], dtype=torch.float64)
    assert torch.allclose(softmax.scores(logits).double(), logits.softmax(dim=-1), atol=1e-6)


def test_a_smaller_logit_never_weighs_more():
    # Within an entry of the fine table only the last factor moves, and falls: the ends of all 2**18 entries tell all.
    step = torch.arange(2**18 + 1, dtype=torch.float64)
    first = -step * 2.0**-12
    last = -(step + 1) * 2.0**-12 + 2.0**-22
    # float64, as float32 cannot hold the ends of the lower entries; the differences are rounded all the same.
    ends = torch.stack((first, last), dim=1).flatten()
    weights = softmax.weights(torch.stack((torch.zeros_like(ends), ends), dim=1))[0][:, 1]
    assert bool((weights.diff() <= 0).all())
    assert weights[0] == 1
    assert weights[-1] == 0


def test_any_libm_makes_the_same_tables():
    with decimal.localcontext(prec=50):
        exact = [(-decimal.Decimal(i) / 16).exp() for i in range(1024)]
        exact += [(-decimal.Decimal(j) / 4096).exp() for j in range(256)]
        for true, held in zip(exact, (*softmax.COARSE[:-1], *softmax.FINE), strict=True):
            if true == 1:
                assert held == 1
                continue
            below, above = (
                (decimal.Decimal(held) + decimal.Decimal(float(np.nextafter(np.float32(held), np.float32(side))))) / 2
                for side in (0, 2)
            )  # where float32 begins to round to its neighbours
            margin = true * decimal.Decimal("2e-12")  # a double's last bit is 2e-16
            assert below + margin < true < above - margin


def test_limits():
    inf, nan = math.inf, math.nan
    rows = torch.tensor(
        [
            [inf, 0, 0, -inf],
            [inf, 1, inf, 1],
            [-inf, -inf, -inf, -inf],
            [0, -inf, -inf, 0],
            [nan, 0, 0, 9],
            [nan, inf, 0, 0],
        ]
    )
    expected = torch.tensor([[1, 0, 0, 0], [0.5, 0, 0.5, 0], [0.0] * 4, [0.5, 0, 0, 0.5], [nan] * 4, [nan] * 4])
    assert torch.equal(softmax.scores(rows).nan_to_num(7), expected.nan_to_num(7))
    largest = torch.tensor([[3.4e38, -3.4e38, 3.4e38]])
    assert torch.equal(softmax.scores(largest), torch.tensor([[0.5, 0.0, 0.5]]))


def scored(logits, labels):
    values = softmax.scores(logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    alone = (values.unsqueeze(-1), logits.unsqueeze(-2), labels.unsqueeze(-1))  # each query by itself
    return softmax.with_slope(*alone).squeeze(-1)


def smooth(logits, labels):
    return logits.softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_derivatives_are_those_of_softmax(compiled):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (3, 5), generator=generator)
    cotangent = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    function = torch.compile(scored, fullgraph=True) if compiled else scored
    found, expected = function(logits, labels), smooth(logits, labels)
    # Of float64 logits it is softmax itself, in a compiler's order of operations.
    assert torch.allclose(found, expected, rtol=1e-15, atol=0)
    (first,), (second,) = (torch.autograd.grad(value, logits, cotangent) for value in (found, expected))
    assert torch.allclose(first, second, rtol=1e-12, atol=1e-15)
    assert float(second.abs().max()) > 0.1


def test_a_slope_changes_no_bit_of_a_score():
    logits = adversarial_rows(92).requires_grad_()
    labels = torch.arange(len(logits)) % 92
    values = softmax.scores(logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    found = softmax.with_slope(values, logits, torch.arange(len(logits)) * 92 + labels)
    assert found.requires_grad
    assert torch.equal(found, values)


def test_forward_mode_and_second_derivatives_are_those_of_softmax():
    generator = torch.Generator().manual_seed(1)
    logits, tangent = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(6, (4,), generator=generator)
    found, expected = (
        torch.func.jvp(lambda values, f=f: f(values, labels), (logits,), (tangent,))[1] for f in (scored, smooth)
    )
    assert torch.allclose(found, expected, rtol=1e-12)
    assert float(expected.abs().max()) > 0.01
    found, expected = (
        torch.func.hessian(lambda values, f=f: f(values, labels).sum())(logits) for f in (scored, smooth)
    )
    assert torch.allclose(found, expected, rtol=1e-12)
    assert float(expected.abs().max()) > 0.01


def test_no_derivative_is_nan():
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[inf, 0.0], [-inf, -inf], [nan, 0.0], [0.0, -inf]], requires_grad=True)
    scored(logits, torch.tensor([0, 1, 1, 0])).nan_to_num(0).sum().backward()
    assert torch.equal(logits.grad, torch.zeros(4, 2))


def test_a_default_device_changes_nothing():
    softmax.tables_on.cache_clear()
    logits = adversarial_rows(5)
    with torch.device("meta"):
        inside = softmax.scores(logits)
    with torch.inference_mode():
        softmax.tables_on.cache_clear()
        softmax.scores(logits)
    assert torch.equal(inside, softmax.scores(logits))
    assert not softmax.tables_on(logits.device)[0].is_inference()


@pytest.mark.parametrize("first", [torch.func.vmap, torch.func.grad])
def test_a_first_use_inside_a_transform_leaves_nothing_behind(first):
    softmax.tables_on.cache_clear()
    logits = adversarial_rows(5)
    first(lambda values: scored(values, torch.zeros(values.shape[:-1], dtype=torch.int64)).sum())(logits)
    assert torch.equal(softmax.scores(logits), by_integers(logits))
