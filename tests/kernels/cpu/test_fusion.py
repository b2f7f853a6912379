"""The C++ fusion and merging, held to the plain PyTorch forms at every instruction level."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from detpost import kernels
from detpost.kernels.cpu import fusion as cpu
from detpost.kernels.cpu import library
from detpost.kernels.cpu import nms as cpu_nms
from detpost.reference import fusion as reference
from tests.kernels.cpu.test_nms import odd
from tests.mixin import assert_same
from tests.test_nms import crowd

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"the C++ kernels are {library.missing()}")


@pytest.mark.parametrize("smaller", [False, True], ids=["of the union", "of the smaller"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_what_is_merged_is_what_the_plain_form_merges(dtype, smaller):
    swallowed = 0
    for seed in range(20):
        boxes, scores, labels, valid = odd(2, 1 + seed, dtype, seed)
        threshold = [0.1, 1 / 3, 0.5, 0.7, 1.0][seed % 5]
        for chosen in ((labels, valid), (None, valid), (labels, None), (None, None)):
            expected = reference.merge(boxes, scores, *chosen, threshold, smaller)
            assert_same(cpu_nms.merge(boxes, scores, *chosen, threshold, smaller), expected)
            swallowed += int((expected[1] != boxes).any(dim=-1).sum())
    assert swallowed > 30


def test_what_is_fused_is_what_the_plain_form_fuses():
    fused = 0
    for seed in range(30):
        boxes, scores, labels, valid = odd(2, 1 + seed, torch.float64, seed)
        threshold = [0.0, 0.1, 1 / 3, 0.5, 0.7, 1.0][seed % 6]
        for chosen in ((labels, valid), (None, valid), (labels, None), (None, None)):
            expected = reference.fuse(boxes, scores, *chosen, threshold)
            assert_same(cpu.fuse(boxes, scores, *chosen, threshold), expected)
            fused += int((expected[0] != torch.arange(1 + seed)).sum())
    assert fused > 100


AT_LEVEL = """
from fractions import Fraction
import numpy as np
import torch
from detpost.kernels.cpu import fusion as cpu, library, nms as cpu_nms
from detpost.reference import fusion as reference
from detpost.reference import nms as reference_nms
from tests.kernels.cpu.test_nms import odd
from tests.test_nms import crowd
torch.manual_seed(0)
for seed, count in enumerate((1, 2, 3, 7, 9, 17, 40)):
    boxes, scores, labels = crowd(2, count, 2, seed, side=200.0)
    for threshold in (0.2, 0.55):
        given = boxes.double() / 3, scores.double(), labels, None, threshold
        for found, expected in zip(cpu.fuse(*given), reference.fuse(*given)):
            assert torch.equal(found, expected), (count, threshold)
    for smaller in (False, True):
        given = boxes / 3, scores, labels, None, 0.3, smaller
        for found, expected in zip(cpu_nms.merge(*given), reference.merge(*given)):
            assert torch.equal(found, expected), (count, smaller)
# At the very value of an overlap: a product that is not rounded before a sum would move it.
pairs = torch.rand(200, 2, 4, dtype=torch.float64).cumsum(2)
scores = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
for pair, iou in zip(pairs, reference_nms.overlap(pairs[:, 0].T, pairs[:, 1].T).tolist()):
    if iou > 0:
        below = float(np.nextafter(iou, -1))
        assert cpu.fuse(pair[None], scores, None, None, iou)[0].tolist() == [[0, 1]]
        assert cpu.fuse(pair[None], scores, None, None, below)[0].tolist() == [[0, 0]]
        above = float(np.nextafter(iou, 2))
        kept, grown = cpu_nms.merge(pair[None], scores, None, None, iou, False)
        assert kept.tolist() == [[True, False]]
        union = torch.cat((pair[:, :2].amin(0), pair[:, 2:].amax(0)))
        assert torch.equal(grown[0, 0], union), pair
        assert cpu_nms.merge(pair[None], scores, None, None, above, False)[0].all()
        # The swallowing is decided in float64, from boxes that came as float32.
        single = pair.float()
        wide = reference_nms.overlap(single[0].double(), single[1].double()).item()
        for limit in (wide, float(np.nextafter(wide, 2))):
            given = single[None], scores, None, None, limit, False
            for found, expected in zip(cpu_nms.merge(*given), reference.merge(*given)):
                assert torch.equal(found, expected)
