"""The static half: find in-place writes, host waits and moving shapes in source, without running or importing it."""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import keyword
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from detpost.purity.kinds import Function, Kind, Scope, annotated, imported, indexes_an_array, parameters
from detpost.purity.report import Finding, PurityReport, ordered
from detpost.purity.rules import Severity, allowed_codes

# Layers and activations, also those handed in under a general name: `relu_type(inplace=True)`.
_LAYER_NAME = re.compile(r"relu|elu|act|dropout|silu|swish|mish|sigmoid|tanh|threshold|norm|layer", re.IGNORECASE)
# They end in "_" and write no values: of tensors, and where a word of Python's is taken, as in pyarrow and in operator.
_HARMLESS = frozenset({"_", "rename_", "requires_grad_", "share_memory_"})
_NO_METHODS = frozenset(f"{word}_" for word in (*keyword.kwlist, *dir(builtins))) - {
    "abs_",
    "map_",
    "pow_",
    "round_",
    "set_",
}
_SHAPES = frozenset({"argwhere", "masked_select", "nonzero", "unique", "unique_consecutive"})


def check_source(source: str, file: str = "<source>") -> tuple[Finding, ...]:
    """Find in-place writes to tensors, host waits and shapes that depend on values in source code.

    How it tells tensors from other things stands at the top of ``detpost.purity.kinds``. A write to a tensor that the
    function made itself is a note, everything else an error. ``torch.nn.init`` inside a function whose name speaks of
    initialising or resetting is how parameters get their first values, and is left alone.

    Args:
        source: Python source.
        file: name to report.

    Returns:
        The findings by line, without those that a ``# detpost: allow`` comment on their statement allows.

    Raises:
        SyntaxError: if the source does not parse.

    Examples:
        >>> code = '''
        ... import torch
        ... def f(x: torch.Tensor, n: int):
        ...     n += 1
        ...     x += n
        ...     return x'''
        >>> [(finding.rule, finding.line) for finding in check_source(code)]
        [('DP001', 5)]
    """
    tree = ast.parse(source, filename=file)
    reader = _Reader(tree, source.splitlines(), file)
    reader.block(tree.body, reader.scope)
    allowed = allowances(source)
    kept = [f for f in reader.findings.values() if f.rule not in allowed.get(f.line or 0, frozenset())]
    return tuple(sorted(kept, key=lambda finding: (finding.line or 0, finding.rule)))


def check_paths(paths: Iterable[Path | str]) -> list[PurityReport]:
    """Run the static half over files and folders.

    Args:
        paths: Python files, or folders to search for them; hidden folders and caches are passed over.

    Returns:
        One report for each file.

    Raises:
        SyntaxError: if a file does not parse.
        FileNotFoundError: if a path does not exist.
    """
    reports = []
    for path in _files(paths):
        with tokenize.open(path) as stream:
            reports.append(PurityReport(str(path), ordered(check_source(stream.read(), str(path)))))
    return reports


def _files(paths: Iterable[Path | str]) -> Iterator[Path]:
    for given in map(Path, paths):
        if not given.exists():
            raise FileNotFoundError(f"no file or folder named {given}")
        for path in [given] if given.is_file() else sorted(given.rglob("*.py")):
            inner = path.relative_to(given).parts
            if not any(part.startswith(".") or part == "__pycache__" for part in inner):
                yield path


def allowances(source: str) -> dict[int, frozenset[str]]:
    """Tell which rules are allowed on which lines of a source; nothing for one that does not parse.

    A comment counts for every line of the simple statement it stands in, and for the head of a compound one.
    """
    comments: dict[int, frozenset[str]] = {}
    if "detpost:" not in source:
        return comments
    with contextlib.suppress(SyntaxError, ValueError, tokenize.TokenError):
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and (codes := allowed_codes(token.string)):
                comments.update({token.start[0]: codes})
        spread = dict(comments)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.stmt):
                body = getattr(node, "body", None)
                end = body[0].lineno - 1 if isinstance(body, list) and body else node.end_lineno or node.lineno
                lines = range(node.lineno, end + 1)
                codes = frozenset[str]().union(*(comments.get(line, ()) for line in lines))
                spread.update({line: spread.get(line, frozenset()) | codes for line in lines})
        return spread
    return {}


