from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch
from torch import nn

from detpost import DetectionPostProcessor
from detpost.export import CudaGraph, cuda_graph
from detpost.postprocess import DetectorModule
from tests.export.detectors import SmallDetector, adversarial, raw
from tests.mixin import assert_same, one_line

POST = DetectionPostProcessor.from_preset("rtdetr", top_k=10)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_cuda_the_error_names_the_way_out():
    with pytest.raises(RuntimeError, match="needs a CUDA device and there is none") as error:
        CudaGraph(POST, raw(1))
    assert "detpost.export.compile" in one_line(error)


class FakeGraphs:
    """Stands in for the device: a capture that records itself, and a replay that runs the module again.

    What is left to test is CudaGraph's own bookkeeping: signatures, eviction, copying, lending and locking.
    """

    def __init__(self):
        self.captures = []
        self.running = self.most_at_once = 0

    def capture(self, module, given, device, pool):
        self.captures.append((tuple(value.shape for value in given if value is not None), pool))
        inputs = tuple(None if value is None else torch.zeros_like(value) for value in given)
        outputs = [torch.zeros_like(value) for value in module(*inputs)]

        def replay():
            self.running += 1
            self.most_at_once = max(self.most_at_once, self.running)
            time.sleep(0.002)  # another thread would come in between here
            for own, value in zip(outputs, module(*inputs), strict=True):
                own.copy_(value)
            self.running -= 1

        return cuda_graph._Captured(inputs, outputs, replay, pool or f"pool {len(self.captures)}")


class Double(nn.Module):
    def forward(self, values, shift=None):
        return [values * 2 if shift is None else values * 2 + shift]


@pytest.fixture
def fake(monkeypatch):
    graphs = FakeGraphs()
    monkeypatch.setattr(cuda_graph, "_require_cuda", lambda: None)
    monkeypatch.setattr(cuda_graph, "_device_of", lambda inputs: torch.device("cpu"))
    monkeypatch.setattr(cuda_graph, "_wait_for", lambda device: None)
    monkeypatch.setattr(cuda_graph, "_capture", graphs.capture)
    monkeypatch.setattr(cuda_graph._StreamOrder, "on", lambda self, device: contextlib.nullcontext())
    return graphs


class TestBookkeeping:
    def test_captures_once_per_shape_dtype_and_missing_input(self, fake):
        run = CudaGraph(Double())
        for _ in range(3):
            run(torch.ones(2))
            run(torch.ones(3))
            run(torch.ones(3, dtype=torch.float64))
            run(torch.ones(3), torch.ones(3))
            run(torch.ones(3), None)
        assert len(fake.captures) == 5

    def test_example_is_captured_at_once(self, fake):
        CudaGraph(Double(), (torch.ones(2),))
        assert len(fake.captures) == 1

    def test_forgets_the_signature_unused_for_longest(self, fake):
        run = CudaGraph(Double(), max_signatures=2)
        for size in (1, 2, 1, 3):
            run(torch.ones(size))
        assert [signature[0][0] for signature in run.signatures] == [(1,), (3,)]
        run(torch.ones(1))
        assert len(fake.captures) == 3
        run(torch.ones(2))
        assert len(fake.captures) == 4

    def test_all_graphs_share_one_pool(self, fake):
        run = CudaGraph(Double(), max_signatures=2)
        for size in (1, 2, 3, 4):
            run(torch.ones(size))
        assert [pool for _, pool in fake.captures] == [None, "pool 1", "pool 1", "pool 1"]

    def test_every_call_reads_its_own_tensors(self, fake):
        run = CudaGraph(Double())
        for value in (1.0, 5.0, -3.0):
            assert run(torch.full((2,), value), torch.ones(2))[0].tolist() == [2 * value + 1] * 2

    def test_clones_belong_to_the_caller_and_lent_outputs_to_the_graph(self, fake):
        own, lent = CudaGraph(Double()), CudaGraph(Double(), clone=False)
        first, first_lent = own(torch.ones(2))[0], lent(torch.ones(2))[0]
        own(torch.zeros(2)), lent(torch.zeros(2))
        assert first.tolist() == [2, 2]
        assert first_lent.tolist() == [0, 0]

    def test_threads_take_turns_and_get_their_own_answers(self, fake):
        run, wrong = CudaGraph(Double()), []

        def work(value):
            for _ in range(20):
                if run(torch.full((3,), value))[0].tolist() != [2 * value] * 3:
                    wrong.append(value)

        threads = [threading.Thread(target=work, args=(float(value),)) for value in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert fake.most_at_once == 1
        assert len(fake.captures) == 1

    def test_a_failed_capture_leaves_nothing_behind_and_the_lock_free(self, fake, monkeypatch):
        run = CudaGraph(Double())

        def fail(*_):
            raise RuntimeError("no")

        with monkeypatch.context() as patch:
            patch.setattr(cuda_graph, "_capture", fail)
            with pytest.raises(RuntimeError, match="no"):
                run(torch.ones(2))
        assert run.signatures == ()
        assert run(torch.ones(2))[0].tolist() == [2, 2]

    def test_a_bound_below_one_is_refused(self, fake):
        with pytest.raises(ValueError, match="max_signatures must be at least 1; got 0"):
            CudaGraph(Double(), max_signatures=0)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((torch.ones(1),), ValueError, "needs inputs on one CUDA device; got cpu"),
        ((None,), ValueError, "got no tensor"),
        ((3,), TypeError, "takes tensors or None; got int"),
    ],
)
def test_inputs_elsewhere_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        cuda_graph._device_of(inputs)


