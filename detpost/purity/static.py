"""The static half: finds in-place writes in source code, without running or importing it."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from detpost.purity.inference import Imports, Kind, Scope, annotation_kind, dotted, indexes_an_array, parameter_kinds
from detpost.purity.report import Finding, PurityReport, ordered
from detpost.purity.rules import allowed_codes
from detpost.purity.vocabulary import (
    NO_WRITE,
    WRITING_METHODS,
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
# A layer or activation handed in under its own or a general name: `relu_type(inplace=True)`.
LAYER_NAME = re.compile(r"relu|elu|act|dropout|silu|swish|mish|sigmoid|tanh|threshold|norm|layer", re.IGNORECASE)

_SYMBOLS: dict[type[ast.operator], str] = {
    ast.Add: "+=",
    ast.Sub: "-=",
    ast.Mult: "*=",
    ast.Div: "/=",
    ast.FloorDiv: "//=",
    ast.Mod: "%=",
    ast.Pow: "**=",
    ast.BitAnd: "&=",
    ast.BitOr: "|=",
    ast.BitXor: "^=",
    ast.LShift: "<<=",
    ast.RShift: ">>=",
}  # `@=` is missing: tensors have no in-place matrix product, so it makes a new one


def check_source(source: str, file: str = "<source>") -> tuple[Finding, ...]:
    """Finds in-place writes to tensors in source code.

    How it tells tensors from numbers stands at the top of ``detpost.purity.inference``. ``torch.nn.init`` inside a
    function whose name speaks of initialising or resetting is how parameters get their first values, and is left alone.

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
    visitor = _Visitor(tree, source.splitlines(), file)
    visitor.run()
    allowed = _allowances(tree, source)
    kept = [f for f in visitor.findings.values() if f.rule not in allowed.get(f.line or 0, frozenset())]
    return tuple(sorted(kept, key=lambda finding: (finding.line or 0, finding.rule)))


