"""Which kernel serves where: by the environment, by the device, and for Triton by a trial."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Any

import torch

from detpost.kernels.cpu import library

__all__ = ["KERNELS", "constant_kernel_for", "is_exporting", "kernel_for", "may_serve", "tried", "writes_graph"]

KERNELS = ("native", "numpy", "triton", "aten")
VARIABLE = "DETPOST_KERNEL"


def is_exporting() -> bool:
    """Tell whether ``torch.export`` is at work.

    By the flag: ``torch.compiler.is_exporting()`` is always true inside ``torch.compile`` of PyTorch 2.11.
    """
    return bool(torch.compiler._is_exporting_flag)


def writes_graph() -> bool:
    """Tell whether a graph is being written for another runtime, which has plain operators only."""
    if torch.compiler.is_compiling():  # asked first: not every Dynamo can follow the question below
        return is_exporting()
    return torch._C._is_tracing()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def constant_kernel_for(device: str) -> str:
    """Give :func:`kernel_for` as a constant of what is compiled."""
    return kernel_for(device)


def kernel_for(device: str) -> str:
    """Name the kernel that serves a type of device.

    Args:
        device: ``"cpu"``, ``"cuda"`` or another type of device.

    Returns:
        One of ``KERNELS``; ``triton`` serves where its trial passes (:func:`tried`).

    Raises:
        ValueError: ``DETPOST_KERNEL`` holds something else.
        RuntimeError: the kernel that it forces is not there.

    Example:
        >>> kernel_for("mps")
        'aten'
    """
    return _kernel_for(os.environ.get(VARIABLE, ""), device)


@functools.cache
def _kernel_for(forced: str, device: str) -> str:
    if forced and forced not in KERNELS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(KERNELS)}; got {forced!r}")
    if forced == "native" and (reason := library.missing()) is not None:
        raise RuntimeError(f"{VARIABLE}=native, but detpost's C++ kernels are {reason}")
    if forced == "triton" and importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"{VARIABLE}=triton, but Triton is not installed: pip install triton")
    if device == "cpu":
        if forced == "triton":
            return "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "aten"
        return forced or ("native" if library.missing() is None else "numpy")
    if device == "cuda" and forced == "":
        return "triton" if importlib.util.find_spec("triton") is not None else "aten"
    return "triton" if device == "cuda" and forced == "triton" else "aten"


# What was tried in this process, and what was wrong: the device's type, the name of the trial, its arguments.
_TRIED: dict[tuple[Any, ...], str | None] = {}


def tried(device: str, trial: str, *arguments: Any) -> str | None:
    """Try the Triton kernels, once in a process.

    Args:
        device: ``"cuda"``, or ``"cpu"`` under ``TRITON_INTERPRET=1``.
        trial: name of a function of :mod:`detpost.kernels.triton.trial`.
        arguments: of that function, after the device.

    Returns:
        In one line, what did not agree or did not run; ``None`` where all is well.
    """
    key = (device, trial, *arguments)
    if key not in _TRIED:
        from torch.utils._python_dispatch import _disable_current_modes

        from detpost.kernels.triton import trial as trials

        with _disable_current_modes():  # real tensors, whatever the caller traces
            _TRIED[key] = getattr(trials, trial)(device, *arguments)
    return _TRIED[key]


def may_serve(device: torch.device, compiling: bool, *trial: Any) -> bool:
    """Tell whether a Triton kernel may run here: tried on what it is about to run on, or forced."""
    if compiling:
        constant: bool = _constant_may_serve(device.type, *trial)
        return constant
    if os.environ.get(VARIABLE) == "triton":
        return True
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing() and (device.type, *trial) not in _TRIED:
        return False  # while a CUDA graph is captured nothing can be tried
    return _passes(device.type, *trial)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_may_serve(device: str, *trial: Any) -> bool:
    return os.environ.get(VARIABLE) == "triton" or _passes(device, *trial)


def _passes(device: str, *trial: Any) -> bool:
    """Tell whether a trial passes; say so, once, where it does not."""
    is_new = (device, *trial) not in _TRIED
    reason = tried(device, *trial)
    if is_new and reason is not None:
        warnings.warn(f"detpost computes without its Triton kernels: {reason}", stacklevel=2)
    return reason is None
