from __future__ import annotations

import functools
import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detpost import select_top_k
from detpost.kernels.aten import selection as aten
from detpost.kernels.cpu import library, numpy_decode
from detpost.kernels.cpu import selection as native_selection
from detpost.reference.selection import select_top_k as reference
from detpost.selection import best_class
from tests.mixin import DTYPES, AsModule, one_line

NAN, INF = math.nan, math.inf
PATHS = {
    "select_top_k": select_top_k,
    "reference": reference,
    "aten": aten.select,
    "by top-k alone": aten.select_by_top_k,
}
# Called for what they take, by select_top_k.
KERNELS = {"numpy": numpy_decode.select, **({"native": native_selection.select} if library.missing() is None else {})}


def reference_top_k(rows: torch.Tensor, k: int) -> torch.Tensor:
    """The contract in plain Python: numbers before NaN, the greater before the lesser, then the lower index."""
    order = [
        sorted(range(len(row)), key=lambda i, row=row: (math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i))
        for row in rows.tolist()
    ]
    return torch.tensor(order, dtype=torch.int64).reshape(rows.shape)[:, :k]


def numpy_top_k(rows: torch.Tensor, k: int) -> torch.Tensor:
    """The same for long rows: NumPy's stable sort puts NaN last and takes the zeros as equal."""
    return torch.from_numpy(np.argsort(-rows.double().numpy(), axis=1, kind="stable")[:, :k].copy())


def hold_to_reference(rows: torch.Tensor, k: int, expected: torch.Tensor) -> None:
    kernels = {"by looking": aten.select_by_looking, **(KERNELS if rows.dtype != torch.float64 else {})}
    for name, path in {**PATHS, **kernels}.items():
        actual = path(rows, k)
        assert actual.dtype == torch.int64
        assert actual.shape == expected.shape, name
        assert torch.equal(actual, expected), f"{name}, k={k}: {rows.tolist()}"


def adversarial_pool(dtype: torch.dtype) -> list[float]:
    limits = torch.finfo(dtype)
    ulp = torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(2.0, dtype=dtype)).item()
    least = torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)).item()
    plain = [0.0, 1.0, ulp, 2.0, limits.max, limits.tiny, least, INF]
    return [*plain, *(-value for value in plain), NAN]


@st.composite
def adversarial_rows(draw):
    """Rows of few distinct values, in any dtype, with lengths and k on both sides of the group prefilter."""
    dtype = draw(st.sampled_from(DTYPES))
    palette = draw(st.lists(st.sampled_from(adversarial_pool(dtype)), min_size=1, max_size=5))
    batch = draw(st.integers(0, 3))
    width = draw(st.one_of(st.integers(0, 12), st.integers(13, 90)))
    picks = draw(st.lists(st.integers(0, len(palette) - 1), min_size=batch * width, max_size=batch * width))
    rows = torch.tensor([palette[i] for i in picks], dtype=dtype).reshape(batch, width)
    return rows, draw(st.one_of(st.integers(1, 4), st.integers(1, 100)))


@settings(max_examples=1200, deadline=None, suppress_health_check=list(HealthCheck))
@given(adversarial_rows())
def test_every_path_gives_the_one_order_on_adversarial_rows(case):
    rows, k = case
    hold_to_reference(rows, k, reference_top_k(rows, k))
    if not rows.isnan().any():
        stable = torch.argsort(rows, dim=1, descending=True, stable=True)[:, :k]
        assert torch.equal(select_top_k(rows, k), stable)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=64), st.integers(1, 70))
def test_any_floats_are_ordered_as_the_reference_orders_them(values, k):
    rows = torch.tensor([values], dtype=torch.float32)
    hold_to_reference(rows, k, reference_top_k(rows, k))


def quantised(*shape):
    return torch.randn(*shape).mul(4).round().div(4)


@pytest.mark.parametrize(
    ("width", "k"),
    [(24000, 300), (24001, 300), (23999, 300), (2400, 300), (2399, 300), (2401, 300), (5000, 1), (4999, 7), (64, 64)],
)
def test_quantised_logits_longer_than_the_prefilter_threshold(width, k):
    rows = quantised(4, width)
    hold_to_reference(rows, k, numpy_top_k(rows, k))


