"""Hold the static half of the purity checker to what a reader found in torchvision, kornia, MONAI and transformers.

    python scripts/audit_source.py                       # precision and recall, rule by rule
    python scripts/audit_source.py --wrong               # and each finding that is false, each fault that is missed
    python scripts/audit_source.py --draw new.csv        # another sample, to be read and given verdicts

`tests/purity/sample.csv` holds the verdicts. The population are all places that could be a fault by their form (an
augmented assignment, a store to a subscript, a trailing underscore, ...), found or not; it was divided by rule, package
and whether the checker of version 0.1 and the present one found the place, and drawn from at random within each part,
the small parts whole. A row counts for as many places as its part had for each one drawn (`stratum / drawn`), so the
figures are estimates for the whole of the four libraries, and stay so when the checker changes. Where another version
is installed, rows are looked up by their text, and those whose text is gone are left out.
"""

from __future__ import annotations

import argparse
import ast
import csv
import importlib.util
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from detpost.purity import Finding, check_source

SAMPLE = Path(__file__).resolve().parents[1] / "tests" / "purity" / "sample.csv"
COLUMNS = (
    "package",
    "version",
    "file",
    "line",
    "rule",
    "code",
    "stratum",
    "drawn",
    "before",
    "verdict",
    "memory",
    "reason",
)
PACKAGES = ("torchvision", "kornia", "monai", "transformers")
DETECTORS = (
    *("conditional_detr", "d_fine", "dab_detr", "deformable_detr", "deimv2", "detr", "grounding_dino", "lw_detr"),
    *("mm_grounding_dino", "omdet_turbo", "owlv2", "owlvit", "rf_detr", "rt_detr", "rt_detr_v2", "table_transformer"),
    "yolos",
)
WRITES = ("DP001", "DP002", "DP003", "DP004", "DP005", "DP006")
READS = ("DP010", "DP020")


@dataclass
class Tally:
    """Places found rightly, found wrongly and missed, each counted for those that it stands for."""

    right: float = 0.0
    false: float = 0.0
    missed: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def precision(self) -> float:
        """The share of what is found that is a fault."""
        return self.right / max(self.right + self.false, 1e-9)

    @property
    def recall(self) -> float:
        """The share of the faults that is found."""
        return self.right / max(self.right + self.missed, 1e-9)

    def add(self, row: dict[str, str], found: bool) -> None:
        """Count one row of the sample."""
        weight, fault = int(row["stratum"]) / int(row["drawn"]), row["verdict"] == "true"
        self.right += weight * (found and fault)
        self.false += weight * (found and not fault)
        self.missed += weight * (fault and not found)
        if found != fault:
            what = "false " if found else "missed"
            self.wrong.append(f"{what} {row['rule']} {row['file']}:{row['line']}: {row['code']} ({row['reason']})")


@dataclass
class Audit:
    """What the sample says of the checker of version 0.1 and of the present one, and how many rows are left."""

    before: dict[str, Tally]
    now: dict[str, Tally]
    notes: int = 0  # findings of severity "note", and those of them that write what someone else holds
    notes_held: int = 0
    rows: int = 0
    gone: int = 0


