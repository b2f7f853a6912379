"""What an installation brings: the wheel, the extras, the pins."""

import ctypes
import fnmatch
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What the decode as one C++ file is put together from, and no more.
SHIPPED_SOURCES = {
    *("common.h", "arithmetic.h", "best_of_row.h", "softmax.h", "decode.h", "decode.cpp", "decode_call.h")
}
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements):
    """Give the distributions that requirements name, extras of detpost itself followed."""
    found = set()
    for requirement in requirements:
        name, extras = re.match(r"([\w.-]+)(?:\[([\w, -]+)\])?", requirement).groups()
        inner = [EXTRAS[extra.strip()] for extra in extras.split(",")] if name == "detpost" else []
        found |= {plain(name)} if name != "detpost" else set().union(*map(names, inner))
    return found


def build_wheel(folder, **environment):
    """Build a wheel from a copy of the checkout, so that no earlier build is found in it."""
    source = folder / "source"
    leave_out = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "detpost", source / "detpost", ignore=leave_out)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(source)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel, done.stdout + done.stderr


def test_a_new_kernels_sources_stay_out_of_the_wheel():
    patterns = PYPROJECT["tool"]["setuptools"]["exclude-package-data"]["detpost.kernels.cpu"]
    sources = [path.name for end in ("cpp", "h") for path in (ROOT / "detpost" / "kernels" / "cpu").glob(f"*.{end}")]
    left = {name for name in sources if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    assert left == SHIPPED_SOURCES


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_wheel_serves_every_python_of_its_platform(tmp_path):
    wheel, said = build_wheel(tmp_path)
    assert re.fullmatch(r"detpost-[\d.]+-py3-none-(?!any).+\.whl", wheel.name)
    assert "experimental" not in said
    with zipfile.ZipFile(wheel) as opened:
        (library,) = [name for name in opened.namelist() if "/_native" in name]
        assert re.fullmatch(r"detpost/kernels/cpu/_native\.(so|pyd)", library)
        (extension,) = [name for name in opened.namelist() if "/_tensors" in name]
        assert re.fullmatch(r"detpost/_tensors\.(abi3\.so|pyd)", extension)
        assert {Path(name).name for name in opened.namelist() if name.endswith((".cpp", ".h"))} == SHIPPED_SOURCES
        loaded = opened.extract(library, tmp_path)
        names = set(re.findall(rb"\b_?Py[A-Z_]\w+", Path(opened.extract(extension, tmp_path)).read_bytes()))
    ctypes.CDLL(loaded).detpost_interface()
    # Without a name of CPython's in it there is nothing that another version could lack.
    assert not re.search(rb"Py[A-Z_]\w+|libpython", Path(loaded).read_bytes())
    # The extension keeps to the limited interface, of whose private names there are these; the last is inline.
    assert b"PyModule_Create2" in names
    assert {name for name in names if name.startswith(b"_Py")} <= {
        *(b"_Py_Dealloc", b"_Py_NoneStruct", b"_Py_TrueStruct", b"_Py_FalseStruct", b"_Py_NewRef")
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is looked for on PATH there")
def test_without_a_compiler_there_is_a_wheel_all_the_same(tmp_path):
    wheel, _ = build_wheel(tmp_path, CC="false", CXX="false")
    with zipfile.ZipFile(wheel) as opened:
        assert "detpost/__init__.py" in opened.namelist()
        assert {"detpost/web/static/index.html", "detpost/web/static/src/index.js"} <= {*opened.namelist()}
        assert not [name for name in opened.namelist() if "/_native" in name or "/_tensors" in name]


def test_every_dependency_of_the_main_environment_is_pinned():
    wanted = names([*PROJECT["dependencies"], "detpost[all,dev,scale,quantize]"])
    assert wanted - {plain(name) for name in PINS} == set()


def test_a_pin_is_a_version_and_no_address():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line


def test_all_is_what_serves_on_a_plain_machine():
    everything = set(EXTRAS) - {"all", "dev", "docs"}
    assert names(["detpost[all]"]) == names([f"detpost[{','.join(everything - {'scale', 'quantize', 'edge'})}]"])
    assert not names([*PROJECT["dependencies"], "detpost[all,dev]"]) & {"ray", "nncf", "executorch", "litert-torch"}


def test_every_floor_is_stated():
    for requirement in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]:
        assert requirement.startswith("detpost[") or re.search(r"[>=]=", requirement), requirement


def test_the_oldest_versions_are_the_floors():
    done = subprocess.run(
        [sys.executable, "scripts/oldest_versions.py"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    pins = dict(line.split("==") for line in done.stdout.split())
    assert {plain(name) for name in pins} == names([*PROJECT["dependencies"], "detpost[all,dev]"])
    for requirement in [*PROJECT["dependencies"], *EXTRAS["onnx"], *EXTRAS["hf"]]:
        name, floor = requirement.split(">=")
        assert pins[name] == floor


def test_a_requirement_without_a_floor_is_refused():
    scripts = runpy.run_path(str(ROOT / "scripts" / "oldest_versions.py"))
    with pytest.raises(ValueError, match=r"expected NAME>=FLOOR or NAME==VERSION .* got 'numpy'"):
        scripts["oldest"]({"name": "x", "dependencies": ["numpy"], "optional-dependencies": {}}, ())
    table = {"name": "x", "dependencies": ["a>=1.9"], "optional-dependencies": {"e": ["x[f]"], "f": ["a>=1.10,<2"]}}
    assert scripts["oldest"](table, ("e",)) == {"a": "1.10"}
