"""`diagnose`: planted faults are found by name, permuted queries are no damage, and a stopped search goes on."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from detpost.command.cli import app
from detpost.export.lowering import lower
from detpost.export.mixed import Mixture
from detpost.verify.bisect import Budget, Measured, OutOfBudgetError, needed, seconds_of
from detpost.verify.changes import compare_detections, disagreement
from detpost.verify.diagnose import diagnose, parts_of
from detpost.verify.diagnosis_page import page
from tests.fewer_bits import float_model, on_scenes, planted, ranges, scenes, tiny_file


def found(*rows):
    """Detections of one image, best first: score, label, box."""
    return {
        "scores": np.array([row[0] for row in rows], np.float32),
        "labels": np.array([row[1] for row in rows], np.int64),
        "boxes": np.array([row[2] for row in rows], np.float32).reshape(-1, 4),
    }


BOX, MOVED, FAR = (0, 0, 100, 100), (20, 0, 120, 100), (300, 300, 400, 400)


@pytest.mark.parametrize(
    ("before", "after", "kinds", "loss"),
    [
        ([(0.9, 1, BOX)], [(0.9, 1, BOX)], [], 0.0),
        ([(0.9, 1, BOX)], [], ["lost"], 1.0),
        ([], [(0.9, 1, BOX)], ["gained"], 1.0),
        ([(0.9, 1, BOX)], [(0.8, 2, BOX)], ["relabelled"], 1.0),
        ([(0.9, 1, BOX)], [(0.9, 1, MOVED)], ["drifted"], 1.0),
        ([(0.9, 1, BOX)], [(0.9, 1, FAR)], ["lost", "gained"], 1.0),
        ([(0.9, 1, BOX)], [(0.2, 1, BOX)], ["lost"], 1.0),
        ([(0.52, 1, BOX)], [(0.48, 1, BOX)], ["lost"], 0.0),  # over the threshold by rounding
        ([(0.9, 1, BOX), (0.8, 1, MOVED)], [(0.9, 1, MOVED), (0.8, 1, BOX)], [], 0.0),  # the order is not what changed
    ],
)
def test_what_changed_is_told_one_by_one(before, after, kinds, loss):
    changes = compare_detections([found(*before)], [found(*after)], 0.5)
    assert [change.kind for change in changes.changes] == kinds
    assert changes.loss == loss
    for change in changes.changes:
        assert change.margin == pytest.approx(max(change.score, change.other_score) - 0.5, abs=1e-6)
    assert (disagreement([found(*before)], [found(*after)], 0.5) > 0) == (before != after and bool(before or after))


def test_of_two_that_serve_alike_the_earlier_stays_and_sets_that_are_needed_together_are_found():
    units = [f"n{i}" for i in range(64)]
    asked = []

    def may_drop(whole, part):
        asked.append(part)
        return bool({"n5", "n40"} & part) and {"n17", "n18"} <= part

    assert needed(units, may_drop) == ["n5", "n17", "n18"]
    assert len(asked) < 60


def test_a_measure_is_asked_once_and_a_stopped_search_goes_on(tmp_path):
    runs = []
    journal = tmp_path / "journal"
    asked = Measured(lambda names: runs.append(names) or len(names), Budget(), journal, "q")
    assert [asked("ab"), asked("ba"), asked("a")] == [2, 2, 1]
    assert len(runs) == 2
    journal.write_text(journal.read_text() + '["half a li')
    again = Measured(lambda names: math.nan, Budget(), journal, "q")
    assert (again("ab"), again.resumed, again.runs) == (2, 2, 0)
    other = Measured(lambda names: 7, Budget(), journal, "another question")
    assert (other("ab"), other.resumed) == (7, 0)
    with pytest.raises(OutOfBudgetError):
        Measured(lambda names: 1, Budget(-1))("a")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_a_budget_is_a_span_of_time(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "ten", "-1m", "0", "inf"])
def test_what_is_no_span_of_time_is_refused(text):
    with pytest.raises(ValueError, match="must be a span of time"):
        seconds_of(text)


def test_a_network_is_cut_into_at_most_a_dozen_parts_that_hold_every_module():
    modules = [f"a.b{i}.c{j}" for i in range(20) for j in range(3)] + ["d", "d.e.f", "d.g", ""]
    parts = parts_of(modules)
    assert set(parts) == set(modules)
    assert len(set(parts.values())) <= 12
    assert all(part in ("", module) or module.startswith(f"{part}.") for module, part in parts.items())
    assert parts["d.g"] != parts["d.e.f"]


@pytest.mark.parametrize("precision", ["int8", "fp16", "bf16"])
def test_a_mixture_of_all_that_differs_is_the_float_graph_and_of_nothing_the_other(precision):
    model = float_model()
    low = lower(model, precision, ranges=ranges())
    mixture = Mixture(model, low)
    every = on_scenes().detect(mixture.build(mixture.candidates))
    assert disagreement(on_scenes().detect(model), every, 0.3) < (0.01 if precision == "fp16" else 1e-5)
    assert not any(name.startswith("detpost/") for name in mixture.candidates)
    if precision == "int8":
        assert disagreement(on_scenes().detect(low), on_scenes().detect(mixture.build(())), 0.3) == 0


@pytest.mark.parametrize("kind", ["operators of whole numbers", "dynamic"])
def test_files_of_stock_tools_are_put_back_into_float_too(kind, tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = on_scenes().arrays()

        def get_next(self):
            return next(self.left, None)

    if kind == "dynamic":
        quantize_dynamic(tiny_file(), tmp_path / "few.onnx")
    else:
        kinds = ["Conv", "MatMul"]
        options = {"quant_format": QuantFormat.QOperator, "op_types_to_quantize": kinds}
        quantize_static(tiny_file(), tmp_path / "few.onnx", Reader(), **options)
    reference, other = onnx.load(tiny_file()), onnx.load(tmp_path / "few.onnx")
    mixture = Mixture(reference, other)
    half = [on_scenes().detect(mixture.build(mixture.candidates[part])) for part in (slice(0, 40), slice(40, None))]
    every = on_scenes().detect(mixture.build(mixture.candidates))
    expected = on_scenes().detect(reference)
    apart = disagreement(expected, on_scenes().detect(other), 0.3)
    assert disagreement(expected, every, 0.3) < 0.1 * apart
    assert all(len(found) == len(scenes()) for found in half)


def test_a_graph_against_itself_has_no_candidates():
    assert Mixture(float_model(), float_model()).candidates == ()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["overflow", "saturated", "clipped", "outlier channel"])
def test_a_planted_fault_is_found_by_name(kind, tmp_path):
    reference, version, blamed = planted(kind)
    onnx.save(reference, tmp_path / "float.onnx")
    onnx.save(version, tmp_path / "few.onnx")
    said = []
    diagnosis = diagnose(
        tmp_path / "few.onnx", tmp_path / "float.onnx", scenes()[:4], threshold=0.3, progress=said.append
    )
    assert blamed & set(diagnosis.nodes)
    assert len(diagnosis.nodes) <= 6
    assert diagnosis.runs <= 10
    assert diagnosis.complete
    assert any("about" in line and "minutes" in line for line in said)
    mine = [finding for finding in diagnosis.findings if finding.node in blamed]
    seen = {each.kind for finding in mine for each in finding.evidence}
    assert (kind if kind != "saturated" else "clipped") in seen or kind == "clipped"
    assert all(finding.module for finding in mine)
    told = json.loads(diagnosis.to_json())
    assert set(told["nodes"]) == set(diagnosis.nodes)
    assert set(told["counts"]) == {"lost", "gained", "relabelled", "drifted", "borderline"}
    assert f"<code>{diagnosis.nodes[0]}</code>" in page(diagnosis)


@pytest.mark.slow
def test_a_loss_that_is_spread_is_said_to_be_in_few_runs_and_a_search_that_stopped_goes_on(tmp_path):
    onnx.save(float_model(), tmp_path / "float.onnx")
    onnx.save(lower(float_model(), "int8", ranges=ranges()), tmp_path / "few.onnx")
    files = tmp_path / "few.onnx", tmp_path / "float.onnx", scenes()[:4]

    def stop(runs, ahead):
        if runs == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(*files, threshold=0.3, journal=tmp_path / "journal", tell=stop)
    said = []
    diagnosis = diagnose(*files, threshold=0.3, journal=tmp_path / "journal", progress=said.append)
    assert any(line.endswith("; 5 known") for line in said)
    assert diagnosis.complete
    assert diagnosis.runs + 5 <= 36
    assert any("the loss is spread" in note for note in diagnosis.notes)
    assert len(diagnosis.modules) == 12
    stopped = diagnose(*files, threshold=0.3, budget=1e-3)
    assert not stopped.complete
    assert any(note.startswith("the budget is spent") for note in stopped.notes)


def test_permuted_queries_are_no_damage(tmp_path):
    model = float_model()
    top = next(node for node in model.graph.node if node.op_type == "TopK" and not node.name.startswith("detpost/"))
    other = onnx.ModelProto.FromString(model.SerializeToString())
    place, turned = next((i, node) for i, node in enumerate(other.graph.node) if node.name == top.name)
    name = turned.output[1]
    turned.output[1] = "straight"
    index = onnx.numpy_helper.from_array(np.arange(30)[::-1].astype(np.int64).copy(), "turned")
    other.graph.initializer.append(index)
    other.graph.node.insert(place + 1, onnx.helper.make_node("Gather", ["straight", "turned"], [name], "turn", axis=1))
    onnx.save(other, tmp_path / "turned.onnx")
    diagnosis = diagnose(tmp_path / "turned.onnx", tiny_file(), scenes()[:4], threshold=0.3)
    assert diagnosis.changes.loss == 0
    assert diagnosis.findings == ()


def test_the_command_writes_the_report_and_the_json(tmp_path):
    half = tmp_path / "half.onnx"
    onnx.save(lower(float_model(), "fp16"), half)
    html, told = tmp_path / "report.html", tmp_path / "report.json"
    options = [
        "--images",
        str(scenes()[0]),
        "-o",
        str(html),
        "--json",
        str(told),
        "--budget",
        "1s",
        "--threshold",
        "0.3",
    ]
    run = CliRunner().invoke(app, ["diagnose", str(half), str(tiny_file()), *options])
    assert run.exit_code == 0, run.output
    assert "loss:" in run.output
    assert json.loads(told.read_text())["bits"] == ["fp16"]
    text = html.read_text()
    assert "What changed" in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text


def test_two_runtimes_are_compared_by_detections(tmp_path):
    diagnosis = diagnose(tiny_file(), "tiny", scenes()[:2])
    assert diagnosis.changes.loss == 0
    assert "where both are .onnx files" in diagnosis.notes[0]
    with pytest.raises(ValueError, match="no images"):
        diagnose(tiny_file(), tiny_file(), ())
