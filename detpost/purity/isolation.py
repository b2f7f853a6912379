"""Run the subject on copies of everything that it could change, and put every object back as it was."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import random
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detpost.purity.structure import clone, tensors

_INTERNAL = frozenset(vars(nn.Module())) - {"training"}  # the registries that every module has


@dataclass(frozen=True)
class Subject:
    """What is checked: a function, method, module or other callable, and the inputs of one call."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword inputs, as the caller gave them."""
        return self.args, self.kwargs

    @property
    def asks_for_gradients(self) -> bool:
        """Whether any input requires a gradient."""
        return any(tensor.requires_grad for _, tensor in tensors(self.inputs))

    def copies(self, require_grad: bool | None = None, leaf: bool = True, dtype: torch.dtype | None = None) -> Any:
        """Copy the inputs, as ``structure.clone`` does."""
        return clone(self.inputs, require_grad, leaf, dtype)

    def run(self, inputs: Any) -> Any:
        """Call the subject on a pair of positional and keyword inputs."""
        return self.call(*inputs[0], **inputs[1])


@dataclass
class HeldTensor:
    """One tensor that the subject holds between calls: its copy, in use during the run, and what it is."""

    kind: str  # "parameter", "buffer" or "captured tensor"
    name: str
    tensor: Tensor
    original: Tensor


@dataclass
class State:
    """What a run may look at: the tensors held, and afterwards the names of Python attributes that it changed."""

    held: list[HeldTensor] = field(default_factory=list)
    changed_attributes: list[str] = field(default_factory=list)


