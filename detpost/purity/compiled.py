"""Asks Dynamo where the graph breaks and whether a second call compiles again, and torch.export whether it takes it."""

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

from detpost.purity.frames import Site, deepest, definition, error_site
from detpost.purity.isolation import isolated
from detpost.purity.report import Finding
from detpost.purity.structure import batch_size, clone, with_batch


class Wrapped(nn.Module):
    """A function as a module, for interfaces that take modules only."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.function(*args, **kwargs)


def first_line(error: BaseException | str) -> str:
    """The first line of an error message that says something, cut to a readable length."""
    text = error if isinstance(error, str) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[0] if lines else ""
    prefix = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return (prefix + said)[:300].rstrip()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the compiler's log lines off the terminal: what matters in them is in the report."""
    before, trace = logging.root.manager.disable, logging.getLogger("torch.__trace")
    disabled, trace.disabled = trace.disabled, True  # it hands records to handlers past logging.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
        trace.disabled = disabled


def reason_of(text: str) -> str:
    """What Dynamo says of a break: its first line, and the explanation it adds to a general one."""
    reason = first_line(text)
    found = re.search(r"^\s*Explanation:\s*(.+)$", text, re.MULTILINE)
    explanation = found.group(1).strip() if found else ""
    return f"{reason}: {explanation}"[:300] if explanation else reason


def compilable(subject: Callable[..., Any]) -> Callable[..., Any]:
    """The subject, or a Python function around it where Dynamo has no code to look at."""
    if isinstance(subject, nn.Module | types.FunctionType | types.MethodType):
        return subject
    return lambda *args, **kwargs: subject(*args, **kwargs)


def _as_is(graph: Any, example_inputs: Any) -> Any:
    return graph.forward


def graph_breaks(
    subject: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Finding], str]:
    """Lists what breaks the graph: the first break, which Dynamo is made to stop at, then all that it passes over.

    A break before which nothing was captured leaves no trace among the latter, so that of several such breaks only the
    first is listed; the recorder sees the synchronisations among them all the same.

    Args:
        subject: what to compile.
        args: its positional inputs.
        kwargs: its keyword inputs.

    Returns:
        Findings, and one line that sums them up.
    """
    function = compilable(subject)
    breaks = _first_break(subject, function, args, kwargs)
    if breaks:
        breaks += _all_breaks(subject, function, args, kwargs)
    findings: dict[tuple[Any, ...], Finding] = {}
    for reason, site in breaks:
        broken = Finding("DP030", "error", reason, site.file, site.line, site.source)
        findings.setdefault((site.file, site.line), broken)
    if not findings:
        return [], "one graph, no breaks"
    return list(findings.values()), f"{len(findings)} line{'s' if len(findings) > 1 else ''} break the graph"


def _first_break(
    subject: Callable[..., Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, Site]]:
    """The first break, if there is one.

    Dynamo is asked to raise at a break with its settings as they are: `fullgraph=True` would capture `.item()` and
    `nonzero`, where a default compilation breaks.
    """
    import torch._dynamo as dynamo

    try:
        dynamo.reset()
        with isolated(subject, args):
            stop = getattr(dynamo, "error_on_graph_break", None)
            compiled = torch.compile(function, backend=_as_is, fullgraph=stop is None)
            with stop(True) if stop is not None else contextlib.nullcontext():
                compiled(*clone(args), **clone(kwargs))
        return []
    except Exception as error:
        stack = getattr(error, "real_stack", None)
        site = deepest(stack) if stack else error_site(error)
        return [(reason_of(str(error)) or type(error).__name__, site)]
    finally:
        dynamo.reset()


def _all_breaks(
    subject: Callable[..., Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, Site]]:
    import torch._dynamo as dynamo

    try:
        with isolated(subject, args):
            explained = dynamo.explain(function)(*clone(args), **clone(kwargs))
        return [(reason_of(entry.reason), deepest(entry.user_stack)) for entry in explained.break_reasons]
    except Exception:  # the first reason is known already; explain is a convenience that some code defeats
        return []
    finally:
        dynamo.reset()


