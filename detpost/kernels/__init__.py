"""What is written for speed, and the choice between its forms.

Every form gives what the plain PyTorch form gives: the same indices to the bit, the same losses and gradients to 1e-5.
The environment variable ``DETPOST_KERNEL`` forces one:

- ``native``: the C++ kernels, on the CPU. The default there, where they were built.
- ``numpy``: NumPy, for the decode on the CPU. The default there otherwise.
- ``triton``: the Triton kernels. The default on CUDA, where a trial of what is about to run agrees with PyTorch's own
  operators; on the CPU under ``TRITON_INTERPRET=1`` alone, for tests.
- ``aten``: PyTorch's own operators, everywhere.

Whatever a form does not take (float64, gradients through the decode, another device) goes the plain way, and so does
everything that is exported.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.kernels.cpu import decode as native_decode
from detpost.kernels.cpu import fusion as native_fusion
from detpost.kernels.cpu import library, numpy_decode
from detpost.kernels.cpu import nms as native_nms
from detpost.kernels.cpu import selection as native_selection
from detpost.reference import fusion as reference_fusion
from detpost.reference import nms as reference_nms
from detpost.reference.derivatives import wants_derivative
from detpost.spec import DecodeSpec

__all__ = [
    "KERNELS",
    "decode",
    "for_losses",
    "fuse",
    "is_exporting",
    "kind_for",
    "merge",
    "nms",
    "select",
    "suppress",
    "wants_other_derivatives",
]

KERNELS = ("native", "numpy", "triton", "aten")
_VARIABLE = "DETPOST_KERNEL"


def kind_for(device: str) -> str:
    """Give the form that serves a type of device.

    Args:
        device: ``"cpu"``, ``"cuda"`` or another type of device.

    Returns:
        One of ``KERNELS``; ``triton`` serves where its trial passes.

    Raises:
        ValueError: ``DETPOST_KERNEL`` holds something else.
        RuntimeError: the form that it forces is not there.
    """
    return _kind_for(os.environ.get(_VARIABLE, ""), device)


@functools.cache
def _kind_for(forced: str, device: str) -> str:
    if forced and forced not in KERNELS:
        raise ValueError(f"{_VARIABLE} must be one of {', '.join(KERNELS)}; got {forced!r}")
    if forced == "native" and (reason := library.missing()) is not None:
        raise RuntimeError(f"{_VARIABLE}=native, but detpost's C++ kernels are {reason}")
    if forced == "triton" and importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"{_VARIABLE}=triton, but Triton is not installed: pip install triton")
    if device == "cpu":
        if forced == "triton":
            return "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "aten"
        return forced or ("native" if library.missing() is None else "numpy")
    if device == "cuda" and forced == "":
        return "triton" if importlib.util.find_spec("triton") is not None else "aten"
    return "triton" if device == "cuda" and forced == "triton" else "aten"


# What was tried of the Triton kernels in this process, and whether it was found right.
_TRIED: dict[tuple[Any, ...], bool] = {}


def _passes_trial(device: str, trial: str, *arguments: Any) -> bool:
    """Whether the Triton kernels agree with PyTorch on what ``trial`` tries: once in a process."""
    key = (device, trial, *arguments)
    if key not in _TRIED:
        from torch.utils._python_dispatch import _disable_current_modes

        from detpost.kernels.triton import trial as triton_trial

        with _disable_current_modes():  # real tensors, whatever the caller traces
            reason = getattr(triton_trial, trial)(device, *arguments)
        if reason is not None:
            warnings.warn(f"detpost computes without its Triton kernels: {reason}", stacklevel=2)
        _TRIED[key] = reason is None
    return _TRIED[key]


def _triton_serves(device: torch.device, trial: str, *arguments: Any) -> bool:
    """Whether a Triton kernel may run here: tried on what it is about to run on, or forced."""
    if torch.compiler.is_compiling():
        constant: bool = _constant_triton_serves(device.type, trial, *arguments)
        return constant
    if os.environ.get(_VARIABLE) == "triton":
        return True
    if (
        device.type == "cuda"
        and torch.cuda.is_current_stream_capturing()
        and (device.type, trial, *arguments) not in _TRIED
    ):
        return False  # while a CUDA graph is captured nothing can be tried
    return _passes_trial(device.type, trial, *arguments)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_triton_serves(device: str, trial: str, *arguments: Any) -> bool:
    return os.environ.get(_VARIABLE) == "triton" or _passes_trial(device, trial, *arguments)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_kind_for(device: str) -> str:
    return kind_for(device)


def _kind_of(device: torch.device) -> str:
    """Give the form for tensors on a device, as seen from where it is asked."""
    if torch.compiler.is_compiling():  # looked up once, without following the environment and the file system
        constant: str = _constant_kind_for(device.type)
        return constant
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return "aten"  # Triton launches on the current GPU
    return kind_for(device.type)


def is_exporting() -> bool:
    """Whether ``torch.export`` is at work.

    By the flag: ``torch.compiler.is_exporting()`` is always true inside ``torch.compile`` of PyTorch 2.11.
    """
    return bool(torch.compiler._is_exporting_flag)


def _writes_a_graph() -> bool:
    """Whether a graph is being recorded for another runtime, which has plain operators only."""
    if torch.compiler.is_compiling():  # asked first: not every Dynamo can follow the question below
        return is_exporting()
    return torch._C._is_tracing()  # TorchScript, and the older ONNX exporter


def _is_transformed() -> bool:
    """Whether a functorch transform (vmap, grad) is active: it looks into plain operators only."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def wants_other_derivatives() -> bool:
    """Whether derivatives are taken that an autograd function of ours does not give: by ``torch.func``, or forwards.

    Inside ``torch.compile`` too, where tangents would be lost without a word.
    """
    if torch.compiler.is_compiling():
        constant: bool = _constant_is_in_functorch()
        return constant
    # An enclosing dual level is enough: operators may make a tangent out of any other tensor.
    return _is_transformed() or torch.autograd.forward_ad._current_level >= 0