def test_the_reason_is_the_first_error_of_the_chain():
    def fails():
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nadvice")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as error:
        fails()
    assert cuda_graph._cause(error.value) == "operation not permitted when stream is capturing"


@pytest.mark.gpu
class TestOnGpu:
    def test_chooses_what_the_cpu_chooses(self):
        run = CudaGraph(POST)
        for batch in (1, 3, 8):
            for arguments in adversarial(batch).values():
                found, expected = run(*(value.cuda() for value in arguments)), POST(*arguments)
                for name in ("labels", "queries", "valid"):
                    assert_same(getattr(found, name).cpu(), getattr(expected, name))
        assert len(run.signatures) == 3

    def test_a_whole_detector_replays(self):
        detector = DetectorModule(SmallDetector(), POST).eval().cuda()
        run = CudaGraph(detector)
        for seed in range(3):
            torch.manual_seed(seed)
            images, sizes = torch.rand(2, 3, 64, 64, device="cuda"), torch.full((2, 2), 50, device="cuda")
            with torch.no_grad():
                assert_same(run(images, sizes, None), detector(images, sizes))

    def test_a_module_that_waits_for_the_device_is_named(self):
        class Waits(nn.Module):
            def forward(self, values):
                return values * values.sum().item()

        with pytest.raises(RuntimeError, match="Waits cannot be captured") as error:
            CudaGraph(Waits(), (torch.ones(4, device="cuda"),))
        one_line(error)
        assert CudaGraph(Double(), (torch.ones(4, device="cuda"),)).signatures  # the device is none the worse

    def test_threads_on_their_own_streams_get_their_own_answers(self):
        run, wrong = CudaGraph(POST), []

        def work(seed):
            arguments = raw(2, seed=seed)
            expected = POST(*arguments).queries
            with torch.cuda.stream(torch.cuda.Stream()):
                placed = [value.cuda() for value in arguments]
                for _ in range(50):
                    if not torch.equal(run(*placed).queries.cpu(), expected):
                        wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_eviction_and_new_captures_keep_answers_right(self):
        run = CudaGraph(POST, max_signatures=2)
        for batch in (1, 2, 3, 1, 2, 3):
            arguments = raw(batch)
            found = run(*(value.cuda() for value in arguments))
            assert_same(found.queries.cpu(), POST(*arguments).queries)
        assert len(run.signatures) == 2
