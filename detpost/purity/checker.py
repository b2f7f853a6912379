"""``check`` and ``assert_pure``: one call in, one report out."""

from __future__ import annotations

import functools
import inspect
import linecache
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from detpost.purity import compiled, gradients
from detpost.purity.frames import definition, failure, first_line
from detpost.purity.gradients import Outcome
from detpost.purity.isolation import State, Subject, isolated
from detpost.purity.recorder import Recorder, storage_key
from detpost.purity.report import Finding, PurityReport, ordered
from detpost.purity.rules import RULES
from detpost.purity.static import allowances
from detpost.purity.structure import same, tensors

STAGES = ("writes", "backward", "checkpoint", "gradcheck", "graph breaks", "recompiles", "export", "cuda graph")


def check(
    subject: Callable[..., Any],
    /,
    *args: Any,
    gradcheck: bool = False,
    only: Collection[str] | None = None,
    **kwargs: Any,
) -> PurityReport:
    """Run a function or module on copies of its inputs and report what compilers, exporters and autograd dislike.

    Nothing that the caller owns is changed: inputs, parameters and buffers are copied for each run, Python attributes
    and random generators are put back, and no ``.grad`` is touched. What the subject does never escapes as an
    exception; if it raises, that is the finding.

    Severity: a write to an input, a view of one, a parameter, a buffer, a captured tensor or a tensor saved for
    backward is an error; a write to a temporary of its own is a note, and so leaves ``report.ok`` True. Running
    statistics that normalisation layers update in training mode, recompilations, changed Python attributes and
    non-finite gradients are warnings. Everything else is an error. A line that carries ``# detpost: allow DP001`` is
    silent about that rule. Writes that PyTorch makes to memory it allocated within the same call are not reported.

    Two things are out of reach: a TorchScript module runs on its own parameters and buffers, and what a subject does
    to files, to globals other than tensors and modules, or to objects inside its attributes is done each time.

    Floating inputs are made to require a gradient for the recorded run, also if the caller's do not, so that tensors
    saved for backward are seen; if the subject only works without gradients, it is recorded without them.

    Overhead: the subject runs about twelve times in eager mode, two of them under recording modes that add some
    10 to 30 microseconds to each operator, and memory for one copy of inputs, parameters and buffers is needed.
    Dynamo and export trace it about five times; that takes seconds for a large model, and a fraction of one for a
    post-processor. Dynamo's caches are reset, so functions compiled earlier in the process compile again at their
    next call. Pass ``only=("writes",)`` to record alone.

    Args:
        subject: function, method or module.
        *args: its positional inputs; nested containers of tensors are fine.
        gradcheck: also compare gradients with finite differences in float64.
        only: stages to run, among ``detpost.purity.STAGES``; all of them by default.
        **kwargs: its keyword inputs. A subject with a keyword ``gradcheck`` or ``only`` of its own goes in a lambda.

    Returns:
        The report.

    Raises:
        ValueError: if ``only`` names a stage that does not exist.

    Examples:
        >>> def shifted(x):
        ...     x += 1
        ...     return x
        >>> x = torch.zeros(2)
        >>> report = check(shifted, x, only=("writes",))
        >>> report.ok, report.findings[0].rule, report.findings[0].target, x.tolist()
        (False, 'DP001', 'input', [0.0, 0.0])
        >>> check(lambda x: x + 1, x, only=("writes",)).clean
        True
    """
    unknown = set(only or ()) - set(STAGES)
    if unknown:
        raise ValueError(f"only names {sorted(unknown)}, which are not stages; choose among {', '.join(STAGES)}")
    run = [stage for stage in STAGES if (stage in only if only is not None else stage != "gradcheck" or gradcheck)]
    with compiled.quiet():
        try:
            findings, stages = _run_stages(Subject(subject, args, kwargs), run)
        except Exception as error:  # inputs that cannot be copied, objects that answer to nothing
            findings, stages = [Finding("DP090", "error", f"cannot be checked: {first_line(error)}")], {}
    kept = [finding for finding in findings if not _allowed(finding)]
    return PurityReport(_name_of(subject), ordered(kept), stages)


