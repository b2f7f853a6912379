"""How the tests of the Triton kernels run: on the CPU in a process of their own, and on a GPU in the ordinary one.

Triton decides when it is imported whether kernels are interpreted, and Inductor may have imported it before. So each
test module has one test that runs the module again with ``TRITON_INTERPRET=1``; there the tests that take ``device``
run on the CPU, and elsewhere on a GPU, under the marker ``gpu``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _plain_references(monkeypatch):
    """Hold the kernels to PyTorch's own operators: left alone, a reference would run on kernels too, even on these."""
    monkeypatch.setenv("DETPOST_KERNEL", "aten")


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def assert_plain(reference, *arguments) -> None:
    """Refuse a reference that reaches any operator of this project's own."""
    with _Operators() as seen:
        reference(*arguments)
    assert seen.names, "nothing was seen to run"
    assert not [name for name in seen.names if name.startswith("detpost")]


on_each_device = pytest.mark.parametrize("device", DEVICES)
in_the_ordinary_process = pytest.mark.skipif(INTERPRETED, reason="about kernels that are not interpreted")


def assert_passes_interpreted(path: str, at_least: int) -> None:
    """Run a test module under the interpreter; ``at_least`` so many of its tests must have run and passed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", path],
        env=environment | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=500,
    )
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert passed, run.stdout[-2000:]
    assert int(passed[1]) >= at_least, run.stdout[-2000:]


def assert_compiles(kernel, types: list[str], constants: dict[str, int], warps: int, path: Path, monkeypatch) -> None:
    """Compile a kernel to machine code for compute capability 9.0, which needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    try:
        assembler = triton.knobs.nvidia.ptxas
    except RuntimeError:
        assembler = None
    if assembler is None:
        pytest.skip("no ptxas beside Triton")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(path))
    names = kernel.arg_names
    free = [name for name in names if name not in constants]
    assert len(free) == len(types), (free, types)
    signature = {name: "constexpr" if name in constants else types[free.index(name)] for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert ".target sm_90" in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0


def written_arguments(function, inputs, monkeypatch) -> list[list[str]]:
    """Trace a call on fake CUDA tensors, as a compiler does, and give which arguments each kernel is seen to write to.

    A compiler copies what a kernel writes to and the caller still holds: an input in these lists costs a copy.
    """
    triton = pytest.importorskip("triton")
    from torch._subclasses import FakeTensorMode
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    with FakeTensorMode():
        fakes = [torch.empty(value.shape, dtype=value.dtype, device="cuda") for value in inputs]
        graph = make_fx(dispatch_functionalize(function))(*fakes).graph
    kernels = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    return [sorted(node.kwargs["tensors_to_clone"]) for node in kernels]


def compiled_whole(function):
    """Compile without graph breaks; Inductor on a GPU, where it sees through the operator."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")


def replayed(function, *inputs):
    """Capture a call in a CUDA graph, overwrite the inputs, restore them, replay; give what the graph wrote."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    kept = [value.clone() for value in inputs]
    for value in inputs:
        value.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)
    for value, copy in zip(inputs, kept, strict=True):
        value.copy_(copy)
    graph.replay()
    torch.cuda.synchronize()
    return outputs
