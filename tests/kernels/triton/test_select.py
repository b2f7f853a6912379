from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from detpost.kernels.triton import select as triton_select
from detpost.kernels.triton.select import block_sizes, segment_count, select, takes
from tests.kernels.triton.harness import (
    INTERPRETED,
    _plain_references,  # noqa: F401
    assert_compiles,
    assert_passes_interpreted,
    compiled_whole,
    in_the_ordinary_process,
    on_each_device,
    replayed,
    written_arguments,
)

NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDS = 4 if INTERPRETED else 200


def expected_top_k(rows, k):
    """NumPy's stable sort puts NaN last and takes the zeros as equal."""
    return torch.from_numpy(np.argsort(-rows.double().numpy(), axis=1, kind="stable")[:, :k].copy())


def hold(rows, k, device):
    moved = rows.to(device)
    assert takes(moved, k)
    actual = select(moved, k)
    assert actual.dtype == torch.int64
    assert torch.equal(actual.cpu(), expected_top_k(rows, k)), f"k={k}: {rows.tolist()}"


def adversarial_pool(dtype):
    limits = torch.finfo(dtype)
    ulp = torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(2.0, dtype=dtype)).item()
    least = torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)).item()
    plain = [0.0, 1.0, ulp, 2.0, limits.max, limits.tiny, least, INF]
    return torch.tensor([*plain, *(-value for value in plain), NAN], dtype=dtype)


@in_the_ordinary_process
@pytest.mark.slow
def test_everything_under_the_interpreter():
    assert_passes_interpreted(__file__, at_least=20)


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_one_order_on_adversarial_rows(dtype, device):
    pool = adversarial_pool(dtype)
    for _ in range(ROUNDS):
        palette = pool[torch.randint(len(pool), (int(torch.randint(1, 6, ())),))]
        width, k = int(torch.randint(1, 91, ())), int(torch.randint(1, 25, ()))
        hold(palette[torch.randint(len(palette), (3, width))], k, device)
    hold(pool[None], len(pool), device)


@on_each_device
@pytest.mark.parametrize("kind", ["few numbers", "nan and -inf", "constant", "all nan", "all -inf", "rising", "zeros"])
def test_long_rows_of_one_kind(kind, device):
    width, k = 4007, 20
    rows = {
        "few numbers": torch.where(torch.rand(2, width) < 0.002, torch.randn(2, width), NAN),
        "nan and -inf": torch.where(torch.rand(2, width) < 0.002, -INF, NAN),
        "constant": torch.full((1, width), 1.5),
        "all nan": torch.full((1, width), NAN),
        "all -inf": torch.full((1, width), -INF),
        "rising": torch.arange(width)[None] / 64,
        "zeros": torch.where(torch.rand(1, width) < 0.5, 0.0, -0.0),
    }[kind]
    hold(rows, k, device)


@on_each_device
@pytest.mark.parametrize(("width", "k"), [(24000, 300), (4096, 24), (4097, 25), (1023, 26), (25, 25), (1, 1), (3, 9)])
def test_plain_and_quantised_rows_on_both_sides_of_every_block_size(width, k, device):
    hold(torch.randn(1, width), k, device)
    hold(torch.randn(1, width).mul(4).round().div(4), k, device)


@on_each_device
def test_the_best_may_stand_in_a_few_groups(device, monkeypatch):
    """Then more lie above the threshold of the groups than fit, and the row itself is bisected."""
    packed = []
    if INTERPRETED:
        plain = triton_select._pack
        monkeypatch.setattr(triton_select, "_pack", lambda *a: (packed.append(1), plain(*a))[1])
    k = 20
    groups, capacity = block_sizes(k)
    for high in (torch.rand(10), torch.ones(10), torch.full((10,), INF)):
        rows = -torch.rand(1, groups * 10).clamp(min=0.1)
        for group in range(6):
            rows[0, group::groups] = high + group % 2
        assert int((rows >= 0).sum()) > capacity
        hold(rows, k, device)
    assert len(packed) == (2 * 3 if INTERPRETED else 0)


