"""Run the numeric tests once for each level of instructions and each form of the kernels that this machine has.

    python scripts/test_processors.py           # what `make test-processors` does
    python scripts/test_processors.py --list    # what it would run, and what it would skip and why

Each level is a process of its own, and a test in it watches what computes there. Exit status 1 if a test fails at any.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import processor  # noqa: E402

PROBE = "test_what_computes_is_what_the_environment_asks_for"
SELECTING = ("tests/test_selection.py", "tests/test_postprocess.py", "tests/test_nms.py", "tests/test_parity.py")
LOSSES = ("tests/losses", "tests/metrics")
EVERYTHING = (*SELECTING, *LOSSES, "tests/kernels", "tests/reference")
# The Triton kernels are held to PyTorch's operators, whatever the C++ ones do; NumPy has no form of the losses.
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


def run(level: Level) -> tuple[dict[str, int], bool]:
    """Run the tests of a level.

    Returns:
        How many passed, failed and were skipped, and whether all is well: nothing failed, and the level took effect.
    """
    environment = {name: value for name, value in os.environ.items() if name not in processor.LEVELS}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        arguments = ["-m", "pytest", "-q", "-r", "fE", "-n", "auto", "--dist", "worksteal", f"--junit-xml={results}"]
        done = subprocess.run(
            [sys.executable, *arguments, "-m", "not gpu", f"tests/test_processor.py::{PROBE}", *level.tests],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1"} | level.environment,
        )
        cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    outcomes = {case: {child.tag for child in case} & {"failure", "error", "skipped"} for case in cases}
    counts = {
        "passed": sum(not outcome for outcome in outcomes.values()),
        "failed": sum(bool(outcome & {"failure", "error"}) for outcome in outcomes.values()),
        "skipped": sum(outcome == {"skipped"} for outcome in outcomes.values()),
    }
    probed = any(case.get("name") == PROBE and not outcome for case, outcome in outcomes.items())
    return counts, done.returncode == 0 and probed


def run_all(chosen: list[Level]) -> int:
    """Run the levels one after the other, and print a table of them."""
    width = max(len(level.name) for level in chosen)
    lines, well, total = [], True, dict.fromkeys(("passed", "failed", "skipped"), 0)
    for level in chosen:
        if level.skipped:
            lines.append(f"{level.name:{width}}  skipped: {level.skipped}")
            continue
        print(f"\n--- {level.name}", flush=True)
        start = time.perf_counter()
        counts, good = run(level)
        well = well and good
        total = {name: total[name] + counts[name] for name in total}
        told = ", ".join(f"{count} {name}" for name, count in counts.items())
        took = f"{time.perf_counter() - start:.0f} s"
        lines.append(f"{level.name:{width}}  {'ok' if good else 'NOT OK'}: {told}, {took}")
    print("\n" + "\n".join(lines))
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 0 if well else 1


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
