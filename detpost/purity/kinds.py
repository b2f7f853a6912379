"""What an expression in source is: a tensor, one made here, several, an array, something else, or unknown.

Nothing is run or imported. A kind comes from an annotation, from what a name was given (``torch.zeros(...)`` is a fresh
tensor, ``x[0]`` is what ``x`` is, ``np.zeros(...)`` an array), from a use that only a tensor allows (``x.view(...)``,
``F.relu(x)``, ``x[..., 0]``), or from being a parameter of ``forward``. A name alone says nothing: of 1,904 findings
in four libraries four hung on one, and three of the four were wrong.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from enum import Enum, auto

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Kind(Enum):
    """What an expression is taken to be."""

    FRESH = auto()  # a tensor that this function made itself, in memory of its own
    TENSOR = auto()  # any other: someone else may hold it, or a view of it, or autograd may have saved it
    TENSORS = auto()  # a list, tuple or dictionary of tensors
    LAYER = auto()  # calling it gives a tensor
    ARRAY = auto()  # NumPy
    COMPARISON = auto()  # of things unknown: as an index it can only be a mask
    OTHER = auto()
    UNKNOWN = auto()

    @property
    def is_tensor(self) -> bool:
        """Whether it is one tensor."""
        return self in (Kind.FRESH, Kind.TENSOR)

    @property
    def element(self) -> Kind:
        """What an integer index, or a loop over it, yields."""
        return {Kind.TENSORS: Kind.TENSOR, Kind.OTHER: Kind.UNKNOWN}.get(self, self)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What is read off a tensor and is none.
_NO_TENSOR = _words("""
    allclose backward device dim dtype equal item layout load ndim numel requires_grad shape size stride tolist
""")
# Of the same memory, or possibly so.
_VIEWS = _words("""
    H T as_tensor bool chunk contiguous cpu cuda data detach diagonal double expand expand_as flatten float from_numpy
    grad half int long mH mT narrow permute real reshape select split squeeze swapaxes t to transpose type type_as
    unbind unflatten unfold unsqueeze view view_as
""")
# Autograd saves what these return, so that a write to it makes backward fail, or they may return what they were given.
_SAVED = _words("dropout elu exp identity log_softmax logsoftmax relu rsqrt selu sigmoid softmax sqrt tanh")
# What tensors have, and neither arrays nor lists nor dictionaries.
_TENSORS_ALONE = _words("""
    backward clamp clone contiguous cpu cuda detach dim double expand expand_as flip float gather half index_select
    log_softmax long masked_fill new_empty new_full new_ones new_tensor new_zeros numel permute relu requires_grad_
    scatter sigmoid softmax tanh to topk type_as unbind unflatten unsqueeze view
""")
_TAKES_OTHERS = _words("arange as_tensor cat empty eye from_numpy full linspace ones rand randn stack tensor zeros")
_CONTAINERS = _words("Dict Iterable List Mapping Sequence Tuple dict list set tuple")


def dotted(node: ast.AST) -> list[str]:
    """Name the links of an attribute chain, outermost first; an empty list for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def imported(tree: ast.AST) -> dict[str, str]:
    """Tell what the names of libraries mean in a file: "torch" or "numpy" for each that stands for a part of it."""
    homes = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            parts = f"{getattr(node, 'module', '') or ''}.{alias.name}".lstrip(".").split(".")
            # A library may hand torch's own names on: `from kornia.core import Tensor`.
            home = "torch" if parts[-1] in ("torch", "Tensor") else parts[0].replace("cupy", "numpy")
            if home in ("torch", "torchvision", "numpy"):
                homes.update({alias.asname or alias.name.split(".")[0]: home})
    return homes


def annotated(node: ast.expr | None) -> Kind:
    """Read the kind that an annotation declares."""
    match node:
        case ast.Constant(value=str(text)):
            try:
                return annotated(ast.parse(text, mode="eval").body)
            except SyntaxError:
                return Kind.UNKNOWN
        case ast.BinOp(left=left, right=right):  # X | None
            return _strongest(annotated(left), annotated(right))
        case ast.Subscript(value=outer, slice=inner):
            kind = _strongest(*map(annotated, inner.elts if isinstance(inner, ast.Tuple) else [inner]))
            if (dotted(outer) or [""])[-1] in _CONTAINERS:
                return Kind.TENSORS if kind is Kind.TENSOR else Kind.OTHER
            return kind  # Optional[X], Float[Tensor, "b c"]
    name = (dotted(node) or [""])[-1] if node is not None else ""
    if name.endswith("Tensor") or name in ("Parameter", "Buffer"):
        return Kind.TENSOR
    if name in ("ndarray", "NDArray", "ArrayLike"):
        return Kind.ARRAY
    return Kind.UNKNOWN if name in ("", "Any", "object") and not isinstance(node, ast.Constant) else Kind.OTHER


