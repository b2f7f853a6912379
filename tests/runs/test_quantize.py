"""`quantize`: the loss is held, the recipe repeats the file, and the file is one of detpost's like any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import onnx
import pytest
from typer.testing import CliRunner

from detpost import Detector
from detpost.command.cli import app
from detpost.export import to_onnx, to_openvino, verify
from detpost.export.lowering import lowerable
from detpost.runs.quantize import quantize
from tests.fewer_bits import float_model, on_scenes, ranges, scenes, tiny_file

TRUTH = "truth.json"


@pytest.fixture(scope="module")
def raw_file(tmp_path_factory):
    """The tiny detector as a float file that gives its raw outputs too."""
    path = tmp_path_factory.mktemp("raw") / "raw.onnx"
    return to_onnx("tiny", path, exporter="torchscript", keep_raw=True, queries=True).path


def test_int8_holds_the_loss_and_the_recipe_repeats_it_to_the_bit(tmp_path):
    said = []
    truth = scenes()[0].parent / TRUTH
    made = quantize(
        tiny_file(), tmp_path / "int8.onnx", "int8", scenes(), annotations=truth, max_loss=0.01, progress=said.append
    )
    assert made.measure == "AP"
    assert made.loss <= 0.01
    assert made.size <= 0.45
    assert made.complete
    assert any("measuring with all" in line for line in said)
    again = quantize(tiny_file(), tmp_path / "again.onnx", recipe=made.recipe)
    assert again.written.path.read_bytes() == made.written.path.read_bytes()
    for seed in "12":  # in another process the order of a set of names is another one
        command = [sys.executable, "-m", "detpost", "quantize", tiny_file(), "-o", tmp_path / f"{seed}.onnx"]
        subprocess.run(
            [str(part) for part in (*command, "--recipe", made.recipe)],
            check=True,
            capture_output=True,
            timeout=300,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        assert (tmp_path / f"{seed}.onnx").read_bytes() == made.written.path.read_bytes()
    assert (again.float_nodes, again.weight_nodes) == (made.float_nodes, made.weight_nodes)
    recipe = json.loads(made.recipe.read_text())
    decode = {node.name for node in float_model().graph.node if node.name.startswith("detpost/")}
    assert decode <= recipe["tensorrt"]["layer_precisions"].keys()
    assert len(Detector.load(made.written.path).predict(list(scenes()[:2]))) == 2


def test_a_search_keeps_what_does_the_damage_until_the_loss_is_under_the_bound(tmp_path, monkeypatch):
    import detpost.runs.quantize as module

    last = next(node for node in float_model().graph.node if node.name == "/model/model/decoder/class_embed.1/MatMul")
    narrow = {last.input[0]: (-0.05, 0.05)}  # a range that clips nearly everything the last class head reads
    monkeypatch.setattr(module, "calibrate", lambda model, batches: {**ranges(), **narrow})
    made = quantize(tiny_file(), tmp_path / "less.onnx", "int8", scenes(), max_loss=0.02)
    assert made.measure == "matched detections"
    assert made.loss <= 0.02 < made.all_lowered
    assert last.name in {*made.weight_nodes, *made.float_nodes}
    assert len(made.weight_nodes) < len(lowerable(float_model(), "int8"))


@pytest.mark.parametrize("least", [1, 2, 5, 8, 49])
def test_the_least_size_is_found_by_doubling_and_halving(least):
    from detpost.runs.quantize import _least

    asked = []
    assert _least(49, lambda size: asked.append(size) or size >= least) == least
    assert len(asked) == len(set(asked)) <= 12


def test_named_nodes_stay_float_and_nothing_is_searched(tmp_path):
    kept = lowerable(float_model(), "fp16")[:5]
    made = quantize(tiny_file(), tmp_path / "half.onnx", "fp16", scenes()[:2], keep=kept)
    assert made.float_nodes == kept
    assert made.all_lowered is None
    assert made.loss <= 0.05


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_files_in_fewer_bits_decode_their_raw_outputs_as_eager_does_in_each_runtime(raw_file, tmp_path, precision):
    pytest.importorskip("openvino")
    made = quantize(raw_file, tmp_path / "few.onnx", precision, scenes()[:2], keep=[]).written
    for path in (made.path, to_openvino(made.path, tmp_path / "few.xml").path):
        report = verify(path, raw_file, images=list(scenes()[:1]))
        own = [check for check in report.checks if "its own raw outputs" in check.name]
        assert len(own) >= 6
        assert all(check.ok for check in own)
        assert report.warnings == ()


def test_the_command_writes_it_and_doctor_and_verify_tell_of_a_quantised_decode(tmp_path):
    run = CliRunner()
    out = tmp_path / "half.onnx"
    command = ["quantize", str(tiny_file()), "-o", str(out), "--precision", "fp16", "--max-loss", "0.2"]
    found = run.invoke(app, [*command, "--calibrate", str(scenes()[0].parent)])
    assert found.exit_code == 0, found.output
    assert "kept: the decode in float32" in found.output
    assert "float32: labels, order and boxes" not in found.output
    healthy = run.invoke(app, ["doctor", str(out)])
    assert "fp16" in healthy.output
    assert "exact" in healthy.output
    from onnxruntime.transformers.float16 import convert_float_to_float16

    stock = tmp_path / "stock.onnx"
    onnx.save(convert_float_to_float16(onnx.load(tiny_file()), keep_io_types=True), stock)
    assert "decode are quantised" in " ".join(run.invoke(app, ["doctor", str(stock)]).output.replace("│", "").split())
    report = verify(stock, tiny_file())
    assert len(report.warnings) == 1
    assert "nodes of the decode are quantised or half" in str(report)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": ()}, "no images to calibrate on"),
        ({"precision": "int4"}, "unknown precision 'int4'"),
        ({"out": "few.xml"}, "writes .onnx files"),
        ({"model": "few.xml"}, "takes an .onnx file or a model to export"),
        ({"keep": ["nowhere"]}, "no node 'nowhere'"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(tmp_path, options, said):
    given = {"model": tiny_file(), "out": "few.onnx", "precision": "fp16", "images": scenes()[:2], **options}
    with pytest.raises(ValueError, match=said):
        quantize(
            given["model"], tmp_path / given["out"], given["precision"], given["images"], keep=given.get("keep", [])
        )


def test_a_file_in_fewer_bits_is_no_source(tmp_path):
    made = quantize(tiny_file(), tmp_path / "half.onnx", "fp16", scenes()[:2], keep=[])
    with pytest.raises(ValueError, match="is in fp16 already"):
        quantize(made.written.path, tmp_path / "twice.onnx", "int8", scenes()[:2])


def test_images_that_the_ground_truth_lacks_are_refused(tmp_path):
    truth = json.loads((scenes()[0].parent / TRUTH).read_text())
    few = tmp_path / TRUTH
    few.write_text(json.dumps({**truth, "images": truth["images"][1:], "annotations": truth["annotations"][-3:]}))
    with pytest.raises(ValueError, match=r"has no image '000\.png'"):
        quantize(tiny_file(), tmp_path / "few.onnx", "fp16", scenes(), annotations=few)


def test_openvino_reads_the_int8_file(tmp_path):
    pytest.importorskip("openvino")
    from detpost.verify.changes import compare_detections
    from detpost.verify.on_images import detect_all

    made = quantize(tiny_file(), tmp_path / "int8.onnx", "int8", scenes()[:4], keep=[])
    to_openvino(made.written.path, tmp_path / "int8.xml")
    found = detect_all(Detector.load(tmp_path / "int8.xml", threshold=0.0), scenes())
    assert compare_detections(on_scenes().detect(), found, 0.5).loss < 0.1
