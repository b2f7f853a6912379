"""What a version in fewer bits changed in detections, and which nodes of the graph it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detpost.export.mixed import Mixture
from detpost.export.rounded import decode_in_fewer_bits, decode_warning, fewer_bits
from detpost.export.weights import load_weights, read_onnx
from detpost.verify.bisect import Budget, Measured, OutOfBudgetError, expected_runs, needed
from detpost.verify.changes import Changes, compare_detections, disagreement
from detpost.verify.evidence import Evidence, evidence_of
from detpost.verify.on_images import OnImages, detect_all
from detpost.verify.suspects import own_top_k, suspects

__all__ = ["Diagnosis", "Finding", "QuerySelection", "diagnose", "load_model", "parts_of"]

WORTH_A_NODE = 0.05  # of the loss: what a node, or a half of a graph, must bring to be kept
_MOST_GROUPS = 12  # of modules, in the profile
_FIRST = (1, 4, 16, 64)  # how many of the nodes that add most rounding are tried
_MOST = 0.5  # of the loss: what gives back less of it is not where to search
_LOOKED_AT = 8  # nodes one by one, where the loss is spread
_STOPPED = "the budget is spent: the set found is not the smallest; the same command goes on from here"
_MOST_FOUND = 40  # nodes that a search has which was stopped: more are no finding


@dataclass(frozen=True)
class Finding:
    """A node that explains a part of the loss.

    Args:
        node: its name in the reference.
        operator: what it computes.
        module: the module of the original network, empty where the file does not say.
        share: how much of the loss is back when this node alone is float.
        needed: how much comes again when it alone of those found is not.
        evidence: what its values look like, the telling one first.
    """

    node: str
    operator: str
    module: str
    share: float
    needed: float
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class QuerySelection:
    """What happened to the queries that the network picked with a top-k of its own.

    Args:
        node: the TopK.
        permuted: share of images whose queries are the same in another order: rounding, and no damage.
        changed: share of images with other queries.
        replaced: share of all queries that the other version did not pick.
        share: how much of the loss is back when the reference's queries are picked, and nothing else is changed.
    """

    node: str
    permuted: float
    changed: float
    replaced: float
    share: float | None


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Args:
        model: the version that was looked at.
        reference: what it was compared with.
        images: the images' files.
        threshold: detections above it were compared.
        bits: in which fewer bits the version is.
        changes: what changed in detections.
        disagreement: how far both are apart, between 0 and 1; what the search followed.
        runtime: where the version is half, the changes as ONNX Runtime computes it on this processor, which leaves
            roundings out; ``changes`` are those with every half value rounded, as a GPU stores it.
        findings: the smallest set of nodes that explains the loss, in the order of the graph; where it is spread, those
            of the nodes that add most error which give a part of it back alone.
        explained: how much of the disagreement they explain together.
        modules: how much is back when a part of the network is float, by its name: of parts that hold what was found,
            or of all where the loss is spread.
        selection: what became of the network's own choice of queries, where it has one.
        decode: nodes of the post-processing in fewer bits.
        runs: how often the images were run.
        complete: whether the search came to its end within the budget.
        notes: what a reader should know.
        labels: the name of each class.
        found: detections of both, image by image, for pictures.
    """

    model: str
    reference: str
    images: tuple[str, ...]
    threshold: float
    bits: tuple[str, ...]
    changes: Changes
    disagreement: float
    runtime: Changes | None = None
    findings: tuple[Finding, ...] = ()
    explained: float = 0.0
    modules: Mapping[str, float] | None = None
    selection: QuerySelection | None = None
    decode: tuple[str, ...] = ()
    runs: int = 0
    complete: bool = True
    notes: tuple[str, ...] = ()
    labels: Mapping[int, str] | None = None
    found: tuple[Any, Any] = ((), ())

    @property
    def explains(self) -> str:
        """What the search is about: the loss; where every detection has its partner, the difference that is left."""
        return _what(self.changes)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the nodes that explain the loss: what ``quantize --keep`` takes."""
        return tuple(finding.node for finding in self.findings)

    def to_json(self) -> str:
        """Give all of it but the detections as JSON.

        Returns:
            A JSON object with the fields above, ``nodes``, and the counts and loss of ``changes``.
        """
        whole = {name: value for name, value in vars(self).items() if name not in ("found", "changes", "runtime")}
        names = {int(label): name for label, name in (self.labels or {}).items()}
        changes = [
            {"image": self.images[change.image], "class": names.get(change.label, str(change.label))}
            | {name: value for name, value in change.to_dict().items() if name != "image"}
            for change in self.changes.changes
        ]
        return json.dumps(
            {
                **whole,
                "nodes": self.nodes,
                "findings": [asdict(finding) for finding in self.findings],
                "selection": None if self.selection is None else asdict(self.selection),
                "loss": self.changes.loss,
                "counts": self.changes.counts,
                "detections": {"reference": self.changes.reference, "model": self.changes.other},
                "runtime": None if self.runtime is None else {"loss": self.runtime.loss, "counts": self.runtime.counts},
                "changes": changes,
            },
            indent=1,
        )

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.changes.counts.items())
        lines = [
            f"{self.model} ({', '.join(self.bits) or 'float'}) against {self.reference}, {len(self.images)} images",
            f"detections: {self.changes.reference} against {self.changes.other}; {counts}",
            f"loss: {self.changes.loss:.4f} of detections without a partner",
        ]
        if not self.changes.loss:
            lines.append(f"difference: {self.disagreement:.4f}, of scores and boxes that moved a little")
        if self.selection is not None:
            chosen = self.selection
            share = (
                ""
                if chosen.share is None
                else f"; picked as the reference does, {chosen.share:.0%} of the {self.explains} is back"
            )
            lines.append(
                f"query selection: permuted alone in {chosen.permuted:.0%} of images (no damage), "
                f"{chosen.replaced:.1%} of queries replaced{share}"
            )
        for finding in self.findings:
            place = f" in {finding.module}" if finding.module else ""
            why = f": {finding.evidence[0]}" if finding.evidence else ""
            lines.append(
                f"{finding.node} ({finding.operator}{place}), {finding.share:.0%} of the {self.explains} alone{why}"
            )
        if self.findings:
            lines.append(f"kept float together, they give back {self.explained:.0%} of the {self.explains}")
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])


def diagnose(
    model: str | Path,
    reference: str | Path,
    images: Sequence[str | Path],
    *,
    threshold: float = 0.5,
    budget: float | None = None,
    journal: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Say what a version of a detector changed in detections, and which nodes of its graph that came from.

    Args:
        model: the version in fewer bits, or in another runtime: what :meth:`detpost.Detector.load` takes. Nodes are
            looked for where both are ``.onnx`` files; the model may lack detpost's metadata, as a stock tool leaves it.
        reference: what it was made from.
        images: files of images.
        threshold: detections with ``score > threshold`` are compared.
        budget: seconds that the search may take; what was found until then is given.
        journal: a file that keeps what was measured, so that a search that was stopped goes on.
        progress: called with one line before each step.
        tell: called with the number of runs that the search has made and may need.

    Returns:
        The diagnosis.

    Raises:
        OSError: a file that is missing or cannot be read.
        ValueError: no images, or a file that is no whole detector.
    """
    say = progress or (lambda _: None)
    paths = [Path(image) for image in images]
    if not paths:
        raise ValueError("no images: name a folder that has some")
    names = str(model), str(reference), tuple(str(path) for path in paths)
    if Path(model).suffix != ".onnx" or Path(reference).suffix != ".onnx":
        return _by_detections(names, paths, threshold, say)
    return _Case(Path(model), Path(reference), paths, threshold, Budget(budget), say, tell).solve(names, journal)


