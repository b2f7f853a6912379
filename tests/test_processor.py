"""A level that is asked for is the one that computes: else `make test-processors` would run the same thing again."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from detpost.kernels.cpu import library
from tests import processor

ROOT = Path(__file__).parents[1]


def test_what_computes_is_what_the_environment_asks_for(capfd):
    assert processor.in_use(lambda: capfd.readouterr().out) == processor.expected(os.environ)


@pytest.mark.parametrize("variable", processor.LEVELS)
def test_each_level_differs_from_the_next_or_is_skipped_with_the_reason(variable):
    distinct = [value for value in processor.LEVELS[variable] if not processor.skipped(variable, value)]
    found = [str(processor.expected({variable: value})) for value in distinct]
    assert len(set(found)) == len(found)
    assert str(processor.expected({})) not in found


def test_levels_that_the_processor_lacks_are_left_out(monkeypatch):
    monkeypatch.setattr(processor, "widest", lambda: "avx2")
    if library.missing() is None:
        assert processor.skipped("DETPOST_NATIVE", "avx512") == "this processor has no AVX-512"
        assert processor.skipped("DETPOST_NATIVE", "avx2") == "the same as it is"
        assert processor.skipped("DETPOST_NATIVE", "baseline") is None
    assert processor.skipped("ONEDNN_MAX_CPU_ISA", "AVX2") == "the same as it is"


@pytest.mark.slow
def test_the_command_lists_every_level_and_leaves_none_unsaid():
    command = [sys.executable, "scripts/test_processors.py", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for variable, values in processor.LEVELS.items():
        for value in filter(None, values):
            (said,) = re.findall(rf"^  {variable}={value}  +(.+)$", done.stdout, flags=re.MULTILINE)
            assert said.startswith(("tests/", "skipped: "))


def test_a_level_that_fails_is_named_and_is_the_exit_status(monkeypatch, capsys):
    script = runpy.run_path(str(ROOT / "scripts" / "test_processors.py"))
    level, outcome, run_all = script["Level"], script["Outcome"], script["run_all"]
    counts = {"passed": 3, "failed": 0, "skipped": 1}

    def run(one):
        return outcome(counts, one.environment != {"DETPOST_NATIVE": "avx2"}, 1.0, "")

    monkeypatch.setitem(run_all.__globals__, "run", run)
    sound = [
        level({}),
        level({"DETPOST_NATIVE": "baseline"}),
        level({"DETPOST_NATIVE": "avx512"}, skipped="no AVX-512"),
    ]
    assert run_all(sound) == 0
    assert "FAILED" not in capsys.readouterr().out
    assert run_all([*sound, level({"DETPOST_NATIVE": "avx2"})]) == 1
    assert capsys.readouterr().out.endswith("9 passed, 0 failed, 3 skipped\nFAILED at: DETPOST_NATIVE=avx2\n")


def test_every_test_that_a_level_names_is_there():
    script = runpy.run_path(str(ROOT / "scripts" / "test_processors.py"))
    named = {path for level in script["levels"]() for path in level.tests}
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.slow
def test_a_level_runs_its_tests_and_the_one_that_watches_it():
    script = runpy.run_path(str(ROOT / "scripts" / "test_processors.py"))
    outcome = script["run"](script["Level"]({"DETPOST_KERNEL": "numpy"}, tests=()))
    assert outcome.is_good, outcome.said
    assert outcome.counts == {"passed": 1, "failed": 0, "skipped": 0}
