"""What the Triton kernels share: how a kernel is declared, how an operator is registered, and where both may run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["INTERPRETED", "jit", "operator", "power_of_two", "runs_on", "wrap_triton"]

# TRITON_INTERPRET=1 was set before Triton was imported: kernels are then Python, run by NumPy on the CPU.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# Triton is untyped where it is not installed: one typed name, so that a decorated kernel is not an untyped function.
jit: Callable[[Callable[..., Any]], Any] = triton.jit


class _Interpreted:
    """A kernel under the interpreter: run on real tensors, and skipped on the fake ones of a tracer."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            from torch._subclasses import FakeTensor

            if not any(isinstance(value, FakeTensor) for value in arguments):
                self.kernel[grid](*arguments, **constants)

        return launch


def _operator_interpreted(name: str, function: Callable[..., Any]) -> Any:
    """Register an opaque operator: a tracer that looks inside would find NumPy."""
    registered = torch.library.custom_op(name, function, mutates_args=())
    registered.register_fake(function)
    return registered


def _operator_compiled(name: str, function: Callable[..., Any]) -> Any:
    return torch.library.triton_op(name, function, mutates_args=())


# torch looks for calls of this very name in an operator's source, to know its kernels.
wrap_triton: Callable[[Any], Any] = _Interpreted if INTERPRETED else torch.library.wrap_triton


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function that launches kernels as the operator ``name``, functional and traceable.

    The function allocates its outputs and launches through :func:`wrap_triton`; its fake behaviour is the function
    itself with the launches left out. Compiled, it is a ``torch.library.triton_op``, which Inductor sees through.

    Args:
        name: namespace and name, as in ``"detpost::triton_select"``.

    Returns:
        A decorator.
    """
    register = _operator_interpreted if INTERPRETED else _operator_compiled
    return lambda function: register(name, function)


def runs_on(device: torch.device) -> bool:
    """Tell whether kernels run on a device: on CUDA ones, and on the CPU under the interpreter."""
    return device.type == ("cpu" if INTERPRETED else "cuda")


def power_of_two(count: int) -> int:
    """Give the least power of two that is not below ``count``."""
    return 1 << max(0, count - 1).bit_length()


def flat(values: Tensor) -> Tensor:
    """Lay a tensor out as the kernels address it: contiguous, its own memory or a copy."""
    return values.detach().contiguous()
