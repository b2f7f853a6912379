"""The C++ kernels of ``native.cpp``, as PyTorch operators and, for the decode, as a plain call.

The library is an optional part of the package, built where there is a compiler. As operators of the ``detpost``
namespace its functions stay one node each under ``torch.compile``. They run on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
import struct
from collections.abc import Sequence
from ctypes import c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detpost.detections import Detections
from detpost.spec import DecodeSpec

__all__ = [
    "boundary_distance",
    "decode",
    "erosion",
    "function",
    "id_range",
    "instructions",
    "missing",
    "scaled",
    "select",
    "squared_distance",
    "weighted_error",
]

_INTERFACE = 6
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SIZE_TYPES = {torch.float32: 1, torch.int32: 2, torch.int64: 3}
_BOX_FORMATS = {"cxcywh": 0, "xyxy": 1, "xywh": 2}
_MOST_WIDTH = 2**31 - 1

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "detpost_select": (c_void_p, c_int, c_int64, c_int64, c_int64, c_void_p, c_int),
    "detpost_decode": (c_char_p,),
    "detpost_erosion": (
        *(c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64, c_int, c_float),
        *(c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int),
    ),
    "detpost_scale": (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int),
    "detpost_distance": (
        *(c_void_p, c_int64, c_int64, c_int64, c_int64, c_float, c_float, c_float, c_int, c_float, c_void_p, c_int),
    ),
    "detpost_fuse": (c_char_p,),
    "detpost_nms": (c_char_p, c_char_p),
    "detpost_weighted_error": (
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64),
        *(c_double, c_double, c_float, c_int, c_void_p, c_int),
    ),
}


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Load the built library, or say why there is none."""
    suffixes = reversed(importlib.machinery.EXTENSION_SUFFIXES)  # the one without an interpreter's tag first
    found = [path for suffix in suffixes if (path := Path(__file__).with_name(f"_native{suffix}")).exists()]
    if not found:
        again = "reinstall detpost where there is a C++ compiler (a checkout: python setup.py build_ext --inplace)"
        return f"not built: {again}"
    try:
        library = ctypes.CDLL(str(found[0]))
        interface = int(library.detpost_interface())
    except (OSError, AttributeError) as error:
        return f"cannot be loaded: {error}"
    if interface != _INTERFACE:
        return f"built from another version of detpost (interface {interface}, wanted {_INTERFACE}): reinstall it"
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype, function.errcheck = types, c_int, _raise_failure
    library.detpost_share_threads.argtypes, library.detpost_share_threads.restype = (c_void_p,), None
    library.detpost_range.argtypes, library.detpost_range.restype = (c_void_p, c_int64, c_void_p), None
    shared = _openmp_parallel()
    if shared is not None:
        library.detpost_share_threads(shared)
    return library


def _raise_failure(outcome: int, function: Any, arguments: Any) -> None:
    """Make an exception of how a call ended: ``Outcome`` in common.h."""
    if outcome == 1:
        raise MemoryError(
            f"detpost's C++ kernels got no memory in {function.__name__}: give fewer images at a time, "
            f"or set DETPOST_KERNEL=aten"
        )
    if outcome:
        raise RuntimeError(
            f"{function.__name__} of detpost's C++ kernels failed: set DETPOST_KERNEL=aten and report it"
        )


def _openmp_parallel() -> ctypes.c_void_p | None:
    """Find the function by which PyTorch starts its threads, in the OpenMP library that it loaded.

    Where there is none to be found the kernels have threads of their own: the same answers, some milliseconds later.
    """
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps if ".so" in line}
    names = ("libgomp", "libomp", "libiomp5")
    of_openmp = [path for path in paths if Path(path).name.startswith(names)]
    beside_torch = str(Path(torch.__file__).parent)
    for path in sorted(of_openmp, key=lambda path: not path.startswith(beside_torch)):
        try:
            loaded = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None


def missing() -> str | None:
    """Say why the library cannot be used; ``None`` where it can."""
    library = _library()
    return library if isinstance(library, str) else None


