"""The end of a detector's graph, walked back from its outputs as far as post-processing may reach."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from detpost.export.surgery import uses_of

if TYPE_CHECKING:
    import onnx

__all__ = ["Tail"]

_MOST_VALUES = 600
# A network computes with these, post-processing does not; the walk ends at what they give.
_LEARNED = {
    *("Conv", "ConvTranspose", "Gemm", "Einsum", "GridSample", "Attention", "MultiHeadAttention", "Loop", "Scan"),
    *("LayerNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"),
    *("Gelu", "Relu", "Erf"),
}
# A constant matrix of 4 x 4 turns (cx, cy, w, h) into corners in some exports; one of a head is larger.
_LARGEST_BOX_MATRIX = 16
# These give a value's numbers in another arrangement, or fewer of them.
_SAME_NUMBERS = {
    *("Identity", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Flatten", "Split", "Gather"),
    *("QuantizeLinear", "DequantizeLinear"),
}
# These make each number of a few, without a network's weights between them: a score stays one.
_OF_A_FEW = {"Concat", "Mul", "Div", "Add", "Sub", "Pow", "Sqrt", "Clip", "Min", "Max", "Where"}
_ACTIVATIONS = {"Sigmoid", "HardSigmoid", "Softmax", "LogSoftmax", "TopK", "ReduceMax", "ArgMax"}


@dataclass(frozen=True)
class Tail:
    """What the outputs are made of.

    Args:
        outputs: names of the graph's outputs.
        distances: how many nodes lie between each value and the nearest output, nearest first.
        makers: the node that makes each value of the main graph.
        users: the nodes that take each value.
    """

    outputs: tuple[str, ...]
    distances: Mapping[str, int]
    makers: Mapping[str, onnx.NodeProto]
    users: Mapping[str, tuple[onnx.NodeProto, ...]]

    @classmethod
    def of(cls, graph: onnx.GraphProto) -> Tail:
        """Walk back from a graph's outputs, breadth first, to where a network computes."""
        makers = {name: node for node in graph.node for name in node.output if name}
        users: dict[str, tuple[onnx.NodeProto, ...]] = {}
        for node in graph.node:
            users |= {name: (*users.get(name, ()), node) for name in uses_of(node)}
        sizes = _constant_sizes(graph)
        outputs = tuple(value.name for value in graph.output)
        distances = dict.fromkeys(outputs, 0)
        waiting = deque(outputs)
        while waiting and len(distances) < _MOST_VALUES:
            name = waiting.popleft()
            node = makers.get(name)
            if node is None or _is_learned(node, sizes):
                continue
            new = [value for value in sorted(uses_of(node)) if value not in distances and value not in sizes]
            distances |= dict.fromkeys(new, distances[name] + 1)
            waiting.extend(new)
        return cls(outputs, distances, makers, users)

    def maker(self, name: str) -> str:
        """Give the operator that makes a value, or what else it is."""
        node = self.makers.get(name)
        return "input" if node is None else node.op_type

    def behind(self, name: str) -> set[str]:
        """Give every value that a value has a part in."""
        waiting, found = [name], {name}
        while waiting:
            for node in self.users.get(waiting.pop(), ()):
                waiting += [output for output in node.output if output not in found]
                found |= {*node.output}
        return found

    def activation_of(self, name: str) -> str | None:
        """Give the operator that made a value's numbers scores, where one did; ``None`` for raw numbers."""
        waiting, seen = [name], {name}
        while waiting:
            node = self.makers.get(waiting.pop())
            if node is not None and node.op_type in _ACTIVATIONS:
                return str(node.op_type)
            if node is not None and node.op_type in _SAME_NUMBERS | _OF_A_FEW:
                sources = node.input if node.op_type in _OF_A_FEW else node.input[:1]
                waiting += [source for source in sources if source not in seen]
                seen |= {*sources}
        return None

    def activation_behind(self, name: str) -> str | None:
        """Give the operator that a value's numbers go into to become scores; ``None`` where there is none."""
        waiting, seen = [name], {name}
        while waiting:
            for node in self.users.get(waiting.pop(), ()):
                if node.op_type in _ACTIVATIONS:
                    return str(node.op_type)
                if node.op_type in _SAME_NUMBERS | {"Concat"}:
                    waiting += [output for output in node.output if output not in seen]
                    seen |= {*node.output}
        return None


def _constant_sizes(graph: onnx.GraphProto) -> dict[str, int]:
    """Give the number of elements of each constant of the main graph."""
    sizes = {tensor.name: prod(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            tensor = next((attribute.t for attribute in node.attribute if attribute.HasField("t")), None)
            sizes |= {node.output[0]: 1 if tensor is None else prod(tensor.dims)}
    return sizes


def _is_learned(node: onnx.NodeProto, constants: Mapping[str, int]) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type in _LEARNED:
        return True
    small = any(constants.get(name, _LARGEST_BOX_MATRIX + 1) <= _LARGEST_BOX_MATRIX for name in node.input)
    return node.op_type == "MatMul" and not small
