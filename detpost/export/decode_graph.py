"""The post-processor as an ONNX graph of its own, which every ONNX export ends in."""

from __future__ import annotations

import contextlib
import functools
import io as io_module
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from detpost.detections import Detections
from detpost.postprocess import DetectionPostProcessor
from detpost.selection import group_maxima, select_portable
from detpost.spec import DecodeSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["IoNames", "Ties", "decode_graph", "export_torchscript", "import_onnx", "io_inputs", "io_outputs"]

IoNames = Literal["detpost", "rtdetr", "efficientnms"]
Ties = Literal["exact", "runtime"]

OLDEST_OPSET = 11  # TopK on integers and CumSum came with it
NEWEST_TORCHSCRIPT_OPSET = 20

# From here on the branch saves more than it costs: 219 classes on 300 queries. Narrower graphs stay free of branches.
_BRANCH_FROM_WIDTH = 2**16

_SIZES_INPUT = {"detpost": "image_sizes", "rtdetr": "orig_target_sizes", "efficientnms": "image_sizes"}
_OUTPUTS = {
    "detpost": ("labels", "boxes", "scores", "valid"),
    "rtdetr": ("labels", "boxes", "scores"),
    "efficientnms": ("num_dets", "det_boxes", "det_scores", "det_classes"),
}


def io_inputs(io: IoNames) -> str:
    """Give the name of the image-size input."""
    return _SIZES_INPUT[io]


def io_outputs(io: IoNames, queries: bool) -> tuple[str, ...]:
    """Give the names of the outputs, in order."""
    return (*_OUTPUTS[io], *(("queries",) if queries else ()))


class RuntimeTies(DetectionPostProcessor):
    """The same decode with equal scores left to the runtime's TopK."""

    @staticmethod
    def select_top_k(scores: Tensor, k: int) -> Tensor:
        return scores.topk(min(k, scores.shape[1]), dim=1).indices


class _ExactTies(DetectionPostProcessor):
    """The exact decode as it is exported: with a short way through wide rows that hold no NaN."""

    @staticmethod
    def select_top_k(scores: Tensor, k: int) -> Tensor:
        wide = scores.shape[1] >= _BRANCH_FROM_WIDTH and scores.dtype != torch.float64
        return select_portable(scores, k, _branching_group_maxima if wide else group_maxima)


def _branching_group_maxima(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    if values.shape[1] % size:
        return group_maxima(values, size)  # a row with padding has NaN
    found: tuple[Tensor, Tensor] = _scripted_group_maxima()(values, size)
    return found


@functools.cache
def _scripted_group_maxima() -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """:func:`group_maxima` as a TorchScript function, of which the exporter makes an ``If`` node.

    Taking NaN out of a row costs a runtime more than all the rest: ONNX Runtime's ``Where`` alone takes as long as a
    TopK. Only a look at the data tells that there is none, and both ways give tensors of one shape.
    """

    def maxima(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
        # A sum is NaN if a term is; where it is NaN for another reason (inf - inf), the long way is right too.
        groups = values.shape[1] // size
        if bool(values.sum().isnan()):
            is_nan = values.isnan()
            grouped = torch.where(is_nan, float("-inf"), values).reshape(-1, groups, size)
            only_nan = is_nan.to(torch.float32).reshape(-1, groups, size).amin(2)
            result = grouped.amax(2), only_nan
        else:
            greatest = values.reshape(-1, groups, size).amax(2)
            result = greatest, torch.zeros_like(greatest)
        return result[0], result[1] > 0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, like the exporter that reads it
        return torch.jit.script(maxima)


class _WithIo(nn.Module):
    """A post-processor under the names and conventions of an existing kind of runner."""

    def __init__(self, post: DetectionPostProcessor, io: IoNames, queries: bool) -> None:
        super().__init__()
        self.post = post
        self.io = io
        self.queries = queries

    def forward(self, logits: Tensor, boxes: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        # RT-DETR's runners give (width, height).
        found: Detections = self.post(logits, boxes, sizes.flip(1) if self.io == "rtdetr" else sizes)
        kept: tuple[Tensor, ...]
        if self.io == "efficientnms":
            count = found.valid.to(torch.int32).sum(dim=1, keepdim=True).to(torch.int32)
            kept = (count, found.boxes, found.scores, found.labels.to(torch.int32))
        else:
            kept = (found.labels, found.boxes, found.scores, found.valid)[: len(_OUTPUTS[self.io])]
        return (*kept, found.queries) if self.queries else kept


def decode_graph(
    spec: DecodeSpec,
    num_queries: int,
    num_classes: int,
    *,
    opset: int,
    io: IoNames = "detpost",
    ties: Ties = "exact",
    queries: bool = False,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    dynamic_batch: bool = True,
) -> onnx.ModelProto:
    """Build the graph ``pred_logits`` (B, Q, C), ``pred_boxes`` (B, Q, 4), sizes (B, 2) -> detections.

    Args:
        spec: what the decode does.
        num_queries: Q.
        num_classes: C.
        opset: wanted version of the default operator set, 11 or later.
        io: names of inputs and outputs.
        ties: whether the graph resolves equal scores itself.
        queries: whether ``queries`` is an output.
        dtypes: of logits and boxes as they come.
        dynamic_batch: whether B is free; else 1.

    Returns:
        The checked model.
    """
    onnx = import_onnx()
    kind = _ExactTies if ties == "exact" else RuntimeTies
    module = _WithIo(kind(spec), io, queries).eval()
    batch = 2 if dynamic_batch else 1  # a batch of 1 would be traced as a constant and broadcast silently
    example = (
        torch.zeros(batch, num_queries, num_classes, dtype=dtypes[0]),
        torch.zeros(batch, num_queries, 4, dtype=dtypes[1]),
        torch.ones(batch, 2, dtype=torch.int64),
    )
    inputs = ("pred_logits", "pred_boxes", io_inputs(io))
    outputs = io_outputs(io, queries)
    dynamic = {name: {0: "batch"} for name in (*inputs, *outputs)} if dynamic_batch else {}
    traced = min(opset, NEWEST_TORCHSCRIPT_OPSET)
    model = export_torchscript(module, example, inputs, outputs, dynamic, traced)
    if traced != opset:
        model = onnx.version_converter.convert_version(model, opset)
    onnx.checker.check_model(model, full_check=True)
    return model


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
    buffer = io_module.BytesIO()
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


def import_onnx() -> Any:
    """Import onnx with the submodules used here, or say which extra to install."""
    try:
        import onnx
        import onnx.checker
        import onnx.compose
        import onnx.helper
        import onnx.inliner
        import onnx.shape_inference
        import onnx.version_converter
    except ImportError:
        raise ImportError("ONNX export needs onnx: pip install 'detpost[onnx]'") from None
    return onnx
