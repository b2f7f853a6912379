"""A small vocabulary for ONNX graphs that are written and not traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

__all__ = ["Graph", "Value", "import_onnx"]

Value = str
"""A tensor of the graph, by its name."""

Operand = Value | float | int | NDArray[Any]
"""What a node takes: a value, a number (a float is float32, an int is int32), or an array as it is."""


class Graph:
    """Nodes and constants in the order of writing.

    Names tell where a node comes from: ``detpost/select/TopK_2`` is the second TopK of the part ``select``. Equal
    constants are held once. The methods hide what the operator sets write differently: axes are attributes in some
    and inputs in others.

    Args:
        opset: version of the default operator set, 11 or later.
        prefix: begins every name.
    """

    def __init__(self, opset: int, prefix: str = "detpost/") -> None:
        self.opset = opset
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._onnx = import_onnx()
        self._known: dict[tuple[bytes, str, tuple[int, ...]], Value] = {}
        self._counts: dict[str, int] = {}
        self._part = ""

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name the nodes written inside after a part of the whole."""
        outside = self._part
        self._part = f"{name}/"
        try:
            yield
        finally:
            self._part = outside

    def constant(self, value: float | int | Sequence[int] | NDArray[Any]) -> Value:
        """Hold a constant: a float as float32, an int as int32, a sequence of ints as int64 (shapes and axes)."""
        array = _as_array(value)
        key = (array.tobytes(), array.dtype.str, array.shape)
        if key not in self._known:
            name = f"{self.prefix}constant_{len(self._known)}"
            self.constants.append(self._onnx.numpy_helper.from_array(array, name))
            self._known[key] = name
        return self._known[key]

    def nodes_of(self, operator: str, *operands: Operand, outputs: int, **attributes: Any) -> list[Value]:
        """Write a node with several outputs."""
        inputs = [operand if isinstance(operand, str) else self.constant(operand) for operand in operands]
        place = f"{self.prefix}{self._part}{operator}"
        count = self._counts[place] = self._counts.get(place, 0) + 1
        name = f"{place}_{count}"
        values = [name] if outputs == 1 else [f"{name}:{i}" for i in range(outputs)]
        self.nodes.append(self._onnx.helper.make_node(operator, inputs, values, name=name, **attributes))
        return values

    def node(self, operator: str, *operands: Operand, **attributes: Any) -> Value:
        """Write a node with one output."""
        return self.nodes_of(operator, *operands, outputs=1, **attributes)[0]

    def cast(self, value: Value, kind: str) -> Value:
        """Convert to ``"FLOAT"``, ``"INT32"`` or ``"INT64"``."""
        return self.node("Cast", value, to=self._onnx.TensorProto.DataType.Value(kind))

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """Reshape; 0 keeps a dimension, -1 is what is left."""
        return self.node("Reshape", value, self.constant(shape))

    def unsqueeze(self, value: Value, axis: int) -> Value:
        """Put a dimension of 1 in."""
        return self._with_axis("Unsqueeze", value, axis, 13)

    def greatest(self, value: Value, axis: int, keep: bool = False) -> Value:
        """Reduce an axis to its greatest value. OpenVINO gives the lowest finite number where all are -inf."""
        return self._with_axis("ReduceMax", value, axis, 18, keepdims=int(keep))

    def least(self, value: Value, axis: int, keep: bool = False) -> Value:
        """Reduce an axis to its least value."""
        return self._with_axis("ReduceMin", value, axis, 18, keepdims=int(keep))

    def sum(self, value: Value, axis: int, keep: bool = False) -> Value:
        """Reduce an axis to its sum."""
        return self._with_axis("ReduceSum", value, axis, 13, keepdims=int(keep))

    def halves(self, value: Value, axis: int, size: int) -> list[Value]:
        """Split an axis of ``size`` into two equal parts."""
        parts = [size // 2] * 2
        if self.opset < 13:
            return self.nodes_of("Split", value, outputs=2, axis=axis, split=parts)
        return self.nodes_of("Split", value, self.constant(parts), outputs=2, axis=axis)

    def top_k(self, value: Value, k: int) -> tuple[Value, Value]:
        """Take the k greatest of each row (B, N), sorted: values and indices (B, k), int64."""
        values, indices = self.nodes_of("TopK", value, self.constant([k]), outputs=2, axis=1)
        return values, indices

    def gather_rows(self, value: Value, places: Value) -> Value:
        """Gather along the last dimension of (B, N) by (B, k)."""
        return self.node("GatherElements", value, places, axis=1)

    def indicator(self, condition: Value) -> Value:
        """Give 1.0 where a condition holds, else 0.0."""
        return self.cast(condition, "FLOAT")

    def identity(self, value: Value, name: str) -> onnx.NodeProto:
        """Make a node that gives a value another name; it is not written."""
        node: onnx.NodeProto = self._onnx.helper.make_node("Identity", [value], [name], name=f"{self.prefix}Identity")
        return node

    def rename(self, names: dict[Value, str]) -> None:
        """Give values other names, as those of the graph's outputs."""
        for node in self.nodes:
            for values in (node.input, node.output):
                replaced = [names.get(value, value) for value in values]
                del values[:]
                values.extend(replaced)

    def drop_unused(self, outputs: Sequence[str]) -> None:
        """Drop nodes and constants that no output needs: a layout may leave a part of the detections out."""
        used = {*outputs}
        kept = []
        for node in reversed(self.nodes):
            if used & {*node.output}:
                kept.append(node)
                used |= {*node.input}
        self.nodes = kept[::-1]
        self.constants = [tensor for tensor in self.constants if tensor.name in used]

    def _with_axis(self, operator: str, value: Value, axis: int, as_input_from: int, **attributes: Any) -> Value:
        if self.opset >= as_input_from:
            return self.node(operator, value, self.constant([axis]), **attributes)
        return self.node(operator, value, axes=[axis], **attributes)


def _as_array(value: float | int | Sequence[int] | NDArray[Any]) -> NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, float):
        return np.array(value, np.float32)
    return np.array(value, np.int32 if isinstance(value, int) else np.int64)


def import_onnx() -> Any:
    """Import onnx with the submodules used here, or say which extra to install."""
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.inliner
        import onnx.numpy_helper
        import onnx.shape_inference
        import onnx.version_converter
    except ImportError:
        raise ImportError("ONNX export needs onnx: pip install 'detpost[onnx]'") from None
    return onnx
