"""The saved notebooks: `make test` runs them with nbmake; here is what their files must hold for a reader."""

import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = [
    "01_postprocess",
    "02_export",
    "03_hausdorff",
    "04_purity",
    "05_quantize",
    "06_scale",
    "07_train",
]
# A folder of the machine that ran it, or a terminal's colour codes.
UNWANTED = re.compile(r"(?<![\w.])/(home|root|tmp|work|Users|usr|opt)/|site-packages|\x1b\[")


@pytest.fixture(params=NOTEBOOKS)
def path(request):
    return FOLDER / f"{request.param}.ipynb"


def test_every_notebook_is_looked_at_here():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NOTEBOOKS


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def texts(path):
    for cell in code_cells(path):
        for output in cell["outputs"]:
            data = output.get("data", {})
            yield "".join(output.get("text", [])) + "".join("".join(v) for k, v in data.items() if k != "image/png")


def test_was_run_from_top_to_bottom(path):
    assert [cell["execution_count"] for cell in code_cells(path)] == list(range(1, len(code_cells(path)) + 1))


def test_saved_no_error_and_no_warning(path):
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"] == []
    assert not any("Warning" in text for text in texts(path))


def test_names_no_place_of_the_machine_that_ran_it(path):
    assert [text for text in texts(path) if UNWANTED.search(text)] == []


def test_is_small_and_has_a_picture(path):
    assert path.stat().st_size < 400_000
    assert any("image/png" in output.get("data", {}) for cell in code_cells(path) for output in cell["outputs"])


def test_asks_for_the_kernel_of_the_interpreter_that_runs_the_tests(path):
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"
    manager = pytest.importorskip("jupyter_client").KernelManager(kernel_name="python3")
    assert manager.format_kernel_cmd()[0] == sys.executable


def test_limits_the_time_of_a_cell(path):
    assert json.loads(path.read_text())["metadata"]["execution"]["timeout"] <= 300