def _strongest(*kinds: Kind) -> Kind:
    """Choose one of several kinds: a tensor on any branch stays one, for that branch may be the one taken."""
    if Kind.FRESH in kinds:
        return Kind.FRESH if set(kinds) <= {Kind.FRESH, Kind.OTHER} else Kind.TENSOR
    order = (Kind.TENSOR, Kind.TENSORS, Kind.ARRAY, Kind.LAYER, Kind.COMPARISON, Kind.UNKNOWN)
    return next((kind for kind in order if kind in kinds), Kind.OTHER)


@dataclass
class Scope:
    """Kinds of the names visible at one point; ``self.x`` and ``f()``, what ``f`` returns, are names as well."""

    homes: dict[str, str]  # what `imported` gives
    names: dict[str, Kind] = field(default_factory=dict)

    @property
    def any_torch(self) -> bool:
        """Whether the file imports anything of torch: if it does not, nothing unknown is taken for a tensor."""
        return not {"torch", "torchvision"}.isdisjoint(self.homes.values())

    def home(self, node: ast.expr) -> str:
        """Tell the library of what an expression names: "torch" for ``torch.x``, ``F.x`` or a name imported from it."""
        return self.homes.get((dotted(node) or [""])[0], "")

    def branch(self) -> Scope:
        """Copy the scope, so that names change independently."""
        return Scope(self.homes, dict(self.names))

    def merge(self, *ends: Scope) -> None:
        """Take in what names are at the ends of branches."""
        for name in {name for end in ends for name in end.names}:
            self.names.update({name: _strongest(*(end.names.get(name, Kind.OTHER) for end in ends))})

    def kind(self, node: ast.expr | None) -> Kind:
        """Tell the kind of an expression."""
        match node:
            case ast.Name():
                return self.names.get(node.id, Kind.UNKNOWN)
            case ast.Attribute():
                return self._attribute(node)
            case ast.Call():
                return self._call(node)
            case ast.Subscript():
                base = self.kind(node.value)
                copied = base.is_tensor or (base is Kind.UNKNOWN and self.any_torch)
                return Kind.FRESH if copied and self.picks(node.slice) else base.element
            case ast.BinOp():
                return _operated(self.kind(node.left), self.kind(node.right))
            case ast.UnaryOp():
                return Kind.OTHER if isinstance(node.op, ast.Not) else _operated(self.kind(node.operand))
            case ast.Compare():
                if any(isinstance(operator, ast.Is | ast.IsNot | ast.In | ast.NotIn) for operator in node.ops):
                    return Kind.OTHER
                made = _operated(*map(self.kind, (node.left, *node.comparators)))
                return Kind.COMPARISON if made is Kind.UNKNOWN else made
            case ast.IfExp():
                return _strongest(self.kind(node.body), self.kind(node.orelse))
            case ast.NamedExpr() | ast.Starred() | ast.Await():
                return self.kind(node.value)
            case ast.List() | ast.Tuple():
                return Kind.TENSORS if any(self.kind(part).is_tensor for part in node.elts) else Kind.OTHER
            case ast.Constant() | ast.JoinedStr() | ast.Dict() | ast.ListComp() | ast.GeneratorExp() | ast.DictComp():
                return Kind.OTHER
        return Kind.UNKNOWN

    def picks(self, index: ast.expr) -> bool:
        """Tell whether an index is a tensor, or a mask: what it reads is a copy."""
        kinds = map(self.kind, index.elts if isinstance(index, ast.Tuple) else [index])
        return any(kind.is_tensor or kind is Kind.COMPARISON for kind in kinds)

    def bind(self, target: ast.expr, kind: Kind) -> None:
        """Give a target, or each target of a tuple, its kind."""
        if isinstance(target, ast.Tuple | ast.List):
            for part in target.elts:
                self.bind(part, kind.element)
        elif chain := dotted(target):
            self.names.update({".".join(chain): kind})

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        """Bind the target of an assignment."""
        pair = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts)
        targets, values = (target.elts, value.elts) if pair else ([target], [value])  # type: ignore[attr-defined]
        for part, kind in zip(targets, [self.kind(part) for part in values], strict=True):
            self.bind(part, kind)

    def bind_loop(self, target: ast.expr, source: ast.expr) -> None:
        """Bind what a loop yields; ``enumerate`` and ``zip`` give each target its own kind."""
        match target, source:
            case ast.Tuple(elts=[_, inner]), ast.Call(func=ast.Name(id="enumerate"), args=[inside, *_]):
                self.bind_loop(inner, inside)
            case ast.Tuple(elts=parts), ast.Call(func=ast.Name(id="zip"), args=sources) if len(parts) == len(sources):
                for part, one in zip(parts, sources, strict=True):
                    self.bind_loop(part, one)
            case _, ast.Call(func=ast.Attribute(attr="parameters" | "buffers" | "named_parameters" | "named_buffers")):
                self.bind(target, Kind.TENSOR)
            case _:
                self.bind(target, self.kind(source).element)

    def _attribute(self, node: ast.Attribute) -> Kind:
        if (known := self.names.get(".".join(dotted(node)))) is not None:
            return known
        if self.home(node):
            return Kind.OTHER
        base = self.kind(node.value)
        if base.is_tensor:
            return base if node.attr in _VIEWS else Kind.UNKNOWN
        parameter = node.attr in ("weight", "bias", "grad") and base in (Kind.UNKNOWN, Kind.LAYER, Kind.OTHER)
        return Kind.TENSOR if parameter and self.any_torch else Kind.UNKNOWN

    def _call(self, node: ast.Call) -> Kind:
        function, chain = node.func, dotted(node.func)
        name = function.attr if isinstance(function, ast.Attribute) else "".join(chain)
        if self.home(function) == "numpy":
            return Kind.ARRAY
        if self.home(function) == "torch":
            if name[:1].isupper():  # a class
                makes_tensor = annotated(function) is Kind.TENSOR
                keeps = name.lower() in _SAVED | _VIEWS
                return Kind.TENSOR if makes_tensor else Kind.UNKNOWN if keeps else Kind.LAYER
            first = self.kind(node.args[0]) if node.args else Kind.TENSOR
            # Only what is a tensor or an array already can be taken over without a copy.
            return _result(name, Kind.FRESH if first in (Kind.FRESH, Kind.OTHER) else Kind.TENSOR)
        if self.kind(function) is Kind.LAYER:
            return Kind.FRESH
        if len(chain) == 1 or (len(chain) == 2 and chain[0] == "self"):
            return self.names.get(f"{name}()", Kind.UNKNOWN)
        base = self.kind(function.value) if isinstance(function, ast.Attribute) else Kind.UNKNOWN
        if base.is_tensor:
            return Kind.ARRAY if name == "numpy" else _result(name, base)
        if base in (Kind.UNKNOWN, Kind.COMPARISON) and name in _TENSORS_ALONE and self.any_torch:
            return _result(name, Kind.TENSOR if base is Kind.UNKNOWN else Kind.FRESH)
        return base if base is Kind.ARRAY else Kind.UNKNOWN


