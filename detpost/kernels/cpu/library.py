"""The library of C++ kernels: loads it once, and says what is missing.

It is an optional part of the package, built where there is a compiler. Each family of its operators is a module of its
own, which registers them in the ``detpost`` namespace of PyTorch's operators: one node each under ``torch.compile``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from collections.abc import Callable
from ctypes import c_int, c_void_p
from pathlib import Path
from typing import Any

import torch

__all__ = ["function", "instructions", "missing", "register"]

_INTERFACE = 13


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Load the built library, or say why there is none."""
    suffixes = reversed(importlib.machinery.EXTENSION_SUFFIXES)  # the one without an interpreter's tag first
    found = [path for suffix in suffixes if (path := Path(__file__).with_name(f"_native{suffix}")).exists()]
    if not found:
        again = "reinstall detpost where there is a C++ compiler (a checkout: python setup.py build_ext --inplace)"
        return f"not built: {again}"
    try:
        library = ctypes.CDLL(str(found[0]))
        interface = int(library.detpost_interface())
    except (OSError, AttributeError) as error:
        return f"cannot be loaded: {error}"
    if interface != _INTERFACE:
        return f"built from another version of detpost (interface {interface}, wanted {_INTERFACE}): reinstall it"
    library.detpost_share_threads.argtypes, library.detpost_share_threads.restype = (c_void_p,), None
    shared = _openmp_parallel()
    if shared is not None:
        library.detpost_share_threads(shared)
    return library


def _raise_failure(outcome: int, function: Any, arguments: Any) -> None:
    """Make an exception of how a call ended: ``Outcome`` in common.h."""
    if outcome == 1:
        raise MemoryError(
            f"detpost's C++ kernels got no memory in {function.__name__}: give fewer images at a time, "
            f"or set DETPOST_KERNEL=aten"
        )
    if outcome:
        raise RuntimeError(
            f"{function.__name__} of detpost's C++ kernels failed: set DETPOST_KERNEL=aten and report it"
        )


def _openmp_parallel() -> ctypes.c_void_p | None:
    """Find the function by which PyTorch starts its threads, in the OpenMP library that it loaded.

    Where there is none to be found the kernels have threads of their own: the same answers, some milliseconds later.
    """
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps if ".so" in line}
    names = ("libgomp", "libomp", "libiomp5")
    of_openmp = [path for path in paths if Path(path).name.startswith(names)]
    beside_torch = str(Path(torch.__file__).parent)
    for path in sorted(of_openmp, key=lambda path: not path.startswith(beside_torch)):
        try:
            loaded = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None


def missing() -> str | None:
    """Say why the library cannot be used; ``None`` where it can."""
    library = _library()
    return library if isinstance(library, str) else None


def instructions() -> str:
    """Name the instructions that the loaded library uses on this processor.

    ``DETPOST_NATIVE=baseline`` or ``avx2``, set before the first use, keeps it below what the processor has.
    """
    return {0: "baseline instructions", 2: "AVX2", 3: "AVX-512"}[int(_loaded().detpost_level())]


@functools.cache
def function(name: str, *types: Any) -> Any:
    """Give a function of the library, which raises what went wrong in it.

    Args:
        name: its name in C.
        types: those of its arguments, of :mod:`ctypes`.

    Returns:
        The function.

    Raises:
        RuntimeError: there is no library.
    """
    found: Any = _loaded()[name]  # of its own: types given here are not those of another
    found.argtypes, found.restype, found.errcheck = types, c_int, _raise_failure
    return found


def _loaded() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"detpost's C++ kernels are {library}")
    return library


_OPERATORS: Any = torch.library.Library("detpost", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator of the ``detpost`` namespace for the CPU.

    Args:
        schema: its name and arguments, in PyTorch's words.
        kernel: what computes it.
        fake: what gives outputs of the right shapes to compilers and tracers.
    """
    name = _OPERATORS.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _OPERATORS.impl(name, kernel, "CPU")
    torch.library.register_fake(f"detpost::{name}", fake, lib=_OPERATORS)
