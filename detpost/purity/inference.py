"""Tells tensors from numbers, lists and arrays in source code, without running or importing it.

Kinds come, in this order, from annotations, from what a name is assigned (``torch.zeros(...)`` is a tensor, ``0``,
``len(x)``, ``x.shape[0]`` and what ``range`` or ``enumerate`` yields are numbers, ``[]`` and ``{}`` are containers,
``np.zeros(...)`` is an array), and from how a parameter is used further down (``x.view(...)``, ``F.relu(x)``,
``x[..., 0]`` make it a tensor; ``range(x)``, ``x.append(...)``, ``x["key"]`` do not). A parameter that none of this
decides is a tensor if it belongs to a module's ``forward`` or bears one of the customary names of tensors (``x``,
``logits``, ``boxes``, ...), and is left alone otherwise. Anything else unknown is left alone too.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from enum import Enum, auto

from detpost.purity.vocabulary import (
    ARRAY_TYPES,
    LAYERS_WITH_PAIRS,
    LIST_METHODS,
    NOT_TENSOR_CALLS,
    PAIR_METHODS,
    PAIR_WITH_DIMENSION,
    SCALAR_ATTRIBUTES,
    SCALAR_METHODS,
    SCALAR_TYPES,
    TENSOR_ATTRIBUTES,
    TENSOR_METHODS,
    TENSOR_NAMES,
)


class Kind(Enum):
    """What an expression is taken to be."""

    TENSOR = auto()
    TENSORS = auto()  # a list, tuple or dictionary of tensors
    NUMBER = auto()  # any scalar: int, float, bool, str, None, dtype, device
    CONTAINER = auto()  # list, tuple, dict or set of something else
    ARRAY = auto()  # NumPy
    LAYER = auto()  # calling it gives a tensor
    OTHER = auto()
    UNKNOWN = auto()


@dataclass
class Imports:
    """What the names of libraries mean in one file."""

    torch: set[str] = field(default_factory=set)  # names bound to torch or a part of it
    numpy: set[str] = field(default_factory=set)
    functions: dict[str, str] = field(default_factory=dict)  # names imported from torch modules, by their origin
    any_torch: bool = False

    @classmethod
    def of(cls, tree: ast.AST) -> Imports:
        """Reads the import statements anywhere in a file."""
        found = cls()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found._bind(alias.name, alias.asname or alias.name.split(".")[0])
            elif isinstance(node, ast.ImportFrom) and node.module:
                found._bind_from(node)
        return found

    def _bind(self, module: str, name: str) -> None:
        if module.split(".")[0] in ("torch", "torchvision", "kornia"):
            self.any_torch = True
            self.torch.add(name)
        elif module.split(".")[0] in ("numpy", "np", "cupy"):
            self.numpy.add(name)

    def _bind_from(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        root = module.split(".")[0]
        if root == "numpy":
            self.numpy.update(alias.asname or alias.name for alias in node.names)
        if root not in ("torch", "torchvision"):
            # A package of tensors is known by the names that it exports: `from kornia.core import Tensor`.
            self.any_torch |= root == "kornia" or any(alias.name in ("Tensor", "tensor") for alias in node.names)
            return
        self.any_torch = True
        for alias in node.names:
            name = alias.asname or alias.name
            if alias.name in ("nn", "functional", "ops", "init", "linalg", "special", "fft", "jit", "cuda", "func"):
                self.torch.add(name)
            else:
                self.functions.update({name: f"{module}.{alias.name}"})


def dotted(node: ast.AST) -> list[str]:
    """The names of an attribute chain, outermost first: ``torch.nn.init`` gives ``["torch", "nn", "init"]``."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def annotation_kind(node: ast.expr | None) -> Kind:
    """The kind that an annotation declares.

    Args:
        node: the annotation, or None.

    Returns:
        UNKNOWN without an annotation, OTHER for a type that means nothing here.
    """
    if node is None:
        return Kind.UNKNOWN
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            return annotation_kind(ast.parse(node.value, mode="eval").body)
        except SyntaxError:
            return Kind.UNKNOWN
    if isinstance(node, ast.Constant):
        return Kind.NUMBER
    if isinstance(node, ast.BinOp):  # X | None
        return _strongest(annotation_kind(node.left), annotation_kind(node.right))
    if isinstance(node, ast.Subscript):
        return _generic_kind(node)
    name = (dotted(node) or [""])[-1]
    if name.endswith("Tensor") or name in ("Parameter", "Buffer"):
        return Kind.TENSOR
    if name in ARRAY_TYPES:
        return Kind.ARRAY
    if name in SCALAR_TYPES:
        return Kind.NUMBER
    if name in ("list", "dict", "tuple", "set", "List", "Dict", "Tuple", "Sequence", "Mapping", "Iterable", "Size"):
        return Kind.CONTAINER
    return Kind.UNKNOWN if name in ("Any", "object", "") else Kind.OTHER


