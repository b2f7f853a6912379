"""Whether a derivative of what is computed may be asked for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["wants_derivative"]


def wants_derivative(*values: Tensor | None) -> bool:
    """Whether one of the tensors is followed by autograd: backwards, by a forward-mode tangent, or by ``torch.func``.

    Example:
        >>> wants_derivative(torch.zeros(2)), wants_derivative(torch.zeros(2, requires_grad=True))
        (False, True)
    """
    if torch.is_grad_enabled():
        for value in values:  # a loop: a call of the smallest image notices a generator
            if value is not None and value.requires_grad:
                return True
    # A compiler shows what transforms do by the tensors themselves, and takes this stack for one that is never empty.
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    # The level first: without one there is no tangent, and to ask each tensor costs as much as to decode a small image.
    return forward_ad._current_level >= 0 and any(_has_tangent(value) for value in values)


def _has_tangent(value: Tensor | None) -> bool:
    return value is not None and forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]
