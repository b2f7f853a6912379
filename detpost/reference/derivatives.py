"""Whether a derivative of what is computed may be asked for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["is_in_transform", "wants_derivative"]


def wants_derivative(*values: Tensor | None) -> bool:
    """Tell whether autograd follows one of the tensors: backwards, by a forward-mode tangent, or by ``torch.func``.

    Example:
        >>> wants_derivative(torch.zeros(2)), wants_derivative(torch.zeros(2, requires_grad=True))
        (False, True)
    """
    if torch.is_grad_enabled():
        for value in values:  # a loop: a call of the smallest image notices a generator
            if value is not None and value.requires_grad:
                return True
    if is_in_transform():
        return True
    # The level first: without one there is no tangent, and to ask each tensor costs as much as to decode a small image.
    # A compiler's tensors do not always tell (those of PyTorch 2.11 have none): there the level is enough.
    return forward_ad._current_level >= 0 and (
        torch.compiler.is_compiling() or any(_has_tangent(value) for value in values)
    )


def _has_tangent(value: Tensor | None) -> bool:
    return value is not None and forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


def is_in_transform() -> bool:
    """Tell whether a transform of ``torch.func`` (grad, jvp, vmap) is at work; inside ``torch.compile`` too."""
    if torch.compiler.is_compiling():
        constant: bool = _constant_is_in_transform()
        return constant
    return torch._C._functorch.peek_interpreter_stack() is not None


# Dynamo cannot follow the question; it compiles anew for another answer.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_is_in_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None
