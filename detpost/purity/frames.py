"""Finds the line of the caller's own code that an operator, or an error, comes from."""

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

# Positions of the in-place operators among BINARY_OP's arguments: the names that end in "=".
_INPLACE = frozenset(index for index, entry in enumerate(getattr(dis, "_nb_ops", ())) if entry[1].endswith("="))

_LIBRARIES = tuple(
    os.path.realpath(root) + os.sep
    for root in (
        os.path.dirname(torch.__file__),
        os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), "functorch"),
        os.path.dirname(np.__file__),
        os.path.dirname(__file__),
    )
)
_MACHINERY = ("_python_dispatch.py", "overrides.py", "_compile.py", "eval_frame.py", "_stats.py")
_STANDARD = os.path.realpath(sysconfig.get_paths()["stdlib"]) + os.sep


@dataclass(frozen=True)
class Site:
    """A place in the caller's code.

    Attributes:
        file: source file, or None when no line of the caller is on the stack.
        line: its line.
        source: text of that line.
        form: what the interpreter was executing there: ``"augmented"`` (``x += y``), ``"subscript"``
            (``x[...] = y``) or ``"call"``.
    """

    file: str | None
    line: int | None
    source: str
    form: str


NOWHERE = Site(None, None, "", "call")


@functools.lru_cache(maxsize=4096)
def is_library(file: str) -> bool:
    """Whether a file belongs to torch, NumPy, Python itself or this checker, so that its caller is to be named.

    Args:
        file: file name as a code object carries it.

    Returns:
        True for library code.
    """
    if file.startswith("<frozen"):
        return True
    path = os.path.realpath(file)  # the cache pays for this call
    if path.startswith(_LIBRARIES):
        return True
    return path.startswith(_STANDARD) and "site-packages" not in path and "dist-packages" not in path


@functools.lru_cache(maxsize=4096)
def is_checker(file: str) -> bool:
    """Whether a file is part of this checker, or of the mode machinery that calls it."""
    path = os.path.realpath(file)
    return path.startswith(_LIBRARIES[-1]) or (path.startswith(_LIBRARIES[0]) and path.endswith(_MACHINERY))


def caller_frame(anchor: FrameType | None) -> tuple[FrameType | None, str]:
    """The deepest frame of the caller's code below the anchor, and the file of the deepest frame of library code.

    Args:
        anchor: frame of the checker that called the subject; frames above it are the checker's own caller.

    Returns:
        The frame, or None if only library code is on the stack, and the file of the innermost frame that is not the
        checker's own.
    """
    frame: FrameType | None = sys._getframe(1)
    innermost = ""
    while frame is not None and frame is not anchor:
        file = frame.f_code.co_filename
        if not innermost and not is_checker(file):
            innermost = file
        if not is_library(file):
            return frame, innermost
        frame = frame.f_back
    return None, innermost


def site_of(frame: FrameType | None) -> Site:
    """Line and form of what a frame is executing.

    Args:
        frame: a frame, or None.

    Returns:
        The site; ``NOWHERE`` for None.
    """
    if frame is None:
        return NOWHERE
    file, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(file, line, frame.f_globals).strip()
    return Site(file, line, text, _form(frame))


def _form(frame: FrameType) -> str:
    code, position = frame.f_code.co_code, frame.f_lasti
    if not 0 <= position < len(code) - 1:
        return "call"
    name = dis.opname[code[position]]
    if name == "BINARY_OP" and code[position + 1] in _INPLACE:
        return "augmented"
    return "subscript" if name in ("STORE_SUBSCR", "STORE_SLICE") else "call"


def error_site(error: BaseException) -> Site:
    """The deepest line of the caller's code in an exception's traceback.

    Args:
        error: an exception that was caught.

    Returns:
        Its site; ``NOWHERE`` when the error comes from library code alone.
    """
    return deepest(traceback.extract_tb(error.__traceback__))


def deepest(stack: Iterable[traceback.FrameSummary] | None) -> Site:
    """The deepest line of the caller's code in a stack summary, outermost frame first.

    Args:
        stack: what ``traceback`` or Dynamo gives.

    Returns:
        The site; ``NOWHERE`` when there is none.
    """
    for entry in reversed(list(stack or ())):
        if not is_library(entry.filename):
            return Site(entry.filename, entry.lineno, (entry.line or "").strip(), "call")
    return NOWHERE


def definition(subject: Any, stores: str = "") -> Site:
    """Where a function, or a module's ``forward``, is defined.

    Args:
        subject: function, method, module or other callable.
        stores: an attribute name; the line of the definition that assigns it is taken, if there is one.

    Returns:
        The site; ``NOWHERE`` for what is not written in Python.
    """
    function = inspect.unwrap(getattr(subject, "forward", subject))
    code = getattr(function, "__code__", None)
    if code is None:
        return NOWHERE
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code) if stores else ():
        if instruction.opname == "STORE_ATTR" and instruction.argval == stores and instruction.positions is not None:
            line = instruction.positions.lineno or line
            break
    return Site(code.co_filename, line, linecache.getline(code.co_filename, line).strip(), "call")