def instructions() -> str:
    """Name the instructions that the loaded library uses on this processor.

    ``DETPOST_NATIVE=baseline`` or ``avx2``, set before the first use, keeps it below what the processor has.
    """
    return {0: "baseline instructions", 2: "AVX2", 3: "AVX-512"}[int(_function("detpost_level")())]


@functools.cache
def _function(name: str) -> Any:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"detpost's C++ kernels are {library}")
    return getattr(library, name)


def function(name: str) -> Any:
    """Give a function of the library by its name in C, for the modules of its other families."""
    return _function(name)


# ----------------------------------------------------------------------------------------------------------------------
# Selection
# ----------------------------------------------------------------------------------------------------------------------


def takes_scores(dtype: torch.dtype) -> bool:
    """Whether :func:`select` and :func:`decode` take scores of this dtype."""
    return dtype in _DTYPES


def select(scores: Tensor, k: int) -> Tensor:
    """Select as :func:`detpost.select_top_k` does.

    Args:
        scores: (B, N), float32, float16 or bfloat16, on the CPU; N below 2**31.
        k: how many to keep, at least 1.

    Returns:
        (B, min(k, N)), int64.
    """
    indices: Tensor = torch.ops.detpost.native_select(scores, k)
    return indices


def _select(scores: Tensor, k: int) -> Tensor:
    batch, width = scores.shape
    indices = torch.empty((batch, min(k, width)), dtype=torch.int64, device="cpu")
    if indices.numel():
        rows = scores.contiguous()
        _function("detpost_select")(
            rows.data_ptr(), _DTYPES[rows.dtype], batch, width, min(k, width), indices.data_ptr(), _threads()
        )
    return indices


