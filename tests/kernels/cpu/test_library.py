"""The library of C++ kernels: its threads, its instruction levels, and the choice of it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from detpost import DecodeSpec, DetectionPostProcessor, kernels
from detpost.kernels import serving
from detpost.kernels.cpu import library
from detpost.losses import distance_transform_edt

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"the C++ kernels are {library.missing()}")


@pytest.fixture
def forced(monkeypatch):
    return lambda kind: monkeypatch.setenv("DETPOST_KERNEL", kind)


def test_threads_that_call_at_once_get_their_own_answers(forced):
    forced("native")
    post = DetectionPostProcessor(DecodeSpec())
    inputs = [(torch.randn(8, 300, 80), torch.rand(8, 300, 4), None) for _ in range(4)]
    masks = [torch.rand(1, 3, 150, 150) < 0.5 for _ in range(4)]
    expected = [(post(*given), distance_transform_edt(mask)) for given, mask in zip(inputs, masks, strict=True)]
    wrong = []

    def work(i):
        for _ in range(15):
            found, distance = post(*inputs[i]), distance_transform_edt(masks[i])
            if not torch.equal(found.queries, expected[i][0].queries) or not torch.equal(distance, expected[i][1]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[3],
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_threads_of_its_own():
    code = """
import os, torch
from detpost import select_top_k
rows = torch.randn(8, 40000)
first = select_top_k(rows, 50)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(select_top_k(rows, 50), first) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    done = run(code, DETPOST_KERNEL="native")
    assert done.returncode == 0, done.stderr[-300:]


@pytest.mark.slow
def test_every_level_of_instructions_gives_the_same_answers():
    code = """
import torch
from detpost import DecodeSpec, DetectionPostProcessor
from detpost.verify.compare import raw_cases
from detpost.kernels.cpu import library
from detpost.losses import distance_transform_edt, hausdorff_er_loss
import hashlib
post, digest = DetectionPostProcessor(DecodeSpec()), hashlib.sha256()
for _, given in raw_cases(60, 50):
    found = post(*given)
    for part in (found.queries, found.labels, found.valid): digest.update(part.numpy().tobytes())
    digest.update(post(given[0].half(), *given[1:]).queries.numpy().tobytes())
torch.manual_seed(0)
digest.update(distance_transform_edt(torch.rand(2, 1, 90, 70) < 0.9).numpy().tobytes())
value = hausdorff_er_loss(torch.rand(2, 2, 30, 30), torch.randint(2, (2, 1, 30, 30)))
print(library.instructions().replace(" ", "_"), digest.hexdigest(), f"{float(value):.5g}")
"""
    found = [run(code, DETPOST_NATIVE=asked) for asked in ("baseline", "avx2", "")]
    assert not [done.stderr[-300:] for done in found if done.returncode]
    said = [done.stdout.split() for done in found]
    assert said[0][0] == "baseline_instructions"
    has = torch.backends.cpu.get_cpu_capability()  # what PyTorch found of the same processor
    assert ("AVX" in said[1][0]) == has.startswith("AVX")
    assert (said[2][0] == "AVX-512") == (has == "AVX512")
    assert said[0][1:] == said[1][1:] == said[2][1:]


def test_the_choice_is_said_and_wrong_ones_are_refused(forced, monkeypatch):
    for kind in ("native", "numpy", "aten"):
        forced(kind)
        assert kernels.kernel_for("cpu") == kind
        assert kernels.kernel_for("mps") == "aten"
    forced("cuda")
    with pytest.raises(ValueError, match="must be one of native, numpy, triton, aten; got 'cuda'"):
        kernels.kernel_for("cpu")
    monkeypatch.setattr(library, "_library", lambda: "not built: reinstall")
    serving._kernel_for.cache_clear()
    forced("native")
    with pytest.raises(RuntimeError, match="DETPOST_KERNEL=native, but detpost"):
        kernels.kernel_for("cpu")
    forced("")
    assert kernels.kernel_for("cpu") == "numpy"
    serving._kernel_for.cache_clear()