def _generic_kind(node: ast.Subscript) -> Kind:
    outer = (dotted(node.value) or [""])[-1]
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    kinds = [annotation_kind(part) for part in inner if not (isinstance(part, ast.Constant) and part.value is ...)]
    if outer in ("Optional", "Union", "Annotated", "Final", "ClassVar"):
        return _strongest(*kinds)
    if outer in ARRAY_TYPES:
        return Kind.ARRAY
    if Kind.TENSOR in kinds and outer in ("Float", "Int", "Bool", "Shaped", "Num", "UInt", "Inexact"):  # jaxtyping
        return Kind.TENSOR
    # A list of dictionaries of tensors has no tensors for elements.
    return Kind.TENSORS if Kind.TENSOR in kinds else Kind.CONTAINER


def _strongest(*kinds: Kind) -> Kind:
    for wanted in (Kind.TENSOR, Kind.TENSORS, Kind.ARRAY, Kind.CONTAINER, Kind.OTHER, Kind.LAYER, Kind.NUMBER):
        if wanted in kinds:
            return wanted
    return Kind.UNKNOWN


def join(left: Kind, right: Kind) -> Kind:
    """The kind after two branches: a tensor on either side stays one, for that branch may be the one taken."""
    if left is right:
        return left
    if Kind.TENSOR in (left, right):
        return Kind.TENSOR
    if Kind.TENSORS in (left, right) and Kind.CONTAINER in (left, right):
        return Kind.TENSORS
    if left is Kind.UNKNOWN or right is Kind.UNKNOWN:
        return Kind.UNKNOWN
    return left if right is Kind.NUMBER else right