# Dynamo cannot follow the question; it compiles anew for another answer.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_is_in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _is_observed(first: Tensor, second: Tensor | None = None, third: Tensor | None = None) -> bool:
    """Whether someone watches the operators that run: a tracer, a checker, a tensor of another kind."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(first) is not Tensor
        or (second is not None and type(second) is not Tensor)
        or (third is not None and type(third) is not Tensor)
    )


def select(scores: Tensor, k: int) -> Tensor | None:
    """Select by the form that serves the scores' device.

    Args:
        scores: (B, N), floating.
        k: how many to keep, at least 1.

    Returns:
        (B, min(k, N)), int64, or ``None`` where the plain form has to.
    """
    if scores.dtype == torch.float64 or _writes_a_graph() or _is_transformed():
        return None
    kind = _kind_of(scores.device)
    if kind == "native":
        return native_selection.select(scores, k) if native_selection.takes_scores(scores.dtype) else None
    if kind == "numpy" and not _is_observed(scores):
        return numpy_decode.select(scores, k) if numpy_decode.takes_scores(scores.dtype) else None
    if kind == "triton":
        from detpost.kernels.triton import select as by_triton

        if not by_triton.supported(scores, k):
            return None
        serves = _triton_serves(scores.device, "selection", scores.dtype, min(k, scores.shape[1]))
        return by_triton.select(scores, k) if serves else None
    return None


def decode(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Detections | None:
    """Decode in one step, where no gradient is wanted and a form takes what came.

    Args:
        logits: (B, Q, C), floating, checked.
        boxes: (B, Q, 4), floating, checked.
        image_sizes: (B, 2), checked, or ``None``.
        spec: what the decode does.

    Returns:
        The detections, or ``None`` where the plain form has to.
    """
    if logits.dtype == torch.float64 or boxes.dtype == torch.float64:
        return None
    if wants_derivative(logits, boxes, image_sizes) or _writes_a_graph():
        return None
    kind = _kind_of(logits.device)
    if kind == "native":
        if not native_selection.takes_scores(logits.dtype):
            return None
        observed = _is_observed(logits, boxes, image_sizes)
        run = native_decode.decode_as_operator if observed else native_decode.decode
        return run(logits, boxes, image_sizes, spec)
    if kind == "numpy" and not _is_observed(logits, boxes, image_sizes):
        takes = numpy_decode.takes_spec(spec) and numpy_decode.takes_scores(logits.dtype)
        return numpy_decode.decode(logits, boxes, image_sizes, spec) if takes else None
    if kind == "triton":
        from detpost.kernels.triton import decode as by_triton

        if not by_triton.supported(logits, boxes, image_sizes, spec):
            return None
        sizes = None if image_sizes is None else image_sizes.dtype
        candidates = logits.shape[1] * (logits.shape[2] if spec.selection == "flat" else 1)
        tried = (logits.dtype, boxes.dtype, sizes, min(spec.top_k, candidates))
        choices = (spec.activation, spec.selection, spec.background, spec.box_format, spec.clip)
        serves = _triton_serves(logits.device, "decode", *tried, *choices)
        return by_triton.decode(logits, boxes, image_sizes, spec) if serves else None
    return None


def for_losses(values: Tensor) -> str:
    """Give the form of the losses and the distance transform for a tensor: ``native``, ``triton`` or ``aten``."""
    if values.dtype == torch.float64 or _writes_a_graph() or wants_other_derivatives():
        return "aten"
    kind = _kind_of(values.device)
    if kind == "triton":
        return kind if _triton_serves(values.device, "losses") else "aten"
    return kind if kind == "native" else "aten"


def nms(
    boxes: Tensor,
    scores: Tensor | None,
    labels: Tensor | None,
    valid: Tensor | None,
    threshold: float,
    smaller: bool = False,
) -> Tensor:
    """Say which boxes greedy suppression keeps.

    Args:
        boxes: (B, N, 4), floating, xyxy, checked.
        scores: (B, N), floating, or ``None``: the boxes come best first.
        labels: (B, N), integer, or ``None``: one class.
        valid: (B, N), bool, or ``None``: all are.
        threshold: in [0, 1].
        smaller: whether an overlap is a part of the smaller box, and not of the union.

    Returns:
        (B, N), bool.
    """
    if _is_native(boxes):
        observed = _is_observed(boxes, scores, labels) or type(valid) not in (Tensor, type(None))
        run = native_nms.keep_as_operator if observed else native_nms.keep
        return run(boxes, scores, labels, valid, threshold, smaller)
    if scores is not None:
        return reference_nms.keep(boxes, scores, labels, valid, threshold, smaller)
    everything = torch.ones_like(boxes[..., 0], dtype=torch.bool) if valid is None else valid
    return reference_nms.keep_ranked(boxes.detach(), labels, everything, threshold, smaller)


def suppress(detections: Detections, threshold: float, by_class: bool, compact: bool) -> Detections:
    """Clear the slots of detections that greedy suppression drops.

    Args:
        detections: best first.
        threshold: in [0, 1].
        by_class: whether detections of different labels leave each other alone.
        compact: whether what is kept moves to the front.

    Returns:
        The detections.
    """
    scores, labels, boxes, queries, valid = detections
    plain = not _is_observed(boxes, scores, labels) and type(queries) is type(valid) is Tensor
    if plain and native_nms.takes_detections(detections) and _is_native(boxes):
        return native_nms.suppress(detections, threshold, by_class, compact)
    kept = nms(boxes, None, labels if by_class else None, valid, threshold)
    return reference_nms.suppress(detections, kept, compact)


def _is_native(values: Tensor) -> bool:
    """Whether the C++ kernels serve a tensor here."""
    return not _writes_a_graph() and not _is_transformed() and _kind_of(values.device) == "native"


def merge(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, valid: Tensor | None, threshold: float, smaller: bool
) -> tuple[Tensor, Tensor]:
    """Let the best boxes swallow those that they overlap.

    Args:
        boxes: (B, N, 4), floating, xyxy.
        scores: (B, N), floating.
        labels: (B, N), integer, or ``None``: one class.
        valid: (B, N), bool, or ``None``: all are.
        threshold: above 0, at most 1; an overlap of as much counts.
        smaller: whether an overlap is a part of the smaller box, and not of the union.

    Returns:
        Which boxes stay (B, N), bool. Boxes (B, N, 4), those that stay grown; float32, or float64 if they are.
    """
    if _is_native(boxes) and not wants_derivative(boxes):
        observed = _is_observed(boxes, scores, labels) or type(valid) not in (Tensor, type(None))
        run = native_nms.merge_as_operator if observed else native_nms.merge
        return run(boxes, scores, labels, valid, threshold, smaller)
    return reference_fusion.merge(boxes, scores, labels, valid, threshold, smaller)


def fuse(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, valid: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Fuse clusters of boxes that overlap.

    Args:
        boxes: (B, N, 4), float64, xyxy.
        scores: (B, N), float64: what the boxes are ordered and weighed by.
        labels: (B, N), integer, or ``None``: one class.
        valid: (B, N), bool, or ``None``: all are.
        threshold: a box joins a cluster whose IoU with it is greater.

    Returns:
        Owners (B, N), int64: the index of the box that began the cluster of each box, -1 for boxes that are not valid.
        Boxes (B, N, 4) and scores (B, N): where a cluster begins, its mean box and mean score; elsewhere what came.
    """
    if _is_native(boxes) and not wants_derivative(boxes, scores):
        observed = _is_observed(boxes, scores, labels) or type(valid) not in (Tensor, type(None))
        run = native_fusion.fuse_as_operator if observed else native_fusion.fuse
        return run(boxes, scores, labels, valid, threshold)
    return reference_fusion.fuse(boxes, scores, labels, valid, threshold)
