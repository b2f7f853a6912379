"""PyTorch's own ONNX exporters, kept quiet: for networks. The decode is written, not traced."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from detpost.export.graph import import_onnx

if TYPE_CHECKING:
    import onnx

__all__ = ["NEWEST_TORCHSCRIPT_OPSET", "export_torchscript", "quiet_exporter"]

NEWEST_TORCHSCRIPT_OPSET = 20


def export_torchscript(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    dynamic: dict[str, dict[int, str]],
    opset: int,
) -> onnx.ModelProto:
    """Trace a module to ONNX in memory, without the exporter's warnings."""
    onnx = import_onnx()
    buffer = io.BytesIO()
    with quiet_exporter(), torch.no_grad():
        torch.onnx.export(
            module,
            example,
            buffer,  # type: ignore[arg-type]  # the older exporter takes a file object too
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=dynamic,
            opset_version=opset,
            dynamo=False,
        )
    return onnx.load_model_from_string(buffer.getvalue())


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporters' warnings and log lines off the terminal: what matters is checked afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "torch.fx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
