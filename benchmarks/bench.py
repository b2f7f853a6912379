"""Side by side with the installed peers: one process, rotating inputs, medians and ratios, peak memory."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.cases import ROTATED, Case, Size, Task, is_installed, task_of, tasks

__all__ = ["Row", "run_benchmark", "write_json", "write_plot"]

_TURN_S = 0.1
_PEERS = ("torch", "numpy", "triton", "kornia", "transformers", "rfdetr", "monai", "scipy")


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
        quick: the small sizes and few runs, under a minute on two cores; the whole takes under five.
        progress: called with one line before each size.
        device: ``"cpu"`` or ``"cuda"``.
        only: the name of one task.

    Returns:
        One row per task, size and contender; detpost's own has ratio 1.
    """
    say = progress or (lambda _: None)
    seconds = 0.3 if quick else 0.6
    rows: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task in tasks(device, quick, only):
            say(f"{task.name} {_times(task.size)}")
            timed = _race(task.name, task.size, task.contenders, seconds, device)
            peaks = _peaks(task, device)
            rows += [replace(row, peak_bytes=peaks.get(row.name)) for row in timed]
    return rows


def _times(size: Size) -> str:
    return "x".join(map(str, size))


def _race(task: str, size: Size, contenders: dict[str, Case], seconds: float, device: str = "cpu") -> list[Row]:
    """Time all contenders in turns, so that a slow spell of the machine hits every one of them.

    A turn of a quick contender is all inputs in a row: its own code stays in the caches, as in a loop of its own.
    """
    for case in contenders.values():
        case(0)
        case(1)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    spent, turn = 0.0, 0
    while spent < seconds * len(contenders) or turn < 3:
        for name, case in contenders.items():
            end = time.perf_counter() + _TURN_S
            for step in range(ROTATED):
                _wait(device)
                start = time.perf_counter()
                case((turn + step) % ROTATED)
                _wait(device)
                times[name].append(time.perf_counter() - start)
                spent += times[name][-1]
                if time.perf_counter() > end:
                    break
        turn += 1
    medians = {name: statistics.median(values) for name, values in times.items()}
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
        [sys.executable, "-W", "ignore", "-m", "benchmarks.bench", json.dumps([task.name, task.size])],
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


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the rows with the machine, the versions and the date."""
    from detpost import kernels

    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "kernel": kernels.kind_for("cpu"),
        **gpu,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PEERS if is_installed(name)},
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw one panel per task: time of each contender over the sizes, on a logarithmic scale."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the plot needs matplotlib: pip install 'detpost[viz]'") from None
    names = list(dict.fromkeys(row.task for row in rows))
    across = min(4, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(5.2 * across, 4.2 * down), layout="constrained")
    for position, task in enumerate(names, start=1):
        axes = figure.add_subplot(down, across, position)
        of_task = [row for row in rows if row.task == task]
        sizes = list(dict.fromkeys(row.size for row in of_task))
        contenders = list(dict.fromkeys(row.name for row in of_task))
        if len(sizes) == 1:  # no line through one point
            axes.barh(contenders[::-1], [row.microseconds for row in reversed(of_task)])
            axes.set_xscale("log")
            axes.set_xlabel(f"median, microseconds, at {_times(sizes[0])}")
            axes.grid(visible=True, axis="x", alpha=0.2)
        else:
            for name in contenders:
                times = {row.size: row.microseconds for row in of_task if row.name == name}
                places = [place for place, size in enumerate(sizes) if size in times]
                width = 2.5 if name == "detpost" else 1.2
                axes.plot(places, [times[sizes[place]] for place in places], label=name, marker="o", linewidth=width)
            axes.set_xticks(range(len(sizes)), [_times(size) for size in sizes], rotation=30, ha="right")
            axes.set_yscale("log")
            axes.set_ylabel("median, microseconds")
            axes.legend(fontsize=8)
            axes.grid(visible=True, which="both", alpha=0.2)
        axes.set_title(task, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    asked, shape = json.loads(sys.argv[1])
    print(json.dumps(_peaks_in_this_process(asked, tuple(shape))))
