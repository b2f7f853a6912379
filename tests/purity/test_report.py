"""A report can be read in a terminal, by a program and by code review, and says whether all is well."""

import dataclasses
import json

import pytest
import torch

from detpost.purity import RULES, Finding, PurityReport, assert_pure, check

x = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)


def shifted(x):
    x += 1
    return x * x.sum().item()


def temporary(x):
    y = x * 2
    y += 1
    return y


def test_text_names_verdict_place_line_rule_and_rewrite():
    text = str(check(shifted, x, only=("writes",)))
    assert text.splitlines()[0] == "shifted: not pure (2 errors)"
    for part in ("test_report.py:", "| x += 1", "DP001", "float32[2, 3]", "instead: x = x + y"):
        assert part in text
    assert str(check(torch.sigmoid, x, only=("writes",))).splitlines()[0] == "sigmoid: pure"


def test_a_note_leaves_the_report_ok_but_not_clean():
    report = check(temporary, x, only=("writes",))
    assert (report.ok, report.clean, [f.severity for f in report.findings]) == (True, False, ["note"])


def test_errors_come_before_notes():
    def both(x):
        y = x * 2
        y += 1
        return y * y.sum().item()

    assert [f.severity for f in check(both, x, only=("writes",)).findings] == ["error", "note"]


def test_json_holds_every_field():
    report = check(shifted, x, only=("writes",))
    parsed = json.loads(report.to_json())
    assert (parsed["ok"], parsed["subject"]) == (False, "shifted")
    assert parsed["findings"][0]["rule"] == "DP001"
    assert parsed["findings"][0]["shape"] == [2, 3]
    assert set(parsed["findings"][0]) == {field.name for field in dataclasses.fields(Finding)}


def test_sarif_has_rules_levels_and_relative_places(monkeypatch, request):
    monkeypatch.chdir(request.path.parent)
    log = json.loads(check(shifted, x, only=("writes",)).to_sarif())
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == list(RULES)
    result = run["results"][0]
    assert (result["ruleId"], result["level"]) == ("DP001", "error")
    assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == "DP001"
    place = result["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "test_report.py"
    assert place["region"]["startLine"] == shifted.__code__.co_firstlineno + 1


def test_reports_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PurityReport("f").subject = "g"


def test_assert_pure_raises_with_the_report_and_takes_what_is_allowed():
    with pytest.raises(AssertionError, match="DP010"):
        assert_pure(shifted, x, only=("writes",))
    assert assert_pure(shifted, x, allow=["DP001", "DP010"], only=("writes",)).clean
    assert assert_pure(temporary, x, only=("writes",)).findings
    with pytest.raises(ValueError, match="not rules"):
        assert_pure(shifted, x, allow=["DP999"])
