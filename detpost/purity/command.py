"""What `detpost check` does: the static half for paths, the dynamic half for `package.module:Callable`."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detpost.purity.report import PurityReport, sarif
from detpost.purity.static import check_paths

if TYPE_CHECKING:
    from torch import Tensor

CLEAN, FOUND, MISUSED = 0, 1, 2


class UsageError(Exception):
    """The command line asks for something that cannot be done; the message says what to write instead."""


def check(
    targets: Sequence[str],
    shape: Sequence[str] = (),
    dtype: Sequence[str] = (),
    output_format: str = "text",
    output: Path | None = None,
    gradcheck: bool = False,
    allow: Sequence[str] = (),
) -> int:
    """Check paths and callables, and write one report.

    Args:
        targets: files or folders (static half), or ``package.module:Callable`` (dynamic half); a class is called
            without arguments to make the object that is checked.
        shape: one shape for each input of a callable, such as ``"2,300,80"``.
        dtype: one dtype for each shape, or one for all; float32 by default.
        output_format: ``"text"``, ``"json"`` or ``"sarif"``.
        output: file to write to; the terminal by default.
        gradcheck: also compare gradients with finite differences.
        allow: rule codes to leave out.

    Returns:
        Exit status: 0 if there is no error, 1 if there is one, 2 for a target, shape or file that cannot be used.
        Warnings and notes count for nothing, as in ``report.ok``.
    """
    try:
        if output_format not in ("text", "json", "sarif"):
            raise UsageError(f"format {output_format!r} is not known; choose text, json or sarif")
        if not targets:
            raise UsageError("name a path, or package.module:Callable with --shape for each of its inputs")
        reports = _reports(targets, shape, dtype, gradcheck, allow)
        text = _written(reports, output_format)
        if output is None:
            print(text)
        else:
            output.write_text(text + "\n", encoding="utf-8")
    except UsageError as error:
        print(f"detpost check: {error}", file=sys.stderr)
        return MISUSED
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        where = f"{error.filename}:{error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else error
        print(f"detpost check: {where}", file=sys.stderr)
        return MISUSED
    return CLEAN if all(report.ok for report in reports) else FOUND


def _reports(
    targets: Sequence[str], shape: Sequence[str], dtype: Sequence[str], gradcheck: bool, allow: Sequence[str]
) -> list[PurityReport]:
    reports: list[PurityReport] = []
    for target in targets:
        if Path(target).exists():
            reports += check_paths([target])
        elif ":" in target and not target.endswith(".py"):
            reports.append(_dynamic(target, shape, dtype, gradcheck))
        else:
            raise UsageError(f"{target}: no such path; a callable is written package.module:Callable")
    return [report.without(allow) for report in reports]


def _dynamic(target: str, shape: Sequence[str], dtype: Sequence[str], gradcheck: bool) -> PurityReport:
    from detpost.purity.checker import check as check_callable

    if not shape:
        raise UsageError(f"{target}: give --shape once for each input, such as --shape 2,300,80 --shape 2,300,4")
    inputs = example_inputs(shape, dtype)
    report = check_callable(_resolved(target), *inputs, gradcheck=gradcheck)
    return PurityReport(target, report.findings, report.stages)


def _resolved(target: str) -> Any:
    module_name, _, path = target.partition(":")
    if "" not in sys.path:  # the console script does not look in the working directory, `python -m` does
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{target}: {error}") from error
    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:
            raise UsageError(
                f"{target}: calling the class without arguments raises {type(error).__name__}: {error}; "
                "name a function or an object instead"
            ) from error
    if not callable(found):
        raise UsageError(f"{target}: a {type(found).__name__} cannot be called")
    return found


def example_inputs(shapes: Sequence[str], dtypes: Sequence[str] = ()) -> list[Tensor]:
    """Make tensors of the shapes and dtypes written on a command line, the same at each call.

    Normal numbers for floating dtypes, 0 and 1 for the others. An empty shape makes a tensor without dimensions; one
    dtype stands for all shapes.

    Examples:
        >>> [(tuple(t.shape), t.dtype) for t in example_inputs(["2,3", "4"], ["float32", "int64"])]
        [((2, 3), torch.float32), ((4,), torch.int64)]
    """
    import torch

    names = list(dtypes) or ["float32"]
    names = names * len(shapes) if len(names) == 1 else names
    if len(names) != len(shapes):
        raise UsageError(f"{len(shapes)} shapes but {len(names)} dtypes; give one dtype, or one for each shape")
    generator = torch.Generator().manual_seed(0)
    made = []
    for text, name in zip(shapes, names, strict=True):
        try:
            sizes = [int(size) for size in text.replace("x", ",").split(",") if size.strip()]
        except ValueError as error:
            raise UsageError(f"shape {text!r} is not whole numbers separated by commas, such as 2,300,80") from error
        dtype = getattr(torch, name.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise UsageError(f"dtype {name!r} is not one of torch's, such as float32, float16 or int64")
        if dtype.is_floating_point or dtype.is_complex:
            made.append(torch.randn(sizes, generator=generator).to(dtype))
        else:
            made.append(torch.randint(0, 2, sizes, generator=generator).to(dtype))
    return made


def _written(reports: list[PurityReport], output_format: str) -> str:
    if output_format == "sarif":
        return sarif(reports)
    if output_format == "json":
        return json.dumps([report.to_dict() for report in reports], indent=2)
    dynamic = [str(report) for report in reports if report.stages]
    static = [report for report in reports if not report.stages]
    lines = [str(report) for report in static if not report.clean]
    if static:
        number = sum(len(report.findings) for report in static)
        files = f"{len(static)} file{'s' if len(static) != 1 else ''}"
        lines.append(f"{files} read, {number} finding{'s' if number != 1 else ''}")
    return "\n".join([*lines, *dynamic])