def assert_pure(subject: Callable[..., Any], /, *args: Any, allow: Collection[str] = (), **kwargs: Any) -> PurityReport:
    """Raise if the checker finds an error.

    Args:
        subject: function, method or module.
        *args: its positional inputs.
        allow: rule codes to accept, such as ``("DP010",)``.
        **kwargs: its keyword inputs, and the keywords of ``check``.

    Returns:
        The report, without what was allowed.

    Raises:
        AssertionError: with the whole report as its message.
        ValueError: if ``allow`` names a rule that does not exist.

    Examples:
        >>> assert_pure(torch.sigmoid, torch.zeros(2), only=("writes",)).ok
        True
    """
    codes = (allow,) if isinstance(allow, str) else tuple(allow)
    unknown = [code for code in codes if code not in RULES]
    if unknown:
        raise ValueError(f"allow names {unknown}, which are not rules; choose among {', '.join(RULES)}")
    report = check(subject, *args, **kwargs).without(codes)
    if not report.ok:
        raise AssertionError(str(report))
    return report


def _run_stages(subject: Subject, run: list[str]) -> tuple[list[Finding], dict[str, str]]:
    outcomes: dict[str, str] = {}
    raised, findings = _plain_run(subject)
    if "writes" in run or raised is not None:
        started = time.perf_counter()
        recorded, outcome = _record(subject, raised)
        findings += recorded
        outcomes.update({"writes": f"{outcome} ({time.perf_counter() - started:.2f} s)"})
    if raised is not None:
        outcomes.update({stage: "not checked: the call raises" for stage in run if stage != "writes"})
        return findings, outcomes
    plain: gradients.Gradients | None = None
    if "backward" in run or "checkpoint" in run:
        found, outcome, plain = gradients.backward(subject)
        findings += [placed for finding in found if (placed := _beside_writes(finding, findings)) is not None]
        outcomes.update({"backward": outcome})
    later: dict[str, Callable[[], Outcome]] = {
        "checkpoint": lambda: gradients.checkpointing(subject, plain),
        "gradcheck": lambda: gradients.finite_differences(subject),
        "graph breaks": lambda: compiled.graph_breaks(subject),
        "recompiles": lambda: compiled.recompiles(subject),
        "export": lambda: compiled.export(subject),
        "cuda graph": lambda: compiled.cuda_graph(subject),
    }
    for stage in run:
        if stage in later:
            try:
                found, outcome = later[stage]()
            except (Exception, SystemExit) as error:  # a failure of the checker's own is an outcome
                found, outcome = [], f"not checked: {first_line(error)}"
            findings += found
            outcomes.update({stage: outcome})
    return findings, outcomes


def _beside_writes(finding: Finding, others: list[Finding]) -> Finding | None:
    """Give a failing backward, which names no line, that of the write that made it fail; drop what repeats a write."""
    if finding.rule != "DP050":
        return finding
    writes = [other for other in others if other.target and other.rule <= "DP006"]
    if finding.severity == "warning" and any((w.file, w.line) == (finding.file, finding.line) for w in writes):
        return None
    cause = next((w for w in writes if "saved for backward" in w.message), None)
    if finding.file is None and cause is not None:
        return replace(finding, file=cause.file, line=cause.line, source=cause.source)
    return finding


