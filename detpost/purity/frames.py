"""Find the line of the caller's own code that an operator, or an error, comes from."""

from __future__ import annotations

import dis
import functools
import inspect
import linecache
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch

from detpost.purity.report import Finding
from detpost.purity.rules import Severity

# Positions of the in-place operators among BINARY_OP's arguments: the names that end in "=".
_INPLACE = frozenset(index for index, entry in enumerate(getattr(dis, "_nb_ops", ())) if entry[1].endswith("="))
_TORCH, _NUMPY, _HERE = (os.path.dirname(file) for file in (torch.__file__, np.__file__, __file__))
_FUNCTORCH = os.path.join(os.path.dirname(_TORCH), "functorch")
_LIBRARIES = tuple(os.path.realpath(root) + os.sep for root in (_TORCH, _FUNCTORCH, _NUMPY, _HERE))
_MACHINERY = ("_python_dispatch.py", "overrides.py", "_compile.py", "eval_frame.py", "_stats.py")
_STANDARD = os.path.realpath(sysconfig.get_paths()["stdlib"]) + os.sep


@dataclass(frozen=True)
class Site:
    """A place in the caller's code: file, line and text, and what the interpreter was executing there.

    The form is ``"augmented"`` (``x += y``), ``"subscript"`` (``x[...] = y``) or ``"call"``.
    """

    file: str | None = None
    line: int | None = None
    source: str = ""
    form: str = "call"


NOWHERE = Site()


@functools.lru_cache(maxsize=4096)
def is_library(file: str) -> bool:
    """Tell whether a file belongs to torch, NumPy, Python or this checker, so that its caller is to be named."""
    path = os.path.realpath(file)  # the cache pays for this call
    installed = "site-packages" in path or "dist-packages" in path
    return file.startswith("<frozen") or path.startswith(_LIBRARIES) or (path.startswith(_STANDARD) and not installed)


@functools.lru_cache(maxsize=4096)
def is_checker(file: str) -> bool:
    """Tell whether a file is part of this checker, or of the mode machinery that calls it."""
    path = os.path.realpath(file)
    return path.startswith(_LIBRARIES[-1]) or (path.startswith(_LIBRARIES[0]) and path.endswith(_MACHINERY))


def caller_frame(anchor: FrameType | None) -> tuple[FrameType | None, FrameType | None]:
    """Find the deepest frame of the caller's code below the anchor, and the deepest one that is not the checker's.

    The anchor is the frame of the checker that called the subject; frames above it are the checker's own caller.
    """
    frame: FrameType | None = sys._getframe(1)
    innermost: FrameType | None = None
    while frame is not None and frame is not anchor:
        file = frame.f_code.co_filename
        if innermost is None and not is_checker(file):
            innermost = frame
        if not is_library(file):
            return frame, innermost
        frame = frame.f_back
    return None, innermost


def site_of(frame: FrameType | None) -> Site:
    """Read the line and form of what a frame is executing."""
    if frame is None:
        return NOWHERE
    file, line = frame.f_code.co_filename, frame.f_lineno
    return Site(file, line, linecache.getline(file, line, frame.f_globals).strip(), _form(frame))


def _form(frame: FrameType) -> str:
    code, position = frame.f_code.co_code, frame.f_lasti
    if not 0 <= position < len(code) - 1:
        return "call"
    name = dis.opname[code[position]]
    if name == "BINARY_OP" and code[position + 1] in _INPLACE:
        return "augmented"
    return "subscript" if name in ("STORE_SUBSCR", "STORE_SLICE") else "call"


def deepest(stack: Iterable[traceback.FrameSummary] | None) -> Site:
    """Find the deepest line of the caller's code in a stack summary, outermost frame first."""
    for entry in reversed(list(stack or ())):
        if not is_library(entry.filename):
            return Site(entry.filename, entry.lineno, (entry.line or "").strip())
    return NOWHERE


def first_line(error: BaseException | str) -> str:
    """Cut an error message to its first line that says something, and that to a readable length."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    prefix = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return (prefix + said)[:300].rstrip()


def failure(rule: str, error: BaseException, severity: Severity = "error") -> Finding:
    """Make a finding of an exception, at the deepest line of the caller's code in its traceback."""
    site = deepest(traceback.extract_tb(error.__traceback__))
    return Finding(rule, severity, first_line(error), site.file, site.line, site.source)


def definition(subject: Any, stores: str = "") -> Site:
    """Find where a function, or a module's ``forward``, is defined, or the line in it that assigns an attribute."""
    function = inspect.unwrap(getattr(subject, "forward", subject))
    code = getattr(function, "__code__", None)
    if code is None:  # not written in Python
        return NOWHERE
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code) if stores else ():
        if instruction.opname == "STORE_ATTR" and instruction.argval == stores and instruction.positions is not None:
            line = instruction.positions.lineno or line
            break
    return Site(code.co_filename, line, linecache.getline(code.co_filename, line).strip())
