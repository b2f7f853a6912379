"""PyTorch's own ONNX exporters, kept quiet: for networks. The decode is written, not traced."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from detpost.export.graph import import_onnx

if TYPE_CHECKING:
    import onnx

__all__ = ["NEWEST_TORCHSCRIPT_OPSET", "export_dynamo", "export_torchscript", "quiet_exporter"]

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


def export_dynamo(
    module: nn.Module, example: Tensor, images: str, outputs: tuple[str, ...], free: dict[int, str], opset: int
) -> onnx.ModelProto:
    """Export a module of images to ONNX in memory by ``torch.export``.

    Traced by running it first; where Python code of the model ties the graph to the batch size of the example, as in
    transformers' RT-DETRs, as ``torch.compile`` traces, which takes three times as long.
    """
    shapes = ({axis: torch.export.Dim(name, min=1) for axis, name in free.items()},) if free else None
    failure: Exception | None = None
    for strict in (False, True):
        try:
            with quiet_exporter(), torch.no_grad():
                traced = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=strict)
                program = torch.onnx.export(
                    traced,
                    input_names=[images],
                    output_names=list(outputs),
                    opset_version=max(opset, 18),
                    dynamo=True,
                    verbose=False,
                    custom_translation_table=_translations(),
                )
        except Exception as error:  # it may fail with anything, and the other way of tracing may not
            failure = failure or error
            continue
        if program is not None:
            return program.model_proto
    raise failure or ValueError("no program came back")


def _translations() -> dict[Any, Any]:
    """Give ONNX functions for operators of PyTorch that its exporter has none for."""
    from onnxscript import opset18 as op

    def is_all_true(self: Any) -> Any:
        """Translate a check of RT-DETRv2's shapes, which a free batch size leaves in the graph."""
        return op.Cast(op.ReduceMin(op.Cast(self, to=_INT32), keepdims=0), to=_BOOL)

    return {torch.ops.aten._is_all_true.default: is_all_true}


_INT32, _BOOL = 6, 9  # ONNX's numbers of dtypes


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporters' warnings and log lines off the terminal: what matters is checked afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "torch.fx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), _no_log_of_graphs():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _no_log_of_graphs() -> Iterator[None]:
    """Keep the older exporter from switching its log on, which prints a whole graph where an operator is missing."""
    switch = getattr(torch._C, "_jit_set_onnx_log_enabled", None)
    if switch is None:
        yield
        return
    torch._C._jit_set_onnx_log_enabled = lambda enabled: None
    try:
        yield
    finally:
        torch._C._jit_set_onnx_log_enabled = switch