# A sum of one half and a product that lies at the middle of two floats once it is rounded to a double, and not before.
middle = 0.5 + 2.0**-24 + 2.0**-53
side = 0.6
while True:
    side = float(np.nextafter(side, 1))
    score = middle / side
    if score * side == middle and Fraction(score) * Fraction(side) > Fraction(middle):
        break
boxes = torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.0, 0.0, side, 1.0]]], dtype=torch.float64)
fused = cpu.fuse(boxes, torch.tensor([[1.0, score]], dtype=torch.float64), None, None, 0.1)[1]
assert fused[0, 0, 2].item() == np.float32(1.0 / (1.0 + score)), fused
print(library.instructions())
"""


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.slow
def test_every_instruction_level_gives_the_same(level):
    environment = os.environ | {"DETPOST_NATIVE": level, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", AT_LEVEL],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[3], timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if level == "baseline":
        assert done.stdout.strip() == "baseline instructions"


def test_any_strides_and_dtypes_are_read():
    boxes, scores, labels = crowd(3, 40, 4)
    valid = torch.rand(3, 40) < 0.7
    given = boxes.double(), scores.double(), labels, valid
    turned = [value.transpose(0, 1).contiguous().transpose(0, 1) for value in given]
    assert_same(cpu.fuse(*turned, 0.3), cpu.fuse(*given, 0.3))
    assert_same(cpu_nms.merge(*turned, 0.3, False), cpu_nms.merge(*given, 0.3, False))
    assert_same(cpu.fuse(*given[:2], labels.to(torch.int16), valid, 0.3), cpu.fuse(*given, 0.3))


def test_many_boxes_are_shared_out_and_fused_the_same():
    boxes, scores, labels = crowd(2, 6000, 3, side=6000.0)
    wide = boxes.double(), scores.double()
    owners, fused, means = cpu.fuse(*wide, labels, None, 0.4)
    for image in range(2):
        for label in range(3):
            mine = (labels[image] == label).nonzero()[:, 0]
            own, box, mean = cpu.fuse(*(values[image : image + 1, mine] for values in wide), None, None, 0.4)
            assert_same(owners[image, mine], mine[own[0]])
            assert_same(fused[image, mine], box[0])
            assert_same(means[image, mine], mean[0])


def test_what_came_is_not_written_to():
    boxes, scores, labels = crowd(1, 60, 1, extent=400.0)
    wide, single = boxes.double(), boxes.clone()
    before = wide.clone()
    assert (cpu.fuse(wide, scores.double(), labels, None, 0.3)[1] != wide).any()
    assert (cpu_nms.merge(single, scores, labels, None, 0.3, True)[1] != single).any()
    assert_same(wide, before)
    assert_same(single, boxes)


def test_what_wants_a_gradient_goes_the_plain_way(monkeypatch):
    monkeypatch.setenv("DETPOST_KERNEL", "native")
    boxes, scores, _ = crowd(1, 6, 1, extent=600.0)
    wide = boxes.double().requires_grad_()
    assert kernels.fuse(wide, scores.double(), None, None, 0.2)[1].requires_grad
    assert kernels.merge(wide, scores, None, None, 0.2, False)[1].requires_grad
    with torch.no_grad():
        assert not kernels.fuse(wide, scores.double(), None, None, 0.2)[1].requires_grad


def test_the_operators_keep_their_contract_with_the_compiler():
    boxes, scores, labels = crowd(2, 12, 3)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    given = boxes.double(), scores.double(), labels, None, 0.3
    torch.library.opcheck(torch.ops.detpost.native_fuse, given, test_utils=tests)
    torch.library.opcheck(
        torch.ops.detpost.native_merge, (boxes.half(), scores, None, None, 0.3, True), test_utils=tests
    )


def test_threads_that_call_at_once_get_their_own_answers():
    inputs = [(*(v.double() for v in crowd(2, 1500, 2, seed)[:2]), None, None, 0.4) for seed in range(4)]
    expected = [cpu.fuse(*given) for given in inputs]
    wrong = []

    def work(i):
        for _ in range(3):
            if not all(map(torch.equal, cpu.fuse(*inputs[i]), expected[i])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
