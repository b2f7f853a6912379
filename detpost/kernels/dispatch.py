"""The choice between the forms of each computation: the first that takes what came, and at the end the definition.

Every form gives what the definition in :mod:`detpost.reference` gives: the same indices to the bit, the same losses and
gradients to 1e-5. The environment variable ``DETPOST_KERNEL`` forces one kernel:

- ``native``: C++, on the CPU. The default there, where it was built.
- ``numpy``: NumPy, for selection and decode on the CPU. The default there otherwise.
- ``triton``: Triton. The default on CUDA, where a trial of what is about to run agrees with the definition; on the CPU
  under ``TRITON_INTERPRET=1`` alone, for tests.
- ``aten``: PyTorch's own operators, everywhere, and for whatever the others do not take.

What writes a graph for another runtime gets forms of operators that every runtime has, and what takes derivatives in
ways of its own (``torch.func``, forward mode) gets forms that it can look into.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.kernels.aten import decode as aten_decode
from detpost.kernels.aten import gradient as aten_gradient
from detpost.kernels.aten import losses as aten_losses
from detpost.kernels.aten import nms as aten_nms
from detpost.kernels.aten import selection as aten_selection
from detpost.kernels.cpu import decode as native_decode
from detpost.kernels.cpu import decode_back as native_decode_back
from detpost.kernels.cpu import erosion as native_erosion
from detpost.kernels.cpu import fusion as native_fusion
from detpost.kernels.cpu import losses as native_losses
from detpost.kernels.cpu import nms as native_nms
from detpost.kernels.cpu import numpy_decode
from detpost.kernels.cpu import selection as native_selection
from detpost.kernels.cpu import surface as native_surface
from detpost.kernels.serving import (
    KERNELS,
    constant_kernel_for,
    is_exporting,
    kernel_for,
    may_serve,
    tried,
    writes_graph,
)
from detpost.kernels.triton import doors
from detpost.reference import decode as reference_decode
from detpost.reference import distance as reference_distance
from detpost.reference import erosion as reference_erosion
from detpost.reference import fusion as reference_fusion
from detpost.reference import nms as reference_nms
from detpost.reference import selection as reference_selection
from detpost.reference import surface as reference_surface
from detpost.reference.derivatives import is_in_transform, wants_derivative
from detpost.spec import DecodeSpec
from detpost.tensors import is_plain_call

__all__ = [
    "FORMS",
    "KERNELS",
    "Form",
    "boundary_distance",
    "decode",
    "erosion",
    "fuse",
    "id_range",
    "kernel_for",
    "merge",
    "nms",
    "select",
    "squared_distance",
    "suppress",
    "surface_distances",
    "tried",
    "weighted_error",
    "writes_graph",
]

# Names beside KERNELS that nobody can force: what writes a graph, and what takes derivatives in a way of its own, takes
# forms of these names.
_GRAPH, _TRANSFORM = "graph", "transform"
_DEFINITION = "reference"
# Whose forms are asked, by the kernel that serves: what one does not take goes on to PyTorch's operators.
_ASKED: Final[dict[str, tuple[str, ...]]] = {
    "native": ("native", "aten"),
    "numpy": ("numpy", "aten"),
    "triton": ("triton", "aten"),
    "aten": ("aten",),
    _GRAPH: (_GRAPH,),
    _TRANSFORM: (_TRANSFORM, "aten"),
}

# Computations whose own derivatives are asked for: inside a transform of a compiled function, and forwards, too.
_DIFFERENTIATED = frozenset({"decode", "erosion", "squared_distance", "boundary_distance", "weighted_error"})

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_FLOATING = (*_NARROW, torch.float64)
_WIDE = (torch.float32, torch.float64)


def _anything(*arguments: Any) -> bool:
    return True


@dataclass(frozen=True)
class Form:
    """One way to compute something, and what it takes.

    Args:
        kernel: one of ``KERNELS``; ``"graph"``, for what writes a graph; ``"transform"``, for what takes derivatives in
            a way of its own; or ``"reference"``, the definition.
        run: the call.
        watched: the call where someone watches which operators run (a tracer, a checker, a tensor of another kind);
            ``None``: not a form for these.
        dtypes: of the first tensor; ``None``: any.
        takes: whether it takes the arguments, beyond their dtype.
        trial: what must be tried before it serves: the name of a trial and its arguments. ``None``: nothing.
    """

    kernel: str
    run: Callable[..., Any]
    watched: Callable[..., Any] | None
    dtypes: tuple[torch.dtype, ...] | None = _NARROW
    takes: Callable[..., bool] = _anything
    trial: Callable[..., tuple[Any, ...]] | None = None


# ----------------------------------------------------------------------------------------------------------------------
# What the table is made of
# ----------------------------------------------------------------------------------------------------------------------


def _seen(kernel: str, run: Callable[..., Any], dtypes: tuple[torch.dtype, ...] | None = _FLOATING) -> Form:
    """Make a form of operators, which a watcher sees as they are."""
    return Form(kernel, run, run, dtypes)


def _decode_at_once(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> bool:
    return boxes.dtype != torch.float64 and not wants_derivative(logits, boxes, image_sizes)


_decode_natively_with_gradient = functools.partial(
    aten_gradient.decode, without_gradient=native_decode.decode, back=native_decode_back.decode_back
)
_decode_by_numpy_with_gradient = functools.partial(
    aten_gradient.decode, without_gradient=numpy_decode.decode, back=aten_gradient.back
)


def _decode_in_graph(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Detections:
    if torch.onnx.is_in_onnx_export():
        raise TypeError(
            "a decode is written to ONNX, not traced: take detpost.export.to_onnx for a post-processor or a whole "
            "detector, or export the network and detpost.export.attach the decode"
        )
    return _decode_by_operators(logits, boxes, image_sizes, spec)


def _decode_by_operators(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Detections:
    steps = _STEPS
    if logits.device.type == "cpu" and logits.dtype != torch.float64 and type(logits) is Tensor and is_plain_call():
        steps = _STEPS_ON_PROCESSOR
        if wants_derivative(logits, boxes, image_sizes) and kernel_for("cpu") in ("native", "numpy"):
            steps = _STEPS_WITH_SLOPE
    return reference_decode.decode(logits, boxes, image_sizes, spec, steps)


def _pairs_at_once(logits: Tensor, spec: DecodeSpec, steps: reference_decode.Steps) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the kept pairs by a decode without derivatives: only what is gathered by them has any."""
    values = logits.detach()
    found = decode(values, values.new_zeros(*values.shape[:2], 4, dtype=torch.float32), None, _pairs_alone(spec))
    queries, labels, keys = found.queries.clamp(min=0), found.labels.clamp(min=0), found.scores
    if spec.activation == "sigmoid":
        keys = values.flatten(1).gather(1, queries * values.shape[2] + labels)
    return queries, labels, torch.where(found.valid, keys, math.nan)


