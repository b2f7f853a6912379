"""The conformance suite passes what is right, and says in words what is wrong with what is not."""

import json
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from detpost import DecodeSpec, DetectionPostProcessor
from detpost.command.cli import app, main
from detpost.detections import clear_invalid
from detpost.verify.conformance import conform
from detpost.verify.conformance.cases import all_cases
from detpost.verify.conformance.faults import FAULTS
from detpost.verify.conformance.judge import shares
from detpost.verify.conformance.plan import decode, plan_of
from detpost.verify.conformance.report import _expected
from detpost.verify.conformance.runner import Answer


def decode_as_detpost(inputs):
    post = DetectionPostProcessor(DecodeSpec(**json.loads(inputs["spec"])))
    return post(*(torch.from_numpy(inputs[name]) for name in ("pred_logits", "pred_boxes", "image_sizes")))


def parts_of(inputs, place):
    return {name: part[place] for name, part in decode_as_detpost(inputs)._asdict().items()}


def changed(inputs, **spec):
    return {**inputs, "spec": json.dumps({**json.loads(inputs["spec"]), **spec})}


def wrong_size(inputs):
    return decode_as_detpost({**inputs, "image_sizes": np.ascontiguousarray(inputs["image_sizes"][:, ::-1])})


def wrong_first_size(inputs):
    sizes = inputs["image_sizes"]
    return decode_as_detpost({**inputs, "image_sizes": np.repeat(sizes[:1], len(sizes), axis=0)})


def wrong_argmax(inputs):
    return decode_as_detpost(changed(inputs, selection="per_query"))


def wrong_label(inputs):
    found = decode_as_detpost(inputs)
    return found._replace(labels=torch.where(found.valid, found.labels - 1, -1))


def wrong_activation(inputs):
    return decode_as_detpost(changed(inputs, activation="sigmoid"))


def wrong_threshold(inputs):
    return decode_as_detpost(changed(inputs, score_threshold=None))


def wrong_format(inputs):
    return decode_as_detpost(changed(inputs, box_format="cxcywh"))


def wrong_background(inputs):
    return decode_as_detpost(changed(inputs, background="none"))


def wrong_order_of_ties(inputs):
    """What a sort from the other end gives."""
    classes = inputs["pred_logits"].shape[2]
    turned = {name: inputs[name][:, ::-1].copy() for name in ("pred_logits", "pred_boxes")}
    turned["pred_logits"] = turned["pred_logits"][:, :, ::-1].copy()
    found = decode_as_detpost({**inputs, **turned})
    labels = torch.where(found.valid, classes - 1 - found.labels, -1)
    return found._replace(
        labels=labels, queries=torch.where(found.valid, inputs["pred_logits"].shape[1] - 1 - found.queries, -1)
    )


def wrong_count(inputs):
    """As many as there are queries, in as many slots as are asked for."""
    found = decode_as_detpost(inputs)
    kept = torch.arange(found.valid.shape[1]) < inputs["pred_logits"].shape[1]
    return clear_invalid(*found[:4], found.valid & kept)


def wrong_score(inputs):
    found = decode_as_detpost(inputs)
    return found._replace(scores=found.scores.half().float())


def wrong_last_size(inputs):
    sizes = inputs["image_sizes"]
    return decode_as_detpost({**inputs, "image_sizes": np.repeat(sizes[-1:], len(sizes), axis=0)})


def wrong_way_round(inputs):
    return {name: part.flip(1) for name, part in decode_as_detpost(inputs)._asdict().items()}


def wrong_box_of_slot(inputs):
    """Slot i has the box of query i: where no queries are given, that is what its query is told by."""
    found = decode_as_detpost(inputs)._asdict()
    slots = torch.arange(found["labels"].shape[1]) % inputs["pred_boxes"].shape[1]
    boxes = torch.where(found["valid"][..., None], every_box(inputs)[:, slots], 0)
    return {**{name: part for name, part in found.items() if name != "queries"}, "boxes": boxes}


