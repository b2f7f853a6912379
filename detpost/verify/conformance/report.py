"""A runner put to the suite: its scores, and in words what it does otherwise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from statistics import fmean
from typing import Any

import numpy as np
import torch

from detpost.reference import decode as reference
from detpost.verify.conformance.cases import Case, all_cases
from detpost.verify.conformance.faults import FAULTS, Fault
from detpost.verify.conformance.judge import PARTS, agreement, right_slots, shares
from detpost.verify.conformance.plan import Decoded, Plan, decode, plan_of
from detpost.verify.conformance.runner import Answer, Runner, RunnerError, function_runner, open_runner

__all__ = ["CaseResult", "ConformReport", "Difference", "conform"]

# The least that a fault must add to the mean agreement over all cases, to be named: a part of one case.
LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class CaseResult:
    """How one case went.

    Args:
        name: of the case.
        agreement: share of slots that agree, by part: indices, labels, order (NaN where nothing is in common), scores,
            boxes, valid. Empty where there was no answer.
        failure: why there was none, empty where there was.
        example: the first slot that differs, in words, empty where none does.
        explained: whether the differences named in the report give exactly this answer.
    """

    name: str
    agreement: dict[str, float] = field(default_factory=dict)
    failure: str = ""
    example: str = ""
    explained: bool = True

    @property
    def ok(self) -> bool:
        """Whether every slot agrees in every part."""
        return not self.failure and all(share == 1 for part, share in self.agreement.items() if part != "order")


@dataclass(frozen=True)
class Difference:
    """Something that a runner does otherwise.

    Args:
        name: for machines, as ``"argmax"``.
        words: for people.
        cases: names of the cases that do not agree, and that it explains, or explains better.
    """

    name: str
    words: str
    cases: tuple[str, ...]


@dataclass(frozen=True)
class ConformReport:
    """What :func:`conform` found.

    Args:
        runner: its name.
        cases: how each case went.
        differences: what the runner does otherwise, the gravest first.

    Example:
        >>> from detpost import DecodeSpec, DetectionPostProcessor
        >>> def runner(inputs):
        ...     post = DetectionPostProcessor(DecodeSpec(**json.loads(inputs["spec"])))
        ...     arrays = (torch.from_numpy(inputs[name]) for name in ("pred_logits", "pred_boxes", "image_sizes"))
        ...     return post(*arrays)
        >>> report = conform(runner, preset="detr")
        >>> report.ok, report.shares["labels"]
        (True, 1.0)
    """

    runner: str
    cases: tuple[CaseResult, ...]
    differences: tuple[Difference, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all cases agree."""
        return bool(self.cases) and all(case.ok for case in self.cases)

    @property
    def shares(self) -> dict[str, float]:
        """The mean share of slots that agree, by part; a case without an answer counts as 0."""
        found = {part: [case.agreement.get(part, 0.0) for case in self.cases] for part in PARTS}
        return {part: fmean([x for x in each if not math.isnan(x)] or [0.0]) for part, each in found.items()}

    def to_json(self) -> str:
        """Give the report as JSON; an order with nothing in common is null."""
        cases = [
            {**asdict(case), "ok": case.ok, "agreement": {k: _finite(v) for k, v in case.agreement.items()}}
            for case in self.cases
        ]
        differences = [asdict(difference) for difference in self.differences]
        made = {"runner": self.runner, "ok": self.ok, "shares": self.shares, "differences": differences, "cases": cases}
        return json.dumps(made, indent=1)

    def __str__(self) -> str:
        """Say it in lines: scores, what is done otherwise, and what that does not explain."""
        agreeing = sum(case.ok for case in self.cases)
        lines = [f"{self.runner}: {agreeing} of {len(self.cases)} cases agree"]
        lines += ["  slots that agree: " + ", ".join(f"{part} {_percent(x)}" for part, x in self.shares.items())]
        if self.differences:
            lines += ["what it does otherwise:"]
            lines += [f"  - {each.words} ({_count(len(each.cases), 'case')})" for each in self.differences]
        failed = [case for case in self.cases if case.failure]
        open_cases = [case for case in self.cases if not (case.ok or case.failure or case.explained)]
        if failed:
            lines += ["without an answer:", *(f"  - {case.name}: {case.failure}" for case in failed)]
        if open_cases:
            lines += ["what that does not explain, or not wholly:"]
            lines += [f"  - {case.name}: {case.example}" for case in open_cases]
        return "\n".join(lines)