def folder(package: str) -> Path:
    """Give the folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{package} is not installed")
    return Path(spec.origin).parent


def sources() -> Iterator[tuple[str, str, Path]]:
    """Package, name and path of each file: three libraries whole, and what transformers has for detection."""
    for package in PACKAGES:
        root = folder(package)
        if package == "transformers":
            paths = [path for name in DETECTORS for path in sorted((root / "models" / name).glob("*.py"))]
            paths += [*sorted((root / "loss").glob("*.py")), root / "image_transforms.py"]
        else:
            paths = sorted(root.rglob("*.py"))
        for path in paths:
            yield package, path.relative_to(root.parent).as_posix(), path


def measure(sample: Path = SAMPLE) -> Audit:
    """Run the checker over the files of the sample and count.

    Args:
        sample: the verdicts.

    Returns:
        The audit.
    """
    with sample.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    by_file: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        by_file[row["file"]].append(row)
    audit = Audit(defaultdict(Tally), defaultdict(Tally))
    for name, members in by_file.items():
        path = folder(members[0]["package"]).parent / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [line.strip() for line in text.splitlines()]
        findings = {(finding.rule, finding.line): finding for finding in check_source(text, name)}
        for row in members:
            places = [number for number, line in enumerate(lines, 1) if line == row["code"]]
            if not places:
                audit.gone += 1
                continue
            line = min(places, key=lambda place: abs(place - int(row["line"])))
            count(audit, row, findings.get((row["rule"], line)))
    return audit


def count(audit: Audit, row: dict[str, str], finding: Finding | None) -> None:
    audit.rows += 1
    groups = (row["rule"], "all", "writes" if row["rule"] in WRITES else "reads")
    for group in groups:
        audit.before[group].add(row, row["before"] == "1")
        audit.now[group].add(row, finding is not None)
    if finding is not None and finding.severity == "note":
        audit.notes += 1
        audit.notes_held += row["verdict"] == "true" and row["memory"] == "held"


def candidates(tree: ast.AST) -> set[tuple[str, int]]:
    """Rule and line of each place that could be a fault by its form."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.AugAssign() if not isinstance(node.op, ast.MatMult):
                found.add(("DP001", node.lineno))
            case ast.Subscript(ctx=ast.Store(), slice=index):
                if not (isinstance(index, ast.Constant) and isinstance(index.value, str)):
                    found.add(("DP002", node.lineno))
            case ast.Attribute(attr="data"):
                found.add(("DP006", node.lineno))
            case ast.Call():
                found |= {(rule, node.lineno) for rule in call_rules(node)}
    return found


def call_rules(node: ast.Call) -> Iterator[str]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name.endswith("_") and not name.startswith("_"):
        yield "DP003"
    for keyword in node.keywords:
        if keyword.arg == "out":
            yield "DP004"
        if keyword.arg == "inplace" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True:
            yield "DP005"
    if name == "item" and not node.args:
        yield "DP010"
    if name in ("argwhere", "masked_select", "nonzero", "unique", "unique_consecutive"):
        yield "DP020"
    if name == "where" and len(node.args) == 1 and not node.keywords:
        yield "DP020"


def draw(output: Path, seed: int) -> None:
    """Draw another sample, by rule, package and whether the place is found."""
    parts: dict[tuple[str, str, bool], list[list[str]]] = defaultdict(list)
    for package, name, path in sources():
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        found = {(finding.rule, finding.line) for finding in check_source(text, name)}
        for rule, line in sorted(candidates(ast.parse(text)) | found):
            place = [package, version(package), name, str(line), rule, lines[line - 1].strip()]
            parts[rule, package, (rule, line) in found].append(place)
    generator = random.Random(seed)
    with output.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for _, places in sorted(parts.items()):
            size = min(len(places), max(4, round(math.sqrt(len(places)))))
            for place in sorted(generator.sample(places, size)):
                writer.writerow([*place, len(places), size, "", "", "", ""])


def table(audit: Audit, groups: Iterable[str]) -> str:
    lines = ["| rule | precision, 0.1 | precision | recall, 0.1 | recall |", "| --- | --- | --- | --- | --- |"]
    for group in groups:
        before, now = audit.before[group], audit.now[group]
        figures = [before.precision, now.precision, before.recall, now.recall]
        shown = [f"{figure:.1%}" for figure in figures]
        if group in (*READS, "reads"):
            shown[0] = shown[2] = "no such rule"
        lines.append(f"| {group} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wrong", action="store_true", help="list what is found wrongly and what is missed")
    parser.add_argument("--draw", type=Path, metavar="CSV", help="draw another sample into a file")
    parser.add_argument("--seed", type=int, default=12, help="seed of that sample")
    options = parser.parse_args()
    if options.draw is not None:
        draw(options.draw, options.seed)
        return
    audit = measure()
    print(
        f"{audit.rows} places read by hand, {audit.gone} no longer there; "
        + ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    )
    print(table(audit, (*WRITES, "writes", *READS, "all")))
    print(f"{audit.notes} notes, {audit.notes_held} of them on a tensor that someone else holds")
    if options.wrong:
        print("\n".join(audit.now["all"].wrong))


if __name__ == "__main__":
    main()
