"""Softmax and per-query decodes in C++ and in NumPy: the bits of the plain form, at every level of instructions."""

import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detpost import DecodeSpec
from detpost.kernels.cpu import decode as native
from detpost.kernels.cpu import library, numpy_decode
from detpost.reference.decode import decode as reference_decode

NATIVE = pytest.mark.skipif(library.missing() is not None, reason=f"the C++ kernels are {library.missing()}")

ODD = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3e38, -3e38, 1.0, 64.0, -64.0, 1 / 3])
KINDS = {
    "usual": lambda shape: torch.randn(shape) * 2 - 3,
    "far apart": lambda shape: torch.randn(shape) * 30,
    "ties": lambda shape: (torch.randn(shape) * 2).round() / 2,
    "odd": lambda shape: ODD[torch.randint(len(ODD), shape)],
    "odd among usual": lambda shape: torch.where(
        torch.rand(shape) < 0.02, ODD[torch.randint(len(ODD), shape)], torch.randn(shape) * 5
    ),
    "one number": lambda shape: ODD[torch.randint(len(ODD), (1,))].expand(shape),
    "queries of NaN": lambda shape: torch.where(torch.rand(*shape[:2], 1) < 0.5, math.nan, torch.randn(shape)),
}


def a_spec(chance):
    return DecodeSpec(
        activation=chance.choice(["softmax", "softmax", "sigmoid"]),
        selection=chance.choice(["flat", "per_query"]),
        top_k=chance.choice([1, 3, 17, 100, 100_000]),
        score_threshold=chance.choice([None, 0.0, 0.05, 0.3, 1.0]),
        background=chance.choice(["none", "first", "last"]),
        box_format=chance.choice(["cxcywh", "xyxy", "xywh"]),
        clip=chance.random() < 0.5,
    )


def a_batch(chance, kind):
    shape = (chance.choice([0, 1, 2, 5]), chance.choice([0, 1, 2, 7, 33, 100]), chance.choice([1, 2, 7, 8, 9, 16]))
    if chance.random() < 0.5:
        shape = (1, chance.choice([1, 20]), chance.choice([15, 17, 33, 92, 128, 129, 256, 257, 513, 1204, 5000]))
    logits = KINDS[kind](shape).to(chance.choice([torch.float32, torch.float16, torch.bfloat16]))
    if chance.random() < 0.2:
        logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
    boxes = torch.rand(*shape[:2], 4) * chance.choice([1, 3]) - chance.choice([0, 0.5])
    boxes = torch.where(boxes > 0.9, math.nan, boxes) if chance.random() < 0.1 else boxes
    sizes = chance.choice([None, torch.randint(1, 2000, (shape[0], 2)), torch.rand(shape[0], 2) * 1000])
    return logits, boxes.to(chance.choice([torch.float32, torch.float16])), sizes


def assert_same_bits(found, expected, case):
    for name, got, want in zip(found._fields, found, expected, strict=True):
        assert got.dtype == want.dtype, (case, name)
        same = torch.equal(got.nan_to_num(nan=-7.0), want.nan_to_num(nan=-7.0))
        assert same, (case, name)
        if got.is_floating_point():
            assert torch.equal(got.isnan(), want.isnan()), (case, name)