def _select_fake(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((scores.shape[0], min(k, scores.shape[1])), dtype=torch.int64)


def _threads() -> int:
    return torch.get_num_threads()


# ----------------------------------------------------------------------------------------------------------------------
# The decode
# ----------------------------------------------------------------------------------------------------------------------


def takes_spec(spec: DecodeSpec) -> bool:
    """Whether :func:`decode` knows this kind of decode: sigmoid scores, the best of all (query, class) pairs."""
    return spec.activation == "sigmoid" and spec.selection == "flat"


def decode(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Detections:
    """Decode as :class:`detpost.DetectionPostProcessor` does, in one pass and without a gradient.

    Args:
        logits: (B, Q, C), float32, float16 or bfloat16, on the CPU; Q * C below 2**31.
        boxes: (B, Q, 4), floating but not float64, on the CPU.
        image_sizes: (B, 2), (height, width) in pixels, or ``None``.
        spec: one that :func:`takes_spec` takes.

    Returns:
        The detections.
    """
    return Detections(*_decode(logits, boxes, image_sizes, *_spec_arguments(spec, logits.shape[2])))


def decode_as_operator(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Detections:
    """Decode through the registered operator, which compilers and tracers see; as :func:`decode` otherwise."""
    arguments = _spec_arguments(spec, logits.shape[2])
    return Detections(*torch.ops.detpost.native_decode(logits, boxes, image_sizes, *arguments))


def _spec_arguments(spec: DecodeSpec, classes: int) -> tuple[int, int, int, bool, float | None]:
    background = {"none": -1, "first": 0, "last": classes - 1}[spec.background]
    return spec.top_k, background, _BOX_FORMATS[spec.box_format], spec.clip, spec.score_threshold


def _decode(
    logits: Tensor,
    boxes: Tensor,
    image_sizes: Tensor | None,
    top_k: int,
    background: int,
    box_format: int,
    clip: bool,
    threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, queries, classes = logits.shape
    kept = min(top_k, queries * classes)
    if not logits.is_contiguous():
        logits = logits.contiguous()
    if boxes.dtype != torch.float32 or not boxes.is_contiguous():
        boxes = boxes.to(torch.float32).contiguous()
    size_type, sizes_at = 0, 0
    if image_sizes is not None:
        if image_sizes.dtype not in _SIZE_TYPES:
            image_sizes = image_sizes.to(torch.float32)
        if not image_sizes.is_contiguous():
            image_sizes = image_sizes.contiguous()
        size_type, sizes_at = _SIZE_TYPES[image_sizes.dtype], image_sizes.data_ptr()
    like = torch.empty_like  # half the time of making the same from a shape
    score_like, index_like, box_like, valid_like = _templates(batch, kept)
    scores, labels, corners = like(score_like), like(index_like), like(box_like)
    chosen, valid = like(index_like), like(valid_like)
    if batch and kept:
        record = _DECODE_RECORD.pack(
            *(logits.data_ptr(), _DTYPES[logits.dtype], batch, queries, classes, kept, background),
            *(boxes.data_ptr(), sizes_at, size_type, box_format, clip),
            *(scores.data_ptr(), labels.data_ptr(), corners.data_ptr(), chosen.data_ptr(), valid.data_ptr()),
            *(torch.get_num_threads(), threshold is not None, threshold or 0.0),
        )
        _function("detpost_decode")(record)
    return scores, labels, corners, chosen, valid


# Addresses and whole numbers in the order of DecodeCall, and the threshold.
_DECODE_RECORD = struct.Struct("=19qd")


@functools.lru_cache(maxsize=64)
def _templates(batch: int, kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors that the outputs are made like; never written or given out."""
    # Whatever the default device is: the kernel writes to where these are.
    return (
        torch.empty((batch, kept), dtype=torch.float32, device="cpu"),
        torch.empty((batch, kept), dtype=torch.int64, device="cpu"),
        torch.empty((batch, kept, 4), dtype=torch.float32, device="cpu"),
        torch.empty((batch, kept), dtype=torch.bool, device="cpu"),
    )


def _decode_fake(
    logits: Tensor,
    boxes: Tensor,
    image_sizes: Tensor | None,
    top_k: int,
    background: int,
    box_format: int,
    clip: bool,
    threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], min(top_k, logits.shape[1] * logits.shape[2]))
    scores = logits.new_empty(shape, dtype=torch.float32)
    labels = logits.new_empty(shape, dtype=torch.int64)
    corners = logits.new_empty((*shape, 4), dtype=torch.float32)
    return scores, labels, corners, torch.empty_like(labels), logits.new_empty(shape, dtype=torch.bool)


# ----------------------------------------------------------------------------------------------------------------------
# The erosion loss
# ----------------------------------------------------------------------------------------------------------------------


def erosion(
    pred: Tensor,
    target: Tensor,
    classes: Tensor,
    weights: Sequence[float],
    stencil_weight: float,
    axes: int,
    cotangent: Tensor | None,
    want_field: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Erode every field, and go back through it in the same pass while its erosions are in the cache.

    Args:
        pred: (B, C, *spatial), float32, on the CPU.
        target: (B, 1, *spatial), int64.
        classes: (C,), 0 ... C - 1: the check of the ids is a part of a compiled graph through it alone.
        weights: of each erosion's result in the sum.
        stencil_weight: of each tap of the stencil.
        axes: 2 or 3.
        cotangent: gradient of the summed field (B, C, *spatial), float32; ``None`` is 1 everywhere.
        want_field: whether the field is wanted, else its sums.
        want_gradient: whether the gradient is wanted.

    Returns:
        Sums over each field (B, C), float32; the field (B, C, *spatial); the gradient of ``sum(field * cotangent)``
        with respect to ``pred`` (B, C, *spatial), finite. Of the last two, what is not wanted has shape (0,).
    """
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.detpost.native_erosion(
        pred, target, classes, weights, stencil_weight, axes, cotangent, want_field, want_gradient
    )
    return found


def _erosion(
    pred: Tensor,
    target: Tensor,
    classes: Tensor,
    weights: Sequence[float],
    stencil_weight: float,
    axes: int,
    cotangent: Tensor | None,
    want_field: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    pred, target = pred.contiguous(), target.contiguous()
    batch, channels, *sides = pred.shape
    depth, height, width = (1, *sides)[-3:]
    steps = (c_double * len(weights))(*weights)
    totals = torch.empty((batch, channels), dtype=torch.float64, device="cpu")
    field = torch.empty_like(pred) if want_field else pred.new_empty(0)
    gradient = torch.empty_like(pred) if want_gradient else pred.new_empty(0)
    given = cotangent.contiguous() if cotangent is not None else None
    if pred.numel():
        _function("detpost_erosion")(
            *(pred.data_ptr(), target.data_ptr(), batch, channels, depth, height, width, axes, stencil_weight),
            *(steps, len(weights), totals.data_ptr(), field.data_ptr() if want_field else None),
            *(given.data_ptr() if given is not None else None, gradient.data_ptr() if want_gradient else None),
            _threads(),
        )
    return totals.to(torch.float32), field, gradient


def _erosion_fake(
    pred: Tensor,
    target: Tensor,
    classes: Tensor,
    weights: Sequence[float],
    stencil_weight: float,
    axes: int,
    cotangent: Tensor | None,
    want_field: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    whole = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    nothing = pred.new_empty(0)
    return (
        pred.new_empty(pred.shape[:2]),
        whole if want_field else nothing,
        torch.empty_like(whole) if want_gradient else torch.empty_like(nothing),
    )


def scaled(values: Tensor, factors: Tensor) -> Tensor:
    """Multiply each field by a factor of its own; what leaves float32 becomes its greatest number, and NaN stays.

    Args:
        values: (B, C, *spatial), float32, on the CPU.
        factors: (B, C, 1, ...), float32.

    Returns:
        (B, C, *spatial), float32.
    """
    found: Tensor = torch.ops.detpost.native_scaled(values, factors)
    return found


def _scaled(values: Tensor, factors: Tensor) -> Tensor:
    values, factors = values.contiguous(), factors.to(torch.float32).contiguous()
    out = torch.empty_like(values)
    fields = factors.numel()
    if values.numel():
        _function("detpost_scale")(
            *(values.data_ptr(), factors.data_ptr(), fields, values.numel() // fields, out.data_ptr(), _threads())
        )
    return out


def _scaled_fake(values: Tensor, factors: Tensor) -> Tensor:
    return torch.empty(values.shape, dtype=values.dtype, device=values.device)


def id_range(ids: Tensor) -> tuple[int, int]:
    """Give the least and the greatest of int64 ids on the CPU, at least one."""
    ids = ids.contiguous()
    found = (c_int64 * 2)()
    _function("detpost_range")(ids.data_ptr(), ids.numel(), found)
    return found[0], found[1]


# ----------------------------------------------------------------------------------------------------------------------
# The distance transform
# ----------------------------------------------------------------------------------------------------------------------


def squared_distance(inside: Tensor, steps: Sequence[float]) -> Tensor:
    """Square the distance of each element to the nearest False of its field; infinite where there is none.

    Args:
        inside: (B, C, *spatial), bool, on the CPU.
        steps: lengths of an element along each spatial axis.

    Returns:
        (B, C, *spatial), float32.
    """
    found: Tensor = torch.ops.detpost.native_distance(inside, steps, False)
    return found


def boundary_distance(values: Tensor, steps: Sequence[float]) -> Tensor:
    """Square the distance of each element to the nearest one on the other side of 0.5; 0 where there is none.

    Args:
        values: (B, C, *spatial), float32, on the CPU.
        steps: lengths of an element along each spatial axis.

    Returns:
        (B, C, *spatial), float32.
    """
    found: Tensor = torch.ops.detpost.native_distance(values, steps, True)
    return found


def _distance(values: Tensor, steps: Sequence[float], both_sides: bool) -> Tensor:
    return _distances(values.contiguous(), steps, both_sides, 0.5)


def _distances(values: Tensor, steps: Sequence[float], both_sides: bool, threshold: float) -> Tensor:
    squared = torch.empty(values.shape, dtype=torch.float32, device="cpu")
    depth, height, width = (1, *values.shape[2:])[-3:]
    lengths = (1.0, *steps)[-3:]
    if values.numel():
        _function("detpost_distance")(
            *(values.data_ptr(), values.shape[0] * values.shape[1], depth, height, width, *lengths),
            *(both_sides, threshold, squared.data_ptr(), _threads()),
        )
    return squared


def _distance_fake(values: Tensor, steps: Sequence[float], both_sides: bool) -> Tensor:
    return torch.empty(values.shape, dtype=torch.float32, device=values.device)


# The greatest float32 whose sigmoid is not above one half in float32.
_HALF_LOGIT = 2.0**-23
_CHUNK = 1 << 14


def weighted_error(
    values: Tensor, truth: Tensor, steps: Sequence[float], unit: float, alpha: float, limit: float, sigmoid: bool
) -> tuple[Tensor, Tensor]:
    """Sum the squared error of each field, weighted with the distances to both boundaries.

    Args:
        values: (B, C, *spatial), float32, on the CPU: probabilities, or logits with ``sigmoid``.
        truth: (B, C, *spatial), float32.
        steps: lengths of an element along each spatial axis, in ``unit``.
        unit: what the distances are multiplied with.
        alpha: exponent of the distances.
        limit: differences beyond it count as that much, and have no slope.
        sigmoid: whether a sigmoid is applied to ``values``.

    Returns:
        Sums (B, C), float32, and the gradient of each with respect to its own field of ``values`` (B, C, *spatial).
    """
    found: tuple[Tensor, Tensor] = torch.ops.detpost.native_weighted_error(
        values, truth, steps, unit, alpha, limit, sigmoid
    )
    return found


def _weighted_error(
    values: Tensor, truth: Tensor, steps: Sequence[float], unit: float, alpha: float, limit: float, sigmoid: bool
) -> tuple[Tensor, Tensor]:
    values, truth = values.contiguous(), truth.contiguous()
    of_values = _distances(values, steps, True, _HALF_LOGIT if sigmoid else 0.5)
    of_truth = _distances(truth, steps, True, 0.5)
    fields, elements = values.shape[0] * values.shape[1], values[0, 0].numel() if values.numel() else 0
    chunks = max(1, -(-elements // _CHUNK))
    sums = torch.zeros((*values.shape[:2], chunks), dtype=torch.float64, device="cpu")
    if values.numel():
        _function("detpost_weighted_error")(
            *(values.data_ptr(), truth.data_ptr(), of_truth.data_ptr(), of_values.data_ptr(), fields, elements, chunks),
            *(alpha / 2, unit**alpha, limit, sigmoid, sums.data_ptr(), _threads()),
        )
    return sums.sum(dim=2).to(torch.float32), of_values


def _weighted_error_fake(
    values: Tensor, truth: Tensor, steps: Sequence[float], unit: float, alpha: float, limit: float, sigmoid: bool
) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape[:2]), torch.empty(values.shape, dtype=values.dtype, device=values.device)


_OPERATORS: Any = torch.library.Library("detpost", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, _kernel, _fake in (
    ("native_select(Tensor scores, int k) -> Tensor", _select, _select_fake),
    (
        "native_decode(Tensor logits, Tensor boxes, Tensor? image_sizes, int top_k, int background, int box_format, "
        "bool clip, float? threshold) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _decode,
        _decode_fake,
    ),
    (
        "native_erosion(Tensor pred, Tensor target, Tensor classes, float[] weights, float stencil_weight, int axes, "
        "Tensor? cotangent, bool want_field, bool want_gradient) -> (Tensor, Tensor, Tensor)",
        _erosion,
        _erosion_fake,
    ),
    ("native_scaled(Tensor values, Tensor factors) -> Tensor", _scaled, _scaled_fake),
    ("native_distance(Tensor values, float[] steps, bool both_sides) -> Tensor", _distance, _distance_fake),
    (
        "native_weighted_error(Tensor values, Tensor truth, float[] steps, float unit, float alpha, float limit, "
        "bool sigmoid) -> (Tensor, Tensor)",
        _weighted_error,
        _weighted_error_fake,
    ),
):
    _name = _OPERATORS.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _OPERATORS.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"detpost::{_name}", _fake, lib=_OPERATORS)