@dataclass
class Scope:
    """Kinds of the names visible at one point of a function, and what the file says about the rest."""

    imports: Imports
    names: dict[str, Kind] = field(default_factory=dict)
    attributes: dict[str, Kind] = field(default_factory=dict)  # of self
    returns: dict[str, Kind] = field(default_factory=dict)  # functions and methods of the file, by annotation

    def branch(self) -> Scope:
        """A copy whose names change independently."""
        return Scope(self.imports, dict(self.names), self.attributes, self.returns)

    def merge(self, *others: Scope) -> None:
        """Takes the names of other branches in."""
        for name in {name for scope in others for name in scope.names}:
            kinds = [scope.names[name] for scope in others if name in scope.names]
            merged = kinds[0]
            for kind in kinds[1:]:
                merged = join(merged, kind)
            self.names.update({name: merged})

    def kind(self, node: ast.expr | None) -> Kind:
        """The kind of an expression.

        Args:
            node: the expression, or None.

        Returns:
            UNKNOWN where nothing tells.
        """
        match node:
            case ast.Constant() | ast.JoinedStr():
                return Kind.NUMBER
            case ast.Name():
                return self._name_kind(node.id)
            case ast.Attribute():
                return self._attribute_kind(node)
            case ast.Call():
                return self._call_kind(node)
            case ast.Subscript():
                return self._element_kind(node)
            case ast.BinOp():
                return self._operation_kind(self.kind(node.left), self.kind(node.right), node.op)
            case ast.UnaryOp():
                return Kind.NUMBER if isinstance(node.op, ast.Not) else self.kind(node.operand)
            case ast.Compare():
                return self._compare_kind(node)
            case ast.BoolOp():
                return _joined([self.kind(value) for value in node.values])
            case ast.IfExp():
                return join(self.kind(node.body), self.kind(node.orelse))
            case ast.NamedExpr() | ast.Starred() | ast.Await():
                return self.kind(node.value)
            case ast.List() | ast.Tuple() | ast.Set():
                inside = [self.kind(element) for element in node.elts]
                return Kind.TENSORS if Kind.TENSOR in inside or Kind.TENSORS in inside else Kind.CONTAINER
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                return self._comprehension_kind(node.generators, node.elt)
            case ast.Dict():
                inside = [self.kind(value) for value in node.values]
                return Kind.TENSORS if Kind.TENSOR in inside else Kind.CONTAINER
            case ast.DictComp():
                return self._comprehension_kind(node.generators, node.value)
        return Kind.UNKNOWN

    def element(self, node: ast.expr) -> Kind:
        """The kind of what a loop over an expression yields."""
        if isinstance(node, ast.Call):
            name = (dotted(node.func) or [""])[-1]
            if name in ("range", "count"):
                return Kind.NUMBER
            if name in ("parameters", "buffers"):
                return Kind.TENSOR
            if name in ("reversed", "sorted", "list", "tuple", "iter") and node.args:
                return self.element(node.args[0])
            if name == "values" and isinstance(node.func, ast.Attribute):
                return self.element(node.func.value)
        return _element_of(self.kind(node))

    def bind_loop(self, target: ast.expr, source: ast.expr) -> None:
        """Binds the targets of a ``for`` loop or comprehension."""
        if isinstance(target, ast.Tuple | ast.List) and isinstance(source, ast.Call):
            name = (dotted(source.func) or [getattr(source.func, "attr", "")])[-1]
            parts: list[Kind] | None = None
            if name == "enumerate" and source.args and len(target.elts) == 2:
                self.bind(target.elts[0], Kind.NUMBER)
                if isinstance(target.elts[1], ast.Tuple):
                    self.bind_loop(target.elts[1], source.args[0])
                else:
                    self.bind(target.elts[1], self.element(source.args[0]))
                return
            if name == "zip":
                parts = [self.element(argument) for argument in source.args]
            elif name == "items" and isinstance(source.func, ast.Attribute):
                parts = [Kind.NUMBER, self.element(source.func.value)]
            elif name in ("named_parameters", "named_buffers"):
                parts = [Kind.NUMBER, Kind.TENSOR]
            if parts is not None and len(parts) == len(target.elts):
                for element, kind in zip(target.elts, parts, strict=True):
                    self.bind(element, kind)
                return
        self.bind(target, self.element(source))

    def bind(self, target: ast.expr, kind: Kind) -> None:
        """Gives a target, or each target of a tuple, its kind."""
        if isinstance(target, ast.Name):
            self.names.update({target.id: kind})
        elif isinstance(target, ast.Starred):
            self.bind(target.value, Kind.TENSORS if kind is Kind.TENSOR else kind)
        elif isinstance(target, ast.Tuple | ast.List):
            for element in target.elts:
                self.bind(element, _element_of(kind))
        elif isinstance(target, ast.Attribute) and (chain := dotted(target)):
            self.names.update({".".join(chain): kind})

    def assign(self, targets: list[ast.expr], value: ast.expr) -> None:
        """Binds the targets of an assignment."""
        for target in targets:
            sequences = isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List)
            if sequences and len(target.elts) == len(value.elts):  # type: ignore[attr-defined]
                kinds = [self.kind(element) for element in value.elts]  # type: ignore[attr-defined]
                for element, kind in zip(target.elts, kinds, strict=True):  # type: ignore[attr-defined]
                    self.bind(element, kind)
            else:
                self.bind(target, self.kind(value))

    def is_torch(self, node: ast.expr) -> bool:
        """Whether an expression names something in torch: ``torch.x``, ``F.x``, or a name imported from it."""
        chain = dotted(node)
        return bool(chain) and (
            (chain[0] in self.imports.torch and len(chain) > 1)
            or (len(chain) == 1 and chain[0] in self.imports.functions)
        )

    def is_numpy(self, node: ast.expr) -> bool:
        """Whether an expression names something in NumPy."""
        chain = dotted(node)
        return bool(chain) and chain[0] in self.imports.numpy

    def _name_kind(self, name: str) -> Kind:
        return self.names.get(name, Kind.UNKNOWN)

    def _attribute_kind(self, node: ast.Attribute) -> Kind:
        chain = dotted(node)
        if chain and (known := self.names.get(".".join(chain))) is not None:
            return known
        if len(chain) == 2 and chain[0] == "self":
            return self.attributes.get(chain[1], Kind.UNKNOWN)
        if self.is_torch(node):
            return Kind.NUMBER  # torch.float32, torch.pi
        base = self.kind(node.value)
        if base is Kind.TENSOR:
            if node.attr == "shape":
                return Kind.CONTAINER
            if node.attr in SCALAR_ATTRIBUTES:
                return Kind.NUMBER
            return Kind.TENSOR if node.attr in TENSOR_ATTRIBUTES else Kind.UNKNOWN
        if base is Kind.TENSORS and node.attr in ("values", "indices"):
            return Kind.TENSOR
        if node.attr in ("shape", "dtype", "device", "ndim"):
            return Kind.CONTAINER if node.attr == "shape" else Kind.NUMBER
        if node.attr in ("weight", "bias", "grad") and base in (Kind.UNKNOWN, Kind.LAYER) and self.imports.any_torch:
            return Kind.TENSOR
        return Kind.UNKNOWN

    def _element_kind(self, node: ast.Subscript) -> Kind:
        base = self.kind(node.value)
        if base is Kind.TENSORS:
            return Kind.TENSORS if isinstance(node.slice, ast.Slice) else Kind.TENSOR
        if base is Kind.CONTAINER and isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
            return Kind.CONTAINER if isinstance(node.slice, ast.Slice) else Kind.NUMBER
        return base if base in (Kind.TENSOR, Kind.ARRAY) else Kind.UNKNOWN

    def _operation_kind(self, left: Kind, right: Kind, operator: ast.operator) -> Kind:
        kinds = (left, right)
        if Kind.TENSOR in kinds:
            return Kind.TENSOR
        if Kind.ARRAY in kinds:
            return Kind.ARRAY
        if Kind.TENSORS in kinds:
            return Kind.TENSORS
        if Kind.CONTAINER in kinds:
            return Kind.CONTAINER
        return Kind.NUMBER if left is Kind.NUMBER and right is Kind.NUMBER else Kind.UNKNOWN

    def _compare_kind(self, node: ast.Compare) -> Kind:
        if any(isinstance(operator, ast.Is | ast.IsNot | ast.In | ast.NotIn) for operator in node.ops):
            return Kind.NUMBER
        kinds = {self.kind(side) for side in (node.left, *node.comparators)}
        for wanted in (Kind.TENSOR, Kind.ARRAY):
            if wanted in kinds:
                return wanted
        return Kind.UNKNOWN if Kind.UNKNOWN in kinds else Kind.NUMBER

    def _comprehension_kind(self, generators: list[ast.comprehension], element: ast.expr) -> Kind:
        inner = self.branch()
        for generator in generators:
            inner.bind_loop(generator.target, generator.iter)
        return Kind.TENSORS if inner.kind(element) in (Kind.TENSOR, Kind.TENSORS) else Kind.CONTAINER

    def _call_kind(self, node: ast.Call) -> Kind:
        function = node.func
        if self.is_torch(function):
            return self._torch_call_kind(function, node)
        if self.is_numpy(function):
            return Kind.ARRAY
        if isinstance(function, ast.Name):
            return self._plain_call_kind(function.id, node)
        if isinstance(function, ast.Attribute):
            return self._method_kind(function, node)
        return Kind.TENSOR if self.kind(function) is Kind.LAYER else Kind.UNKNOWN

    def _torch_call_kind(self, function: ast.expr, node: ast.Call) -> Kind:
        chain = dotted(function)
        full = self.imports.functions.get(chain[0], ".".join(chain)) if len(chain) == 1 else ".".join(chain)
        name = full.split(".")[-1]
        if name[:1].isupper():  # a class: a layer, or a tensor type
            if name.endswith("Tensor") or name in ("Parameter", "Buffer"):
                return Kind.TENSOR
            return (
                Kind.OTHER
                if name in LAYERS_WITH_PAIRS or (".nn" not in f".{full}" and "nn" not in chain)
                else Kind.LAYER
            )
        if name in NOT_TENSOR_CALLS or "cuda" in chain[:-1] or "jit" in chain[:-1] or "backends" in chain:
            return Kind.NUMBER
        if name in PAIR_METHODS or (name in PAIR_WITH_DIMENSION and _has_dimension(node, 1)):
            return Kind.TENSORS
        if name == "where" and len(node.args) == 1:
            return Kind.TENSORS
        return Kind.TENSOR

    def _plain_call_kind(self, name: str, node: ast.Call) -> Kind:
        if name in (
            "len",
            "int",
            "float",
            "bool",
            "str",
            "round",
            "isinstance",
            "hasattr",
            "id",
            "ord",
            "repr",
            "range",
        ):
            return Kind.CONTAINER if name == "range" else Kind.NUMBER
        if name in ("list", "tuple", "set", "dict", "sorted", "zip", "enumerate", "reversed"):
            inside = [self.kind(argument) for argument in node.args]
            return Kind.TENSORS if Kind.TENSOR in inside or Kind.TENSORS in inside else Kind.CONTAINER
        if name in ("abs", "sum", "max", "min", "pow", "next") and node.args:
            kinds = {_element_of(self.kind(a)) if name in ("sum", "next") else self.kind(a) for a in node.args}
            return (
                Kind.TENSOR
                if kinds & {Kind.TENSOR, Kind.TENSORS}
                else Kind.NUMBER
                if kinds == {Kind.NUMBER}
                else Kind.UNKNOWN
            )
        if self.names.get(name) is Kind.LAYER:
            return Kind.TENSOR
        return self.returns.get(name, Kind.UNKNOWN)

    def _method_kind(self, function: ast.Attribute, node: ast.Call) -> Kind:
        chain, base, name = dotted(function), self.kind(function.value), function.attr
        if len(chain) == 2 and chain[0] == "self":
            if self.attributes.get(name) is Kind.LAYER:
                return Kind.TENSOR
            return self.returns.get(name, Kind.UNKNOWN)
        if chain and chain[0] == "math":
            return Kind.NUMBER
        if base is Kind.TENSOR:
            return _tensor_method_kind(name, node)
        if base is Kind.ARRAY:
            return Kind.ARRAY
        if base is Kind.TENSORS and name in ("get", "pop", "values"):
            return Kind.TENSORS if name == "values" else Kind.TENSOR
        if name in ("size", "numel", "dim", "item"):
            return Kind.CONTAINER if name == "size" and not node.args else Kind.NUMBER
        if name in ("new_zeros", "new_ones", "new_full", "new_tensor", "new_empty", "detach", "unsqueeze", "permute"):
            return Kind.TENSOR  # methods that only tensors have
        return Kind.UNKNOWN