def load_model(path: Path) -> Any:
    """Read an ONNX model with its weights."""
    source = read_onnx(path)
    load_weights(source.model, source.folder)
    return source.model


def _by_detections(
    names: tuple[str, str, tuple[str, ...]], paths: Sequence[Path], threshold: float, say: Callable[[str], None]
) -> Diagnosis:
    """Compare what is not two ONNX files: by detections alone."""
    from detpost.detector import Detector

    labels: Mapping[int, str] = {}
    sides = []
    for name in names[1::-1]:
        say(f"running {name}")
        detector = Detector.load(name, device="cpu", threshold=0.0)
        labels = labels or detector.class_names
        sides.append(detect_all(detector, paths))
    note = "nodes are looked for where both are .onnx files: `detpost export` the reference to have them named"
    return Diagnosis(
        *names,
        threshold=threshold,
        bits=(),
        changes=compare_detections(sides[0], sides[1], threshold),
        disagreement=disagreement(sides[0], sides[1], threshold),
        notes=(note,),
        labels=labels,
        found=(sides[0], sides[1]),
    )


class _Case:
    """Two files, images, and what is known of them so far."""

    def __init__(
        self,
        model: Path,
        reference: Path,
        paths: Sequence[Path],
        threshold: float,
        budget: Budget,
        say: Callable[[str], None],
        tell: Callable[[int, int], None] | None,
    ) -> None:
        self.say, self.tell, self.budget, self.threshold = say, tell, budget, threshold
        say("opening both")
        self.other, self.float = load_model(model), load_model(reference)
        self.on_images = OnImages(reference, paths)
        self.expected = self.on_images.detect()
        self.mixture = Mixture(self.float, self.other)
        self.model, self.reference = model, reference

    def solve(self, names: tuple[str, str, tuple[str, ...]], journal: str | Path | None) -> Diagnosis:
        """Go through all steps."""
        bits, threshold = fewer_bits(self.other), self.threshold
        self.say("running the version")
        found = self.on_images.detect(self.mixture.build(()))
        changes = compare_detections(self.expected, found, threshold)
        apart = disagreement(self.expected, found, threshold)
        runtime = None
        if {"fp16", "bf16"} & set(bits):
            runtime = compare_detections(self.expected, self.on_images.detect(self.other), threshold)
        known: dict[str, Any] = {
            "threshold": threshold,
            "bits": bits,
            "changes": changes,
            "disagreement": apart,
            "runtime": runtime,
            "decode": tuple(decode_in_fewer_bits(self.other)),
            "labels": self.on_images.detector.class_names,
            "found": (self.expected, found),
        }
        notes = _notes_before(known)
        if apart < 1e-4:
            return Diagnosis(
                *names, **known, notes=(*notes, "the detections are the same: there is nothing to explain")
            )
        if not self.mixture.candidates:
            return Diagnosis(*names, **known, notes=(*notes, "the two graphs compute the same: no node differs"))
        asked = Measured(self._measure, self.budget, _path(journal), self._question(names), self._told)
        return self._search(names, known, notes, asked, apart)

    def _search(
        self,
        names: tuple[str, str, tuple[str, ...]],
        known: dict[str, Any],
        notes: list[str],
        asked: Measured,
        apart: float,
    ) -> Diagnosis:
        candidates = self.mixture.candidates
        stopped: list[bool] = []

        def measure(kept: frozenset[str]) -> float:
            try:
                return asked(kept) if kept else apart
            except OutOfBudgetError:
                stopped.append(True)
                return float("nan")  # compares as no to everything: nothing more is dropped

        least = measure(frozenset(candidates))
        self.say(
            f"searching {len(candidates)} nodes: about {self._estimate} runs of {asked.slowest:.1f} s, "
            f"{self._estimate * asked.slowest / 60:.1f} minutes" + (f"; {asked.resumed} known" if asked.resumed else "")
        )
        if stopped:
            return Diagnosis(*names, **known, notes=(*notes, _STOPPED), runs=asked.runs, complete=False)
        explainable = apart - least

        def back(kept: Iterable[str]) -> float:
            return (apart - measure(frozenset(kept))) / explainable

        if not explainable > WORTH_A_NODE * apart:
            notes = [
                *notes,
                f"the {_what(known['changes'])} stays when every node that differs is float: "
                "it is not in the network's arithmetic",
            ]
            return Diagnosis(*names, **known, notes=tuple(notes), runs=asked.runs)
        selection = self._selection(apart, explainable)
        ranked = suspects(self.mixture, self.reference, self.on_images.images)
        found, modules, spread = self._smallest(ranked, back)
        if stopped:
            first = ", ".join(ranked[:3])
            notes = [
                *notes,
                _STOPPED,
                f"most rounding is added by {first}",
            ]
        elif spread:
            notes = [*notes, _spread(_what(known["changes"]), found, back)]
        findings = () if stopped and len(found) > _MOST_FOUND else self._findings(found, back)
        return Diagnosis(
            *names,
            **known,
            findings=tuple(findings),
            explained=_number(back(found)) if found else 0.0,
            modules=modules,
            selection=selection,
            runs=asked.runs,
            complete=not stopped,
            notes=tuple(notes),
        )

    def _smallest(
        self, ranked: Sequence[str], back: Callable[[Iterable[str]], float]
    ) -> tuple[list[str], dict[str, float], bool]:
        """Find the smallest set of nodes that explains the loss.

        Where rounding is added is known from one pass, so the worst few nodes are tried first, and halves are dropped
        of these alone. Where they do not explain the loss, a part of the network that gives most of it back is
        searched; where none does, it is spread, and the worst nodes are looked at one by one.

        Args:
            ranked: the candidates, the worst first.
            back: the share of the loss that is back when a set is float; not a number once the budget is spent.

        Returns:
            The set in the order of the graph, what is back by module, and whether the loss is spread.
        """
        order = {name: place for place, name in enumerate(self.mixture.candidates)}

        def reduce(units: Iterable[str]) -> list[str]:
            inside = sorted(units, key=order.__getitem__)
            return needed(inside, lambda whole, part: back(whole) - back(part) <= WORTH_A_NODE)

        few = [size for size in _FIRST if size < len(ranked)]
        sizes = [*few, *([len(ranked)] if len(ranked) <= _FIRST[-1] else [])]
        for size in sizes:
            if back(ranked[:size]) >= 1 - WORTH_A_NODE:
                found = reduce(ranked[:size])
                return found, self._profile(back, found), False
        modules = self._profile(back)
        for size in few[:-1]:
            if back(ranked[:size]) >= _MOST:
                return reduce(ranked[:size]), modules, False
        part = max(modules, key=modules.__getitem__, default="")
        if modules.get(part, 0.0) >= _MOST:
            return reduce(self._parts()[part]), modules, False
        found = [name for name in ranked[:_LOOKED_AT] if back([name]) >= WORTH_A_NODE]
        return sorted(found, key=order.__getitem__), modules, True

    def _measure(self, kept: frozenset[str]) -> float:
        return disagreement(self.expected, self.on_images.detect(self.mixture.build(kept)), self.threshold)

    def _told(self, runs: int) -> None:
        if self.tell is not None:
            self.tell(runs, max(runs, self._estimate))

    @property
    def _estimate(self) -> int:
        """Guess how many runs the search takes."""
        return len(_FIRST) + _MOST_GROUPS + expected_runs(min(_FIRST[-2], len(self.mixture.candidates)))

    def _question(self, names: tuple[str, str, tuple[str, ...]]) -> str:
        digest = hashlib.sha256()
        for path in (self.model, self.reference, *self.on_images.images):
            digest.update(path.read_bytes())
        return f"{digest.hexdigest()} {self.threshold} {len(names[2])}"

    def _findings(self, found: Sequence[str], back: Callable[[Iterable[str]], float]) -> list[Finding]:
        together = back(found)
        seen = evidence_of(self.mixture, self.on_images, found)
        findings = []
        for name in found:
            alone = back([name])
            without = back([other for other in found if other != name]) if len(found) > 1 else 0.0
            node = self.mixture.node(name)
            shares = _number(alone), _number(together - without)
            findings.append(Finding(name, node.op_type, self.mixture.module(name), *shares, tuple(seen[name])))
        return findings

    def _profile(self, back: Callable[[Iterable[str]], float], found: Sequence[str] | None = None) -> dict[str, float]:
        """Measure what is back when one part of the network is float: of each, or of those that hold what was found."""
        shares = {
            part: back(names)
            for part, names in self._parts().items()
            if found is None or not set(found).isdisjoint(names)
        }
        return {part: _number(share) for part, share in shares.items() if not np.isnan(share)}

    def _parts(self) -> dict[str, list[str]]:
        """Cut the candidates into at most a dozen parts of the network."""
        modules = {name: self.mixture.module(name) or "(no module)" for name in self.mixture.candidates}
        of = parts_of(sorted(set(modules.values())))
        parts: dict[str, list[str]] = {}
        for name, module in modules.items():
            parts.setdefault(of[module], []).append(name)
        return parts

    def _selection(self, apart: float, explainable: float) -> QuerySelection | None:
        """Look at the first TopK of the network whose whole numbers are in both graphs."""
        node = own_top_k(self.mixture)
        if node is None:
            return None
        indices = node.output[1]
        mine, theirs = (
            [each[f"seen/{indices}"].ravel() for _, each in self.on_images.watch(model, [f"seen/{indices}"])]
            for model in (
                Mixture(self.float, self.float).build((), [indices]),
                self.mixture.build((), [indices]),
            )
        )
        equal = [bool(np.array_equal(one, two)) for one, two in zip(mine, theirs, strict=True)]
        same = [set(one.tolist()) == set(two.tolist()) for one, two in zip(mine, theirs, strict=True)]
        replaced = [
            len(set(one.tolist()) - set(two.tolist())) / len(one) for one, two in zip(mine, theirs, strict=True)
        ]
        share = None
        if not all(equal):
            picked = self.on_images.detect(self.mixture.build_with(indices))
            share = _number((apart - disagreement(self.expected, picked, self.threshold)) / explainable)
        permuted = np.mean([alike and not bits for alike, bits in zip(same, equal, strict=True)])
        changed = 1 - np.mean(same)
        return QuerySelection(node.name or indices, float(permuted), float(changed), float(np.mean(replaced)), share)


