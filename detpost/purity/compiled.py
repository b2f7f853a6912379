"""Ask Dynamo where the graph breaks and whether a second call compiles again, and torch.export whether it takes it."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from detpost.purity.frames import Site, deepest, definition, failure, first_line
from detpost.purity.gradients import Outcome
from detpost.purity.isolation import Subject, isolated
from detpost.purity.report import Finding
from detpost.purity.structure import batch_size, clone, tensors, with_batch


class _Wrapped(nn.Module):
    """A function as a module, for interfaces that take modules only."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the compiler's log lines off the terminal: what matters in them is in the report."""
    before, trace = logging.root.manager.disable, logging.getLogger("torch.__trace")
    disabled, trace.disabled = trace.disabled, True  # it hands records to handlers past logging.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
        trace.disabled = disabled


def _reason(text: str) -> str:
    """Read what Dynamo says of a break: its first line, and the explanation that it adds to a general one."""
    found = re.search(r"^\s*Explanation:\s*(.+)$", text, re.MULTILINE)
    return f"{first_line(text)}: {found.group(1).strip()}"[:300] if found else first_line(text)


def _compilable(call: Callable[..., Any]) -> Callable[..., Any]:
    """Put a Python function around what has no code that Dynamo could look at."""
    if isinstance(call, nn.Module | types.FunctionType | types.MethodType):
        return call
    return lambda *args, **kwargs: call(*args, **kwargs)


def _as_is(graph: Any, example_inputs: Any) -> Any:
    return graph.forward


@contextlib.contextmanager
def _fresh_dynamo() -> Iterator[Any]:
    import torch._dynamo as dynamo

    dynamo.reset()
    try:
        yield dynamo
    finally:
        dynamo.reset()


def graph_breaks(subject: Subject) -> Outcome:
    """List what breaks the graph: the first break, which Dynamo is made to stop at, then all that it passes over.

    A break before which nothing was captured leaves no trace among the latter, so that of several such breaks only the
    first is listed; the recorder sees the synchronisations among them all the same.
    """
    breaks = _first_break(subject)
    if breaks:
        breaks += _all_breaks(subject)
    places = {(site.file, site.line): (reason, site) for reason, site in reversed(breaks)}  # the first reason stays
    found = [Finding("DP030", "error", reason, s.file, s.line, s.source) for reason, s in reversed(places.values())]
    return found, f"{len(found)} line{'s' * (len(found) > 1)} break the graph" if found else "one graph, no breaks"


def _first_break(subject: Subject) -> list[tuple[str, Site]]:
    """Find the first break, if there is one.

    Dynamo is asked to raise at a break with its settings as they are: `fullgraph=True` would capture `.item()` and
    `nonzero`, where a default compilation breaks.
    """
    try:
        with _fresh_dynamo() as dynamo, isolated(subject):
            stop = getattr(dynamo, "error_on_graph_break", None)
            compiled = torch.compile(_compilable(subject.call), backend=_as_is, fullgraph=stop is None)
            with stop(True) if stop is not None else contextlib.nullcontext():
                compiled(*clone(subject.args), **clone(subject.kwargs))
        return []
    except Exception as error:
        stack = getattr(error, "real_stack", None)
        found = failure("DP030", error)
        site = deepest(stack) if stack else Site(found.file, found.line, found.source)
        return [(_reason(str(error)) or type(error).__name__, site)]


def _all_breaks(subject: Subject) -> list[tuple[str, Site]]:
    try:
        with _fresh_dynamo() as dynamo, isolated(subject):
            explained = dynamo.explain(_compilable(subject.call))(*clone(subject.args), **clone(subject.kwargs))
        return [(_reason(entry.reason), deepest(entry.user_stack)) for entry in explained.break_reasons]
    except Exception:  # the first reason is known already; explain is a convenience that some code defeats
        return []


def recompiles(subject: Subject) -> Outcome:
    """Call the compiled subject again with the same inputs, then with two other batch sizes.

    One recompilation on the first change of the batch size is how Dynamo learns that the size varies; a further one on
    the second change is a finding.
    """
    try:
        with _fresh_dynamo() as dynamo, isolated(subject):
            compiled = torch.compile(_compilable(subject.call), backend=_as_is)
            compiled(*clone(subject.args), **clone(subject.kwargs))
            error = _recompilation(dynamo, compiled, subject.copies())
            if error is not None:
                return [_recompiled("the same inputs compile again", error, subject)], "recompiles on the same inputs"
            return _other_batches(subject, dynamo, compiled)
    except Exception as error:
        return [], f"not checked: {first_line(error)}"


def _recompilation(dynamo: Any, compiled: Callable[..., Any], inputs: Any) -> Exception | None:
    try:
        with dynamo.config.patch(error_on_recompile=True):
            compiled(*inputs[0], **inputs[1])
    except dynamo.exc.RecompileError as error:
        return error  # type: ignore[no-any-return]
    return None


def _other_batches(subject: Subject, dynamo: Any, compiled: Callable[..., Any]) -> Outcome:
    size = batch_size(subject.inputs)
    if size is None:
        return [], "none on the same inputs"
    larger = [with_batch(subject.inputs, size + extra) for extra in (1, 2)]
    try:
        for inputs in larger:
            subject.run(clone(inputs))
    except Exception:
        return [], f"none on the same inputs; no other batch size is accepted than {size}"
    compiled(*larger[0][0], **larger[0][1])
    error = _recompilation(dynamo, compiled, larger[1])
    if error is None:
        return [], f"none (same inputs; batch {size}, {size + 1}, {size + 2})"
    sizes = f"batch sizes {size}, {size + 1}, {size + 2} each compile"
    return [_recompiled(sizes, error, subject)], "recompiles for each batch size"


def _recompiled(what: str, error: BaseException, subject: Subject) -> Finding:
    guards = [line.strip(" -") for line in str(error).splitlines() if line.strip().startswith("- 0/")]
    reason = guards[0].split("# ")[0].strip() if guards else first_line(error)
    site = definition(subject.call)
    return Finding("DP031", "warning", f"{what}: {reason}"[:300], site.file, site.line, site.source)


def export(subject: Subject) -> Outcome:
    """Ask ``torch.export`` for a program, without strict mode."""
    module = subject.call if isinstance(subject.call, nn.Module) else _Wrapped(subject.call)
    try:
        with isolated(subject):
            torch.export.export(module, clone(subject.args), clone(subject.kwargs), strict=False)
        return [], "ok"
    except Exception as error:
        return [failure("DP040", error)], f"refused: {first_line(error)}"


def cuda_graph(subject: Subject) -> Outcome:
    """Capture one call in a CUDA graph, where there is a GPU and the inputs are on it."""
    if not torch.cuda.is_available():
        return [], "not checked: no CUDA"
    if not any(tensor.is_cuda for _, tensor in tensors(subject.inputs)):
        return [], "not checked: the inputs are not on the GPU"
    try:
        with isolated(subject), torch.no_grad():
            fixed = subject.copies(require_grad=False)
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    subject.run(fixed)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                subject.run(fixed)
            graph.replay()
            torch.cuda.synchronize()
        return [], "ok"
    except Exception as error:
        with contextlib.suppress(Exception):
            torch.cuda.synchronize()
        return [failure("DP060", error)], f"fails: {first_line(error)}"