@functools.lru_cache(maxsize=256)
def _pairs_alone(spec: DecodeSpec) -> DecodeSpec:
    return replace(spec, score_threshold=None, clip=False)


def _nms_by_words(*arguments: Any) -> Tensor:
    keep: Callable[..., Tensor] = reference_nms.keep
    return keep(*arguments, select, aten_nms.walk_words)


def _nms_by_floats(*arguments: Any) -> Tensor:
    keep: Callable[..., Tensor] = reference_nms.keep
    return keep(*arguments, select, aten_nms.walk_floats)


def _suppress_what_nms_drops(detections: Detections, threshold: float, by_class: bool, compact: bool) -> Detections:
    labels = detections.labels if by_class else None
    kept = nms(detections.boxes, None, labels, detections.valid, threshold)
    return reference_nms.suppress(detections, kept, compact)


def _has_no_slope(boxes: Tensor, scores: Tensor, *others: Any) -> bool:
    return not wants_derivative(boxes, scores)


def _has_no_slope_of_truth(values: Tensor, truth: Tensor, *others: Any) -> bool:
    return not (torch.is_grad_enabled() and truth.requires_grad)


def _erosion_of_operators(*arguments: Any) -> Tensor:
    return reference_erosion.erode(*arguments)[0]  # exporters read plain operators and no autograd function


