"""Whether operators run at once and unseen, so that what suits a processor best may be computed in place of a graph."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_unwatched"]


def is_unwatched(values: Tensor) -> bool:
    """Tell whether nobody watches which operators run: no compiler, tracer, functorch transform or fake tensor.

    Example:
        >>> is_unwatched(torch.zeros(2))
        True
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or type(values) not in (Tensor, torch.nn.Parameter)
        or any([type(side) is not int for side in values.shape])  # a tracer's sizes are nodes of its own
    )
