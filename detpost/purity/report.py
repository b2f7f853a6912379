"""What the checker found, and the forms it can be read in: text, JSON and SARIF."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from detpost.purity.rules import RULES, Severity

_ORDER: dict[str, int] = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        rule: code of the rule, a key of ``detpost.purity.RULES``.
        severity: ``"error"``, ``"warning"`` or ``"note"``.
        message: what was found, in one line.
        file: source file, or None where there is none to name.
        line: line in that file, counted from 1.
        source: the text of that line.
        operator: the operator that did it, such as ``aten.add_.Tensor``.
        target: for a write, what was written: ``"input"``, ``"view of an input"``, ``"parameter"``, ``"buffer"``,
            ``"captured tensor"``, ``"saved for backward"`` or ``"temporary"``.
        name: for a write, which one: the argument, parameter or buffer name.
        shape: shape of the tensor concerned.
        dtype: its dtype.
        count: how many times the same line did the same.
    """

    rule: str
    severity: Severity
    message: str
    file: str | None = None
    line: int | None = None
    source: str = ""
    operator: str = ""
    target: str = ""
    name: str = ""
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    count: int = 1

    @property
    def place(self) -> str:
        """``file:line``, the file relative to the working directory where that is shorter."""
        if self.file is None:
            return "-"
        return short_path(self.file) + (f":{self.line}" if self.line is not None else "")

    def __str__(self) -> str:
        times = f" (x{self.count})" if self.count > 1 else ""
        lines = [f"{self.severity:7} {self.rule} {self.place}: {self.message}{times}"]
        if self.source:
            lines.append(f"          | {self.source}")
        return "\n".join(lines)


@dataclass(frozen=True)
class PurityReport:
    """Everything one check found.

    Attributes:
        subject: name of what was checked.
        findings: the findings, errors first.
        stages: what each stage of the check had to say, such as ``{"export": "ok", "cuda graph": "not checked: ..."}``.

    Examples:
        >>> report = PurityReport("f", (Finding("DP001", "note", "aten.add_.Tensor writes a temporary"),))
        >>> report.ok, report.clean
        (True, False)
    """

    subject: str
    findings: tuple[Finding, ...] = ()
    stages: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True when there is no error; warnings and notes (a write to a temporary of its own) leave it True."""
        return not self.errors

    @property
    def clean(self) -> bool:
        """True when nothing at all was found, notes included."""
        return not self.findings

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings of severity ``"error"``."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def without(self, codes: Iterable[str]) -> PurityReport:
        """Leave the findings of some rules out.

        Args:
            codes: rule codes to leave out.

        Returns:
            A new report.
        """
        left_out = frozenset(codes)
        kept = tuple(finding for finding in self.findings if finding.rule not in left_out)
        return PurityReport(self.subject, kept, self.stages)

    def __str__(self) -> str:
        verdict = "pure" if self.clean else "ok" if self.ok else "not pure"
        counts = ", ".join(
            f"{number} {severity}{'s' if number > 1 else ''}"
            for severity in _ORDER
            if (number := sum(finding.severity == severity for finding in self.findings))
        )
        lines = [f"{self.subject}: {verdict}" + (f" ({counts})" if counts else "")]
        lines += ["  " + text for finding in self.findings for text in str(finding).splitlines()]
        for code in sorted({finding.rule for finding in self.findings}):
            rule = RULES[code]
            lines += [f"  {code} {rule.title}: {rule.why}.", f"        instead: {rule.rewrite}"]
        width = max((len(name) for name in self.stages), default=0)
        lines += [f"  {name:{width}}  {outcome}" for name, outcome in self.stages.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain Python values.

        Returns:
            A dict with ``subject``, ``ok``, ``clean``, ``findings`` and ``stages``.
        """
        return {
            "subject": self.subject,
            "ok": self.ok,
            "clean": self.clean,
            "findings": [asdict(finding) for finding in self.findings],
            "stages": dict(self.stages),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """Give the report as JSON.

        Args:
            indent: spaces per level, or None for one line.

        Returns:
            A JSON object with ``subject``, ``ok``, ``clean``, ``findings`` and ``stages``.

        Examples:
            >>> PurityReport("f").to_json(indent=None)
            '{"subject": "f", "ok": true, "clean": true, "findings": [], "stages": {}}'
        """
        return json.dumps(self.to_dict(), indent=indent)

    def to_sarif(self) -> str:
        """Give the report in SARIF 2.1.0, which code review tools read.

        Returns:
            A SARIF log with one run.
        """
        return sarif([self])


def short_path(file: str) -> str:
    """Make a path relative to the working directory, unless it lies outside of it."""
    try:
        relative = os.path.relpath(file)
    except ValueError:  # another drive
        return file
    return file if relative.startswith("..") else relative


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sort findings by severity, then by place, then by rule."""
    return tuple(sorted(findings, key=lambda f: (_ORDER[f.severity], f.file or "", f.line or 0, f.rule)))


def sarif(reports: Iterable[PurityReport]) -> str:
    """Write several reports as the JSON text of one SARIF 2.1.0 log."""
    findings = [finding for report in reports for finding in report.findings]
    rules = [
        {
            "id": rule.code,
            "name": "".join(word.capitalize() for word in rule.title.replace("=", " ").replace(".", " ").split()),
            "shortDescription": {"text": rule.title},
            "fullDescription": {"text": rule.why},
            "help": {"text": f"Instead: {rule.rewrite}"},
        }
        for rule in RULES.values()
    ]
    log = {
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": {"name": "detpost check", "rules": rules}},
                "results": [_sarif_result(finding) for finding in findings],
            }
        ],
    }
    return json.dumps(log, indent=2)


def _sarif_result(finding: Finding) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "ruleIndex": list(RULES).index(finding.rule),
        "level": finding.severity,
        "message": {"text": finding.message},
    }
    if finding.file is None:
        return result
    location: dict[str, Any] = {"artifactLocation": {"uri": Path(short_path(finding.file)).as_posix()}}
    if finding.line is not None:
        location = {**location, "region": {"startLine": finding.line}}
    return {**result, "locations": [{"physicalLocation": location}]}
