"""Another project's tests can use the fixture and the marker, and the plugin costs its start-up nothing."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  pytester puts sys.modules back after each run; it cannot be loaded a second time

pytest_plugins = ["pytester"]

MODULE = "detpost.purity.pytest_plugin"
ROOT = Path(__file__).resolve().parents[2]

TESTS = """
import pytest, torch
x = torch.zeros(2, 3)

def shifted(x):
    x += 1
    return x

def test_pure(purity):
    assert purity(torch.nn.Sigmoid(), x).ok

def test_not_pure(purity):
    purity(shifted, x, only=("writes",))

@pytest.mark.purity(allow=["DP001"], only=("writes",))
def test_allowed_by_the_marker(purity):
    purity(shifted, x)

@pytest.mark.purity(allow=["DP001"], only=("writes",))
class TestClass:
    @pytest.mark.purity(allow=[])
    def test_closest_marker_decides(self, purity):
        purity(shifted, x)

    def test_the_call_decides_over_the_marker(self, purity):
        purity(shifted, x, allow="DP010")
"""


@pytest.fixture
def options():
    """The plugin comes by itself where the package's entry point is installed."""
    installed = any(point.value == MODULE for point in importlib.metadata.entry_points(group="pytest11"))
    return [] if installed else ["-p", MODULE]


def test_fixture_and_marker_pass_and_fail_as_they_say(pytester, options):
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_inprocess(*options, "--strict-markers", "-q", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=3)
    result.stdout.fnmatch_lines(["*shifted: not pure (1 error)*", "*DP001*writes an input (x) float32*"])
    result.stdout.no_fnmatch_line("*assert_subject_is_pure*")


def test_the_marker_is_listed(pytester, options):
    result = pytester.runpytest_inprocess(*options, "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.purity(allow=(), gradcheck=False, only=None)*"])


LOADED = """
import json, pathlib, sys

def pytest_unconfigure(config):
    pathlib.Path("loaded.json").write_text(json.dumps(sorted(sys.modules)))
"""


@pytest.fixture
def loaded(tmp_path, options):
    """The modules that a process holds after a run of pytest with the plugin active, over files given as text."""

    def run(plugins=("-p", MODULE), **files):
        for name, text in {"conftest": LOADED, **files}.items():
            (tmp_path / f"{name}.py").write_text(text)
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugins]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode in (0, 5), done.stdout + done.stderr  # 5: no tests
        return set(json.loads((tmp_path / "loaded.json").read_text()))

    return run


def test_a_suite_that_does_not_use_the_plugin_loads_nothing_but_its_file(loaded):
    without = loaded(plugins=())
    for files in ({}, {"test_other": "def test_nothing():\n    assert True\n"}):
        added = loaded(**files) - without
        assert {name for name in added if name.split(".")[0] == "detpost"} == {"detpost", "detpost.purity", MODULE}
        assert not {name.split(".")[0] for name in added} & {"torch", "numpy", "rich", "typer"}


def test_the_static_half_and_the_command_do_not_import_torch():
    code = (
        "import sys, detpost.purity.static, detpost.purity.command\n"
        "detpost.purity.static.check_source('import torch')\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=environment)
