"""`detpost check` answers 0, 1 or 2, in text, JSON and SARIF, for paths and for callables."""

import json
import sys

import pytest

from detpost.purity.command import check, example_inputs

CODE = """
import torch


class Clean(torch.nn.Module):
    def forward(self, logits, boxes):
        return logits.sigmoid().amax(-1), boxes.clamp(0, 1)


def writes(logits, boxes: torch.Tensor):
    boxes += 1
    return logits, boxes


class NeedsArguments:
    def __init__(self, number):
        self.number = number


constant = 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "planted_package.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield tmp_path
    sys.modules.pop("planted_package", None)


SHAPES = ["2,30,8", "2,30,4"]


def test_a_path_with_findings_answers_1_and_a_clean_one_0(package, capsys):
    assert check(["planted_package.py"]) == 1
    out = capsys.readouterr().out
    assert "planted_package.py:11" in out
    assert "DP001" in out
    (package / "clean.py").write_text("import torch\n\ndef f(x):\n    return x + 1\n")
    assert check(["clean.py"]) == 0
    assert "1 file read, 0 findings" in capsys.readouterr().out
    assert check(["planted_package.py"], allow=["DP001"]) == 0


def test_a_note_is_printed_and_answers_0(package, capsys):
    (package / "noted.py").write_text("import torch\n\ndef f(n):\n    x = torch.zeros(n)\n    x += 1\n    return x\n")
    assert check(["noted.py"]) == 0
    out = capsys.readouterr().out
    assert "note    DP001 noted.py:5" in out
    assert "1 file read, 1 finding" in out


def test_a_callable_is_run_on_the_shapes(package, capsys):
    assert check(["planted_package:Clean"], shape=SHAPES) == 0
    assert check(["planted_package:writes"], shape=SHAPES, dtype=["float64"]) == 1
    out = capsys.readouterr().out
    assert "writes an input (boxes) float64[2, 30, 4]" in out
    assert "planted_package:writes: not pure" in out


def test_json_and_sarif_go_to_a_file(package):
    assert check(["planted_package.py"], output_format="json", output=package / "out.json") == 1
    assert json.loads((package / "out.json").read_text())[0]["findings"][0]["line"] == 11
    targets = ["planted_package.py", "planted_package:writes"]
    assert check(targets, shape=SHAPES, output_format="sarif", output=package / "out.sarif") == 1
    lines = {
        result["locations"][0]["physicalLocation"]["region"]["startLine"]
        for result in json.loads((package / "out.sarif").read_text())["runs"][0]["results"]
    }
    assert 11 in lines


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ([], {}, "name a path"),
        (["absent.py"], {}, "no such path"),
        (["planted_package:Clean"], {}, "--shape"),
        (["planted_package:Absent"], {"shape": SHAPES}, "no attribute 'Absent'"),
        (["absent_package:f"], {"shape": SHAPES}, "No module named"),
        (["planted_package:NeedsArguments"], {"shape": SHAPES}, "without arguments"),
        (["planted_package:constant"], {"shape": SHAPES}, "cannot be called"),
        (["planted_package:Clean"], {"shape": ["2,a"]}, "whole numbers"),
        (["planted_package:Clean"], {"shape": SHAPES, "dtype": ["float31"]}, "float31"),
        (["planted_package:Clean"], {"shape": SHAPES, "dtype": ["int64"] * 3}, "3 dtypes"),
        (["planted_package.py"], {"output_format": "xml"}, "text, json or sarif"),
        (["broken.py"], {}, "broken.py:1"),
    ],
)
def test_misuse_answers_2_with_one_line(package, capsys, targets, options, message):
    (package / "broken.py").write_text("def f(:\n")
    assert check(targets, **options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_example_inputs_are_the_same_each_time():
    first, second = example_inputs(["2,3", ""], ["float16", "bool"]), example_inputs(["2,3", ""], ["float16", "bool"])
    assert [tuple(t.shape) for t in first] == [(2, 3), ()]
    assert all(bool((a == b).all()) for a, b in zip(first, second, strict=True))