def wrong_modulo(inputs):
    """Take flat indices apart as index % Q, which is in no list of faults."""
    found = decode_as_detpost(inputs)
    _, queries, classes = inputs["pred_logits"].shape
    taken = torch.where(found.valid, (found.queries * classes + found.labels) % queries, 0)
    boxes = every_box(inputs).gather(1, taken[..., None].expand(-1, -1, 4))
    return {**found._asdict(), "boxes": torch.where(found.valid[..., None], boxes, 0), "queries": None}


def wrong_clamp(inputs):
    return decode_as_detpost({**inputs, "pred_logits": inputs["pred_logits"].clip(-10, 10)})


def wrong_temperature(inputs):
    return decode_as_detpost({**inputs, "pred_logits": inputs["pred_logits"] / 2})


def wrong_labels_sorted(inputs):
    """Sort what is found by label."""
    found = decode_as_detpost(inputs)._asdict()
    order = found["labels"].sort(dim=1, stable=True).indices
    return {
        name: part.gather(1, order.reshape(*order.shape, *(1,) * (part.ndim - 2)).expand_as(part))
        for name, part in found.items()
    }


def every_box(inputs):
    """Decode the boxes of all queries of RT-DETR's family."""
    center, size = torch.from_numpy(inputs["pred_boxes"]).split(2, dim=-1)
    scale = torch.from_numpy(inputs["image_sizes"]).flip(1).repeat(1, 2)[:, None]
    return torch.cat([center - size / 2, center + size / 2], dim=-1) * scale


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_the_plan_without_faults_is_the_definition(case):
    expected, found = _expected(case), decode(plan_of(case), case)
    for part in ("labels", "queries", "valid"):
        np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=0, atol=1e-3)


def test_detpost_conforms():
    report = conform(decode_as_detpost)
    assert report.ok, report
    assert not report.differences
    assert set(report.shares.values()) == {1.0}


def test_every_choice_of_a_field_meets_every_choice_of_the_others():
    specs = [case.spec for case in all_cases()]
    fields = {
        name: {getattr(spec, name) for spec in specs}
        for name in ("activation", "selection", "background", "box_format", "clip")
    }
    assert {name: len(values) for name, values in fields.items()} == {
        "activation": 2,
        "selection": 2,
        "background": 3,
        "box_format": 3,
        "clip": 2,
    }
    for one, values in fields.items():
        for other, others in fields.items():
            if one != other:
                seen = {(getattr(spec, one), getattr(spec, other)) for spec in specs}
                assert seen == {(x, y) for x in values for y in others}, (one, other)


@pytest.mark.parametrize(
    ("runner", "preset", "name"),
    [
        (wrong_size, "rtdetr", "width-height"),
        (wrong_first_size, "rfdetr", "first-size"),
        (wrong_last_size, "rtdetr", "last-size"),
        (wrong_way_round, "rtdetr", "reversed"),
        (wrong_way_round, "detr", "reversed"),
        (wrong_box_of_slot, "rtdetr", "box-of-slot"),
        (wrong_argmax, "rtdetr", "argmax"),
        (wrong_label, "detr", "label-minus-one"),
        (wrong_activation, "detr", "sigmoid"),
        (wrong_threshold, "rtdetr", "no-threshold"),
        (wrong_format, None, "reads-cxcywh"),
        (wrong_background, "detr", "background-kept"),
        (wrong_order_of_ties, "rtdetr", "higher-index-first"),
        (wrong_score, "rtdetr", "half-scores"),
        (wrong_count, "rtdetr", "as-many-as-queries"),
    ],
)
def test_a_wrong_runner_is_told_what_it_does(runner, preset, name):
    report = conform(runner, preset)
    assert not report.ok
    assert [difference.name for difference in report.differences] == [name]
    assert all(case.explained for case in report.cases)
    assert set(report.differences[0].cases) == {case.name for case in report.cases if not case.ok}
    assert next(fault.words for fault in FAULTS if fault.name == name) in str(report)


def test_two_faults_at_once_are_both_named():
    def runner(inputs):
        return wrong_size(changed(inputs, selection="per_query"))

    report = conform(runner, "rtdetr")
    assert {difference.name for difference in report.differences} == {"argmax", "width-height"}