def _owners(call: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Find the objects whose state a call can reach, by the prefix that names them: modules, the object of a method."""
    found: dict[str, Any] = {}
    if isinstance(call, functools.partial):
        found.update(_owners(call.func, (*call.args, *call.keywords.values())))
    elif isinstance(call, nn.Module):
        found.update({"": call})
    elif isinstance(call, types.MethodType):
        found.update({"self": call.__self__})
    elif isinstance(call, types.FunctionType):
        found.update({name: value for name, value, _ in _captured(call) if isinstance(value, nn.Module)})
    elif hasattr(call, "__dict__") and not isinstance(call, type | types.BuiltinFunctionType):
        found.update({"self": call})
    found.update({f"args[{i}]": value for i, value in enumerate(arguments) if isinstance(value, nn.Module)})
    return {name: value for name, value in found.items() if not isinstance(value, type | types.ModuleType)}


def _captured(function: types.FunctionType) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """Yield names, values and setters of what a function sees besides its arguments."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):  # an empty cell
            yield name, cell.cell_contents, functools.partial(setattr, cell, "cell_contents")
    scope = function.__globals__
    for name in function.__code__.co_names:
        if name in scope:
            yield name, scope[name], functools.partial(scope.__setitem__, name)


@contextlib.contextmanager
def isolated(subject: Subject, dtype: torch.dtype | None = None) -> Iterator[State]:
    """Lend copies of parameters, buffers and captured tensors to the subject for the length of one block.

    Only dictionaries are exchanged: no tensor of the caller is written, not even to restore it. Python attributes,
    the containers directly in them, and the generators of torch, NumPy and ``random`` are put back as well. Floating
    copies take ``dtype`` if it is given.
    """
    state = State()
    memo: dict[int, Any] = {}
    with contextlib.ExitStack() as undo:
        undo.enter_context(_generators_kept())
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        undo.enter_context(contextlib.redirect_stdout(io.StringIO()))  # the subject runs a dozen times
        for prefix, owner in _owners(subject.call, subject.args).items():
            for name, part in _parts(owner):
                label = ".".join(piece for piece in (prefix, name) if piece)
                _lend(part, label, state, undo, memo, dtype)
        for name, value, put in _captured(subject.call) if isinstance(subject.call, types.FunctionType) else ():
            if isinstance(value, Tensor):
                lent = _copy(value, memo, dtype)
                put(lent)
                undo.callback(put, value)
                state.held.append(HeldTensor("captured tensor", name, lent, value))
        yield state


def _parts(owner: Any) -> list[tuple[str, Any]]:
    if isinstance(owner, nn.Module):
        return list(owner.named_modules())
    parts: list[tuple[str, Any]] = [("", owner)]
    for name, value in vars(owner).items() if hasattr(owner, "__dict__") else ():
        if isinstance(value, nn.Module):
            parts += [(f"{name}.{inner}".rstrip("."), part) for inner, part in value.named_modules()]
    return parts


def _lend(
    part: Any, label: str, state: State, undo: contextlib.ExitStack, memo: dict[int, Any], dtype: torch.dtype | None
) -> None:
    """Exchange the tensors of one object for copies, and remember its attributes."""
    if not hasattr(part, "__dict__"):
        return
    if isinstance(part, torch.jit.ScriptModule):  # its registries live in C++ and exchange nothing
        for kind, pairs in (("parameter", part.named_parameters), ("buffer", part.named_buffers)):
            for name, tensor in pairs(recurse=False):
                state.held.append(HeldTensor(kind, f"{label}.{name}".lstrip("."), tensor, tensor))
        return
    registries = [("captured tensor", vars(part))]
    if isinstance(part, nn.Module):
        registries += [("parameter", part._parameters), ("buffer", part._buffers)]
        undo.callback(_put_back, part._modules, dict(part._modules))
    undo.callback(_restore, part, type(part), dict(vars(part)))
    for value in list(vars(part).values()):
        if isinstance(value, list | dict | set):
            undo.callback(_put_back, value, copy.copy(value))
    for kind, registry in registries:
        undo.callback(_put_back, registry, dict(registry))
        for name, tensor in list(registry.items()):
            if isinstance(tensor, Tensor):
                lent = _copy(tensor, memo, dtype)
                registry.update({name: lent})
                state.held.append(HeldTensor(kind, f"{label}.{name}".lstrip("."), lent, tensor))
    if type(part).__module__.split(".")[0] != "torch":  # torch's own bookkeeping is stirred up by the exchange itself
        undo.callback(_note_changes, part, _shadow(part), label, state)


def _copy(tensor: Tensor, memo: dict[int, Any], dtype: torch.dtype | None) -> Tensor:
    """Copy a tensor with its class and flag; the same tensor gives the same copy, so that tied weights stay tied."""
    if id(tensor) not in memo:
        copied = copy.deepcopy(tensor) if tensor.is_leaf else tensor.detach().clone()
        if dtype is not None and copied.is_floating_point():
            wider = copied.detach().to(dtype)
            copied = nn.Parameter(wider) if isinstance(copied, nn.Parameter) else wider
        if copied.requires_grad != tensor.requires_grad:  # a lazy module's parameter cannot be asked to
            copied = copied.requires_grad_(tensor.requires_grad)
        memo.update({id(tensor): copied})
    kept: Tensor = memo[id(tensor)]
    return kept


def _shadow(part: Any) -> dict[str, Any]:
    """Remember what attributes look like: containers by a shallow copy, anything else by itself."""
    kept = {name: value for name, value in vars(part).items() if name not in _INTERNAL}
    return {name: copy.copy(value) if isinstance(value, list | dict | set) else value for name, value in kept.items()}


def _note_changes(part: Any, before: dict[str, Any], label: str, state: State) -> None:
    after = {name: value for name, value in vars(part).items() if name not in _INTERNAL}
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or not _alike(before[name], after[name]):
            state.changed_attributes.append(f"{label}.{name}".lstrip("."))


def _alike(before: Any, after: Any) -> bool:
    if before is after:
        return True
    if isinstance(before, list | tuple) and isinstance(after, list | tuple):
        return len(before) == len(after) and all(_alike(a, b) for a, b in zip(before, after, strict=True))
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(_alike(value, after[key]) for key, value in before.items())
    if isinstance(before, int | float | str | bytes | bool | set | frozenset):
        return type(before) is type(after) and before == after
    return False


def _restore(part: Any, kind: type, attributes: dict[str, Any]) -> None:
    if type(part) is not kind:  # a lazy module turns into its final class during the first call
        part.__class__ = kind
    _put_back(vars(part), attributes)


def _put_back(container: Any, contents: Any) -> None:
    """Give a list, dictionary or set its old contents without replacing the object."""
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(contents)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