class _Reader:
    """Read statement by statement, and carry the kinds of names along."""

    def __init__(self, tree: ast.Module, lines: list[str], file: str) -> None:
        self.lines, self.file, self.function = lines, file, ""
        self.findings: dict[tuple[str, int, int], Finding] = {}
        functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
        self.scope = Scope(imported(tree), {f"{node.name}()": annotated(node.returns) for node in functions})

    def block(self, statements: list[ast.stmt], scope: Scope) -> None:
        for statement in statements:
            self.statement(statement, scope)

    def statement(self, node: ast.stmt, scope: Scope) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                inner = scope.branch()
                inner.names.update(parameters(node, scope))
                outer, self.function = self.function, node.name
                self.block(node.body, inner)
                self.function = outer
                # What one method gives `self.x`, the next one finds there.
                held = {name: kind for name, kind in inner.names.items() if name.startswith("self.")}
                scope.names.update({name: Kind.TENSOR if kind.is_tensor else kind for name, kind in held.items()})
            case ast.ClassDef():
                self.block(node.body, scope.branch())
            case ast.AugAssign():
                self.expressions(node, scope)
                self.augmented(node, scope)
            case ast.Assign():
                self.expressions(node, scope)
                for target in node.targets:
                    self.stored(target, scope)
                    scope.assign(target, node.value)
            case ast.AnnAssign():
                self.expressions(node, scope)
                declared, given = annotated(node.annotation), scope.kind(node.value)
                scope.bind(node.target, given if declared is Kind.UNKNOWN or given is Kind.FRESH else declared)
            case _:
                self.compound(node, scope)

    def compound(self, node: ast.stmt, scope: Scope) -> None:
        """Go through the head of a statement, then through its blocks as branches."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr | ast.withitem):
                self.expressions(child, scope)
        if isinstance(node, ast.For | ast.AsyncFor):
            scope.bind_loop(node.target, node.iter)
        parts = (node, *getattr(node, "handlers", ()), *getattr(node, "cases", ()))
        bodies = [body for part in parts if isinstance(body := getattr(part, "body", None), list)]
        bodies += [node.orelse] if hasattr(node, "orelse") else []
        # Twice round a loop: `total = 0; for ...: total += loss` writes in place from the second round on.
        for _ in range(2 if isinstance(node, ast.For | ast.AsyncFor | ast.While) else 1):
            ends = [scope.branch() for _ in bodies]
            for body, end in zip(bodies, ends, strict=True):
                self.block(body, end)
            scope.merge(*ends)
        self.block(getattr(node, "finalbody", []), scope)

    def augmented(self, node: ast.AugAssign, scope: Scope) -> None:
        written, value = scope.kind(node.target), scope.kind(node.value)
        if isinstance(node.target, ast.Subscript):
            written = self.written_through(node.target, scope).element
        if written in (Kind.UNKNOWN, Kind.COMPARISON) and value.is_tensor:
            written = Kind.TENSOR
        if written.is_tensor and not isinstance(node.op, ast.MatMult):  # there is no in-place matrix product
            made = ast.unparse(ast.BinOp(node.target, node.op, node.value))
            how = f"{ast.unparse(node.target)} = {made}" if isinstance(node.target, ast.Name) else f"a new {made}"
            self.report("DP001", node, f"{ast.unparse(node)} writes {_said(written)} in place; write {how}", written)
        elif isinstance(node.target, ast.Name | ast.Attribute) and value.is_tensor and written is Kind.OTHER:
            scope.bind(node.target, Kind.FRESH)  # a number plus a tensor is a new tensor

    def stored(self, target: ast.expr, scope: Scope) -> None:
        """Look for subscripts of tensors among the targets of an assignment."""
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(part, ast.Subscript) and (written := self.written_through(part, scope)).is_tensor:
                text, base = ast.unparse(part), ast.unparse(part.value)
                how = f"write {base} = torch.where(mask, value, {base}), or stack the parts"
                self.report("DP002", part, f"{text} = ... writes {_said(written)} in place; {how}", written)

    def written_through(self, target: ast.Subscript, scope: Scope) -> Kind:
        """Tell the kind of what a store to a subscript writes; an index for arrays alone shows an array."""
        base = scope.kind(target.value)
        if isinstance(target.slice, ast.Constant) and isinstance(target.slice.value, str):
            return Kind.OTHER  # a dictionary, whatever else is known of it
        shows = base in (Kind.UNKNOWN, Kind.COMPARISON) and scope.any_torch
        return Kind.TENSOR if shows and (indexes_an_array(target.slice) or scope.picks(target.slice)) else base

    def expressions(self, node: ast.AST, scope: Scope) -> None:
        """Look at calls and `.data` anywhere in an expression."""
        for part in ast.walk(node):
            match part:
                case ast.NamedExpr():
                    scope.assign(part.target, part.value)
                case ast.Attribute(attr="data") if scope.kind(part.value).is_tensor:
                    text = ast.unparse(part)
                    self.report("DP006", part, f"{text} hides the tensor from autograd; write {text[:-4]}detach()")
                case ast.Call():
                    self.call(part, scope)

    def call(self, node: ast.Call, scope: Scope) -> None:
        method, text, home = isinstance(node.func, ast.Attribute), ast.unparse(node.func), scope.home(node.func)
        name = text.rpartition(".")[2] if method else text
        receiver = scope.kind(node.func.value) if isinstance(node.func, ast.Attribute) else Kind.OTHER
        if not scope.any_torch or receiver is Kind.ARRAY or home == "numpy":
            return
        if name in ("register_buffer", "register_parameter") and node.args and isinstance(node.args[0], ast.Constant):
            scope.names.update({f"self.{node.args[0].value!s}": Kind.TENSOR})
        on_tensor = home == "torch" or receiver.is_tensor
        own = f"{name}()" in scope.names  # a method or function of the same file
        maybe = method and receiver in (Kind.UNKNOWN, Kind.TENSORS) and not own
        harmless = name in _HARMLESS or (name in _NO_METHODS and not on_tensor)
        if name.endswith("_") and not (name.startswith("_") or harmless) and (on_tensor or maybe):
            self.underscored(node, text, home, receiver)
        made = ast.unparse(node.args[0]) if name == "partial" and node.args else name
        for option in node.keywords:
            constant = option.value.value if isinstance(option.value, ast.Constant) else ...
            if option.arg == "inplace" and constant is True and _LAYER_NAME.search(made):
                self.report("DP005", node, f"{text}(inplace=True) overwrites its input; write inplace=False")
            if option.arg == "out" and constant is not None and on_tensor:
                written = scope.kind(option.value)
                self.report("DP004", node, f"{text}(out=...) writes {_said(written)}; use what it returns", written)
        if name == "item" and not node.args and receiver is not Kind.OTHER:
            self.report("DP010", node, f"{text}() makes the host wait for the value; keep it in a tensor")
        one_argument = name == "where" and len(node.args) == 1 and not node.keywords
        if (name in _SHAPES or one_argument) and (on_tensor or (name in ("masked_select", "nonzero") and not own)):
            self.report("DP020", node, f"{text}(...) gives a shape that depends on values; carry a mask instead")

    def underscored(self, node: ast.Call, text: str, home: str, receiver: Kind) -> None:
        # Parameters get their first values from `init.zeros_(...)`, in torch's module or a library's wrapper of it.
        initialiser = "init" in text.split(".")[:-1] or (home == "torch" and "." not in text)
        if not (initialiser and any(word in self.function for word in ("init", "reset"))):
            written = receiver if receiver is Kind.FRESH else Kind.TENSOR
            how = f"write x = {text[:-1]}(...), without the underscore"
            self.report("DP003", node, f"{text}(...) writes {_said(written)} in place; {how}", written)

    def report(self, rule: str, node: ast.stmt | ast.expr, message: str, written: Kind = Kind.TENSOR) -> None:
        severity: Severity = "note" if written is Kind.FRESH else "error"
        target, source = "temporary" if written is Kind.FRESH else "tensor", self.lines[node.lineno - 1].strip()
        finding = Finding(rule, severity, message, self.file, node.lineno, source, target=target)
        self.findings.setdefault((rule, node.lineno, node.col_offset), finding)


def _said(written: Kind) -> str:
    return "a temporary of its own" if written is Kind.FRESH else "a tensor"
