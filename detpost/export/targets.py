"""The runners that ``detpost export MODEL --for RUNNER`` writes a folder for, as data. Imports nothing slow."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["TARGETS", "Target", "folder_name", "target_of"]


@dataclass(frozen=True)
class Target:
    """A runner.

    Args:
        name: what ``--for`` takes.
        writer: ``"module:function"`` that takes a model, a folder, a spec and options, and gives a
            :class:`detpost.export.WrittenFile`.
        takes: options of the runner's own that it takes.
        through_onnx: whether it takes the options of :func:`detpost.export.to_onnx`.
    """

    name: str
    writer: str
    takes: frozenset[str]
    through_onnx: bool

    def write(self) -> Callable[..., Any]:
        """Import the writer."""
        module, name = self.writer.split(":")
        function: Callable[..., Any] = getattr(import_module(module), name)
        return function

    def check(self, own: Mapping[str, Any], of_onnx: Mapping[str, Any]) -> None:
        """Refuse options that would do nothing.

        Args:
            own: options of runners that were given.
            of_onnx: options of :func:`detpost.export.to_onnx` that were given.

        Raises:
            ValueError: one that this runner does not take.
        """
        wrong = sorted(own.keys() - self.takes)
        if not self.through_onnx:
            wrong += sorted(of_onnx.keys() - {"image_size", "num_queries", "num_classes"})
        if wrong:
            raise ValueError(f"--for {self.name} takes no {', '.join(wrong)}: leave it out")


TARGETS = (
    Target(
        "triton",
        "detpost.export.triton_server:to_triton",
        frozenset({"name", "backend", "max_batch", "ensemble"}),
        through_onnx=True,
    ),
    Target("tensorrt", "detpost.export.tensorrt:to_tensorrt", frozenset({"max_batch"}), through_onnx=True),
    Target("executorch", "detpost.export.edge:to_executorch", frozenset({"split"}), through_onnx=False),
    Target("litert", "detpost.export.edge:to_litert", frozenset({"split"}), through_onnx=False),
    Target("coreml", "detpost.export.edge:to_coreml", frozenset({"split"}), through_onnx=False),
)


def target_of(name: str) -> Target:
    """Find a runner.

    Args:
        name: of an entry of ``TARGETS``.

    Returns:
        The entry.

    Raises:
        ValueError: there is none.

    Example:
        >>> target_of("triton").through_onnx
        True
    """
    found = next((target for target in TARGETS if target.name == name), None)
    if found is None:
        raise ValueError(f"--for must be one of {', '.join(target.name for target in TARGETS)}; got {name!r}")
    return found


def folder_name(model: Any) -> str:
    """Make a folder's name of a model's.

    Args:
        model: what was exported.

    Returns:
        Letters, digits, ``_``, ``-`` and ``.`` alone, a letter or digit first.

    Example:
        >>> folder_name("kornia:rtdetr_r18vd@best.safetensors"), folder_name("PekingU/rtdetr_r50vd")
        ('rtdetr_r18vd', 'rtdetr_r50vd')
    """
    if isinstance(model, (str, Path)):
        named = re.fullmatch(r"\w+:([^@]+)(@.*)?", str(model))
        plain = Path(named[1] if named else str(model)).resolve().name
    else:
        plain = type(model).__name__.lower()
    return re.sub(r"[^A-Za-z0-9_.-]", "_", plain).lstrip("._-").rstrip(".") or "detector"