def _notes_before(known: Mapping[str, Any]) -> list[str]:
    notes = []
    if known["decode"]:
        notes.append(decode_warning(known["decode"]))
    if known["runtime"] is not None and known["runtime"].loss < known["changes"].loss:
        notes.append(
            f"ONNX Runtime on this processor computes half nodes in float32: the loss is {known['runtime'].loss:.4f} "
            "there; what is said here is with every half value rounded, as a GPU stores it"
        )
    return notes


def _what(changes: Changes) -> str:
    return "loss" if changes.loss else "difference"


def _spread(what: str, found: Sequence[str], back: Callable[[Iterable[str]], float]) -> str:
    """Say that no small set explains it."""
    if not found:
        return f"the {what} is spread: no node alone gives 5 % of it back; see the modules"
    return f"the {what} is spread: the nodes named give {back(found):.0%} of it back together; see the modules"


def _path(journal: str | Path | None) -> Path | None:
    return None if journal is None else Path(journal)


def _number(value: float) -> float:
    return 0.0 if np.isnan(value) else round(float(value), 4)


def parts_of(modules: Sequence[str]) -> dict[str, str]:
    """Cut a network into at most a dozen parts, and tell the part of each module.

    Args:
        modules: dotted names.

    Returns:
        The part of each: a module that it lies in, or itself. The largest part is opened as long as there is room.
    """
    parts, opened = {""}, set[str]()
    while True:
        of = {module: _innermost(module, parts) for module in modules}
        inside = {part: [module for module in modules if of[module] == part] for part in parts}
        finer = {part: {_one_deeper(module, part) for module in held} for part, held in inside.items()}
        ready = [
            part
            for part in parts - opened
            if finer[part] not in ({part}, set()) and len(parts - {part} | finer[part]) <= _MOST_GROUPS
        ]
        if not ready:
            return of
        largest = max(sorted(ready), key=lambda part: len(inside[part]))
        opened.add(largest)
        parts = parts - {largest} | finer[largest]


def _innermost(module: str, parts: set[str]) -> str:
    """Give the deepest part that a module lies in, the module itself where none does."""
    around = [part for part in parts if part in ("", module) or module.startswith(part + ".")]
    return max(around, key=len, default=module)


def _one_deeper(module: str, part: str) -> str:
    return ".".join(module.split(".")[: (part.count(".") + 2) if part else 1])