def check_paths(paths: Iterable[Path | str]) -> list[PurityReport]:
    """Runs the static half over files and folders.

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
        if given.is_file():
            yield given
            continue
        for path in sorted(given.rglob("*.py")):
            inner = path.relative_to(given).parts
            if not any(part.startswith(".") or part == "__pycache__" for part in inner):
                yield path


def allowances(source: str) -> dict[int, frozenset[str]]:
    r"""Which rules are allowed on which lines.

    A comment counts for every line of the simple statement it stands in, and for the header of a compound one.

    Args:
        source: Python source.

    Returns:
        Rule codes by line; empty for source that does not parse.

    Examples:
        >>> allowances("x = 1\ny += 1  # detpost: allow DP001")
        {2: frozenset({'DP001'})}
    """
    if "detpost:" not in source:
        return {}
    try:
        return _allowances(ast.parse(source), source)
    except (SyntaxError, ValueError):
        return {}


def _allowances(tree: ast.AST, source: str) -> dict[int, frozenset[str]]:
    by_line: dict[int, frozenset[str]] = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and (codes := allowed_codes(token.string)):
                by_line.update({token.start[0]: codes})
    except (tokenize.TokenError, IndentationError):
        return by_line
    if not by_line:
        return {}
    spread = dict(by_line)
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt):
            continue
        body = getattr(node, "body", None)
        end = body[0].lineno - 1 if isinstance(body, list) and body else node.end_lineno or node.lineno
        lines = range(node.lineno, end + 1)
        codes = frozenset(code for line in lines for code in by_line.get(line, ()))
        if codes:
            spread.update({line: spread.get(line, frozenset()) | codes for line in lines})
    return spread


class _Visitor:
    """Walks functions statement by statement, carrying the kinds of names along."""

    def __init__(self, tree: ast.Module, lines: list[str], file: str) -> None:
        self.tree, self.lines, self.file = tree, lines, file
        self.imports = Imports.of(tree)
        self.findings: dict[tuple[str, int, int], Finding] = {}
        self.returns = {
            node.name: annotation_kind(node.returns)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        self.function = ""

    def run(self) -> None:
        """Visits the whole file."""
        self.block(self.tree.body, Scope(self.imports, returns=self.returns))

    def block(self, statements: list[ast.stmt], scope: Scope) -> None:
        for statement in statements:
            self.statement(statement, scope)

    def statement(self, node: ast.stmt, scope: Scope) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.visit_function(node, scope)
            case ast.ClassDef():
                self.visit_class(node, scope)
            case ast.AugAssign():
                self.augmented(node, scope)
            case ast.Assign():
                self.expressions(node.value, scope)
                for target in node.targets:
                    self.stored(target, scope)
                scope.assign(node.targets, node.value)
            case ast.AnnAssign():
                self.annotated(node, scope)
            case (
                ast.If()
                | ast.While()
                | ast.For()
                | ast.AsyncFor()
                | ast.Try()
                | ast.With()
                | ast.AsyncWith()
                | ast.Match()
            ):
                self.compound(node, scope)
            case _:
                self.expressions(node, scope)

    def visit_function(self, node: Function, scope: Scope) -> None:
        inner = scope.branch()
        is_forward = bool(scope.attributes.get("")) and node.name == "forward"
        inner.names.update(parameter_kinds(node, self.imports, is_forward))
        outer, self.function = self.function, node.name
        self.block(node.body, inner)
        self.function = outer

    def visit_class(self, node: ast.ClassDef, scope: Scope) -> None:
        inner = scope.branch()
        inner.attributes = _attribute_kinds(node, self.imports, self.returns)
        self.block(node.body, inner)

    def annotated(self, node: ast.AnnAssign, scope: Scope) -> None:
        if node.value is not None:
            self.expressions(node.value, scope)
            self.stored(node.target, scope)
        declared = annotation_kind(node.annotation)
        scope.bind(node.target, scope.kind(node.value) if declared is Kind.UNKNOWN and node.value else declared)

    def compound(self, node: ast.stmt, scope: Scope) -> None:
        match node:
            case ast.If():
                self.expressions(node.test, scope)
                self.branches([node.body, node.orelse], scope)
            case ast.While():
                self.expressions(node.test, scope)
                self.loop(node.body, scope)
                self.block(node.orelse, scope)
            case ast.For() | ast.AsyncFor():
                self.expressions(node.iter, scope)
                scope.bind_loop(node.target, node.iter)
                self.loop(node.body, scope)
                self.block(node.orelse, scope)
            case ast.Try():
                self.block(node.body, scope)
                self.branches([*(handler.body for handler in node.handlers), node.orelse], scope)
                self.block(node.finalbody, scope)
            case ast.With() | ast.AsyncWith():
                for item in node.items:
                    self.expressions(item.context_expr, scope)
                self.block(node.body, scope)
            case ast.Match():
                self.expressions(node.subject, scope)
                self.branches([case.body for case in node.cases], scope)

    def branches(self, bodies: list[list[ast.stmt]], scope: Scope) -> None:
        ends = []
        for body in bodies:
            branch = scope.branch()
            self.block(body, branch)
            if not (body and isinstance(body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)):
                ends.append(branch)
        if ends:
            scope.merge(*ends)

    def loop(self, body: list[ast.stmt], scope: Scope) -> None:
        """Goes round twice: `total = 0; for ...: total += loss` writes in place from the second round on."""
        for _ in range(2):
            branch = scope.branch()
            self.block(body, branch)
            scope.merge(scope.branch(), branch)

    def augmented(self, node: ast.AugAssign, scope: Scope) -> None:
        self.expressions(node.value, scope)
        symbol = _SYMBOLS.get(type(node.op))
        target_kind, value_kind = scope.kind(node.target), scope.kind(node.value)
        array_like = isinstance(node.target, ast.Subscript) and self.written_through(node.target, scope)
        if symbol and (target_kind is Kind.TENSOR or array_like):
            text = ast.unparse(node.target)
            plain = symbol.removesuffix("=")
            rewrite = (
                f"{text} = {text} {plain} {ast.unparse(node.value)}"
                if isinstance(node.target, ast.Name)
                else f"a new tensor from {text} {plain} {ast.unparse(node.value)}"
            )
            self.report("DP001", node, f"{text} {symbol} ... writes a tensor in place; write {rewrite}")
        elif isinstance(node.target, ast.Name):
            scope.names.update({node.target.id: _after_augmented(target_kind, value_kind)})

    def stored(self, target: ast.expr, scope: Scope) -> None:
        """A target of an assignment: a subscript of a tensor, or `.data`."""
        if isinstance(target, ast.Tuple | ast.List):
            for element in target.elts:
                self.stored(element, scope)
        elif isinstance(target, ast.Starred):
            self.stored(target.value, scope)
        elif isinstance(target, ast.Subscript):
            self.expressions(target.value, scope)
            if self.written_through(target, scope):
                text = ast.unparse(target)
                base = ast.unparse(target.value)
                how = f"{base} = torch.where(mask, value, {base})"
                self.report("DP002", target, f"{text} = ... writes a tensor in place; write {how}, or stack the parts")
        elif isinstance(target, ast.Attribute):
            self.attribute(target, scope)

    def written_through(self, target: ast.Subscript, scope: Scope) -> bool:
        """Whether a store to a subscript writes a tensor."""
        base = scope.kind(target.value)
        if isinstance(target.slice, ast.Constant) and isinstance(target.slice.value, str):
            return False  # a dictionary, whatever else is known of it
        if base is Kind.UNKNOWN and self.imports.any_torch:
            return indexes_an_array(target.slice) or scope.kind(target.slice) is Kind.TENSOR
        return base is Kind.TENSOR

    def expressions(self, node: ast.AST, scope: Scope) -> None:
        """Calls, `.data` and nested functions anywhere in an expression."""
        if isinstance(node, ast.Lambda):
            inner = scope.branch()
            inner.names.update({argument.arg: Kind.UNKNOWN for argument in node.args.args})
            self.expressions(node.body, inner)
            return
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            scope = scope.branch()
            for generator in node.generators:
                scope.bind_loop(generator.target, generator.iter)
        if isinstance(node, ast.NamedExpr):
            scope.bind(node.target, scope.kind(node.value))
        if isinstance(node, ast.Call):
            self.call(node, scope)
        if isinstance(node, ast.Attribute):
            self.attribute(node, scope)
        for child in ast.iter_child_nodes(node):
            self.expressions(child, scope)

    def attribute(self, node: ast.Attribute, scope: Scope) -> None:
        if node.attr == "data" and scope.kind(node.value) is Kind.TENSOR:
            text = ast.unparse(node)
            self.report("DP006", node, f"{text} hides the tensor from autograd; write {text[:-4]}detach()")

    def call(self, node: ast.Call, scope: Scope) -> None:
        function, text = node.func, ast.unparse(node.func)
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        in_torch = scope.is_torch(function)
        receiver = scope.kind(function.value) if isinstance(function, ast.Attribute) else Kind.OTHER
        if in_torch or receiver is not Kind.OTHER:
            self.underscored(node, name, text, in_torch, receiver, scope)
        for keyword in node.keywords:
            given = not (isinstance(keyword.value, ast.Constant) and keyword.value.value in (None, False))
            if keyword.arg == "out" and given and (in_torch or receiver is Kind.TENSOR):
                self.report(
                    "DP004", node, f"{text}(..., out=...) writes into a tensor that exists; use what it returns"
                )
            in_place = (
                keyword.arg == "inplace" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            )
            torch_layer = in_torch and not {"ao", "quantization"} & set(dotted(function))
            if in_place and (torch_layer or (self.imports.any_torch and LAYER_NAME.search(name))):
                self.report("DP005", node, f"{text}(inplace=True) overwrites its input; write inplace=False")

    def underscored(self, node: ast.Call, name: str, text: str, in_torch: bool, receiver: Kind, scope: Scope) -> None:
        if name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__") and receiver is Kind.TENSOR:
            self.report("DP003", node, f"{text}(...) writes a tensor in place; assign the result to a new name")
            return
        if not name.endswith("_") or name.startswith("__") or name in NO_WRITE:
            return
        if in_torch:
            chain = dotted(node.func)
            origin = self.imports.functions.get(chain[0], ".".join(chain))
            if "init" in origin.split(".") and self.initialises():
                return
        elif dotted(node.func)[:1] == ["init"] and self.initialises():
            return  # a library's own wrapper of torch.nn.init
        elif name[:-1] not in WRITING_METHODS or receiver not in (Kind.TENSOR, Kind.TENSORS, Kind.UNKNOWN):
            return
        plain = f"{text[:-1]}(...)"
        self.report("DP003", node, f"{text}(...) writes in place; write x = {plain}, without the underscore")

    def initialises(self) -> bool:
        """Whether the current function gives parameters their first values."""
        return any(word in self.function for word in ("init", "reset"))

    def report(self, rule: str, node: ast.stmt | ast.expr, message: str) -> None:
        line = node.lineno
        source = self.lines[line - 1].strip() if line <= len(self.lines) else ""
        finding = Finding(rule, "error", message, self.file, line, source, target="tensor")
        self.findings.setdefault((rule, line, node.col_offset), finding)


def _after_augmented(target: Kind, value: Kind) -> Kind:
    """A number plus a tensor makes a new tensor; an unknown stays one unless the value is a number as well."""
    if target is Kind.TENSOR or (value is Kind.TENSOR and target in (Kind.NUMBER, Kind.UNKNOWN)):
        return Kind.TENSOR
    if target in (Kind.CONTAINER, Kind.TENSORS, Kind.ARRAY):
        return Kind.TENSORS if value is Kind.TENSORS else target
    return target if value is Kind.NUMBER else Kind.UNKNOWN


def _attribute_kinds(node: ast.ClassDef, imports: Imports, returns: dict[str, Kind]) -> dict[str, Kind]:
    """Kinds of `self.x`, from every assignment in the class; the empty name tells that the class is a module."""
    kinds: dict[str, Kind] = {}
    if any("Module" in (dotted(base) or [""])[-1] for base in node.bases) or _calls_super_forward(node):
        kinds.update({"": Kind.LAYER})
    for statement in ast.walk(node):
        if isinstance(statement, ast.Call):
            kinds.update(_registered(statement))
        elif isinstance(statement, ast.AnnAssign):
            name = _self_attribute(statement.target) or (
                statement.target.id if isinstance(statement.target, ast.Name) and statement in node.body else None
            )
            if name and (kind := annotation_kind(statement.annotation)) is not Kind.UNKNOWN:
                kinds.update({name: kind})
    for method in node.body:
        if isinstance(method, ast.FunctionDef):
            scope = Scope(imports, parameter_kinds(method, imports, False), dict(kinds), returns)
            for statement in ast.walk(method):
                if isinstance(statement, ast.Assign):
                    for target in statement.targets:
                        if name := _self_attribute(target):
                            kinds.update({name: _settled(kinds.get(name), scope.kind(statement.value))})
                    scope.assign(statement.targets, statement.value)
    return kinds


def _settled(known: Kind | None, new: Kind) -> Kind:
    return new if known is None or known is Kind.UNKNOWN else known


def _calls_super_forward(node: ast.ClassDef) -> bool:
    """A class with `forward` and bases from elsewhere is taken for a module."""
    return bool(node.bases) and any(isinstance(part, ast.FunctionDef) and part.name == "forward" for part in node.body)


def _self_attribute(target: ast.expr) -> str | None:
    chain = dotted(target)
    return chain[1] if len(chain) == 2 and chain[0] == "self" else None


def _registered(call: ast.Call) -> dict[str, Kind]:
    name = (dotted(call.func) or [""])[-1]
    first = call.args[0] if call.args else None
    if name in ("register_buffer", "register_parameter") and isinstance(first, ast.Constant):
        return {str(first.value): Kind.TENSOR}
    return {}