def recompiles(subject: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Finding], str]:
    """Calls the compiled subject again with the same inputs, then with two other batch sizes.

    One recompilation on the first change of the batch size is how Dynamo learns that the size varies; a further one on
    the second change is a finding.

    Args:
        subject: what to compile.
        args: its positional inputs.
        kwargs: its keyword inputs.

    Returns:
        Findings, and one line that sums them up.
    """
    import torch._dynamo as dynamo

    try:
        dynamo.reset()
        with isolated(subject, args):
            compiled = torch.compile(compilable(subject), backend=_as_is)
            compiled(*clone(args), **clone(kwargs))
            try:
                with dynamo.config.patch(error_on_recompile=True):
                    compiled(*clone(args), **clone(kwargs))
            except dynamo.exc.RecompileError as error:
                return [_recompiled("the same inputs compile again", error, subject)], "recompiles on the same inputs"
            return _other_batches(subject, compiled, args, kwargs)
    except Exception as error:
        return [], f"not checked: {first_line(error)}"
    finally:
        dynamo.reset()


def _other_batches(
    subject: Callable[..., Any], compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Finding], str]:
    import torch._dynamo as dynamo

    size = batch_size((args, kwargs))
    if size is None:
        return [], "none on the same inputs"
    larger = [with_batch((args, kwargs), size + extra) for extra in (1, 2)]
    try:
        for other_args, other_kwargs in larger:
            subject(*clone(other_args), **clone(other_kwargs))
    except Exception:
        return [], f"none on the same inputs; no other batch size is accepted than {size}"
    compiled(*larger[0][0], **larger[0][1])
    try:
        with dynamo.config.patch(error_on_recompile=True):
            compiled(*larger[1][0], **larger[1][1])
    except dynamo.exc.RecompileError as error:
        sizes = f"batch sizes {size}, {size + 1}, {size + 2} each compile"
        return [_recompiled(sizes, error, subject)], "recompiles for each batch size"
    return [], f"none (same inputs; batch {size}, {size + 1}, {size + 2})"


def _recompiled(what: str, error: BaseException, subject: Callable[..., Any]) -> Finding:
    guards = [line.strip(" -") for line in str(error).splitlines() if line.strip().startswith("- 0/")]
    reason = guards[0].split("# ")[0].strip() if guards else first_line(error)
    site = definition(subject)
    return Finding("DP031", "warning", f"{what}: {reason}"[:300], site.file, site.line, site.source)


def export(subject: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Finding], str]:
    """Asks ``torch.export`` for a program, without strict mode.

    Args:
        subject: what to export.
        args: its positional inputs.
        kwargs: its keyword inputs.

    Returns:
        Findings, and one line that sums them up.
    """
    module = subject if isinstance(subject, nn.Module) else Wrapped(subject)
    try:
        with isolated(subject, args):
            torch.export.export(module, clone(args), clone(kwargs), strict=False)
        return [], "ok"
    except Exception as error:
        site, reason = error_site(error), first_line(error)
        return [Finding("DP040", "error", reason, site.file, site.line, site.source)], f"refused: {reason}"


def cuda_graph(subject: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Finding], str]:
    """Captures one call in a CUDA graph, where there is a GPU and the inputs are on it.

    Args:
        subject: what to capture.
        args: its positional inputs.
        kwargs: its keyword inputs.

    Returns:
        Findings, and one line that sums them up.
    """
    from detpost.purity.structure import tensors

    if not torch.cuda.is_available():
        return [], "not checked: no CUDA"
    if not any(tensor.is_cuda for _, tensor in tensors((args, kwargs))):
        return [], "not checked: the inputs are not on the GPU"
    try:
        with isolated(subject, args), torch.no_grad():
            fixed_args, fixed_kwargs = clone(args, require_grad=False), clone(kwargs, require_grad=False)
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    subject(*fixed_args, **fixed_kwargs)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                subject(*fixed_args, **fixed_kwargs)
            graph.replay()
            torch.cuda.synchronize()
        return [], "ok"
    except Exception as error:
        site, reason = error_site(error), first_line(error)
        with contextlib.suppress(Exception):
            torch.cuda.synchronize()
        return [Finding("DP060", "error", reason, site.file, site.line, site.source)], f"fails: {reason}"
