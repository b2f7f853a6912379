"""Tensors in and out of C++ in one call: the extension of ``_tensors.cpp``, where it was built and serves this PyTorch.

What it does not take goes to PyTorch's operators: values that autograd follows, other devices, and wherever someone
looks at each operator (a compiler, a tracer, a transform).
"""

from __future__ import annotations

import functools
import importlib
import sysconfig
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["extension", "is_plain_call", "split"]

_INTERFACE = 2


@functools.cache
def extension() -> Any | None:
    """Load the extension; ``None`` where there is none for this Python and this PyTorch."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):  # objects of another layout than those of the limited interface
        return None
    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # what PyTorch gives to other libraries
    try:
        found: Any = importlib.import_module("detpost._tensors")
    except ImportError:  # no compiler, no headers of Python, or a Python without the limited interface
        return None
    if table is None or found.INTERFACE != _INTERFACE or not found.bind(Tensor, table, torch.is_grad_enabled):
        return None
    return found


def is_plain_call() -> bool:
    """Tell whether nobody looks at the operators of this call: no compiler, tracer, transform or mode is at work.

    Example:
        >>> is_plain_call(), torch.func.vmap(lambda x: x * is_plain_call())(torch.ones(1))
        (True, tensor([0.]))
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        # An enclosing dual level is enough: operators may make a tangent out of any other tensor.
        or forward_ad._current_level >= 0
    )


def split(names: tuple[str, ...] | None, valid: Tensor, *values: Tensor) -> list[Any]:
    """Copy what is valid of each image into tensors of its own: by the extension in one allocation, or by operators.

    Args:
        names: the keys of each image's dict; ``None`` makes tuples.
        valid: (B, K), bool.
        values: (B, K) or (B, K, n) each.

    Returns:
        For each image the D rows of each of the values whose slot is valid, still differentiable.

    Example:
        >>> split(None, torch.tensor([[True, False], [True, True]]), torch.tensor([[1, 2], [3, 4]]))
        [(tensor([1]),), (tensor([3, 4]),)]
    """
    found = extension() if is_plain_call() else None
    images: list[Any] | None = None if found is None else found.split(names, valid, *values)
    if images is not None:
        return images
    rows = _split_by_operators(valid, *values)
    return rows if names is None else [dict(zip(names, image, strict=True)) for image in rows]


def _split_by_operators(valid: Tensor, *values: Tensor) -> list[tuple[Tensor, ...]]:
    """Split into tuples."""
    counts = valid.sum(dim=1).tolist()  # detpost: allow DP010: lists are made on the host
    if all(count == valid.shape[1] for count in counts):
        return list(zip(*(rows.clone().unbind(0) for rows in values), strict=True))
    places = valid.flatten().nonzero().squeeze(1)  # detpost: allow DP020: as long as what is valid
    parts = (rows.flatten(0, 1).index_select(0, places).split_with_sizes(counts) for rows in values)
    return list(zip(*parts, strict=True))
