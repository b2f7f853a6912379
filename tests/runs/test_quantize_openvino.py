"""`quantize` of OpenVINO's files: NNCF's int8 with the decode in float32, measured in detections."""

import json

import pytest
from typer.testing import CliRunner

from detpost import Detector
from detpost.command.cli import app
from detpost.export import to_openvino, verify
from detpost.export.openvino import read_openvino
from detpost.runs.quantize import quantize
from tests.fewer_bits import scenes, tiny_file

TRUTH = "truth.json"


@pytest.fixture(scope="module")
def ir(tmp_path_factory):
    return to_openvino(tiny_file(), tmp_path_factory.mktemp("ir") / "tiny.xml").path


@pytest.fixture(scope="module")
def made(ir, tmp_path_factory):
    pytest.importorskip("nncf")
    out = tmp_path_factory.mktemp("int8") / "int8.xml"
    return quantize(ir, out, images=scenes(), annotations=scenes()[0].parent / TRUTH, max_loss=0.01)


def quantisers(path):
    return [node for node in read_openvino(path)[0].get_ops() if node.get_type_name() == "FakeQuantize"]


def test_the_loss_is_held_and_the_decode_is_float(made):
    assert made.measure == "AP"
    assert made.loss <= 0.01
    assert made.size <= 0.45
    found = quantisers(made.written.path)
    assert not any("detpost" in node.get_friendly_name() for node in found)
    detector = Detector.load(made.written.path, threshold=0.3)
    assert len(detector.predict(list(scenes()[:2]))) == 2


def test_its_decode_is_exact_on_its_own_raw_outputs(tmp_path):
    pytest.importorskip("nncf")
    source = to_openvino("tiny", tmp_path / "raw.xml", keep_raw=True, queries=True).path
    made = quantize(source, tmp_path / "int8.xml", images=scenes(), max_loss=1.0, symmetric=True)
    report = verify(made.written.path, "tiny", images=[scenes()[0]])
    decodes = [check for check in report.checks if "decode" in check.name]
    assert decodes
    assert all(check.ok for check in decodes)
    assert len(quantisers(made.written.path)) > 20
    assert json.loads(made.recipe.read_text())["step"] == "all"
    again = quantize(source, tmp_path / "again.xml", images=scenes(), recipe=made.recipe)
    assert read_openvino(again.written.path)[1]["quantized"]["symmetric"] is True


def test_a_recipe_is_repeated_and_says_what_was_measured(ir, made, tmp_path):
    said = json.loads(made.recipe.read_text())
    assert said["by"] == "nncf"
    assert said["measured"]["loss"] == pytest.approx(made.loss)
    again = quantize(ir, tmp_path / "again.xml", images=scenes(), recipe=made.recipe)
    assert [node.get_friendly_name() for node in quantisers(again.written.path)] == [
        node.get_friendly_name() for node in quantisers(made.written.path)
    ]


def test_what_is_named_stays_float(ir, tmp_path):
    pytest.importorskip("nncf")
    model, _ = read_openvino(ir)
    name = next(node.get_friendly_name() for node in model.get_ops() if node.get_type_name() == "Convolution")
    made = quantize(ir, tmp_path / "kept.xml", images=scenes(), keep=[name], max_loss=1.0)
    assert made.float_nodes == (name,)
    kept = next(node for node in read_openvino(made.written.path)[0].get_ops() if node.get_friendly_name() == name)
    assert "FakeQuantize" not in {value.get_node().get_type_name() for value in kept.input_values()}
    with pytest.raises(ValueError, match="no node 'nothing'"):
        quantize(ir, tmp_path / "none.xml", images=scenes(), keep=["nothing"])


def test_a_loss_that_no_step_holds_is_told_step_by_step(ir, tmp_path):
    pytest.importorskip("nncf")
    with pytest.raises(ValueError, match=r"above -1 at every step: .* keeping nothing of the network, .* arithmetic"):
        quantize(ir, tmp_path / "never.xml", images=scenes()[:4], max_loss=-1)
    assert not (tmp_path / "never.xml").exists()


def test_what_cannot_be_is_one_line(ir, tmp_path):
    result = CliRunner().invoke(app, ["quantize", str(ir), "-o", str(tmp_path / "half.xml"), "--precision", "fp16"])
    assert result.exit_code != 0
    with pytest.raises(ValueError, match="becomes int8; got 'fp16'"):
        quantize(ir, tmp_path / "half.xml", "fp16", images=scenes())
    with pytest.raises(ValueError, match=r"quantize writes \.onnx files, and \.xml files of \.xml files"):
        quantize(tiny_file(), tmp_path / "x.xml", images=scenes())


def test_a_missing_nncf_names_its_extra(ir, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ImportError, match=r"pip install 'detpost\[quantize\]'"):
        quantize(ir, tmp_path / "x.xml", images=scenes())
