"""The static half keeps the precision and recall that a reader measured over four libraries."""

import csv
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "audit_source.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("audit_source", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["audit_source"] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["audit_source"]


@pytest.fixture(scope="module")
def audit(script):
    for package in script.PACKAGES:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return script.measure()


def test_the_sample_holds_two_hundred_findings_and_for_each_row_a_verdict_and_a_reason(script):
    with script.SAMPLE.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == script.COLUMNS
    assert sum(row["before"] == "1" for row in rows) >= 200
    assert {row["package"] for row in rows} == set(script.PACKAGES)
    assert {row["rule"] for row in rows} == {*script.WRITES, *script.READS}
    assert all(row["verdict"] in ("true", "false") and row["reason"] for row in rows)
    assert all(
        row["memory"] in ("own", "held") for row in rows if row["verdict"] == "true" and row["rule"] in script.WRITES
    )
    assert all(1 <= int(row["drawn"]) <= int(row["stratum"]) for row in rows)
    assert max(Counter((row["file"], row["line"], row["rule"]) for row in rows).values()) == 1


@pytest.mark.peers
@pytest.mark.slow
def test_most_of_the_sample_is_still_there(audit):
    assert audit.rows >= 9 * audit.gone


@pytest.mark.peers
@pytest.mark.parametrize(
    ("group", "precision", "recall"),
    [
        ("writes", 0.96, 0.96),
        ("reads", 0.97, 0.95),
        ("DP001", 0.93, 0.92),
        ("DP002", 0.96, 0.98),
        ("DP003", 0.98, 0.98),
    ],
)
def test_precision_and_recall_are_what_the_documentation_says(audit, group, precision, recall):
    now = audit.now[group]
    assert (now.precision, now.recall) >= (precision, 0.0), "\n".join(now.wrong)
    assert now.recall >= recall, "\n".join(now.wrong)


@pytest.mark.peers
def test_nothing_was_lost_against_version_0_1(audit):
    before, now = audit.before["writes"], audit.now["writes"]
    assert now.precision >= before.precision
    assert now.recall >= before.recall


@pytest.mark.peers
def test_no_write_to_what_someone_else_holds_is_called_a_note(audit):
    assert audit.notes > 50
    assert audit.notes_held == 0


def test_the_drawing_finds_every_form_that_a_fault_can_have(script):
    source = "x += 1\nx[0] = 1\nx.add_(1)\nf(out=x)\nf(inplace=True)\nx.data\nx.item()\nwhere(x)\nx['a'] = 1\nx @= y\n"
    found = script.candidates(script.ast.parse(source))
    assert found == {(rule, line) for line, rule in enumerate([*script.WRITES, *script.READS], 1)}
