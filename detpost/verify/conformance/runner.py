"""Someone else's decode: a command, or a Python function, from raw outputs to arrays."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detpost.verify.conformance.cases import Array, Case

__all__ = ["Answer", "Runner", "RunnerError", "function_runner", "open_runner"]

PARTS = ("labels", "boxes", "scores", "valid")
SECONDS = 300  # for one case


class RunnerError(Exception):
    """A runner that gave no answer to a case, and why, in one line."""


@dataclass(frozen=True)
class Answer:
    """What a decode gave.

    Args:
        labels: (B, K), int64.
        boxes: (B, K, 4), float64.
        scores: (B, K), float64.
        valid: (B, K), bool.
        queries: (B, K), int64, or ``None`` where the runner does not say.
    """

    labels: Array
    boxes: Array
    scores: Array
    valid: Array
    queries: Array | None = None


Runner = Callable[[Case], Answer]


def open_runner(name: str) -> Runner:
    """Give what answers a case.

    Args:
        name: a command line, called as ``COMMAND in.npz out.npz``, or ``module:function``. The function takes one
            mapping with the names of ``in.npz``, or an argument for each of them, or the two paths; it gives a mapping
            with the names of ``out.npz`` or its arrays in their order.

    Returns:
        The runner; it raises :class:`RunnerError` where there is no answer.

    Raises:
        ValueError: an empty name, or a command that is not there.
        ImportError: a module or a function that is not there, or a module that cannot be imported.

    Example:
        >>> open_runner("no_such_module:decode")
        Traceback (most recent call last):
        ImportError: no module no_such_module for the runner no_such_module:decode: is its folder the current one?
    """
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name):
        return function_runner(_import(name))
    words = shlex.split(name)
    if not words:
        raise ValueError("a runner must be a command or module:function; got an empty text")
    return lambda case: _by_files(case, lambda given, made: _run_command([*words, str(given), str(made)]))


def _import(name: str) -> Callable[..., Any]:
    module_name, attribute = name.split(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as python -m has it
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise _not_importable(module_name, error) from error  # a module that the runner's own imports miss
        raise ImportError(f"no module {module_name} for the runner {name}: is its folder the current one?") from None
    except (Exception, SystemExit) as error:  # whatever the module does as it is imported
        raise _not_importable(module_name, error) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ImportError(f"the module {module_name} has no {attribute}, which the runner {name} names")
        found = getattr(found, part)
    if not callable(found):
        raise ImportError(f"the runner {name} must be a function; it is a {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _not_importable(module_name: str, error: BaseException) -> ImportError:
    why = _one_line(_what_it_raised(error))
    return ImportError(f"the module {module_name} cannot be imported, mend that first: {why}")


def _what_it_raised(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it called sys.exit({'' if error.code is None else repr(error.code)})"
    return f"{type(error).__name__}: {error}"


def function_runner(function: Callable[..., Any]) -> Runner:
    """Give the runner that a Python function is; see :func:`open_runner` for what it takes."""

    def answer(case: Case) -> Answer:
        try:
            given = case.inputs()
            given = {**given, "spec": _Text(given["spec"])}
            takes = _parameters(function)
            if len(takes) == 2 and not set(takes) & set(given):
                return _by_files(case, lambda path, made: function(str(path), str(made)))
            if set(takes) >= set(given) or "**" in takes:
                found = function(**given)
            else:
                found = function(given) if len(takes) == 1 else function(*given.values())
        except RunnerError:
            raise
        except (Exception, SystemExit) as error:  # an exit would end the run without its report
            raise RunnerError(_one_line(_what_it_raised(error))) from error
        return _read_answer(found, case)

    return answer


class _Text(str):
    """A text that reads like the array of one text that ``numpy.load`` gives, too."""

    def item(self) -> str:
        """Give the text."""
        return str(self)


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Name what a function must be given; ``**`` where it takes any name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return [""]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return ["**"]
    return [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]


def _by_files(case: Case, run: Callable[[Path, Path], Any]) -> Answer:
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "in.npz"), Path(folder, "out.npz")
        np.savez(given, **case.inputs())
        run(given, made)
        if not made.is_file():
            raise RunnerError("it wrote no out.npz")
        try:
            with np.load(made, allow_pickle=False) as found:
                return _read_answer(dict(found), case)
        except (ValueError, OSError, EOFError) as error:
            raise RunnerError(_one_line(f"its out.npz cannot be read: {error}")) from None


def _run_command(words: list[str]) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError:
        raise ValueError(f"no command {words[0]!r} for the runner: name a program, or module:function") from None
    except PermissionError:
        raise ValueError(f"{words[0]!r} cannot be run: make it executable, or put its interpreter before it") from None
    except subprocess.TimeoutExpired:
        raise RunnerError(f"no answer after {SECONDS} s") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
        raise RunnerError(_one_line(f"exit status {done.returncode}: {said}"))


def _read_answer(found: Any, case: Case) -> Answer:
    """Read the arrays, whatever holds them."""
    if isinstance(found, (tuple, list)) and not hasattr(found, "_fields") and len(found) == len(PARTS):
        found = dict(zip(PARTS, found, strict=True))
    if hasattr(found, "_asdict"):
        found = found._asdict()
    if not isinstance(found, Mapping):
        raise RunnerError(f"it must give {', '.join(PARTS)}; it gave a {type(found).__name__}")
    missing = [part for part in PARTS if part not in found]
    if missing:
        raise RunnerError(f"no {missing[0]} in its answer, which has {', '.join(map(str, found)) or 'nothing'}")
    arrays = {part: _numbers(part, found[part]) for part in PARTS}
    if found.get("queries") is not None:
        arrays["queries"] = _numbers("queries", found["queries"])
    labels, batch = arrays["labels"], len(case.logits)
    slots = labels.shape[1] if labels.ndim == 2 else None  # without a batch dimension there is no K to go by
    for part, value in arrays.items():
        if value.shape != ((batch, slots, 4) if part == "boxes" else (batch, slots)):
            expected = "(B, K, 4)" if part == "boxes" else "(B, K)"
            raise RunnerError(f"its {part} must have shape {expected}, B = {batch}; they have {value.shape}")
    return Answer(**arrays)


def _numbers(part: str, value: Any) -> Array:
    try:
        numbers = np.asarray(value).astype(np.float64)  # labels too: some give them as floats
    except (TypeError, ValueError) as error:
        raise RunnerError(_one_line(f"its {part} are no numbers: {error}")) from None
    if part in ("boxes", "scores"):
        return numbers
    return numbers != 0 if part == "valid" else np.nan_to_num(numbers, nan=-1, posinf=-1, neginf=-1).astype(np.int64)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
