"""Side by side with the installed peers: one process, rotating inputs, medians and ratios, peak memory."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.inputs import ROTATED, Case, Size
from benchmarks.tasks import Task, task_of, tasks

__all__ = ["Row", "run_benchmark", "times"]

_TURN_S = 0.1


@dataclass(frozen=True)
class Row:
    """One contender on one input size.

    Args:
        task: what was timed.
        size: shape of the input.
        name: the contender.
        microseconds: median over the runs.
        ratio: the contender's time over detpost's: how many times slower it is.
        device: ``"cpu"`` or ``"cuda"``.
        peak_bytes: memory that one run takes beyond what was there before it, where it was measured.
    """

    task: str
    size: Size
    name: str
    microseconds: float
    ratio: float
    device: str = "cpu"
    peak_bytes: int | None = None


def run_benchmark(
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
    device: str = "cpu",
    only: str | None = None,
) -> list[Row]:
    """Time everything that is installed.

    Args:
        quick: the small sizes and few runs.
        progress: called with one line before each size.
        device: ``"cpu"`` or ``"cuda"``.
        only: the name of one task.

    Returns:
        One row per task, size and contender; detpost's own has ratio 1.
    """
    say = progress or (lambda _: None)
    seconds, longest = (0.3, 3.0) if quick else (0.6, 60.0)
    rows: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task in tasks(device, quick, only):
            say(f"{task.name} {times(task.size)}")
            task = replace(task, contenders=_that_run(task, say))
            timed = _race(task.name, task.size, task.contenders, seconds, device, longest)
            peaks = _peaks(task, device)
            rows += [replace(row, peak_bytes=peaks.get(row.name)) for row in timed]
    return rows


def times(size: Size) -> str:
    """Write a size as 1x300x80."""
    return "x".join(map(str, size))


def _that_run(task: Task, say: Callable[[str], None]) -> dict[str, Case]:
    """Run each contender twice; a peer of a version that these inputs do not suit is named and left out."""
    able: dict[str, Case] = {}
    for name, case in task.contenders.items():
        try:
            case(0)
            case(1)
        except Exception as error:
            if name.startswith("detpost"):
                raise
            why = " ".join(f"{type(error).__name__}: {error}".split())
            say(f"{task.name} {times(task.size)}: without {name}, which fails ({why})")
        else:
            able[name] = case
    return able


def _race(
    task: str,
    size: Size,
    contenders: dict[str, Case],
    seconds: float,
    device: str = "cpu",
    longest: float = 60.0,
) -> list[Row]:
    """Time all contenders in turns, so that a slow spell of the machine hits every one of them.

    A turn of a quick contender is all inputs in a row: its own code stays in the caches, as in a loop of its own.
    What runs before a cold call may take a thousand times as long as the call: no race lasts much beyond ``longest``.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    spent, turn, last = 0.0, 0, time.perf_counter() + longest
    while turn < 3 or (spent < seconds * len(contenders) and time.perf_counter() < last):
        for name, case in contenders.items():
            end = time.perf_counter() + _TURN_S
            for step in range(ROTATED):
                prepare = getattr(case, "prepare", None)
                if prepare is not None:
                    prepare()
                _wait(device)
                start = time.perf_counter()
                case((turn + step) % ROTATED)
                _wait(device)
                taken[name].append(time.perf_counter() - start)
                spent += taken[name][-1]
                if time.perf_counter() > end:
                    break
        turn += 1
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return [Row(task, size, name, value * 1e6, value / medians["detpost"], device) for name, value in medians.items()]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peaks(task: Task, device: str) -> dict[str, int]:
    """Measure the memory of one run of each: on a GPU by PyTorch's count, on a CPU by what a process grows."""
    if not task.with_memory:
        return {}
    if device == "cuda":
        return {name: _peak_on_gpu(case) for name, case in task.contenders.items()}
    if not Path("/proc/self/clear_refs").exists():
        return {}
    # A process of its own: what an earlier run freed would hide what this one takes.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.race", json.dumps([task.name, task.size])],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in (os.getcwd(), *sys.path) if path)},
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    return found


def _peak_on_gpu(case: Case) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peaks_in_this_process(name: str, size: Size) -> dict[str, int]:
    """Measure each contender in a child of its own, which begins with nothing but the inputs."""
    torch.set_num_threads(1)  # threads do not survive a fork
    small = (1, 2, *(8 for _ in size[2:])) if len(size) > 3 else (1, 20, 10)
    first, whole = task_of(name, small), task_of(name, size)
    peaks: dict[str, int] = {}
    for contender in whole.contenders:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, str(_peak_of(first, whole, contender)).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as said:
            peaks.update({contender: int(value)} if (value := said.read()) else {})
        os.waitpid(child, 0)
    return peaks


def _peak_of(small: Task, whole: Task, contender: str) -> int:
    """Run a small size first, so that code and tables are there, then measure the growth of the asked one."""
    # Compiling is not running, and another size would be compiled anew.
    (whole if "compiled" in contender else small).contenders[contender](0)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what comes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    whole.contenders[contender](0)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    asked, shape = json.loads(sys.argv[1])
    print(json.dumps(_peaks_in_this_process(asked, tuple(shape))))