def _boundary_distance(field: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, float]:
    return reference_distance.boundary_distance(field, spacing, squared_distance)


def _surface_distances(a: Tensor, b: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return reference_surface.surface_distances(a, b, spacing, squared_distance)


def _weighted_error(*arguments: Any) -> Tensor:
    error: Callable[..., Tensor] = reference_distance.weighted_error
    return error(*arguments, boundary_distance)


def _is_read_on_a_processor(inside: Tensor, *others: Any) -> bool:
    return inside.device.type == "cpu" and is_plain_call()


def _id_range(ids: Tensor) -> tuple[int, int]:
    lowest, highest = torch.aminmax(ids)
    return int(lowest), int(highest)


# For each of the functions below, its forms in the order in which they are asked; the last takes everything.
FORMS: Final[dict[str, tuple[Form, ...]]] = {
    "select": (
        Form("native", native_selection.select, native_selection.select),
        Form("numpy", numpy_decode.select, None),
        Form("triton", doors.Selection.run, doors.Selection.run, _NARROW, doors.Selection.takes, doors.Selection.trial),
        _seen(_GRAPH, aten_selection.select_by_top_k),
        Form("aten", aten_selection.select_by_looking, None, _WIDE, _is_read_on_a_processor),
        _seen("aten", aten_selection.select),
        _seen(_DEFINITION, reference_selection.select_top_k),
    ),
    "decode": (
        Form("native", native_decode.decode, native_decode.decode_as_operator, _NARROW, _decode_at_once),
        Form("native", _decode_natively_with_gradient, None, _NARROW, aten_gradient.takes),
        Form("numpy", numpy_decode.decode, None, _NARROW, _decode_at_once),
        Form("numpy", _decode_by_numpy_with_gradient, None, _NARROW, aten_gradient.takes),
        Form("triton", doors.Decode.run, doors.Decode.run, _NARROW, doors.Decode.takes, doors.Decode.trial),
        _seen(_GRAPH, _decode_in_graph),
        _seen(_DEFINITION, _decode_by_operators),
    ),
    "nms": (
        Form("native", native_nms.keep, native_nms.keep_as_operator, _FLOATING),
        _seen(_GRAPH, _nms_by_floats),
        _seen(_TRANSFORM, _nms_by_floats),  # vmap of PyTorch 2.11 cannot read numbers as those of another type
        _seen("aten", _nms_by_words),
        _seen(_DEFINITION, reference_nms.keep),
    ),
    "suppress": (
        Form("native", native_nms.suppress, None, (torch.float32,), native_nms.takes),
        _seen(_DEFINITION, _suppress_what_nms_drops),
    ),
    "merge": (
        Form("native", native_nms.merge, native_nms.merge_as_operator, _FLOATING, _has_no_slope),
        _seen(_DEFINITION, reference_fusion.merge),
    ),
    "fuse": (
        Form("native", native_fusion.fuse, native_fusion.fuse_as_operator, (torch.float64,), _has_no_slope),
        _seen(_DEFINITION, reference_fusion.fuse),
    ),
    "erosion": (
        _seen("native", native_losses.erosion, (torch.float32,)),
        Form("triton", doors.Erosion.run, doors.Erosion.run, _NARROW, doors.Erosion.takes, doors.Erosion.trial),
        _seen(_TRANSFORM, reference_erosion.erode_differentiably),
        _seen("aten", aten_losses.erosion),
        _seen(_DEFINITION, _erosion_of_operators),
    ),
    "squared_distance": (
        _seen("native", native_losses.squared_distance, (torch.bool,)),
        Form(
            *("triton", doors.SquaredDistance.run, doors.SquaredDistance.run, (torch.bool,)),
            *(doors.SquaredDistance.takes, doors.SquaredDistance.trial),
        ),
        _seen(_GRAPH, aten_losses.squared_distance_by_rows, (torch.bool,)),
        Form("aten", aten_losses.squared_distance_nearby, None, (torch.bool,), _is_read_on_a_processor),
        _seen("aten", aten_losses.squared_distance, (torch.bool,)),
        _seen(_DEFINITION, reference_distance.squared_distance),
    ),
    "boundary_distance": (
        _seen("native", native_losses.boundary_distance, _NARROW),
        Form(
            *("triton", doors.BoundaryDistance.run, doors.BoundaryDistance.run, _NARROW),
            *(doors.BoundaryDistance.takes, doors.BoundaryDistance.trial),
        ),
        _seen(_DEFINITION, _boundary_distance),
    ),
    "surface_distances": (
        Form("native", native_surface.surface_distances, None, (torch.bool,)),
        _seen(_DEFINITION, _surface_distances),
    ),
    "weighted_error": (
        Form(
            *("native", native_losses.weighted_error, native_losses.weighted_error),
            *((torch.float32,), _has_no_slope_of_truth),
        ),
        _seen(_DEFINITION, _weighted_error),
    ),
    "id_range": (
        Form("native", native_erosion.id_range, None, (torch.int64,)),
        _seen(_DEFINITION, _id_range),
    ),
}


# ----------------------------------------------------------------------------------------------------------------------
# The choice
# ----------------------------------------------------------------------------------------------------------------------


def _form(computation: str, first: Tensor, *arguments: Any) -> Callable[..., Any]:
    """Choose the form that computes with these arguments; ``first`` is the tensor that decides."""
    compiling = torch.compiler.is_compiling()
    asked = _ASKED[_serving(first.device, compiling, computation in _DIFFERENTIATED)]
    *forms, definition = FORMS[computation]
    for form in forms:
        if form.kernel not in asked or (form.dtypes is not None and first.dtype not in form.dtypes):
            continue
        if not form.takes(*arguments):
            continue
        if form.trial is not None and not may_serve(first.device, compiling, *form.trial(*arguments)):
            continue
        if form.run is form.watched or not (compiling or _is_watched(arguments)):
            return form.run
        if form.watched is not None:
            return form.watched
    return definition.run


def _is_watched(arguments: tuple[Any, ...]) -> bool:
    """Tell whether someone watches which operators run: a tracer, a checker, a tensor of another kind."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    return any([type(value) is not Tensor and isinstance(value, Tensor) for value in arguments])


def _serving(device: torch.device, compiling: bool, differentiated: bool) -> str:
    """Name what serves tensors on a device, as seen from where it is asked: a key of ``_ASKED``."""
    if compiling:  # looked up once, without following the environment and the file system
        if is_exporting():
            return _GRAPH
        if differentiated and (is_in_transform() or torch.autograd.forward_ad._current_level >= 0):
            return _TRANSFORM
        constant: str = constant_kernel_for(device.type)
        return constant
    if torch._C._is_tracing():  # TorchScript, and the older ONNX exporter
        return _GRAPH
    if is_in_transform():
        return _TRANSFORM
    # An enclosing dual level is enough: operators may make a tangent out of any other tensor.
    if differentiated and torch.autograd.forward_ad._current_level >= 0:
        return _TRANSFORM
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return "aten"  # Triton launches on the current GPU
    return kernel_for(device.type)


# ----------------------------------------------------------------------------------------------------------------------
# What is computed
# ----------------------------------------------------------------------------------------------------------------------


def select(scores: Tensor, k: int) -> Tensor:
    """Give the indices of the k greatest scores of each row; as :func:`detpost.select_top_k`.

    Args:
        scores: (B, N), floating, without a gradient.
        k: how many to keep, at least 1.

    Returns:
        (B, min(k, N)), int64.
    """
    indices: Tensor = _form("select", scores, scores, k)(scores, k)
    return indices


_STEPS: Final = reference_decode.Steps(select)
_STEPS_ON_PROCESSOR: Final = aten_decode.STEPS._replace(select=select)
_STEPS_WITH_SLOPE: Final = _STEPS_ON_PROCESSOR._replace(select_pairs=_pairs_at_once)


def decode(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Detections:
    """Decode a batch; as :class:`detpost.DetectionPostProcessor`.

    Args:
        logits: (B, Q, C), floating, checked.
        boxes: (B, Q, 4), floating, checked.
        image_sizes: (B, 2), checked, or ``None``.
        spec: what the decode does.

    Returns:
        The detections, differentiable in logits and boxes.

    Raises:
        TypeError: it is being traced into ONNX.
    """
    run = _form("decode", logits, logits, boxes, image_sizes, spec)
    detections: Detections = run(logits, boxes, image_sizes, spec)
    return detections


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
    arguments = (boxes, scores, labels, valid, threshold, smaller)
    kept: Tensor = _form("nms", boxes, *arguments)(*arguments)
    return kept


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
    arguments = (detections, threshold, by_class, compact)
    found: Detections = _form("suppress", detections.boxes, *arguments)(*arguments)
    return found


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
    arguments = (boxes, scores, labels, valid, threshold, smaller)
    found: tuple[Tensor, Tensor] = _form("merge", boxes, *arguments)(*arguments)
    return found


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
    arguments = (boxes, scores, labels, valid, threshold)
    found: tuple[Tensor, Tensor, Tensor] = _form("fuse", boxes, *arguments)(*arguments)
    return found


def erosion(
    pred: Tensor, target: Tensor, classes: Tensor, weights: Sequence[float], axes: int, keep_field: bool
) -> Tensor:
    """Erode the squared difference ``len(weights)`` times and sum the stretched erosions.

    Args:
        pred: (B, C, *spatial), float32 or float64.
        target: (B, 1, *spatial), integer class ids.
        classes: (C,), the class id of each channel.
        weights: of each erosion in the sum.
        axes: 2 or 3.
        keep_field: whether the sum stays a field, or runs over the elements of each field too.

    Returns:
        (B, C, *spatial), or with ones for the spatial sides; differentiable in ``pred``.
    """
    arguments = (pred, target, classes, weights, axes, keep_field)
    total: Tensor = _form("erosion", pred, *arguments)(*arguments)
    return total


def squared_distance(inside: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, float]:
    """Give the squared distance to the nearest False, in the returned unit; infinite in a field without any False.

    Args:
        inside: (B, C, *spatial) boolean.
        spacing: one length per spatial axis.

    Returns:
        (B, C, *spatial) float32, and the unit: the largest spacing.
    """
    found: tuple[Tensor, float] = _form("squared_distance", inside, inside, spacing)(inside, spacing)
    return found


def surface_distances(a: Tensor, b: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Give how far each element of one mask's surface is from the other's, in the order in which they lie in memory.

    Args:
        a: (1, 1, *spatial), bool.
        b: a mask of the same shape and device.
        spacing: one length per spatial axis.

    Returns:
        (N,) and (M,), float32.
    """
    found: tuple[Tensor, Tensor] = _form("surface_distances", a, a, b, spacing)(a, b, spacing)
    return found


def boundary_distance(field: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, float]:
    """Give the squared distance to the nearest element across 0.5, in the returned unit; 0 where there is none.

    Args:
        field: (B, C, *spatial), floating.
        spacing: one length per spatial axis.

    Returns:
        (B, C, *spatial) float32, and the unit.
    """
    found: tuple[Tensor, float] = _form("boundary_distance", field, field, spacing)(field, spacing)
    return found


def weighted_error(values: Tensor, truth: Tensor, spacing: tuple[float, ...], alpha: float, sigmoid: bool) -> Tensor:
    """Give the mean over each field of the squared error, weighted with the distances to both boundaries.

    Args:
        values: (B, C, *spatial), float32 or float64: probabilities, or logits with ``sigmoid``.
        truth: (B, C, *spatial), of the same dtype.
        spacing: one length per spatial axis.
        alpha: exponent of the distances.
        sigmoid: whether a sigmoid is applied to ``values``.

    Returns:
        (B, C, 1, ...), differentiable in values and truth.
    """
    arguments = (values, truth, spacing, alpha, sigmoid)
    error: Tensor = _form("weighted_error", values, *arguments)(*arguments)
    return error


def id_range(ids: Tensor) -> tuple[int, int]:
    """Give the least and the greatest of integer ids (...,), at least one of them; waits for their device."""
    found: tuple[int, int] = _form("id_range", ids, ids)(ids)
    return found
