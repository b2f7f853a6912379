"""Nested inputs and outputs: walk through them, copy them, and resize the batch that they carry."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 12  # deeper nests than this are taken as one opaque value


def tensors(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in a nest of containers and plain objects, with the expression that reaches it from a name."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth < _DEPTH:
        for suffix, child in _children(value):
            yield from tensors(child, name + suffix, depth + 1)


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", child) for key, child in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", getattr(value, name)) for name in value._fields]
    if isinstance(value, list | tuple):
        return [(f"[{index}]", child) for index, child in enumerate(value)]
    return [(f".{name}", child) for name, child in _attributes(value).items()]


def _attributes(value: Any) -> dict[str, Any]:
    """List the attributes of a plain object; none for what is not data: modules, classes, functions."""
    if isinstance(value, nn.Module | type) or callable(value):
        return {}
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return dict(vars(value)) if hasattr(value, "__dict__") else {}


def map_tensors(value: Any, change: Callable[[Tensor], Tensor], depth: int = 0) -> Any:
    """Make the same nest with each tensor replaced; what holds no tensor is copied as far as it can be."""
    if isinstance(value, Tensor):
        return change(value)
    if depth >= _DEPTH:
        return value
    if type(value) in (dict, list, tuple, set) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        children = value.values() if type(value) is dict else value
        changed = [map_tensors(child, change, depth + 1) for child in children]
        if type(value) is dict:
            return dict(zip(value, changed, strict=True))
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    result: Any = value
    if isinstance(value, Mapping):
        # Model outputs are dictionaries whose entries are attributes as well: setting the items keeps the two together.
        result = copy.copy(value)
        for key, child in value.items():
            result.__setitem__(key, map_tensors(child, change, depth + 1))
    elif any(True for _ in tensors(value)):
        result = copy.copy(value)
        for name, child in _attributes(value).items():
            object.__setattr__(result, name, map_tensors(child, change, depth + 1))
    return result


def clone(value: Any, require_grad: bool | None = None, leaf: bool = True, dtype: torch.dtype | None = None) -> Any:
    """Copy a nest with every tensor in it.

    ``require_grad`` sets the flag of floating tensors, None keeps each tensor's own. Copies that require a gradient and
    are no leaves can be written in place without autograd refusing it, so that a write can be observed.
    """

    def copied(tensor: Tensor) -> Tensor:
        fresh = tensor.detach().clone()
        if dtype is not None and fresh.is_floating_point():
            fresh = fresh.to(dtype)
        wanted = tensor.requires_grad if require_grad is None else require_grad
        if wanted and (fresh.is_floating_point() or fresh.is_complex()):
            fresh = fresh.requires_grad_(True)  # a flag on a copy of our own, not a write
            return fresh if leaf else fresh.clone()
        return fresh

    return map_tensors(value, copied)


def batch_size(value: Any) -> int | None:
    """Read the length of the first dimension of the first tensor that has one."""
    return next((int(t.shape[0]) for _, t in tensors(value) if t.dim() > 0 and t.shape[0] > 0), None)


def with_batch(value: Any, size: int) -> Any:
    """Repeat every tensor whose first dimension has the batch's length up to another batch size."""
    old = batch_size(value)

    def resized(tensor: Tensor) -> Tensor:
        if old is None or tensor.dim() == 0 or tensor.shape[0] != old:
            return tensor.detach().clone()
        return tensor.detach().index_select(0, torch.arange(size, device=tensor.device) % old)

    return map_tensors(value, resized)


def same(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors hold the same values, NaN equal to NaN."""
    try:
        if left.shape != right.shape or left.dtype != right.dtype:
            return False
        if left.is_floating_point() or left.is_complex():
            return bool(torch.allclose(left.detach(), right.detach(), rtol=0.0, atol=0.0, equal_nan=True))
        return bool(torch.equal(left, right))
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, lazy or subclass tensors cannot be compared
        return True