def _tensor_method_kind(name: str, node: ast.Call) -> Kind:
    if name in ("size", "stride"):
        return Kind.NUMBER if node.args or node.keywords else Kind.CONTAINER
    if name in SCALAR_METHODS or name.startswith("is_"):
        return Kind.NUMBER
    if name == "tolist":
        return Kind.CONTAINER
    if name == "numpy":
        return Kind.ARRAY
    if name in PAIR_METHODS or (name in PAIR_WITH_DIMENSION and _has_dimension(node, 0)):
        return Kind.TENSORS
    return Kind.TENSOR


def _has_dimension(node: ast.Call, position: int) -> bool:
    return any(keyword.arg in ("dim", "return_inverse", "return_counts") for keyword in node.keywords) or (
        len(node.args) > position and isinstance(node.args[position], ast.Constant | ast.UnaryOp)
    )


def _element_of(kind: Kind) -> Kind:
    if kind in (Kind.TENSOR, Kind.TENSORS):
        return Kind.TENSOR
    return Kind.ARRAY if kind is Kind.ARRAY else Kind.UNKNOWN


def _joined(kinds: list[Kind]) -> Kind:
    result = kinds[0]
    for kind in kinds[1:]:
        result = join(result, kind)
    return result


def parameter_kinds(
    function: ast.FunctionDef | ast.AsyncFunctionDef, imports: Imports, is_forward: bool
) -> dict[str, Kind]:
    """Kinds of a function's parameters, from annotation, default, use and name, in this order.

    Args:
        function: the function.
        imports: what the file imports.
        is_forward: whether it is a module's ``forward``.

    Returns:
        A kind for each parameter.
    """
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    defaults: dict[str, ast.expr] = {
        argument.arg: default for argument, default in zip(reversed(positional), reversed(spec.defaults), strict=False)
    }
    defaults.update({a.arg: d for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if d is not None})
    kinds: dict[str, Kind] = {}
    for argument in (*positional, *spec.kwonlyargs):
        kind = annotation_kind(argument.annotation)
        default = defaults.get(argument.arg)
        if kind is Kind.UNKNOWN and isinstance(default, ast.Constant) and default.value is not None:
            kind = Kind.NUMBER
        if kind is Kind.UNKNOWN and argument.arg not in ("self", "cls"):
            kind = _kind_from_use(function, argument.arg, imports, is_forward)
        kinds.update({argument.arg: kind})
    for variadic in (spec.vararg, spec.kwarg):
        if variadic is not None:
            inner = annotation_kind(variadic.annotation)
            kinds.update({variadic.arg: Kind.TENSORS if inner is Kind.TENSOR else Kind.CONTAINER})
    return kinds


