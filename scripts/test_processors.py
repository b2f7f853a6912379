"""Run the numeric tests once for each level of instructions and each form of the kernels that this machine has.

    python scripts/test_processors.py         # what `make test-processors` does
    python scripts/test_processors.py --list  # what it would run, and what it would skip and why

Each level is a process of its own, as many at a time as there are cores, and a test in it watches what computes there.
Exit status 1 if a test fails at any level; the last line names the level. Left to `make test`, which takes the
processor as it is, are slow tests, whatever compiles or exports (nearly all of that time is a compiler's, and what it
makes calls the same kernels), and the tests that start a process at each level themselves.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import processor  # noqa: E402

PROBE = "test_what_computes_is_what_the_environment_asks_for"
SELECTING = ("tests/test_selection.py", "tests/test_postprocess.py", "tests/test_nms.py", "tests/test_parity.py")
LOSSES = ("tests/losses", "tests/metrics")
LEFT_OUT = (
    *("export", "compile", "dynamo", "inductor", "onnx", "is_pure", "in_training"),
    *("every_level", "every_instruction_level", "not_given_is_a_memory_error", "not_given_are_done_without"),
    *("two_processes", "forked_child"),
)
# The Triton kernels are interpreted here, by NumPy, which none of the levels changes.
EVERYTHING = (*SELECTING, *LOSSES, "tests/kernels/cpu", "tests/reference")
# What PyTorch's own operators compute is the same at every level of the C++; NumPy has no form of the losses.
TESTS = {
    "DETPOST_NATIVE": (*SELECTING, *LOSSES, "tests/kernels/cpu"),
    "DETPOST_KERNEL": (*SELECTING, *LOSSES),
    "DETPOST_KERNEL=numpy": SELECTING,
}


@dataclass
class Level:
    """One run.

    Args:
        environment: the variables that it sets.
        tests: what it runs.
        skipped: why it does not.
    """

    environment: dict[str, str]
    tests: tuple[str, ...] = EVERYTHING
    skipped: str | None = None

    @property
    def name(self) -> str:
        """Give the variables as they are typed."""
        return " ".join(f"{name}={value}" for name, value in self.environment.items()) or "as it is"


def levels() -> list[Level]:
    """Give every level of every variable once, the others as they are, and one with all that PyTorch has lowered."""
    found = [Level({})]
    for variable, values in processor.LEVELS.items():
        for value in filter(None, values):
            tests = TESTS.get(f"{variable}={value}", TESTS.get(variable, EVERYTHING))
            found.append(Level({variable: value}, tests, processor.skipped(variable, value)))
    lowest = {"DETPOST_KERNEL": "aten", "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"}
    usable = not any(level.skipped for level in found if level.name.startswith(("ONEDNN_MAX_CPU_ISA=S", "ATEN_")))
    return [*found, Level(lowest, TESTS["DETPOST_KERNEL"], None if usable else "its parts are skipped")]


@dataclass
class Outcome:
    """What came of a level.

    Args:
        counts: how many tests passed, failed and were skipped.
        is_good: nothing failed, and the level took effect.
        seconds: how long it took.
        said: what pytest printed.
    """

    counts: dict[str, int]
    is_good: bool
    seconds: float
    said: str


def run(level: Level) -> Outcome:
    """Run the tests of a level in one process."""
    start = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name not in processor.LEVELS}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        arguments = ["-q", "-r", "fE", "-p", "no:cacheprovider", f"--junit-xml={results}", "-m", "not gpu and not slow"]
        arguments += ["-k", f"not ({' or '.join(LEFT_OUT)})"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, f"tests/test_processor.py::{PROBE}", *level.tests],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1"} | level.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    outcomes = {case: {child.tag for child in case} & {"failure", "error", "skipped"} for case in cases}
    counts = {
        "passed": sum(not outcome for outcome in outcomes.values()),
        "failed": sum(bool(outcome & {"failure", "error"}) for outcome in outcomes.values()),
        "skipped": sum(outcome == {"skipped"} for outcome in outcomes.values()),
    }
    probed = any(case.get("name") == PROBE and not outcome for case, outcome in outcomes.items())
    return Outcome(counts, done.returncode == 0 and probed, time.perf_counter() - start, done.stdout)


def run_all(chosen: list[Level]) -> int:
    """Run the levels, print a table of them and give the exit status."""
    width = max(len(level.name) for level in chosen)
    lines = [f"{level.name:{width}}  skipped: {level.skipped}" for level in chosen if level.skipped]
    total, bad = dict.fromkeys(("passed", "failed", "skipped"), 0), []
    worth = [level for level in chosen if not level.skipped]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for level, outcome in zip(worth, pool.map(run, worth), strict=True):
            print(f"\n--- {level.name}\n{outcome.said.rstrip()}", flush=True)
            total = {name: total[name] + count for name, count in outcome.counts.items()}
            told = ", ".join(f"{count} {name}" for name, count in outcome.counts.items())
            good = "ok" if outcome.is_good else "NOT OK"
            lines.append(f"{level.name:{width}}  {good}: {told}, {outcome.seconds:.0f} s")
            bad += [] if outcome.is_good else [level.name]
    print("\n" + "\n".join(lines))
    print(", ".join(f"{count} {name}" for name, count in total.items()))
    if bad:
        print(f"FAILED at: {', '.join(bad)}")
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    arguments = parser.parse_args()
    chosen = levels()
    width = max(len(level.name) for level in chosen)
    here = ", ".join(f"{part}: {what or 'not there'}" for part, what in processor.expected({}).items())
    print(f"As it is, this machine computes with: {here}.")
    for level in chosen:
        print(f"  {level.name:{width}}  {'skipped: ' + level.skipped if level.skipped else ' '.join(level.tests)}")
    sys.stdout.flush()
    return 0 if arguments.list else run_all(chosen)


if __name__ == "__main__":
    sys.exit(main())
