"""Watch one run: which operators write, which wait for the host, and which shapes depend on values.

Two modes look together. The dispatch mode sees every ATen operator with its schema, hence every write; the function
mode sees the Python call around it, hence ``.tolist()``, ``.cpu()``, ``.data`` and ``print``, which never reach an
operator, and tells which writes belong to one call. A tensor that PyTorch makes and fills inside one call of its own
(``one_hot``, ``pad_sequence``, ``dropout``) is that call's private matter and is not reported.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from detpost.purity.frames import Site, caller_frame, site_of
from detpost.purity.isolation import HeldTensor
from detpost.purity.report import Finding
from detpost.purity.rules import Severity

# Operators that hand a value to the host, and those that only do so to check for errors on a GPU.
_SYNCS = frozenset({"aten._local_scalar_dense", "aten.item", "aten.equal", "aten.allclose", "aten.is_nonzero"})
_CHECKS = frozenset({"aten._linalg_check_errors", "aten._is_all_true", "aten._is_any_true"})
# Python calls that read values without an operator of their own.
_READS = frozenset({"numpy", "tolist", "cpu", "__array__", "__repr__", "__str__", "__format__"})
_BRANCHES = frozenset({"__bool__", "is_nonzero"})
# Custom operators whose output length depends on values though they carry no tag for it.
_DYNAMIC = frozenset({"torchvision.nms"})
_NORMALISATIONS = frozenset(
    {
        "aten.native_batch_norm",
        "aten._native_batch_norm_legit",
        "aten.cudnn_batch_norm",
        "aten.miopen_batch_norm",
        "aten._batch_norm_with_update",
        "aten.batch_norm_update_stats",
    }
)


Written = tuple[str, str]  # what a write writes ("input", "buffer", ...), and its name


@dataclass
class Step:
    """A torch function or an operator that is about to run, and from where."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    frame: FrameType | None  # the caller's, if any
    innermost: FrameType | None  # the deepest that is not the checker's

    @property
    def place(self) -> FrameType | None:
        """The caller's frame or, where only library code is on the stack, the innermost one."""
        return self.frame or self.innermost

    @property
    def tensor(self) -> Tensor | None:
        """The first tensor among the arguments."""
        return next(_flat(self.arguments), None)


@dataclass
class Call(Step):
    """One call of a torch function."""

    serial: int
    name: str
    through_data: bool
    reported: set[str] = field(default_factory=set)


@dataclass
class Operation(Step):
    """One operator, and the call of a torch function whose own code runs it, if there is one."""

    operator: Any
    inner: Call | None

    @property
    def name(self) -> str:
        """The operator without its overload, as ``aten.add_``."""
        return str(self.operator._schema.name).replace("::", ".")

    def bound(self) -> Iterator[tuple[Any, Any]]:
        """Pair the schema's arguments with what was given."""
        for position, argument in enumerate(self.operator._schema.arguments):
            if argument.name in self.keywords:
                yield argument, self.keywords[argument.name]
            elif position < len(self.arguments) and not argument.kwarg_only:
                yield argument, self.arguments[position]


def storage_key(tensor: Tensor) -> tuple[Any, StorageWeakRef | None]:
    """Make a key that two tensors share exactly when they share memory, and what keeps the key from being reused."""
    try:
        reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (RuntimeError, NotImplementedError, AttributeError, ValueError):  # sparse or lazy: no storage
        return ("tensor", id(tensor)), None
    return reference.cdata, reference


