"""The C++ suppression, held to the plain PyTorch form and, at every instruction level, to torchvision."""

import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torchvision.ops import nms as torchvision_nms

from detpost import kernels
from detpost.kernels.cpu import library
from detpost.kernels.cpu import nms as cpu
from detpost.nms import NonMaximumSuppression, nms
from detpost.reference import nms as reference
from tests.mixin import assert_same
from tests.test_nms import best_first, crowd, detections_of

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"the C++ kernels are {library.missing()}")

# Coordinates at which rounding, overflow, underflow and NaN decide.
ODD = [0.0, -0.0, 1.0, 1 / 3, 0.1, 7.0, 1e-45, 1e-38, 1e-20, 1e19, 3e38, -2.0, math.inf, -math.inf, math.nan]


@pytest.fixture
def forced(monkeypatch):
    return lambda kind: monkeypatch.setenv("DETPOST_KERNEL", kind)


def odd(batch, count, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(ODD, dtype=dtype)
    boxes = values[torch.randint(len(ODD), (batch, count, 4), generator=generator)]
    usual = torch.rand(batch, count, 4, generator=generator, dtype=dtype).cumsum(2)
    boxes = torch.where(torch.rand(batch, count, 1, generator=generator) < 0.5, boxes, usual)
    scores = values[torch.randint(len(ODD), (batch, count), generator=generator)]
    labels = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 256])[torch.randint(6, (batch, count), generator=generator)]
    return boxes, scores, labels, torch.rand(batch, count, generator=generator) < 0.8


