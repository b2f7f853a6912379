"""What the system refuses, memory or threads, is an exception in Python or goes unnoticed: no process ends by it."""

import os
import subprocess
import sys

import pytest

from detpost.kernels.cpu import library

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's"),
    pytest.mark.skipif(library.missing() is not None, reason="no C++ kernels"),
]

WITHOUT_MEMORY = """
import resource, sys
import torch
from detpost import DecodeSpec
from detpost.kernels.cpu import decode, distance, erosion, library, nms, selection, surface

THREADS = {threads}
torch.set_num_threads(THREADS)
if not {openmp}:
    library._openmp_parallel = lambda: None
logits, boxes = torch.zeros(THREADS, 15_000, 1000), torch.zeros(THREADS, 15_000, 4)
halves, long = logits.to(torch.bfloat16), torch.ones(1, 1, 1_000_000, 2)
fields, ids = torch.rand(THREADS, 1, 1500, 1500), torch.ones(THREADS, 1, 1500, 1500, dtype=torch.int64)
volume = torch.ones(1, 1, 300, 300, 300, dtype=torch.bool)
many, scores = torch.zeros(THREADS, 1_500_000, 4), torch.rand(THREADS, 1_500_000)

# Each call needs half as much again and more, beside what it is given and gives and what PyTorch makes before.
ROOM = 32 << 20
BY_TORCH = dict(surface=2 * volume.numel())
CALLS = dict(
    select=lambda: selection.select(logits.flatten(1), 5),
    decode=lambda: decode.decode(halves, boxes, None, DecodeSpec(top_k=5)),
    decode_with_background=lambda: decode.decode(logits, boxes, None, DecodeSpec(top_k=5, background="last")),
    erosion=lambda: erosion.erosion(fields, ids, torch.arange(1), [1.0] * 10, 0.2, 2, None, False, True),
    distance=lambda: distance.squared_distance(long > 0, (1.0, 1.0)),
    boundary_distance=lambda: distance.boundary_distance(long, (1.0, 1.0)),
    surface=lambda: surface.surface_distances(volume, volume, (1.0, 1.0, 1.0)),
    nms=lambda: nms.keep(many, scores, None, None, 0.5, False),
)
selection.select(torch.rand(THREADS, 40_000), 3)  # the threads are there, and whatever is made once
free = resource.getrlimit(resource.RLIMIT_AS)
for name, call in CALLS.items():
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM + BY_TORCH.get(name, 0), free[1]))
    try:
        call()
    except MemoryError as error:
        print(name, error)
    else:
        sys.exit(name + " needs less memory than this test thinks")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, free)
    small = selection.select(torch.tensor([[1.0, 3.0, 2.0]] * THREADS), 2)
    assert small.tolist() == [[1, 2]] * THREADS, small
"""


def run(code):
    # What a call frees goes back to the system: none of it is there, beside the limit, for the next.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)


@pytest.mark.parametrize(("threads", "openmp"), [(1, True), (2, True), (2, False)])
def test_memory_that_is_not_given_is_a_memory_error(threads, openmp):
    found = run(WITHOUT_MEMORY.format(threads=threads, openmp=openmp))
    assert found.returncode == 0, (found.returncode, found.stderr[-600:])
    lines = found.stdout.splitlines()
    assert len(lines) == 8
    for line in lines:
        assert "detpost's C++ kernels got no memory" in line
        assert "DETPOST_KERNEL=aten" in line


WITHOUT_THREADS = """
import resource
import torch
from detpost.kernels.cpu import library, selection

library._openmp_parallel = lambda: None
rows = torch.rand(4, 40_000)
torch.set_num_threads(4)
expected = rows.argsort(dim=1, descending=True, stable=True)[:, :5]
library.missing()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
free = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20), free[1]))  # less than a thread's stack
found = selection.select(rows, 5)
resource.setrlimit(resource.RLIMIT_AS, free)
assert torch.equal(found, expected)
"""


def test_threads_that_are_not_given_are_done_without():
    found = run(WITHOUT_THREADS)
    assert found.returncode == 0, (found.returncode, found.stderr[-600:])


def test_a_failure_of_any_other_kind_is_a_runtime_error():
    with pytest.raises(
        RuntimeError, match=r"detpost_select of detpost's C\+\+ kernels failed: set DETPOST_KERNEL=aten"
    ):
        library._raise_failure(2, library.function("detpost_select"), ())