def _kind_from_use(
    function: ast.FunctionDef | ast.AsyncFunctionDef, name: str, imports: Imports, is_forward: bool
) -> Kind:
    if not imports.any_torch:
        return Kind.UNKNOWN
    votes = [vote for node in ast.walk(function) if (vote := _vote(node, name, imports)) is not None]
    # The first use that tells decides: later ones may concern the name after it was assigned anew.
    if votes:
        return votes[0]
    if is_forward or name in TENSOR_NAMES:
        return Kind.TENSOR
    return Kind.UNKNOWN


def _vote(node: ast.AST, name: str, imports: Imports) -> Kind | None:
    """What one use of a name says about it."""

    def named(part: ast.AST | None) -> bool:
        return isinstance(part, ast.Name) and part.id == name

    if isinstance(node, ast.Call):
        callee = dotted(node.func)
        if callee and callee[0] in imports.numpy and any(named(argument) for argument in node.args):
            return Kind.ARRAY
        if len(callee) > 1 and callee[0] in imports.torch and node.args and named(node.args[0]):
            creates = callee[-1] in (
                "tensor",
                "as_tensor",
                "zeros",
                "ones",
                "full",
                "empty",
                "arange",
                "device",
                "rand",
            )
            creates |= callee[-1] in ("from_numpy", "stack", "cat", "Size", "randn", "linspace", "eye", "manual_seed")
            return None if creates or callee[-1][:1].isupper() else Kind.TENSOR
        if callee == ["range"] and any(named(argument) for argument in node.args):
            return Kind.NUMBER
    if isinstance(node, ast.Attribute) and named(node.value):
        if node.attr in LIST_METHODS:
            return Kind.CONTAINER
        return Kind.TENSOR if node.attr in TENSOR_METHODS else None
    if isinstance(node, ast.Subscript) and named(node.value):
        if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
            return Kind.OTHER
        return Kind.TENSOR if indexes_an_array(node.slice) else None
    return None


def indexes_an_array(index: ast.expr) -> bool:
    """Whether an index makes sense for arrays alone: ``...``, ``None``, a comparison, or a tuple with a slice."""
    if isinstance(index, ast.Tuple):
        return any(isinstance(part, ast.Slice) or indexes_an_array(part) for part in index.elts)
    return (isinstance(index, ast.Constant) and index.value in (..., None)) or isinstance(index, ast.Compare)
