"""The steps of a decode in fewer passes, held to the definition to the bit."""

import math

import pytest
import torch

from detpost import DecodeSpec
from detpost.kernels.aten import decode as aten
from detpost.reference import softmax
from detpost.reference.decode import Steps, decode
from detpost.reference.selection import best_class

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1), (7, 2), (300, 92), (40, 257), (5, 1204), (2, 40000))


def hard_rows(count, classes, dtype, seed):
    """Rows of every kind: rounded ones, some with NaN, infinities and zeros of both signs, flat and steep ones."""
    draw = torch.Generator().manual_seed(seed)
    rows = (
        torch.randn(count, classes, generator=draw)
        * torch.tensor([0.01, 1.0, 8.0, 60.0])[torch.arange(count) % 4, None]
    )
    rows = torch.where(torch.rand(count, 1, generator=draw) < 0.5, (rows * 4).round() / 4, rows)
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0])
    placed = odd[torch.randint(5, (count, classes), generator=draw)]
    here = (
        torch.rand(count, classes, generator=draw) < torch.tensor([0.0, 0.02, 0.0, 0.9])[torch.arange(count) % 4, None]
    )
    rows = torch.where(here, placed, rows)
    return torch.where(torch.arange(count)[:, None] % 11 == 10, odd[torch.arange(count) % 5, None], rows).to(dtype)


def same(found, expected):
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_probability_is_the_definitions(shape, dtype):
    rows = hard_rows(*shape, dtype, seed=shape[1])
    expected = softmax.scores(rows)
    assert expected.isfinite().any()
    assert same(aten.scores(rows), expected)
    labels = torch.randint(shape[1], shape[:1])
    assert same(aten.scores_of(rows, labels), expected.gather(1, labels[:, None])[:, 0])
    assert same(softmax.scores_of(rows, labels), expected.gather(1, labels[:, None])[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_best_class_is_the_definitions(shape, dtype):
    rows = hard_rows(*shape, dtype, seed=1 + shape[1])
    found, expected = aten.best_class(rows), best_class(rows)
    is_number = ~rows.isnan().all(dim=1)  # of NaN alone any class is the best, and none is valid
    assert is_number.any()
    assert torch.equal(found[is_number], expected[is_number])
    assert int(found.min()) >= 0
    assert int(found.max()) < shape[1]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_bit(threads):
    before = torch.get_num_threads()
    rows = hard_rows(3000, 92, torch.float32, seed=3)
    try:
        torch.set_num_threads(threads)
        assert same(aten.scores(rows), softmax.scores(rows))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("background", ["none", "first", "last"])
@pytest.mark.parametrize("selection", ["flat", "per_query"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_decode_of_these_steps_is_the_definitions(activation, selection, background, dtype):
    spec = DecodeSpec(activation=activation, selection=selection, background=background, top_k=60)
    for seed, (queries, classes) in enumerate(((40, 5), (90, 92), (300, 400), (1, 1))):
        logits = torch.stack([hard_rows(queries, classes, dtype, seed + 10 * image) for image in range(3)])
        boxes, sizes = torch.rand(3, queries, 4), torch.tensor([[480, 640], [100, 7], [1, 1]])
        for found, expected in zip(
            decode(logits, boxes, sizes, spec, aten.STEPS), decode(logits, boxes, sizes, spec), strict=True
        ):
            assert torch.equal(found, expected)


def test_a_step_that_is_wrong_would_be_seen():
    """The comparison above can fail: the last of equal classes in place of the first."""
    logits, boxes = torch.zeros(1, 4, 3), torch.rand(1, 4, 4)
    spec = DecodeSpec(selection="per_query", top_k=4)
    wrong = Steps(best_class=lambda rows: torch.full_like(rows[..., 0], 2, dtype=torch.int64))
    assert not torch.equal(decode(logits, boxes, None, spec, wrong).labels, decode(logits, boxes, None, spec).labels)