def compare(seed, count, decode=native.decode):
    """Compare ``count`` decodes of each kind of logits with the plain form; the subprocesses below run it too."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    for kind in KINDS:
        for _ in range(count):
            spec, given = a_spec(chance), a_batch(chance, kind)
            case = (kind, spec, given[0].shape, given[0].dtype)
            assert_same_bits(decode(*given, spec), reference_decode(*given, spec), case)


def every_pair_of_entries():
    """Give logits (1, Q, 2) of gaps that need every entry of both tables, with what lies between them."""
    steps = torch.arange(1 << 17, dtype=torch.float64) * 1024 + torch.arange(1 << 17) % 1021
    steps = torch.cat((steps, steps[:: 1 << 5] + 2.0**27))  # and beyond the gaps that need no table
    gaps = (steps / 2.0**22).float()
    return torch.stack((torch.zeros_like(gaps), -gaps), dim=-1).unsqueeze(0)


def compare_every_pair_of_entries(decode=native.decode):
    logits = every_pair_of_entries()
    boxes = torch.zeros(1, logits.shape[1], 4)
    spec = DecodeSpec(activation="softmax", top_k=logits.shape[1] * 2)
    assert_same_bits(decode(logits, boxes, None, spec), reference_decode(logits, boxes, None, spec), "pairs")


@NATIVE
def test_any_decode_is_the_plain_one_to_the_bit():
    compare(seed=0, count=40)


def test_any_decode_in_numpy_is_the_plain_one_to_the_bit():
    compare(seed=0, count=40, decode=numpy_decode.decode)
    compare_every_pair_of_entries(numpy_decode.decode)


@pytest.mark.parametrize("preset", ["detr", "owlvit", "rtdetr"])
def test_what_is_usual_is_decoded_in_numpy_and_not_left_to_pytorch(preset):
    given = torch.randn(2, 100, 92), torch.rand(2, 100, 4), torch.full((2, 2), 100)
    assert numpy_decode._decode(*given, DecodeSpec.preset(preset)) is not None


@NATIVE
@pytest.mark.parametrize("level", ["baseline", "avx2", ""])
@pytest.mark.slow
def test_every_level_of_instructions_gives_the_bits_of_the_plain_form(level):
    code = (
        "from tests.kernels.cpu import test_softmax as test\n"
        "test.compare(seed=1, count=15)\n"
        "test.compare_every_pair_of_entries()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DETPOST_NATIVE": level},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[3],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-600:]


@NATIVE
def test_one_thread_and_several_give_the_same_bits():
    torch.manual_seed(2)
    given = torch.randn(8, 300, 92), torch.rand(8, 300, 4), torch.randint(1, 999, (8, 2))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(native.decode(*given, DecodeSpec.preset("detr")))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(*found, "threads")


@NATIVE
@pytest.mark.parametrize("classes", [2, 9, 92, 1204, 20_000])
def test_a_threshold_at_a_score_leaves_out_what_reaches_it_and_no_more(classes):
    torch.manual_seed(classes)
    logits, boxes = torch.randn(1, 40, classes) * 2, torch.rand(1, 40, 4)
    spec = DecodeSpec.preset("detr")
    scores = reference_decode(logits, boxes, None, spec).scores
    for score in scores[0, ::5].tolist():  # by a part of a sum, or a bound of it, none may come out on the other side
        for threshold in (score, math.nextafter(score, 0), min(score * 1.001, 1.0), score * 0.999):
            here = replace(spec, score_threshold=threshold)
            expected = reference_decode(logits, boxes, None, here)
            assert_same_bits(native.decode(logits, boxes, None, here), expected, threshold)


@NATIVE
@pytest.mark.parametrize("selection", ["flat", "per_query"])
@pytest.mark.parametrize("background", ["none", "first", "last"])
@pytest.mark.parametrize("shape", [(1, 300, 92), (2, 97, 130), (1, 33, 600)])
def test_threads_that_share_an_image_give_what_one_gives(shape, background, selection, monkeypatch):
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(shape, generator=generator) * 3
    logits[0, 31, 5] = math.nan
    logits[0, 32, 2] = math.inf
    boxes = torch.rand(*shape[:2], 4, generator=generator)
    spec = DecodeSpec(activation="softmax", selection=selection, background=background, top_k=50, score_threshold=0.05)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = []
        for threads in (1, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found.append(native.decode(logits.to(dtype), boxes, None, spec))
        monkeypatch.undo()
        expected = reference_decode(logits.to(dtype), boxes, None, spec)
        for one, several, of_reference in zip(*found, expected, strict=True):
            assert torch.equal(one, several)
            assert torch.equal(one, of_reference)


@pytest.mark.parametrize("threshold", [0.02, 0.1])
def test_numpy_looks_closer_only_at_what_may_reach_the_threshold(threshold):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 300, 400, generator=generator) * 2.5  # enough of them to be screened
    logits[0, 4, 7], logits[1, 5, 1], logits[1, 6] = math.nan, math.inf, -math.inf
    boxes = torch.rand(2, 300, 4, generator=generator)
    spec = DecodeSpec.preset("detr", score_threshold=threshold)
    expected = reference_decode(logits, boxes, None, spec)
    assert 0 < int(expected.valid.sum()) < 600
    found = numpy_decode._decode(logits, boxes, None, spec)
    assert found is not None
    for of_numpy, of_reference in zip(found, expected, strict=True):
        assert torch.equal(of_numpy, of_reference)