class Recorder:
    """Collect findings while the modes are on.

    The inputs come with their names, as passed; the anchor is the frame that calls the subject.
    """

    def __init__(self, inputs: Iterable[tuple[str, Tensor]], held: Iterable[HeldTensor], anchor: FrameType) -> None:
        self.findings: dict[tuple[Any, ...], Finding] = {}
        self.written: set[int] = set()  # ids of the tensors of the caller that an operator wrote
        self.host_views: dict[Any, Site] = {}  # memory that NumPy was given, and where
        self.anchor = anchor
        self.call: Call | None = None
        self._serial = 0
        self._known: dict[Any, tuple[str, str, Tensor]] = {}
        self._saved: set[Any] = set()
        self._born: dict[Any, int | None] = {}
        self._kept: list[StorageWeakRef | None] = []
        self._data_views: dict[int, weakref.ref[Tensor]] = {}
        named = [(tensor, "input", name) for name, tensor in inputs]
        for tensor, kind, name in named + [(item.tensor, item.kind, item.name) for item in held]:
            self._known.setdefault(self._key(tensor), (kind, name, tensor))

    def _key(self, tensor: Tensor) -> Any:
        key, reference = storage_key(tensor)
        self._kept.append(reference)
        return key

    @contextlib.contextmanager
    def watching(self, hooks: bool) -> Iterator[None]:
        """Turn the modes on for one block; with hooks, also note which tensors autograd saves for backward."""
        with contextlib.ExitStack() as stack:
            if hooks:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._on_save, lambda tensor: tensor))
            stack.enter_context(_Functions(self))
            stack.enter_context(_Operators(self))
            yield

    def results(self) -> list[Finding]:
        """List the findings so far, without what a worse one on the same line already says."""
        rules_at: dict[tuple[Any, ...], set[str]] = {}
        for finding in self.findings.values():
            rule = finding.rule if finding.severity != "warning" else f"{finding.rule} warning"
            rules_at.setdefault((finding.file, finding.line), set()).add(rule)
        return [f for f in self.findings.values() if not _implied(f, rules_at[f.file, f.line])]

    def _on_save(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            self._saved.add(self._key(tensor))
        return tensor

    # Python calls

    def enter(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Call:
        """Note a torch function that is about to run."""
        self._serial += 1
        frame, innermost = caller_frame(self.anchor)
        name = getattr(function, "__name__", "")
        view = self._data_views.get(id(arguments[0])) if arguments else None
        through_data = view is not None and view() is arguments[0]
        call = Call(arguments, keywords, frame, innermost, self._serial, name, through_data)
        if _is_data_property(function):
            call.reported.add("data")
            if name == "__set__":
                self._write(arguments[0], "Tensor.data", call, "DP006", "replaces the memory of")
            elif frame is not None and innermost is frame:
                self._add("DP006", "warning", ".data takes a tensor out of autograd's sight", call, "Tensor.data", None)
        elif name in _READS or _moves_to_host(name, arguments, keywords) or _collects_tensors(name, arguments):
            self._sync(call, call, f"{_said(name)} reads a tensor's values on the host", f"Tensor.{name}")
            if name in ("numpy", "__array__") and call.tensor is not None:
                self.host_views.setdefault(storage_key(call.tensor)[0], site_of(frame))
        elif name == "detach_" and arguments:
            self._write(arguments[0], "Tensor.detach_", call, "DP003", "detaches")
        return call

    def leave(self, call: Call, result: Any) -> None:
        """Note what a torch function returned."""
        if call.name == "__get__" and "data" in call.reported and isinstance(result, Tensor):
            self._data_views.update({id(result): weakref.ref(result)})

    # Operators

    def before(self, operator: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Call | None:
        """Look at an operator before it runs, and give the torch function whose own code runs it, if there is one."""
        frame, innermost = caller_frame(self.anchor)
        # A torch function may call back into the caller's code (a custom backward): what that does is the caller's.
        inner = self.call if self.call is not None and self.call.frame is frame else None
        if getattr(operator, "_schema", None) is not None:  # torch.cond and the like run operators of their own
            seen = Operation(arguments, keywords, frame, innermost, operator, inner)
            if operator._schema.is_mutable:
                self._on_writes(seen)
            if seen.name in _NORMALISATIONS:
                self._on_normalisation(seen)
            self._on_values(seen)
        return inner

    def after(self, result: Any, inner: Call | None) -> None:
        """Note the memory that an operator made, and inside which call."""
        for tensor in _flat(result):
            key, reference = storage_key(tensor)
            if key not in self._known and key not in self._born:
                self._kept.append(reference)
                self._born.update({key: inner.serial if inner is not None else None})

    def _on_writes(self, seen: Operation) -> None:
        file = seen.innermost.f_code.co_filename if seen.innermost is not None else ""
        normalises = file.endswith(("batchnorm.py", "instancenorm.py"))
        for argument, value in seen.bound():
            for tensor in _flat(value) if argument.alias_info is not None and argument.alias_info.is_write else ():
                key, _ = storage_key(tensor)
                if seen.inner is not None and self._born.get(key) == seen.inner.serial:
                    continue
                if normalises and self._known.get(key, ("",))[0] == "buffer":
                    self._write(tensor, str(seen.operator), seen, "DP008", "updates", "warning")
                else:
                    rule = _write_rule(argument.name, seen.inner, site_of(seen.frame).form)
                    self._write(tensor, str(seen.operator), seen, rule, "writes")

    def _on_normalisation(self, seen: Operation) -> None:
        values = {argument.name: value for argument, value in seen.bound()}
        if values.get("training", values.get("train", True)) is not False:
            for name in ("running_mean", "running_var"):
                self._write(values.get(name), str(seen.operator), seen, "DP008", "updates", "warning")

    def _on_values(self, seen: Operation) -> None:
        """Look for synchronisations, and for shapes that depend on values."""
        name, text, inner = seen.name, str(seen.operator), seen.inner
        if name in _SYNCS and not _validates_on_cpu_alone(inner):
            if inner is not None and inner.name in _BRANCHES:
                self._sync(seen, inner, "Python branches on a tensor's value", text, "DP011")
            else:
                self._sync(seen, inner, f"{_said(inner.name if inner else text)} waits for the value", text)
        elif name in _CHECKS:
            self._add("DP010", "warning", f"{text} waits for an error code on a GPU", seen, text, seen.tensor)
        elif name == "aten._to_copy" and _leaves_device(seen.tensor, seen.keywords):
            self._sync(seen, inner, "copies from the device to the host", text)
        elif name in ("aten.index_put_", "aten.index_put"):
            if _has_mask(seen.arguments):
                self._sync(seen, inner, "writing through a boolean mask counts its elements", text)
        elif _is_dynamic(seen) and not (inner is not None and "shape" in inner.reported):
            if inner is not None:
                inner.reported.add("shape")
            self._add("DP020", "error", f"{text} returns a shape that depends on values", seen, text, seen.tensor)
            self._add("DP010", "error", f"{text} waits for the size of its result", seen, text, seen.tensor)

    # Findings

    def _sync(self, seen: Step, call: Call | None, message: str, operator: str, rule: str = "DP010") -> None:
        """Report a wait, once for each call of a torch function."""
        if call is None or "sync" not in call.reported:
            self._add(rule, "error", message, seen, operator, seen.tensor)
        if call is not None:
            call.reported.add("sync")

    def _write(self, tensor: Any, operator: str, seen: Step, rule: str, verb: str, level: Severity = "error") -> None:
        if not isinstance(tensor, Tensor):
            return
        key, _ = storage_key(tensor)
        kind, name, original = self._known.get(key, ("temporary", "", tensor))
        saved = key in self._saved
        if kind == "temporary" and saved:
            kind = "saved for backward"
        elif kind == "input" and tensor is not original:
            kind = "view of an input"
        if original is not tensor or kind != "temporary":
            self.written.add(id(original))
        if kind == "temporary" and level == "error":
            level = "note"
        message = f"{operator} {verb} {_described(kind, name)} {_dtype(tensor)}{list(tensor.shape)}"
        if saved and level == "error" and kind != "saved for backward":
            message += ", which autograd saved for backward"
        self._add(rule, level, message, seen, operator, tensor, (kind, name))

    def _add(
        self, rule: str, level: Severity, message: str, seen: Step, operator: str, tensor: Any, of: Written = ("", "")
    ) -> None:
        site = site_of(seen.place)
        key = (rule, site.file, site.line, operator, *of)
        shape, dtype = (tuple(tensor.shape), _dtype(tensor)) if isinstance(tensor, Tensor) else (None, "")
        where = (site.file, site.line, site.source, operator, *of, shape, dtype)
        known = self.findings.get(key)
        new = Finding(rule, level, message, *where) if known is None else replace(known, count=known.count + 1)
        self.findings.update({key: new})


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        recorder, keywords = self.recorder, kwargs or {}
        call = recorder.enter(func, args, keywords)
        outer, recorder.call = recorder.call, call
        try:
            result = func(*args, **keywords)
        finally:
            recorder.call = outer
        recorder.leave(call, result)
        return result


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        with torch._C.DisableTorchFunction():
            inner = self.recorder.before(func, args, keywords)
        result = func(*args, **keywords)
        with torch._C.DisableTorchFunction():
            self.recorder.after(result, inner)
        return result


def _implied(finding: Finding, rules: set[str]) -> bool:
    """``x[i] += y`` also stores its result, and ``x.data += y`` also reads ``.data``: one finding is enough."""
    if finding.rule == "DP002":
        return "DP001" in rules
    reads_data = finding.rule == "DP006" and finding.severity == "warning"
    return reads_data and bool(rules & {"DP001", "DP002", "DP003", "DP006"})


def _write_rule(argument: str, inner: Call | None, form: str) -> str:
    if form == "augmented":
        return "DP001"
    if form == "subscript" or (inner is not None and inner.name == "__setitem__"):
        return "DP002"
    if argument == "out" or (inner is not None and inner.keywords.get("out") is not None):
        return "DP004"
    if inner is not None and inner.through_data:
        return "DP006"
    return "DP005" if inner is not None and not inner.name.endswith("_") else "DP003"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _flat(child)


def _is_data_property(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    return getattr(owner, "__name__", "") == "data" and getattr(function, "__name__", "") in ("__get__", "__set__")


def _moves_to_host(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """``.to("cpu")`` in so many letters; ``.to(other.device)`` moves nothing where this run takes place."""
    if name != "to":
        return False
    wanted = [value for value in (*arguments[1:2], keywords.get("device")) if isinstance(value, str)]
    return any(value.startswith("cpu") for value in wanted)


def _leaves_device(tensor: Tensor | None, keywords: dict[str, Any]) -> bool:
    device = keywords.get("device")
    return (
        tensor is not None
        and isinstance(device, torch.device)
        and device.type == "cpu"
        and tensor.device.type not in ("cpu", "meta")
    )


def _collects_tensors(name: str, arguments: tuple[Any, ...]) -> bool:
    """``torch.tensor([a, b])`` of tensors reads each of them."""
    return (
        name in ("tensor", "as_tensor")
        and bool(arguments)
        and isinstance(arguments[0], list | tuple)
        and any(True for _ in _flat(arguments[0]))
    )


def _validates_on_cpu_alone(call: Call | None) -> bool:
    """``one_hot`` with a class count looks at values on the CPU only, to raise a better error."""
    if call is None or call.name != "one_hot":
        return False
    count = call.keywords.get("num_classes", call.arguments[1] if len(call.arguments) > 1 else -1)
    return isinstance(count, int) and count >= 0


def _is_dynamic(seen: Operation) -> bool:
    if seen.name == "aten.index":
        return _has_mask(seen.arguments)
    if seen.name == "aten.repeat_interleave":
        return seen.keywords.get("output_size") is None
    return seen.name in _DYNAMIC or torch.Tag.dynamic_output_shape in getattr(seen.operator, "tags", ())


def _has_mask(arguments: tuple[Any, ...]) -> bool:
    indices = arguments[1] if len(arguments) > 1 else ()
    return any(index.dtype in (torch.bool, torch.uint8) for index in _flat(indices))


def _said(name: str) -> str:
    """Say how a reader knows a call: ``float(t)`` rather than ``__float__``."""
    if name.startswith("aten."):
        return name
    plain = name.strip("_")
    if name == "to":
        return '.to("cpu")'
    if name in ("tensor", "as_tensor"):
        return f"torch.{name}([tensor, ...])"
    if name in ("__repr__", "__str__", "__format__"):
        return "printing or formatting a tensor"
    if name == "__array__":
        return "conversion to a NumPy array"
    return f"{plain}(tensor)" if name.startswith("__") else f".{plain}()"


def _described(kind: str, name: str) -> str:
    article = {
        "input": "an input",
        "view of an input": "a view of an input",
        "saved for backward": "a tensor saved for backward",
        "temporary": "a temporary of its own",
    }.get(kind, f"a {kind}")
    return f"{article} ({name})" if name else article