def _plain_run(subject: Subject) -> tuple[BaseException | None, list[Finding]]:
    """Make the call as the caller would, and look at what it changes in Python."""
    given = subject.copies()
    state = State()
    try:
        with isolated(subject) as state:
            subject.run(given)
    except (Exception, SystemExit) as error:
        return error, [failure("DP090", error)]
    found = []
    for name in state.changed_attributes:
        place = definition(subject.call, name.rpartition(".")[2])
        message = f"the call changes the attribute {name}"
        found.append(Finding("DP070", "warning", message, place.file, place.line, place.source))
    if {name for name, _ in tensors(subject.inputs)} != {name for name, _ in tensors(given)}:
        place = definition(subject.call)
        message = "the call adds entries to an input container, or takes some away"
        found.append(Finding("DP070", "error", message, place.file, place.line, place.source))
    return None, found


def _record(subject: Subject, raised: BaseException | None) -> Outcome:
    """Record one run: with gradients if the subject bears them, otherwise with less and less around it."""
    best: list[Finding] = []
    problem: BaseException | None = None
    for require_grad, hooks, enabled in ((True, True, True), (None, True, True), (None, False, True), (False,) * 3):
        findings, problem = _record_once(subject, require_grad, hooks, enabled)
        if problem is None:
            return findings, "recorded" if raised is None else "recorded without gradients: the call raises"
        best = max(best, findings, key=len)
    return best, "recorded up to the error" if raised else f"recorded in part: {first_line(problem or '')}"


def _record_once(
    subject: Subject, require_grad: bool | None, hooks: bool, enabled: bool
) -> tuple[list[Finding], BaseException | None]:
    given = subject.copies(require_grad=require_grad, leaf=False)
    problem: BaseException | None = None
    with isolated(subject) as state:
        # Name the inputs once, before the call: a call may take entries out of the containers it is given.
        inputs = list(_named_inputs(subject, given))
        originals = [tensor.detach().clone() for _, tensor in inputs]
        recorder = Recorder(inputs, state.held, sys._getframe())
        try:
            with torch.set_grad_enabled(enabled and torch.is_grad_enabled()), recorder.watching(hooks):
                subject.run(given)
        except (Exception, SystemExit) as error:
            problem = error
        pairs = [("input", name, now, old) for (name, now), old in zip(inputs, originals, strict=True)]
        pairs += [(item.kind, item.name, item.tensor, item.original) for item in state.held]
        unseen = _changed_unseen(subject, pairs, recorder)
    return recorder.results() + unseen, problem


def _changed_unseen(
    subject: Subject, pairs: list[tuple[str, str, torch.Tensor, torch.Tensor]], recorder: Recorder
) -> list[Finding]:
    """Find tensors that differ after the call though no operator wrote them: NumPy views, extensions."""
    found = []
    for kind, name, now, old in pairs:
        if id(now) not in recorder.written and not same(now, old):
            place = recorder.host_views.get(storage_key(now)[0]) or definition(subject.call)
            message = f"{kind} {name} changed during the call, and no operator wrote it"
            where = (place.file, place.line, place.source, "", kind, name)
            found.append(Finding("DP007", "error", message, *where, tuple(old.shape), str(old.dtype)[len("torch.") :]))
    return found


def _named_inputs(subject: Subject, inputs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield input tensors under the names that the subject's signature gives them."""
    args, kwargs = inputs
    named: dict[str, Any] = {f"args[{index}]": value for index, value in enumerate(args)} | kwargs
    try:
        function = subject.call.forward if isinstance(subject.call, nn.Module) else subject.call
        named = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # a builtin without a signature
        pass
    for name, value in named.items():
        yield from tensors(value, name)


def _allowed(finding: Finding) -> bool:
    if finding.file is None or finding.line is None:
        return False
    source = "".join(linecache.getlines(finding.file))
    return finding.rule in _parsed_allowances(source).get(finding.line, frozenset())


_parsed_allowances = functools.lru_cache(maxsize=256)(allowances)


def _name_of(subject: Callable[..., Any]) -> str:
    if isinstance(subject, nn.Module):
        return type(subject).__name__
    name = getattr(subject, "__qualname__" if isinstance(subject, FunctionType | MethodType) else "__name__", "")
    return name.rpartition("<locals>.")[2] or type(subject).__name__