@pytest.mark.parametrize("width", [10, 2400, 24001])
def test_numpy_takes_what_is_common(monkeypatch, width):
    monkeypatch.setattr(aten, "select", lambda scores, k: pytest.fail("left to PyTorch's operators"))
    rows = torch.randn(2, width)
    assert torch.equal(numpy_decode.select(rows, 300), numpy_top_k(rows, 300))
    assert torch.equal(numpy_decode.select(rows.half(), 300), numpy_top_k(rows.half(), 300))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["few numbers", "nan and -inf", "constant", "zeros", "all nan", "all -inf", "rising"])
def test_long_rows_of_one_kind(kind, dtype):
    width, k = 4007, 50
    rows = {
        # Fewer than k numbers: every path must go on into -inf and then NaN, group by group.
        "few numbers": torch.where(torch.rand(3, width) < 0.005, quantised(3, width), NAN),
        "nan and -inf": torch.where(torch.rand(3, width) < 0.01, -INF, NAN),
        "constant": torch.full((3, width), 1.5),
        "zeros": torch.where(torch.rand(3, width) < 0.5, 0.0, -0.0),
        "all nan": torch.full((3, width), NAN),
        "all -inf": torch.full((3, width), -INF),
        "rising": torch.arange(3 * width).reshape(3, width) / 64,
    }[kind].to(dtype)
    hold_to_reference(rows, k, numpy_top_k(rows, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_rows_and_batches(dtype):
    for batch, width, k in [(0, 5, 3), (3, 0, 3), (0, 0, 1), (0, 5000, 3), (2, 1, 1), (2, 1, 9), (2, 5, 9)]:
        rows = torch.randn(batch, width).to(dtype)
        hold_to_reference(rows, k, reference_top_k(rows, k))


def test_any_strides_give_the_same_indices():
    base = quantised(3000, 4)
    for rows in (
        base.t(),
        torch.stack((base.t(), base.t()), -1)[..., 1],
        base.t().flip(1),
        base[:, :1].t().expand(5, 3000),
    ):
        for k in (5, 3000):
            hold_to_reference(rows, k, numpy_top_k(rows, k))


def test_negative_nan_is_nan():
    rows = torch.tensor([[1.0, NAN, -NAN, -INF, 2.0]])
    rows = torch.where(rows.isnan(), rows.view(torch.int32).bitwise_or(-(2**31)).view(torch.float32), rows)
    hold_to_reference(rows, 5, torch.tensor([[4, 0, 3, 1, 2]]))


def test_float64_is_not_rounded():
    step = 2.0**-40
    rows = torch.tensor([[1.0, 1.0 + step, 1.0 + 2 * step, 1e300, -1e300]], dtype=torch.float64)
    hold_to_reference(rows, 5, torch.tensor([[3, 2, 1, 0, 4]]))


def test_half_values_are_compared_as_they_are():
    wide = torch.tensor([[1.0, 1.0001]])
    assert select_top_k(wide, 2).tolist() == [[1, 0]]
    assert select_top_k(wide.half(), 2).tolist() == [[0, 1]]


Found = namedtuple("Found", ["values", "indices"])


def scrambled_top_k(values, k, dim=-1, largest=True, sorted=True):
    """A lawful top-k that gives ties in any order, and its results too where the order is not asked for."""
    shuffle = torch.randperm(values.shape[dim])
    best, where = values.index_select(dim, shuffle).sort(dim=dim, descending=largest, stable=True)
    best, where = best.narrow(dim, 0, k), shuffle[where.narrow(dim, 0, k)]
    if not sorted:
        other = torch.randperm(k)
        best, where = best.index_select(dim, other), where.index_select(dim, other)
    return Found(best, where)


def test_whatever_the_runtime_does_with_ties_the_order_is_the_same(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "topk", scrambled_top_k)
    for width, k in [(40, 10), (40, 40), (900, 10), (901, 100)]:
        for _ in range(10):
            rows = torch.randn(3, width).round()
            rows = torch.where(
                torch.rand(3, width) < 0.2, torch.tensor([NAN, -INF, -0.0])[torch.randint(3, (3, width))], rows
            )
            for count in (k, width):
                assert torch.equal(aten.select_by_top_k(rows, count), numpy_top_k(rows, count))
                assert torch.equal(aten.select(rows, count), numpy_top_k(rows, count))


def test_selection_has_no_gradient_and_leaves_its_input_alone():
    rows = quantised(2, 500).requires_grad_()
    before = rows.detach().clone()
    for path in PATHS.values():
        assert not path(rows, 7).requires_grad
    assert torch.equal(rows, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_best_class_is_the_first_of_the_reference(dtype):
    pool = torch.tensor(adversarial_pool(dtype), dtype=dtype)
    for classes in (1, 2, 7):
        logits = pool[torch.randint(len(pool), (400, classes))]
        rows = logits[~logits.isnan().all(1)]  # what is best of nothing but NaN is nobody's promise
        assert torch.equal(best_class(rows), reference_top_k(rows, 1).squeeze(1))
    assert best_class(torch.zeros(2, 3, 5)).shape == (2, 3)


def test_a_best_class_of_nan_alone_is_still_a_class():
    assert 0 <= best_class(torch.full((1, 4), NAN)).item() < 4


@pytest.mark.parametrize(
    ("scores", "k", "kind", "pattern"),
    [
        (torch.zeros(5), 1, ValueError, r"\(B, N\); got \(5,\)"),
        (torch.zeros(2, 3, 4), 1, ValueError, r"got \(2, 3, 4\): flatten"),
        (torch.zeros(2, 3, dtype=torch.int32), 1, TypeError, "floating.*int32"),
        (torch.zeros(2, 3, dtype=torch.bool), 1, TypeError, "floating.*bool"),
        ([[1.0]], 1, TypeError, "floating.*list"),
        (torch.zeros(2, 3), 0, ValueError, "at least 1; got 0"),
        (torch.zeros(2, 3), -4, ValueError, "at least 1; got -4"),
        (torch.zeros(2, 3), 1.0, TypeError, "k must be an int; got 1.0"),
        (torch.zeros(2, 3), True, TypeError, "k must be an int; got True"),
        (torch.zeros(2, 3), None, TypeError, "k must be an int; got None"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(scores, k, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        select_top_k(scores, k)
    one_line(error)


@pytest.mark.parametrize(("width", "k"), [(50, 20), (3000, 20)])
@pytest.mark.parametrize("name", PATHS)
def test_compiles_whole_and_exports(name, width, k):
    torch._dynamo.reset()
    function = functools.partial(PATHS[name], k=k)
    rows = quantised(3, width)
    expected = numpy_top_k(rows, k)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(rows), expected)
    batch = torch.export.Dim("batch")
    program = torch.export.export(AsModule(function), (rows[:2],), dynamic_shapes=(({0: batch},),))
    assert torch.equal(program.module()(rows), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_chooses_the_same_indices(dtype):
    pool = torch.tensor(adversarial_pool(dtype), dtype=dtype)
    for width, k in [(40, 10), (40, 40), (4007, 50), (24000, 300)]:
        for rows in (pool[torch.randint(len(pool), (4, width))], quantised(4, width).to(dtype)):
            for name, path in PATHS.items():
                assert torch.equal(path(rows.cuda(), k).cpu(), numpy_top_k(rows, k)), name


def test_meta_rows_need_no_values():
    for path in PATHS.values():
        assert path(torch.rand(2, 3000, device="meta"), 7).shape == (2, 7)


def test_the_reference_itself_can_tell_a_wrong_rule():
    rows = torch.tensor([[1.0, 2.0, 2.0, NAN, 0.0, -0.0]])
    assert reference_top_k(rows, 6).tolist() == numpy_top_k(rows, 6).tolist() == [[1, 2, 0, 4, 5, 3]]
    highest_index_first = 5 - reference(rows.flip(1), 6)
    assert not torch.equal(highest_index_first, reference_top_k(rows, 6))
