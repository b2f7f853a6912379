"""Watches one run: which operators write, which wait for the host, and which shapes depend on values.

Two modes look together. The dispatch mode sees every ATen operator with its schema, hence every write; the function
mode sees the Python call around it, hence ``.tolist()``, ``.cpu()``, ``.data`` and ``print``, which never reach an
operator, and tells which writes belong to one call. A tensor that PyTorch makes and fills inside one call of its own
(``one_hot``, ``pad_sequence``, ``dropout``) is that call's private matter and is not reported.
"""

from __future__ import annotations

import contextlib
import sys
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

from detpost.purity.frames import NOWHERE, Site, caller_frame, is_checker, site_of
from detpost.purity.isolation import Held
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


@dataclass
class Call:
    """One call of a torch function from the caller's code."""

    serial: int
    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    frame: FrameType | None
    through_data: bool
    reported: set[str] = field(default_factory=set)


def storage_key(tensor: Tensor) -> tuple[Any, StorageWeakRef | None]:
    """A key that two tensors share exactly when they share memory, and what keeps the key from being reused."""
    try:
        reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (RuntimeError, NotImplementedError, AttributeError, ValueError):  # sparse or lazy: no storage
        return ("tensor", id(tensor)), None
    return reference.cdata, reference


class Recorder:
    """Collects findings while its modes are on.

    Args:
        inputs: names and tensors of the call's inputs, as passed.
        held: tensors that the subject holds between calls.
        anchor: the frame that calls the subject.
    """

    def __init__(self, inputs: Iterable[tuple[str, Tensor]], held: Iterable[Held], anchor: FrameType) -> None:
        self.findings: dict[tuple[Any, ...], Finding] = {}
        self.written: set[int] = set()  # ids of the tensors of the caller that an operator wrote
        self.anchor = anchor
        self.call: Call | None = None
        self._serial = 0
        self._known: dict[Any, tuple[str, str, Tensor]] = {}
        self._saved: set[Any] = set()
        self._born: dict[Any, int | None] = {}
        self._kept: list[StorageWeakRef] = []
        self._data_views: dict[int, weakref.ref[Tensor]] = {}
        self.host_views: dict[Any, Site] = {}  # memory that NumPy was given, and where
        for name, tensor in inputs:
            self._learn(tensor, "input", name)
        for item in held:
            self._learn(item.tensor, item.kind, item.name)

    @contextlib.contextmanager
    def watching(self, hooks: bool) -> Iterator[None]:
        """Turns the modes on for one block.

        Args:
            hooks: also note which tensors autograd saves for backward.

        Yields:
            Nothing.
        """
        with contextlib.ExitStack() as stack:
            if hooks:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._on_save, lambda tensor: tensor))
            stack.enter_context(_Functions(self))
            stack.enter_context(_Operators(self))
            yield

    def results(self) -> list[Finding]:
        """The findings so far, without what a worse one on the same line already says."""
        findings = list(self.findings.values())
        rules_at: dict[tuple[Any, ...], set[str]] = {}
        for finding in findings:
            rules_at.setdefault((finding.file, finding.line), set()).add(finding.rule)
        kept = [finding for finding in findings if not _implied(finding, rules_at[finding.file, finding.line])]
        written = {(f.file, f.line) for f in kept if f.rule == "DP006" and f.severity == "error"}
        return [f for f in kept if f.severity != "warning" or f.rule != "DP006" or (f.file, f.line) not in written]

    def _learn(self, tensor: Tensor, kind: str, name: str) -> None:
        key, reference = storage_key(tensor)
        self._keep(reference)
        self._known.setdefault(key, (kind, name, tensor))

    def _keep(self, reference: StorageWeakRef | None) -> None:
        if reference is not None:
            self._kept.append(reference)

    def _on_save(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            key, reference = storage_key(tensor)
        if key not in self._saved:
            self._keep(reference)
            self._saved.add(key)
        return tensor

    # Python calls

    def enter(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Call:
        """Notes a torch function that is about to run."""
        self._serial += 1
        frame, innermost = caller_frame(self.anchor)
        name = getattr(function, "__name__", "")
        through_data = bool(arguments) and self._is_data_view(arguments[0])
        call = Call(self._serial, name, arguments, keywords, frame, through_data)
        if _is_data_property(function):
            by_caller = frame is not None and innermost == frame.f_code.co_filename
            self._on_data(call, by_caller)
        elif name in _READS or _moves_to_host(name, arguments, keywords) or _collects_tensors(name, arguments):
            tensor = _tensor_in(arguments)
            self._sync(call, frame, f"{_said(name)} reads a tensor's values on the host", tensor)
            if name in ("numpy", "__array__") and tensor is not None:
                self.host_views.setdefault(storage_key(tensor)[0], site_of(frame))
        elif name == "detach_" and arguments:
            self._write(arguments[0], "Tensor.detach_", frame, "DP003", "detaches")
        return call

    def leave(self, call: Call, result: Any) -> None:
        """Notes what a torch function returned."""
        if call.name == "__get__" and "data" in call.reported and isinstance(result, Tensor):
            self._data_views.update({id(result): weakref.ref(result)})

    def _is_data_view(self, value: Any) -> bool:
        reference = self._data_views.get(id(value))
        return reference is not None and reference() is value

    def _on_data(self, call: Call, by_caller: bool) -> None:
        call.reported.add("data")
        if call.name == "__set__":
            self._write(call.arguments[0], "Tensor.data", call.frame, "DP006", "replaces the memory of")
        elif by_caller:
            self._add("DP006", "warning", ".data takes a tensor out of autograd's sight", call.frame, "Tensor.data")

    def _sync(
        self, call: Call | None, frame: FrameType | None, message: str, tensor: Any, operator: str = "", rule: str = ""
    ) -> None:
        if call is not None:
            if "sync" in call.reported:
                return
            call.reported.add("sync")
        name = operator or (f"Tensor.{call.name}" if call is not None else "")
        self._add(rule or "DP010", "error", message, frame, name, tensor=tensor)

    # Operators

    def before(self, operator: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Call | None:
        """Looks at an operator before it runs.

        Args:
            operator: the ATen or custom operator.
            arguments: its positional arguments.
            keywords: its keyword arguments.

        Returns:
            The torch function whose own code runs the operator; None when the caller's code does so directly.
        """
        frame, innermost = caller_frame(self.anchor)
        # A torch function may call back into the caller's code (a custom backward): what that does is the caller's.
        inner = self.call if self.call is not None and self.call.frame is frame else None
        schema = getattr(operator, "_schema", None)
        if schema is None:  # a higher-order operator: torch.cond and its kin run their own operators
            return inner
        name = schema.name.replace("::", ".")
        if schema.is_mutable:
            for argument, value in _bound(schema, arguments, keywords):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._on_write(operator, argument.name, value, frame, innermost, inner)
        if name in _NORMALISATIONS:
            self._on_normalisation(operator, schema, arguments, keywords, frame)
        self._on_values(name, operator, arguments, keywords, frame, inner)
        return inner

    def after(self, result: Any, inner: Call | None) -> None:
        """Notes the memory that an operator made, and inside which call."""
        for tensor in _flat(result):
            key, reference = storage_key(tensor)
            if key not in self._known and key not in self._born:
                self._keep(reference)
                self._born.update({key: inner.serial if inner is not None else None})

    def _on_write(
        self, operator: Any, argument: str, value: Any, frame: FrameType | None, innermost: str, inner: Call | None
    ) -> None:
        for tensor in _flat(value):
            key, _ = storage_key(tensor)
            if inner is not None and self._born.get(key) == inner.serial:
                continue
            if innermost.endswith(("batchnorm.py", "instancenorm.py")) and self._known.get(key, ("",))[0] == "buffer":
                self._write(tensor, str(operator), frame, "DP008", "updates", severity="warning")
                continue
            rule = _write_rule(operator, argument, inner, site_of(frame).form)
            self._write(tensor, str(operator), frame, rule, "writes")

    def _write(
        self,
        tensor: Any,
        operator: str,
        frame: FrameType | None,
        rule: str,
        verb: str,
        severity: Severity | None = None,
    ) -> None:
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
        level: Severity = severity or ("note" if kind == "temporary" else "error")
        message = f"{operator} {verb} {_described(kind, name)} {_shape_of(tensor)}"
        if saved and level == "error" and kind != "saved for backward":
            message += ", which autograd saved for backward"
        self._add(rule, level, message, frame, operator, kind, name, tensor)

    def _on_normalisation(
        self, operator: Any, schema: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], frame: FrameType | None
    ) -> None:
        values = {argument.name: value for argument, value in _bound(schema, arguments, keywords)}
        if values.get("training", values.get("train", True)) is False:
            return
        for name in ("running_mean", "running_var"):
            if isinstance(values.get(name), Tensor):
                self._write(values[name], str(operator), frame, "DP008", "updates", severity="warning")

    def _on_values(
        self,
        name: str,
        operator: Any,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        frame: FrameType | None,
        inner: Call | None,
    ) -> None:
        """Synchronisations and shapes that depend on values."""
        tensor = _tensor_in(arguments)
        text = str(operator)
        if name in _SYNCS and not _validates_on_cpu_alone(inner):
            if inner is not None and inner.name in _BRANCHES:
                self._sync(inner, frame, "Python branches on a tensor's value", tensor, text, "DP011")
            else:
                self._sync(inner, frame, f"{_said(inner.name if inner else text)} waits for the value", tensor, text)
        elif name in _CHECKS:
            self._add("DP010", "warning", f"{text} waits for an error code on a GPU", frame, text, tensor=tensor)
        elif name == "aten._to_copy" and _leaves_device(tensor, keywords):
            self._sync(inner, frame, "copies from the device to the host", tensor, text)
        elif name == "aten.index_put_" or name == "aten.index_put":
            if _has_mask(arguments):
                self._sync(inner, frame, "writing through a boolean mask counts its elements", tensor, text)
        elif _dynamic(name, operator, arguments, keywords) and not (inner is not None and "shape" in inner.reported):
            if inner is not None:
                inner.reported.add("shape")
            message = f"{text} returns a shape that depends on values"
            self._add("DP020", "error", message, frame, text, tensor=tensor)
            self._add("DP010", "error", f"{text} waits for the size of its result", frame, text, tensor=tensor)

    def _add(
        self,
        rule: str,
        severity: Severity,
        message: str,
        frame: FrameType | None,
        operator: str,
        target: str = "",
        name: str = "",
        tensor: Any = None,
    ) -> None:
        site = site_of(frame) if frame is not None else self._fallback()
        key = (rule, site.file, site.line, operator, target, name)
        known = self.findings.get(key)
        if known is not None:
            self.findings.update({key: replace(known, count=known.count + 1)})
            return
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
        dtype = str(tensor.dtype).removeprefix("torch.") if isinstance(tensor, Tensor) else ""
        where = (site.file, site.line, site.source, operator, target, name, shape, dtype)
        self.findings.update({key: Finding(rule, severity, message, *where)})

    def _fallback(self) -> Site:
        """Where no line of the caller lies below the checker: the innermost line of library code."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.anchor:
            if not is_checker(frame.f_code.co_filename):
                return site_of(frame)
            frame = frame.f_back
        return NOWHERE


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
    return finding.rule == "DP006" and finding.severity == "warning" and bool(rules & {"DP001", "DP002", "DP003"})


def _write_rule(operator: Any, argument: str, inner: Call | None, form: str) -> str:
    if form == "augmented":
        return "DP001"
    if form == "subscript" or (inner is not None and inner.name == "__setitem__"):
        return "DP002"
    if argument == "out" or (inner is not None and inner.keywords.get("out") is not None):
        return "DP004"
    if inner is not None and inner.through_data:
        return "DP006"
    if inner is not None and not inner.name.endswith("_"):
        return "DP005"
    return "DP003"


def _bound(schema: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for position, argument in enumerate(schema.arguments):
        if argument.name in keywords:
            yield argument, keywords[argument.name]
        elif position < len(arguments) and not argument.kwarg_only:
            yield argument, arguments[position]


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _flat(child)


def _tensor_in(arguments: Any) -> Tensor | None:
    return next(_flat(arguments), None)


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
        and _tensor_in(arguments[0]) is not None
    )


def _validates_on_cpu_alone(call: Call | None) -> bool:
    """``one_hot`` with a class count looks at values on the CPU only, to raise a better error."""
    if call is None or call.name != "one_hot":
        return False
    count = call.keywords.get("num_classes", call.arguments[1] if len(call.arguments) > 1 else -1)
    return isinstance(count, int) and count >= 0


def _dynamic(name: str, operator: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    if name == "aten.index":
        return _has_mask(arguments)
    if name == "aten.repeat_interleave":
        return keywords.get("output_size") is None
    return name in _DYNAMIC or torch.Tag.dynamic_output_shape in getattr(operator, "tags", ())


def _has_mask(arguments: tuple[Any, ...]) -> bool:
    indices = arguments[1] if len(arguments) > 1 else ()
    return any(index.dtype in (torch.bool, torch.uint8) for index in _flat(indices))


def _said(name: str) -> str:
    """How a reader knows a call: ``float(t)`` rather than ``__float__``."""
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


def _shape_of(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
