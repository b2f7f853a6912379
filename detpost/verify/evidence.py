"""What the values of a node look like in the reference and in a version in fewer bits: why it does damage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from detpost.export.graph import import_onnx
from detpost.export.mixed import Mixture

if TYPE_CHECKING:
    from detpost.verify.on_images import OnImages

__all__ = ["Evidence", "evidence_of"]

_GREATEST_HALF = 65504.0
_MOST_CLIPPED = 0.001  # of the values
_OUTLIER = 8.0  # times the usual channel's range
_COARSE = 0.1  # of the values' spread: a step as large takes a part of it
_MOST_IMAGES = 8


@dataclass(frozen=True)
class Evidence:
    """Something about one value that a node takes or gives.

    Args:
        kind: ``"overflow"``, ``"clipped"``, ``"outlier channel"``, ``"coarse"`` or ``"weights"``.
        value: its name.
        made_by: the node that makes it, empty of inputs and weights.
        detail: the numbers, in words.
        severity: by which the evidence of a node is sorted.
    """

    kind: str
    value: str
    made_by: str
    detail: str
    severity: float

    def __str__(self) -> str:
        by = f", made by {self.made_by}" if self.made_by else ""
        return f"{self.kind} of {self.value}{by}: {self.detail}"


def evidence_of(mixture: Mixture, on_images: OnImages, names: Sequence[str]) -> dict[str, list[Evidence]]:
    """Look at what nodes take and give.

    Args:
        mixture: of the two versions.
        on_images: the images; a few are enough.
        names: of nodes of the reference.

    Returns:
        The evidence of each, the most telling first.
    """
    onnx = import_onnx()
    makers = {value: node for node in mixture.reference.graph.node for value in node.output if value}
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in mixture.reference.graph.initializer}
    wanted: dict[str, list[str]] = {}
    for name in names:
        node = mixture.node(name)
        wanted[name] = [v for v in (*node.input, *node.output) if v in makers and mixture.raw_value(v) is not None]
    values = sorted({value for each in wanted.values() for value in each})
    seen = _values(Mixture(mixture.reference, mixture.reference), on_images, values)
    found = {}
    for name in names:
        node = mixture.node(name)
        inputs = [_look(mixture, value, seen[value], makers[value].name) for value in wanted[name] if value in seen]
        own = [_weight(mixture, node, value, weights[value]) for value in node.input if value in weights]
        listed = [each for each in (*inputs, *own) if each is not None]
        found[name] = sorted(listed, key=lambda each: -each.severity)
    return found


def _values(mixture: Mixture, on_images: OnImages, names: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Give values of the reference on a few images, one after the other along the first axis."""
    outputs = [f"seen/{name}" for name in names]
    rows: list[dict[str, np.ndarray[Any, Any]]] = []
    for _, beside in on_images.watch(mixture.build((), names), outputs):
        rows.append(beside)
        if len(rows) == _MOST_IMAGES:
            break
    numeric = [name for name in names if rows and rows[0][f"seen/{name}"].dtype.kind == "f"]
    return {name: np.stack([row[f"seen/{name}"] for row in rows]) for name in numeric}


def _look(mixture: Mixture, value: str, seen: np.ndarray[Any, Any], maker: str) -> Evidence | None:
    greatest = float(np.abs(seen).max(initial=0.0))
    scale = _scale(mixture, value)
    if scale is None:
        if _is_half(mixture, value) and greatest > _GREATEST_HALF:
            share = float((np.abs(seen) > _GREATEST_HALF).mean())
            return Evidence(
                "overflow", value, maker, f"up to {greatest:.4g}, above 65504 at {share:.2%} of values", 100 + share
            )
        return None
    step, low, high = scale
    outside = float(((seen < low - step) | (seen > high + step)).mean())
    if outside > _MOST_CLIPPED:
        reach = f"{float(seen.min()):.4g} to {float(seen.max()):.4g}"
        return Evidence(
            "clipped",
            value,
            maker,
            f"{outside:.2%} of values ({reach}) lie outside {low:.4g} to {high:.4g}",
            50 + outside,
        )
    return _uneven(value, seen, maker, step)