def conform(
    runner: str | Callable[..., Any],
    preset: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConformReport:
    """Put a runner to the conformance suite.

    The cases hold raw outputs with equal logits, saturated ones, NaN, infinities, half precision, few candidates, and
    scores on the threshold, for specs that have each choice of a field with each choice of every other.

    Args:
        runner: a command line, called as ``COMMAND in.npz out.npz``; ``module:function``; or the function itself. In go
            ``pred_logits`` (B, Q, C), float32 or float16, ``pred_boxes`` (B, Q, 4), float32, ``image_sizes`` (B, 2),
            int64, (height, width), and ``spec``, JSON with the fields of :class:`detpost.DecodeSpec`. Out come
            ``labels``, ``scores``, ``valid`` (B, K), ``boxes`` (B, K, 4), xyxy in pixels, and ``queries`` (B, K) if the
            runner has them.
        preset: what a runner that knows one family is asked about; ``None`` asks every spec.
        progress: called with how many cases are done, of how many.

    Returns:
        The report. ``ok`` where labels, queries and validity are equal in every slot, scores within 1e-5 and boxes
        within 1e-5 of the larger image side.

    Raises:
        ValueError: an unknown preset, or a command that is not there.
        ImportError: a module or function that is not there, or a module that cannot be imported.
    """
    run = _open(runner)
    cases = all_cases(preset)
    answers: list[Answer | RunnerError] = []
    for number, case in enumerate(cases):
        if progress is not None:
            progress(number, len(cases))
        try:
            answers.append(run(case))
        except RunnerError as failure:
            answers.append(failure)
    if progress is not None:
        progress(len(cases), len(cases))
    name = runner if isinstance(runner, str) else getattr(runner, "__name__", type(runner).__name__)
    trials = [_Trial(case, answer) for case, answer in zip(cases, answers, strict=True) if isinstance(answer, Answer)]
    faults = _explain(trials)
    results = [_judge(case, answer, faults) for case, answer in zip(cases, answers, strict=True)]
    return ConformReport(name, tuple(results), tuple(_difference(fault, trials, faults) for fault in faults))


class _Trial:
    """One answer, held against what decodes with faults would give."""

    def __init__(self, case: Case, answer: Answer) -> None:
        self.case, self.answer = case, answer
        self._tried: dict[Plan, float] = {}

    @property
    def ok(self) -> bool:
        """Whether the answer agrees as it is."""
        return self.agreement(()) == 1

    def agreement(self, faults: Sequence[Fault]) -> float:
        """Give the mean agreement of the parts; 1 only where all agree."""
        plan = reduce(lambda changed, fault: fault.change(changed), faults, plan_of(self.case))
        if plan not in self._tried:  # most faults leave most plans as they are
            found = shares(self.answer, decode(plan, self.case), plan, self.case)
            self._tried = {**self._tried, plan: fmean(found.values())}
        return self._tried[plan]


def _open(runner: str | Callable[..., Any]) -> Runner:
    return open_runner(runner) if isinstance(runner, str) else function_runner(runner)


def _expected(case: Case) -> Decoded:
    """Decode by the definition; what else an answer is judged by comes from the plan."""
    logits, boxes, image_sizes = map(torch.from_numpy, (case.logits, case.boxes, case.image_sizes))
    found = reference.decode(logits, boxes, image_sizes, case.spec)
    by_plan = decode(plan_of(case), case)
    return Decoded(
        labels=found.labels.numpy(),
        boxes=found.boxes.numpy().astype(np.float64),
        scores=found.scores.numpy().astype(np.float64),
        valid=found.valid.numpy(),
        queries=found.queries.numpy(),
        every_key=by_plan.every_key,
        every_box=by_plan.every_box,
    )


def _judge(case: Case, answer: Answer | RunnerError, faults: Sequence[Fault]) -> CaseResult:
    if isinstance(answer, RunnerError):
        return CaseResult(case.name, failure=str(answer), explained=False)
    expected = _expected(case)
    found = agreement(answer, expected, plan_of(case), case)
    explained = _Trial(case, answer).agreement(faults) == 1
    return CaseResult(case.name, found, example=_example(case, answer, expected), explained=explained)


def _example(case: Case, answer: Answer, expected: Decoded) -> str:
    """Name the first slot that differs."""
    if answer.labels.shape[1] != expected.labels.shape[1]:
        return f"{answer.labels.shape[1]} slots, where {expected.labels.shape[1]} are asked for"
    right = right_slots(answer, expected, plan_of(case), case)
    same = np.all([same for part, same in right.items()], axis=0)
    if same.all():
        return ""
    image, slot = np.argwhere(~same)[0]
    parts = [part for part, agrees in right.items() if not agrees[image, slot] and part != "indices"]
    if not parts:
        return f"image {image}, slot {slot}: another query than {expected.queries[image, slot]}"
    told: list[str] = []
    for part in parts:
        given, wanted = (_told(getattr(side, part)[image, slot]) for side in (answer, expected))
        told = [*told, f"{part} {given}, where {wanted} is right"]
    return f"image {image}, slot {slot}: " + "; ".join(told)


def _explain(trials: Sequence[_Trial]) -> list[Fault]:
    """Find the faults that together explain the answers best: the best one, then the best beside it, and so on.

    Over all cases at once, those that agree included, so that what explains one answer by chance is not named.
    """
    chosen: list[Fault] = []
    best = _mean_agreement(trials, chosen)
    while best < 1:
        tried = [(_mean_agreement(trials, [*chosen, fault]), -place) for place, fault in enumerate(FAULTS)]
        gained, place = max(tried)
        if gained < best + LEAST_GAIN / len(trials):
            break
        best, chosen = gained, [*chosen, FAULTS[-place]]
    return _justified(trials, chosen)


def _justified(trials: Sequence[_Trial], chosen: Sequence[Fault]) -> list[Fault]:
    """Leave out what is near an answer by chance, or is part of what came later: one by one, the least missed first.

    "Any order of ties" covers "the higher index first".
    """
    kept = list(chosen)
    while kept and not all(_is_needed(trials, kept, fault) for fault in kept):
        kept = max((_without(kept, fault) for fault in kept), key=lambda others: _worth(trials, others))
    return kept


def _is_needed(trials: Sequence[_Trial], faults: Sequence[Fault], fault: Fault) -> bool:
    """Tell whether a fault, with the rest, is true: of most answers that it bears on, it explains what was left open.

    What is near by chance in some cases is further away in others: there, and in what agrees as it is, a runner that
    does what is said would have given another answer.
    """
    if any(trial.ok and trial.agreement(faults) < 1 for trial in trials):
        return False
    others = _without(faults, fault)
    pairs = [(trial.agreement(faults), trial.agreement(others)) for trial in trials if not trial.ok]
    borne_on = [with_it for with_it, without in pairs if with_it != without]
    explained = [with_it for with_it, without in pairs if with_it == 1 > without]
    return 2 * len(explained) > len(borne_on)


def _worth(trials: Sequence[_Trial], faults: Sequence[Fault]) -> tuple[int, float]:
    """Order sets of faults: by how many answers they give exactly, then by how near they come to all."""
    return sum(trial.agreement(faults) == 1 for trial in trials), _mean_agreement(trials, faults)


def _without(faults: Sequence[Fault], fault: Fault) -> list[Fault]:
    return [other for other in faults if other is not fault]


def _mean_agreement(trials: Sequence[_Trial], faults: Sequence[Fault]) -> float:
    return fmean([trial.agreement(faults) for trial in trials]) if trials else 1.0


def _difference(fault: Fault, trials: Sequence[_Trial], faults: Sequence[Fault]) -> Difference:
    """Name the cases that do not agree, and are explained less well without a fault."""
    others = _without(faults, fault)
    changed = [trial for trial in trials if not trial.ok and trial.agreement(faults) > trial.agreement(others)]
    return Difference(fault.name, fault.words, tuple(trial.case.name for trial in changed))


def _told(value: Any) -> str:
    if np.ndim(value):
        return "(" + ", ".join(f"{x:.6g}" for x in value) + ")"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _percent(share: float) -> str:
    """Write a share, never 100 % for what is less."""
    return f"{min(share, 0.9999 if share < 1 else 1):.2%}"


def _finite(share: float) -> float | None:
    return None if math.isnan(share) else share


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
