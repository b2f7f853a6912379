from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from detpost import DecodeSpec, DetectionPostProcessor, presets
from detpost.export import compile
from detpost.postprocess import DetectorModule
from tests.detectors import detector as transformers_detector
from tests.export.detectors import SmallDetector, adversarial, raw
from tests.mixin import assert_same

BATCHES = (1, 4, 2, 1, 8, 3, 7)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small(**overrides):
    return DetectorModule(SmallDetector(), DetectionPostProcessor.from_preset("rtdetr", top_k=6, **overrides)).eval()


def images(batch, height=32, width=32):
    return torch.rand(batch, 3, height, width), torch.randint(10, 900, (batch, 2))


class TestGraphs:
    @pytest.mark.parametrize("first", [1, 4], ids=["one image first", "several images first"])
    def test_post_processor_makes_two_graphs_over_all_batch_sizes(self, first):
        backend = CompileCounterWithBackend("aot_eager")
        compiled = compile(DetectionPostProcessor.from_preset("rtdetr", top_k=10), backend=backend)
        for batch in (first, *BATCHES):
            compiled(*raw(batch))
        assert backend.frame_count == 2
        assert not counters["graph_break"]

    def test_several_images_alone_never_recompile(self):
        compiled = compile(DetectionPostProcessor.from_preset("rtdetr", top_k=10), backend="eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in (2, 5, 3, 8):
                compiled(*raw(batch))

    def test_detector_makes_two_graphs_over_all_batch_sizes(self):
        backend = CompileCounterWithBackend("aot_eager")
        compiled = compile(small(), backend=backend)
        with torch.no_grad():
            for batch in BATCHES:
                compiled(*images(batch))
        assert backend.frame_count == 2
        assert not counters["graph_break"]

    def test_detector_makes_no_further_graph_for_another_image_size(self):
        backend = CompileCounterWithBackend("eager")
        compiled = compile(small(), backend=backend)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            for batch, height, width in ((2, 32, 32), (3, 32, 48), (8, 64, 40), (2, 48, 32)):
                compiled(*images(batch, height, width))
        assert backend.frame_count == 1

    def test_many_specs_do_not_use_up_one_limit(self):
        with torch._dynamo.config.patch(recompile_limit=2):
            for k in (1, 2, 3, 4):
                compiled = compile(DetectionPostProcessor(DecodeSpec(top_k=k)), backend="eager")
                assert compiled(*raw(2)).scores.shape[1] == k

    def test_empty_batch_needs_no_graph(self):
        backend = CompileCounterWithBackend("eager")
        compiled = compile(DetectionPostProcessor.from_preset("rtdetr", top_k=10), backend=backend)
        assert compiled(*(value[:0] for value in raw(2))).labels.shape == (0, 10)
        assert backend.frame_count == 0

    def test_callers_tensors_are_not_marked(self):
        logits, boxes, sizes = raw(2)
        compile(DetectionPostProcessor.from_preset("rtdetr", top_k=10), backend="eager")(logits, boxes, sizes)
        assert not any("dynamo" in name for value in (logits, boxes, sizes) for name in vars(value))


@pytest.mark.parametrize("preset", ["rtdetr", "detr"])
def test_compiled_chooses_what_eager_chooses(preset):
    post = DetectionPostProcessor.from_preset(preset, top_k=10)
    compiled = compile(post, backend="aot_eager")
    for batch in (1, 3):
        for arguments in adversarial(batch).values():
            assert_same(compiled(*arguments), post(*arguments))


def test_gradients_pass_through():
    logits, boxes, sizes = raw(3)
    compiled = compile(DetectionPostProcessor.from_preset("rtdetr", top_k=10), backend="aot_eager")
    found = compiled(logits.requires_grad_(), boxes.requires_grad_(), sizes)
    (found.scores.sum() + found.boxes.sum()).backward()
    assert logits.grad.abs().sum() > 0
    assert boxes.grad.abs().sum() > 0


def test_whatever_is_no_module_is_refused():
    with pytest.raises(TypeError, match="compile takes a module; got function"):
        compile(presets)


@pytest.mark.slow
def test_rt_detr_v2_compiles_whole_and_makes_two_graphs():
    backend = CompileCounterWithBackend("eager")
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=30)
    detector = DetectorModule(transformers_detector("rt_detr_v2"), post).eval()
    compiled = compile(detector, backend=backend)
    with torch.no_grad():
        for batch, height, width in ((1, 64, 64), (2, 64, 64), (3, 64, 96), (8, 96, 64)):
            arguments = images(batch, height, width)
            assert_same(compiled(*arguments).queries, detector(*arguments).queries)
    assert backend.frame_count == 2
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_inductor_chooses_what_eager_chooses(mode):
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=10)
    compiled = compile(post, mode=mode)
    for batch in (1, 3):
        for arguments in adversarial(batch).values():
            found, expected = compiled(*arguments), post(*arguments)
            for name in ("labels", "queries", "valid"):
                assert_same(getattr(found, name), getattr(expected, name))
            torch.testing.assert_close(found, expected)


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("mode", [None, "reduce-overhead"])
    def test_chooses_what_the_cpu_chooses(self, mode):
        post = DetectionPostProcessor.from_preset("rtdetr", top_k=10)
        compiled = compile(post, mode=mode)
        for batch in (1, 3):
            for arguments in adversarial(batch).values():
                found = compiled(*(value.cuda() for value in arguments))
                expected = post(*arguments)
                for name in ("labels", "queries", "valid"):
                    assert_same(getattr(found, name).cpu(), getattr(expected, name))

    def test_reduce_overhead_never_overwrites_an_earlier_answer(self):
        compiled = compile(DetectionPostProcessor.from_preset("rtdetr", top_k=10), mode="reduce-overhead")
        first = [compiled(*(value.cuda() for value in raw(2))) for _ in range(4)][-1]  # warm-ups, then the graph
        kept = first.scores.clone()
        compiled(*(value.cuda() for value in raw(2, seed=9)))
        assert_same(first.scores, kept)
