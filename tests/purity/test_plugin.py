"""Another project's tests can use the fixture and the marker, and the plugin costs its start-up nothing."""

import importlib.metadata
import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

MODULE = "detpost.purity.pytest_plugin"

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


def test_the_plugin_and_the_static_half_do_not_import_torch_themselves():
    code = (
        "import sys, types, importlib.util as u\n"
        "package = types.ModuleType('detpost'); package.__path__ = [sys.argv[1]]; sys.modules['detpost'] = package\n"
        f"import {MODULE}, detpost.purity, detpost.purity.static, detpost.purity.command\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    import detpost

    subprocess.run([sys.executable, "-c", code, next(iter(detpost.__path__))], check=True, timeout=60)
