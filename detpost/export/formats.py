"""The file formats as data: which ending is which, who writes and opens it, which extra that needs.

A new format is a row of ``FORMATS``, a function that writes it and one that opens it. Nothing slow is imported here:
the command looks a file's ending up before anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["ENDINGS", "FORMATS", "Format", "format_of", "has_ending"]


@dataclass(frozen=True)
class Format:
    """A kind of file that holds a detector, or a post-processor alone.

    Args:
        name: of the format.
        ending: of its files, of one part or more; where two fit a name, the longer one counts.
        runtime: what runs them, in words.
        writer: ``"module:function"`` that takes a model, a path, a spec and options, and gives a
            :class:`detpost.export.WrittenFile`.
        opener: ``"module:function"`` that takes a path and a device and gives a
            :class:`detpost.export.opened.OpenedFile`.
        extra: of detpost that has what it needs; empty where torch is enough.
        takes_no: options of :func:`detpost.export.to_onnx` that the writer does not take; ``heads`` stands for those of
            each kind, too.
        beside: names of files that may belong with one of this format, of its ``{name}`` or ``{stem}``.
    """

    name: str
    ending: str
    runtime: str
    writer: str
    opener: str
    extra: str = ""
    takes_no: frozenset[str] = frozenset()
    beside: tuple[str, ...] = ()

    def write(self) -> Callable[..., Any]:
        """Import the writer."""
        return _imported(self.writer)

    def open(self) -> Callable[..., Any]:
        """Import the opener."""
        return _imported(self.opener)

    def files_beside(self, path: Path) -> list[Path]:
        """List the files that belong with one of this format, of those that are there."""
        stem = path.name.removesuffix(self.ending)
        named = [path.with_name(each.format(name=path.name, stem=stem)) for each in self.beside]
        return [file for file in named if file.is_file()]


_WEIGHTS = ("{name}.data", "{name}_data")  # as ONNX exporters call external weights

FORMATS = (
    Format(
        "onnx",
        ".onnx",
        "ONNX Runtime",
        "detpost.export.onnx:to_onnx",
        "detpost.export.opened:open_onnx",
        "onnx",
        beside=_WEIGHTS,
    ),
    Format(
        "openvino",
        ".xml",
        "OpenVINO",
        "detpost.export.openvino:to_openvino",
        "detpost.export.opened:open_ir",
        "openvino",
        beside=("{stem}.bin",),
    ),
    Format(
        "package",
        ".pt2",
        "AOTInductor",
        "detpost.export.packaged:write_package",
        "detpost.export.opened:open_pt2",
        takes_no=frozenset(
            {"dynamic_batch", "dynamic_size", "io", "ties", "queries", "keep_raw", "preprocess_inside", "resize"}
            | {"opset", "exporter", "heads"}
        ),
    ),
)

ENDINGS = tuple(entry.ending for entry in FORMATS)


def format_of(path: str | Path) -> Format:
    """Find the format of a file by its ending.

    Args:
        path: the file, there or not.

    Returns:
        The format.

    Raises:
        ValueError: no format has that ending.

    Example:
        >>> format_of("detector.xml").name
        'openvino'
    """
    name = Path(path).name
    fitting = [entry for entry in FORMATS if len(name) > len(entry.ending) and name.endswith(entry.ending)]
    if not fitting:
        raise ValueError(f"a file must end in {', '.join(ENDINGS)}, which says its format; got {name!r}")
    return max(fitting, key=lambda entry: len(entry.ending))


def has_ending(path: str | Path) -> bool:
    """Tell whether a path ends as a format's files do.

    Args:
        path: the file, there or not.

    Returns:
        Whether :func:`format_of` knows it.
    """
    try:
        format_of(path)
    except ValueError:
        return False
    return True


def _imported(place: str) -> Callable[..., Any]:
    module, name = place.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
