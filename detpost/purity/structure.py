"""Nested inputs and outputs: walking through them, copying them, and resizing the batch they carry."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 12  # deeper nests than this are taken as one opaque value


def tensors(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a nest of containers and plain objects, with the expression that reaches it.

    Args:
        value: tensor, container, dataclass, NamedTuple, or object with attributes.
        name: how the caller names ``value``.
        depth: how deep the walk already is.

    Yields:
        Pairs of name and tensor, such as ``('outputs["logits"]', tensor)``.
    """
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
    """Attributes of a plain object; none for what is not data: modules, classes, functions."""
    if isinstance(value, nn.Module | type) or callable(value):
        return {}
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return dict(vars(value)) if hasattr(value, "__dict__") else {}


def map_tensors(value: Any, change: Callable[[Tensor], Tensor], depth: int = 0) -> Any:
    """The same nest with each tensor replaced; what holds no tensor is copied as far as it can be.

    Args:
        value: any nest of containers.
        change: what to put in place of each tensor.
        depth: how deep the walk already is.

    Returns:
        A new nest of the same types.
    """
    if isinstance(value, Tensor):
        return change(value)
    if depth >= _DEPTH:
        return value
    if isinstance(value, Mapping):
        return _map_mapping(value, {key: map_tensors(child, change, depth + 1) for key, child in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(child, change, depth + 1) for child in value))
    if type(value) in (list, tuple, set):
        return type(value)(map_tensors(child, change, depth + 1) for child in value)
    attributes = _attributes(value)
    if not any(True for child in attributes.values() for _ in tensors(child)):
        return value
    changed = copy.copy(value)
    for name, child in attributes.items():
        object.__setattr__(changed, name, map_tensors(child, change, depth + 1))
    return changed


def _map_mapping(value: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    if type(value) is dict:
        return changed
    # Model outputs are dictionaries whose entries are attributes as well: setting the items keeps the two together.
    result: Any = copy.copy(value)
    for key, child in changed.items():
        result.__setitem__(key, child)
    return result


def clone(value: Any, require_grad: bool | None = None, leaf: bool = True, dtype: torch.dtype | None = None) -> Any:
    """A nest with its own copy of every tensor.

    Args:
        value: the nest.
        require_grad: for floating tensors: True or False sets the flag, None keeps each tensor's own.
        leaf: whether copies that require a gradient are leaves. Those that are not can be written in place without
            autograd refusing it, so a write can be observed.
        dtype: floating dtype to convert to, if any.

    Returns:
        The copy, which shares no memory with the original.
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
    """Length of the first dimension of the first tensor that has one, or None."""
    for _, tensor in tensors(value):
        if tensor.dim() > 0 and tensor.shape[0] > 0:
            return int(tensor.shape[0])
    return None


def with_batch(value: Any, size: int) -> Any:
    """The nest with every tensor that carries the batch repeated up to another batch size.

    Args:
        value: the nest; tensors whose first dimension has the batch's length are taken to carry it.
        size: batch size wanted.

    Returns:
        A new nest, without gradients.
    """
    old = batch_size(value)

    def resized(tensor: Tensor) -> Tensor:
        if old is None or tensor.dim() == 0 or tensor.shape[0] != old:
            return tensor.detach().clone()
        rows = torch.arange(size, device=tensor.device) % old
        return tensor.detach().index_select(0, rows)

    return map_tensors(value, resized)


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN equal to NaN."""
    try:
        if left.shape != right.shape or left.dtype != right.dtype:
            return False
        if left.is_floating_point() or left.is_complex():
            return bool(torch.allclose(left.detach(), right.detach(), rtol=0.0, atol=0.0, equal_nan=True))
        return bool(torch.equal(left, right))
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, lazy or subclass tensors cannot be compared
        return True