def _uneven(value: str, seen: np.ndarray[Any, Any], maker: str, step: float) -> Evidence | None:
    """Compare channels, which share one step: along the second axis of images, the last of rows."""
    axis = 1 if seen.ndim == 4 else seen.ndim - 1  # (N, C, H, W) without the batch of one is (N, C, H, W) here
    ranges = np.abs(seen).max(axis=tuple(other for other in range(seen.ndim) if other != axis))
    usual = float(np.median(ranges))
    worst = int(np.argmax(ranges))
    times = float(ranges[worst]) / usual if usual > 0 else 0.0
    if times >= _OUTLIER:
        detail = (
            f"channel {worst} reaches {float(ranges[worst]):.4g}, {times:.0f} times the usual channel's {usual:.4g}"
        )
        return Evidence("outlier channel", value, maker, f"{detail}; the step is {step:.3g}", 20 + times / 100)
    spread = float(seen.std())
    coarse = step / spread if spread > 0 else 0.0
    if coarse >= _COARSE:
        return Evidence("coarse", value, maker, f"the step is {step:.3g}, {coarse:.0%} of the values' spread", coarse)
    return None


def _weight(mixture: Mixture, node: Any, name: str, mine: np.ndarray[Any, Any]) -> Evidence | None:
    """Compare a weight with what the other version computes with."""
    theirs = _weight_there(mixture, node, list(node.input).index(name))
    if theirs is None or theirs.shape != mine.shape or mine.dtype.kind != "f":
        return None
    size = float(np.abs(mine).max(initial=0.0)) or 1.0
    gap = float(np.abs(mine.astype(np.float64) - theirs).max(initial=0.0)) / size
    if not np.isfinite(theirs).all():
        return Evidence("overflow", name, "", f"a weight of {size:.4g} is infinite in fewer bits", 100)
    if gap <= 0.02:
        return None
    return Evidence("weights", name, "", f"they differ by up to {gap:.1%} of the greatest ({size:.4g})", 10 + gap)


def _weight_there(mixture: Mixture, node: Any, place: int) -> np.ndarray[Any, Any] | None:
    onnx = import_onnx()
    makers = {value: each for each in mixture.other.graph.node for value in each.output}
    raw = mixture.raw_value(node.output[0])
    maker = makers.get(raw) if raw else None
    if maker is None or maker.op_type != node.op_type or place >= len(maker.input):
        return None
    tensors = {tensor.name: tensor for tensor in mixture.other.graph.initializer}
    name = maker.input[place]
    if name in tensors:
        return np.asarray(onnx.numpy_helper.to_array(tensors[name]), np.float64)
    source = makers.get(name)
    if source is None or source.op_type != "DequantizeLinear" or any(each not in tensors for each in source.input):
        return None
    whole, scale, *zero = (np.asarray(onnx.numpy_helper.to_array(tensors[each]), np.float64) for each in source.input)
    axis = next((attribute.i for attribute in source.attribute if attribute.name == "axis"), 1)
    shape = [-1 if other == axis else 1 for other in range(whole.ndim)] if scale.ndim else []
    shift = zero[0].reshape(shape) if zero else 0.0
    return np.asarray((whole - shift) * scale.reshape(shape))


def _scale(mixture: Mixture, value: str) -> tuple[float, float, float] | None:
    """Give the step, least and greatest that a value has behind its quantiser."""
    onnx = import_onnx()
    views = mixture.views(value)
    tensors = {tensor.name: tensor for tensor in mixture.other.graph.initializer}
    for node in mixture.other.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in views and node.input[1] in tensors:
            scale = onnx.numpy_helper.to_array(tensors[node.input[1]])
            zero = onnx.numpy_helper.to_array(tensors[node.input[2]]) if len(node.input) > 2 else np.zeros((), np.uint8)
            if scale.size != 1:
                continue
            kind = np.iinfo(zero.dtype) if zero.dtype.kind in "iu" else np.iinfo(np.int8)
            step, shift = float(scale.ravel()[0]), int(zero.ravel()[0])
            return step, (kind.min - shift) * step, (kind.max - shift) * step
    return None


def _is_half(mixture: Mixture, value: str) -> bool:
    return len(mixture.views(value)) > 1