@pytest.mark.parametrize(
    ("runner", "preset", "agreeing"),
    [
        (wrong_clamp, None, 48),
        (wrong_clamp, "rtdetr", 9),
        (wrong_modulo, "rtdetr", 1),
        (wrong_temperature, "rtdetr", 1),
        (wrong_labels_sorted, "rtdetr", 1),
    ],
)
def test_what_is_no_fault_of_the_list_is_not_named_as_one(runner, preset, agreeing):
    """That a fault comes near an answer in a few cases, by chance, is no reason to name it."""
    report = conform(runner, preset)
    assert sum(case.ok for case in report.cases) == agreeing
    assert not report.differences, report
    assert [case.name for case in report.cases if not case.explained] == [c.name for c in report.cases if not c.ok]


def test_a_fault_is_named_beside_what_is_not_explained():
    def runner(inputs):
        return wrong_clamp(changed(inputs, selection="per_query"))

    report = conform(runner, "rtdetr")
    assert [difference.name for difference in report.differences] == ["argmax"]
    assert {case.name for case in report.cases if not case.explained} == {
        "rtdetr: saturated",
        "rtdetr: NaN and infinities",
    }


def test_ties_excuse_no_slot_that_has_the_detection_that_is_expected():
    """A fault that moves every box is not undone by "no fixed order", which lets tied slots have boxes of their own."""
    by_name = {fault.name: fault.change for fault in FAULTS}
    case = next(case for case in all_cases("rtdetr") if case.name.endswith("plain"))
    plan = by_name["no-order-of-ties"](by_name["box-of-slot"](plan_of(case)))
    given = decode_as_detpost(case.inputs())
    answer = Answer(*(getattr(given, part).numpy() for part in ("labels", "boxes", "scores", "valid", "queries")))
    found = shares(answer, decode(plan, case), plan, case)
    assert found["labels"] == 1
    assert found["boxes"] < 0.2


def test_faults_go_together_in_any_order():
    case = next(case for case in all_cases("rtdetr") if case.name.endswith("fewer candidates than slots"))
    for first in FAULTS:
        for second in FAULTS:
            found = decode(second.change(first.change(plan_of(case))), case)
            assert found.labels.shape == found.valid.shape == found.queries.shape


def test_what_no_fault_explains_is_shown_by_its_first_slot():
    def runner(inputs):
        found = decode_as_detpost(inputs)
        return found._replace(boxes=found.boxes * 1.37 + 5)

    report = conform(runner, "rtdetr")
    assert not report.ok
    assert "what that does not explain" in str(report)
    assert "image 0, slot 0: boxes (" in str(report)


def test_a_runner_may_work_in_place():
    """As RT-DETR's own decode does: it is judged by the numbers that it was given."""

    def runner(inputs):
        found = decode_as_detpost({**inputs, "pred_boxes": inputs["pred_boxes"].copy()})
        inputs["pred_boxes"][..., 2:] += inputs["pred_boxes"][..., :2]
        inputs["pred_logits"][:] = 0
        inputs["image_sizes"][:] = 1
        return found

    assert conform(runner, "rtdetr").ok
    assert conform(decode_as_detpost, "rtdetr").ok


def test_no_slots_are_a_wrong_count():
    def runner(inputs):
        return parts_of(inputs, (slice(None), slice(0)))

    report = conform(runner, "rtdetr")
    assert not report.ok
    assert not report.differences
    assert "0 slots, where 300 are asked for" in str(report)
    assert all(report.shares[part] == 0 for part in report.shares)


def test_missing_slots_are_wrong_slots():
    def runner(inputs):
        return decode_as_detpost(changed(inputs, top_k=10))

    report = conform(runner, "rtdetr")
    assert not report.ok
    assert "10 slots, where" in str(report)


@pytest.mark.parametrize(
    ("give", "said"),
    [
        (lambda inputs: 1 / 0, "ZeroDivisionError"),
        (lambda inputs: None, "it gave a NoneType"),
        (lambda inputs: {"labels": 1}, "no boxes in its answer"),
        (lambda inputs: decode_as_detpost(inputs)._replace(boxes=torch.zeros(1, 2, 3)), "its boxes must have shape"),
        (lambda inputs: {**decode_as_detpost(inputs)._asdict(), "scores": [["a"]]}, "its scores are no numbers"),
        (lambda inputs: parts_of(inputs, 0), "its labels must have shape (B, K), B ="),
        (lambda inputs: parts_of(inputs, (0, slice(1))), "its labels must have shape (B, K), B ="),
        (lambda inputs: sys.exit(3), "it called sys.exit(3)"),
        (lambda inputs: sys.exit(), "it called sys.exit()"),
    ],
)
def test_a_runner_without_an_answer_fails_the_case_in_a_line(give: Callable, said):
    report = conform(give, "rtdetr")
    assert not report.ok
    assert all(said in case.failure for case in report.cases)
    assert report.shares["labels"] == 0
    assert json.loads(report.to_json())["ok"] is False