@on_each_device
def test_segments_of_long_rows_merge_into_the_one_order(device, monkeypatch):
    pool = adversarial_pool(torch.float32)
    for segment, width, k in [(150, 905, 7), (15, 63, 20)]:  # in the second, a segment is shorter than k
        monkeypatch.setattr(triton_select, "_SEGMENT", segment)
        assert segment_count(1, width) > 3
        hold(torch.randn(1, width).mul(2).round(), k, device)
        hold(pool[torch.randint(len(pool), (1, width))], k, device)
        hold(torch.where(torch.rand(1, width) < 0.01, 1.0, NAN), k, device)


def test_rows_are_cut_only_where_the_gpu_has_room():
    assert segment_count(1, 24000) == 1
    assert segment_count(1, 360900) == 22
    assert segment_count(64, 360900) == 4
    assert segment_count(256, 360900) == segment_count(1000, 360900) == 1
    assert segment_count(1, 2**30) == 64


@on_each_device
def test_any_strides_and_no_gradient(device):
    base = torch.randn(60, 2, device=device, requires_grad=True)
    actual = select(base.t(), 5)
    assert not actual.requires_grad
    assert torch.equal(actual.cpu(), expected_top_k(base.detach().cpu().t(), 5))


@on_each_device
def test_negative_nan_is_nan(device):
    rows = torch.tensor([[1.0, NAN, -NAN, -INF, 2.0]])
    rows = torch.where(rows.isnan(), rows.view(torch.int32).bitwise_or(-(2**31)).view(torch.float32), rows)
    assert select(rows.to(device), 5).tolist() == [[4, 0, 3, 1, 2]]


@on_each_device
def test_compiles_whole(device):
    rows = torch.randn(2, 60, device=device).round()
    actual = compiled_whole(lambda scores: select(scores * 2, 5) + 1)(rows)
    assert torch.equal(actual.cpu(), expected_top_k(rows.cpu(), 5) + 1)


@on_each_device
def test_what_is_not_taken_is_said(device):
    rows = torch.zeros(2, 3000, device=device)
    assert takes(rows, 1024)
    assert not takes(rows, 1025)
    assert takes(rows[:, :40], 5000)  # 40 are kept
    assert not takes(rows.double(), 5)
    assert not takes(rows[:0], 5)
    assert not takes(rows[:, :0], 5)
    assert not takes(rows[0], 5)
    assert not takes(rows.to("meta"), 5)


@pytest.mark.gpu
def test_replays_from_a_cuda_graph():
    for width, k in [(24000, 300), (200000, 300)]:
        rows = torch.randn(2, width).mul(4).round()
        assert torch.equal(replayed(lambda r, k=k: select(r, k), rows.cuda()).cpu(), expected_top_k(rows, k))


@pytest.mark.gpu
def test_large_k_and_long_rows_on_a_gpu():
    for batch, width, k in [(1, 360900, 300), (8, 360900, 1024), (3, 5000, 1000), (1, 1000, 1000)]:
        for dtype in DTYPES:
            hold(torch.randn(batch, width).to(dtype), k, "cuda")


@in_the_ordinary_process
def test_a_compiler_sees_that_the_scores_are_left_alone(monkeypatch):
    last = ["out_ptr", "scratch_ptr"]
    short = written_arguments(lambda rows: select(rows, 20), [torch.empty(2, 3000, device="meta")], monkeypatch)
    assert short == [last]
    long = written_arguments(lambda rows: select(rows, 20), [torch.empty(2, 50000, device="meta")], monkeypatch)
    assert long == [["keys_out_ptr", *last], last]


@in_the_ordinary_process
@pytest.mark.parametrize(
    ("k", "dtype", "preselected", "partial"), [(20, "fp16", 0, 1), (20, "i32", 1, 0), (300, "fp32", 0, 0)]
)
def test_compiles_for_a_gpu(k, dtype, preselected, partial, tmp_path, monkeypatch):
    groups, capacity = block_sizes(k)
    out = "*i32" if partial else "*i64"
    places = "*i32" if preselected else f"*{dtype}"
    types = [f"*{dtype}", places, "*i64", out, out, *["i32"] * 6]
    constants = {
        "PRESELECTED": bool(preselected),
        "PARTIAL": bool(partial),
        "GROUPS": groups,
        "BLOCK": triton_select.BLOCK,
        "CAPACITY": capacity,
    }
    assert_compiles(triton_select._select_kernel, types, constants, triton_select.WARPS, tmp_path, monkeypatch)