@pytest.mark.parametrize("smaller", [False, True], ids=["of the union", "of the smaller"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_what_stays_is_what_the_plain_form_keeps(dtype, smaller):
    kept = 0
    for seed in range(60):
        boxes, scores, labels, valid = odd(2, 1 + seed * 2, dtype, seed)
        threshold = [0.0, 0.1, 1 / 3, 0.5, 0.7, 1.0][seed % 6]
        for chosen in ((labels, valid), (None, valid), (labels, None), (None, None)):
            expected = reference.keep(boxes, scores, *chosen, threshold, smaller)
            assert_same(cpu.keep(boxes, scores, *chosen, threshold, smaller), expected)
            kept += int(expected.sum())
        everything = torch.ones_like(valid)
        expected = reference.keep_ranked(boxes, labels, everything, threshold, smaller)
        assert_same(cpu.keep(boxes, None, labels, None, threshold, smaller), expected)
    assert kept > 1000


def test_any_strides_and_dtypes_are_read():
    boxes, scores, labels = crowd(3, 90, 4)
    valid = torch.rand(3, 90) < 0.7
    expected = nms(boxes, scores, 0.4, labels, valid)
    turned = [value.transpose(0, 1).contiguous().transpose(0, 1) for value in (boxes, scores, labels, valid)]
    assert not any(value.is_contiguous() for value in turned)
    assert_same(nms(turned[0], turned[1], 0.4, turned[2], turned[3]), expected)
    assert_same(nms(boxes.double(), scores, 0.4, labels.to(torch.uint8), valid), expected)
    assert_same(nms(boxes, scores.double(), 0.4, labels.to(torch.int32), valid), expected)
    assert_same(nms(boxes.clone().requires_grad_(), scores.clone().requires_grad_(), 0.4, labels, valid), expected)


@pytest.mark.parametrize(("batch", "count", "classes"), [(1, 9000, 3), (3, 4000, 1), (8, 2500, 2), (1, 40000, 100)])
def test_many_boxes_are_shared_out_and_kept_the_same(batch, count, classes):
    """Enough for threads over images and over classes."""
    boxes, scores, labels = crowd(batch, count, classes, side=6000.0)
    pairs = batch * count * (count / classes) / 2
    assert pairs > 2**22
    found = nms(boxes, scores, 0.5, labels)
    for image in range(batch):
        for label in range(classes):
            of_label = torch.nonzero(labels[image] == label)[:, 0]
            stays = of_label[torchvision_nms(boxes[image, of_label], scores[image, of_label], 0.5)]
            assert_same(found[image, of_label].nonzero()[:, 0], torch.isin(of_label, stays).nonzero()[:, 0])


AT_LEVEL = """
import numpy as np
import torch
from tests.kernels.cpu.test_nms import odd
from detpost.kernels.cpu import library, nms as cpu
from detpost.reference import nms as reference
from tests.test_nms import crowd, reference as of_torchvision
for seed, count in enumerate((1, 2, 3, 5, 15, 16, 17, 31, 33, 100, 350)):
    for dtype in (torch.float32, torch.float64):
        boxes, scores, labels = crowd(2, count, 3, seed, extent=300.0)
        boxes, scores = boxes.to(dtype) / 3, scores.to(dtype)
        for threshold in (0.0, 0.3, 0.5):
            found = cpu.keep(boxes, scores, labels, None, threshold, False)
            assert torch.equal(found, of_torchvision(boxes, scores, threshold, labels)), (count, dtype, threshold)
        # Pairs at the very value of their overlap: a product that is not rounded before the sum would move it.
        pairs = torch.rand(60, 2, 4, dtype=dtype).cumsum(2)
        for pair, iou in zip(pairs, reference.overlap(pairs[:, 0].T, pairs[:, 1].T).tolist()):
            if iou > 0:
                below = np.nextafter(iou, -1)
                given = pair[None], torch.tensor([[1.0, 0.5]]), None, None
                assert cpu.keep(*given, iou, False).all() and not cpu.keep(*given, below, False).all(), pair
        given = odd(2, count, dtype, seed)
        for smaller in (False, True):
            expected = reference.keep(*given, 0.3, smaller)
            assert torch.equal(cpu.keep(*given, 0.3, smaller), expected), (count, dtype, smaller)
print(library.instructions())
"""


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.slow
def test_every_instruction_level_keeps_the_same(level):
    environment = os.environ | {"DETPOST_NATIVE": level, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", AT_LEVEL],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[3], timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if level == "baseline":
        assert done.stdout.strip() == "baseline instructions"


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_detections_are_suppressed_as_by_the_plain_form(forced, agnostic, compact):
    boxes, scores, labels = best_first(*crowd(2, 300, 4, extent=300))
    found = detections_of(boxes, scores, labels, torch.rand(2, 300) < 0.8)
    module = NonMaximumSuppression(0.4, agnostic, compact)
    forced("aten")
    expected = module(found)
    forced("native")
    assert_same(module(found), expected)
    turned = type(found)(*(value.transpose(0, 1).contiguous().transpose(0, 1) for value in found))
    assert_same(module(turned), expected)
    wide = found._replace(boxes=found.boxes.double())
    assert_same(module(wide).queries, expected.queries)
    assert module(wide).boxes.dtype == torch.float64
    assert 0 < expected.valid.sum() < found.valid.sum()


def test_detections_that_went_in_are_not_written_to():
    boxes, scores, labels = best_first(*crowd(1, 50, 1, extent=400))
    found = detections_of(boxes, scores, labels)
    before = type(found)(*(value.clone() for value in found))
    kept = NonMaximumSuppression(0.2)(found)
    assert kept.valid.sum() < 50
    assert_same(found, before)


def test_compiled_code_calls_one_operator(forced):
    forced("native")
    torch.compiler.reset()
    seen = []

    def backend(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    boxes, scores, labels = crowd(2, 40, 3)
    compiled = torch.compile(nms, fullgraph=True, backend=backend)
    assert_same(compiled(boxes, scores, 0.3, labels), nms(boxes, scores, 0.3, labels))
    assert len(seen) == 1
    assert sum("native_nms" in target for target in seen[0]) == 1


def test_what_is_exported_has_plain_operators(forced):
    forced("native")

    class Plain(torch.nn.Module):
        def forward(self, boxes, scores, labels):
            return nms(boxes, scores, 0.3, labels)

    given = crowd(2, 20, 3)
    program = torch.export.export(Plain(), given)
    assert "native_nms" not in str(program.graph)
    assert_same(program.module()(*given), nms(given[0], given[1], 0.3, given[2]))


def test_a_transform_sees_plain_operators(forced):
    forced("native")
    boxes, scores, _ = crowd(4, 20, 1, extent=500)
    found = torch.func.vmap(lambda box, score: nms(box[None], score[None], 0.3)[0])(boxes, scores)
    assert_same(found, nms(boxes, scores, 0.3))


def test_the_operator_keeps_its_contract_with_the_compiler():
    boxes, scores, labels = crowd(2, 20, 3)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for rest in ((scores, labels, None), (None, None, torch.ones(2, 20, dtype=torch.bool))):
        torch.library.opcheck(torch.ops.detpost.native_nms, (boxes, *rest, 0.5, False), test_utils=tests)


def test_threads_that_call_at_once_get_their_own_answers():
    inputs = [crowd(8, 2500, 2, seed) for seed in range(4)]
    expected = [kernels.nms(boxes, scores, labels, None, 0.5) for boxes, scores, labels in inputs]
    wrong = []

    def work(i):
        boxes, scores, labels = inputs[i]
        for _ in range(3):
            if not torch.equal(nms(boxes, scores, 0.5, labels), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