def _result(name: str, base: Kind) -> Kind:
    """Tell what a method of a tensor, or a function of torch, gives, from its name."""
    if name in _NO_TENSOR or name.startswith("is_"):
        return Kind.OTHER
    if name in _VIEWS or name.endswith("_"):
        return base
    return Kind.TENSOR if name in _SAVED else Kind.FRESH


def _operated(*kinds: Kind) -> Kind:
    """Tell the kind of an operation: one tensor among its operands makes it a new tensor."""
    if any(kind.is_tensor for kind in kinds):
        return Kind.FRESH
    return next((kind for kind in (Kind.ARRAY, Kind.COMPARISON, Kind.UNKNOWN) if kind in kinds), Kind.OTHER)


def parameters(function: Function, scope: Scope) -> dict[str, Kind]:
    """Tell the kinds of a function's parameters: by annotation, by use, or as what ``forward`` cannot do without."""
    spec = function.args
    required = spec.args[: len(spec.args) - len(spec.defaults)] if function.name == "forward" else []
    kinds = {}
    for argument in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs):
        kind = annotated(argument.annotation)
        if kind is Kind.UNKNOWN and scope.any_torch and argument.arg != "self":
            used = any(_shows_tensor(node, argument.arg, scope) for node in ast.walk(function))
            kind = Kind.TENSOR if used or argument in required else kind
        kinds.update({argument.arg: kind})
    return kinds


def _shows_tensor(node: ast.AST, name: str, scope: Scope) -> bool:
    """Tell whether one use of a name shows that it is a tensor."""
    match node:
        case ast.Attribute(value=ast.Name(id=used), attr=attribute):
            return used == name and attribute in _TENSORS_ALONE
        case ast.Subscript(value=ast.Name(id=used), slice=index):
            return used == name and indexes_an_array(index)
        case ast.Call(func=ast.Attribute(attr=function), args=[ast.Name(id=used), *_]):
            takes_tensor = function.islower() and function not in _TAKES_OTHERS
            return used == name and takes_tensor and scope.home(node.func) == "torch"
    return False


def indexes_an_array(index: ast.expr) -> bool:
    """Tell whether an index makes sense for arrays alone: ``...``, ``None``, a comparison, or a tuple with a slice."""
    if isinstance(index, ast.Tuple):
        return any(isinstance(part, ast.Slice) or indexes_an_array(part) for part in index.elts)
    return (isinstance(index, ast.Constant) and index.value in (..., None)) or isinstance(index, ast.Compare)