RUNNER = """
    import json, sys
    import numpy as np

    given = np.load(sys.argv[1])
    spec = json.loads(str(given["spec"]))
    rows = given["pred_logits"].astype(np.float32).reshape(len(given["pred_logits"]), -1)
    count = min(spec["top_k"], rows.shape[1])
    labels = np.zeros((len(rows), count), dtype=np.int64)
    zeros = np.zeros((len(rows), count), dtype=np.float32)
    np.savez(sys.argv[2], labels=labels, boxes=np.repeat(zeros[..., None], 4, -1), scores=zeros, valid=zeros == 0)
"""


def test_the_command_runs_a_program_and_a_function(tmp_path, monkeypatch):
    program = tmp_path / "runner.py"
    program.write_text(textwrap.dedent(RUNNER))
    report = tmp_path / "report.json"
    command = f"{sys.executable} {program}"
    result = CliRunner().invoke(app, ["conform", command, "--preset", "rtdetr", "--json", str(report)])
    assert result.exit_code == 1, result.output
    assert json.loads(report.read_text())["shares"]["labels"] < 1

    (tmp_path / "my_decode.py").write_text(
        "import json, torch\nfrom detpost import DecodeSpec, DetectionPostProcessor\n\n"
        "def decode(pred_logits, pred_boxes, image_sizes, spec):\n"
        "    post = DetectionPostProcessor(DecodeSpec(**json.loads(spec.item())))\n"
        "    found = post(*map(torch.from_numpy, (pred_logits, pred_boxes, image_sizes)))\n"
        "    return found.labels, found.boxes, found.scores, found.valid\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = CliRunner().invoke(app, ["conform", "my_decode:decode"])
    assert result.exit_code == 0, result.output
    assert "62 of 62 cases agree" in result.output


def test_a_runner_that_is_not_there_is_one_line(monkeypatch):
    with pytest.raises(ImportError, match="no module no_such"):
        conform("no_such:decode")
    with pytest.raises(ImportError, match="has no decode_it"):
        conform("json:decode_it")
    with pytest.raises(ValueError, match="no command 'no-such-program'"):
        conform("no-such-program --flag")
    with pytest.raises(ValueError, match="must be a command"):
        conform("")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def decode(:\n", "SyntaxError: "),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import no_such_module_inside\n", "ModuleNotFoundError: No module named 'no_such_module_inside'"),
        ("raise RuntimeError('one line\\nand another')\n", "RuntimeError: one line and another"),
        ("import sys\nsys.exit(3)\n", "it called sys.exit(3)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line_and_status_two(source, said, tmp_path, monkeypatch, capsys):
    name = f"decode_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["detpost", "conform", f"{name}:decode"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: the module {name} cannot be imported, mend that first: {said}")


def test_a_fault_leaves_alone_what_it_does_not_concern():
    case = all_cases("detr")[0]
    assert not case.spec.clip
    plan = plan_of(case)
    by_name = {fault.name: fault.change for fault in FAULTS}
    assert by_name["argmax"](plan) == plan
    assert by_name["no-threshold"](plan) == plan
    assert by_name["clipped"](plan) == replace(plan, clip=True)


def test_the_page_shows_what_the_command_says(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()
    module, said = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "text"))
    (tmp_path / "decode_of_the_page.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    report = conform("decode_of_the_page:decode", "rtdetr")
    assert str(report).replace("decode_of_the_page", "my_module") == said.partition("\n")[2].strip()
    assert f"{len(FAULTS)} things" in page
    assert f"{len(all_cases())} cases" in page
    assert f"in {len(all_cases('rtdetr'))} cases" in page
