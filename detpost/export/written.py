"""What an export wrote, whatever the format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["WrittenFile"]


@dataclass(frozen=True)
class WrittenFile:
    """What :func:`to_onnx`, :func:`attach`, :func:`to_openvino` and :func:`package` wrote.

    Args:
        path: the file.
        format: a name of ``detpost.export.formats.FORMATS``.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        notes: what the caller should know: outputs taken, values renamed, an exporter that was passed over and why.
        opset: of ``.onnx`` files, the version of the default operator set.
        exporter: what made the network's part of an ``.onnx`` file: ``"dynamo"``, ``"torchscript"``, or ``"none"``
            where there was none.
        weights: of ``.xml`` files, the ``.bin`` file beside it; the two belong together.
        kind: of ``.pt2`` files, ``"aot"`` or ``"export"``.
        device: of ``.pt2`` files, the type of device an ``"aot"`` one runs on; an ``"export"`` one can be moved.
        beside: other files that were written for the runner, such as its configuration.
    """

    path: Path
    format: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    notes: tuple[str, ...] = ()
    opset: int | None = None
    exporter: str = "none"
    weights: Path | None = None
    kind: str | None = None
    device: str | None = None
    beside: tuple[Path, ...] = ()
