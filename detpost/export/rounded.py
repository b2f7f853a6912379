"""Graphs in fewer bits as float graphs that say where they round: what is half, what is quantised, by the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from detpost.export.graph import import_onnx
from detpost.export.weights import inner_graphs

if TYPE_CHECKING:
    import onnx

__all__ = ["ROUNDED", "decode_in_fewer_bits", "decode_warning", "fewer_bits", "is_decode", "value_types", "written_out"]

ROUNDED = "rounded/"
"""Begins the names of the casts that :func:`written_out` adds."""

_QUANTISED = frozenset(
    ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv")
)
# Copies and reads of shapes keep every bit of a half value; so does a comparison.
_NOT_ARITHMETIC = frozenset(("Cast", "Identity", "Shape", "Constant"))


def is_decode(node: onnx.NodeProto) -> bool:
    """Tell whether a node is of the post-processing: the decode's nodes bear its name, and so do their values."""
    return node.name.startswith("detpost/") or any(name.startswith("detpost/") for name in node.output)


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Give the element type of every value of the main graph whose type can be inferred."""
    onnx = import_onnx()
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph
    except (onnx.shape_inference.InferenceError, ValueError):  # above 2 GB, or operators of unknown domains
        inferred = model.graph
    found = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for values in (inferred.input, inferred.value_info, inferred.output):
        found |= {value.name: value.type.tensor_type.elem_type for value in values}
    return {name: kind for name, kind in found.items() if kind}


def fewer_bits(model: onnx.ModelProto) -> tuple[str, ...]:
    """Say in which fewer bits parts of a model are: some of ``int8``, ``fp16`` and ``bf16``."""
    onnx = import_onnx()
    kinds = {*value_types(model).values()}
    operators = {node.op_type for node in model.graph.node}
    found = ["int8"] if any(name in _QUANTISED or name.startswith("QLinear") for name in operators) else []
    found += ["fp16"] if onnx.TensorProto.FLOAT16 in kinds else []
    return (*found, *(["bf16"] if onnx.TensorProto.BFLOAT16 in kinds else []))


def decode_in_fewer_bits(model: onnx.ModelProto) -> list[str]:
    """Find nodes of the decode that compute on quantised or half values.

    Args:
        model: a whole file, with detpost's decode in it.

    Returns:
        Their names, in the order of the graph. A cast from half to float32 is none: it is exact.
    """
    onnx = import_onnx()
    half = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    types = value_types(model)
    found = []
    for node in model.graph.node:
        if not is_decode(node):
            continue
        # A cast from half is exact; one to half rounds, as a converter leaves them between nodes that it is to keep.
        touched = node.output if node.op_type in _NOT_ARITHMETIC else (*node.input, *node.output)
        if node.op_type in _QUANTISED or any(types.get(name) in half for name in touched):
            found.append(node.name or node.output[0])
    return found


def decode_warning(nodes: Sequence[str]) -> str:
    """Say of a file whose decode is in fewer bits what that means, and the way out."""
    return (
        f"{len(nodes)} nodes of the decode are quantised or half ({nodes[0]}, ...), so boxes may move by pixels: leave "
        "the nodes named detpost/... out, as `detpost quantize` does"
    )


def written_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a half graph as a float32 graph in which every half value is rounded by a pair of casts.

    ONNX Runtime has few half kernels on a CPU: it computes half nodes in float32 and leaves out roundings in between,
    so that a value above 65,504 passes through it that is infinite on a GPU. The pairs are kept by it.

    Args:
        model: any model; one without half values in its main graph is given back as a copy.

    Returns:
        The float32 graph. Values keep their names; ``rounded/NAME`` is ``NAME`` after rounding.

    Raises:
        ValueError: half values inside a branch or loop, which nobody here can follow.
    """
    onnx = import_onnx()
    half = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    types = value_types(model)
    fresh = onnx.ModelProto()
    fresh.CopyFrom(model)
    if not any(kind in half for kind in types.values()):
        return fresh
    graph = fresh.graph
    if any(inner_graphs(node) for node in graph.node):
        raise ValueError("a half graph with branches or loops cannot be followed: give the float file to both sides")
    edges = {value.name for value in (*graph.input, *graph.output)}
    seen: dict[str, str] = {}  # a half value to what its readers take
    nodes = []
    for value in graph.input:
        if types.get(value.name) in half:
            nodes += _pair(value.name, value.name, types[value.name], seen, from_half=True)
    for node in graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        _read(copy, seen)
        _make_attributes_float(copy, half)
        nodes.append(copy)
        for place, name in enumerate(node.output):
            if types.get(name) not in half:
                continue
            raw = name
            if name in edges:  # an output of the file keeps its half type: its float value gets a name beside it
                raw = f"{ROUNDED}raw/{name}"
                copy.output[place] = raw
            nodes += _pair(raw, name, types[name], seen)
            if name in edges:
                nodes.append(
                    onnx.helper.make_node("Cast", [seen[name]], [name], f"{ROUNDED}{name}/out", to=types[name])
                )
    _replace(graph.node, nodes)
    _replace(graph.initializer, [_as_float(tensor, half) for tensor in graph.initializer])
    del graph.value_info[:]
    return fresh


def _pair(raw: str, name: str, kind: int, seen: dict[str, str], from_half: bool = False) -> list[onnx.NodeProto]:
    """Make the casts to the half type and back; of a value that is half already, the one back."""
    onnx = import_onnx()
    back = f"{ROUNDED}{name}"
    low = raw if from_half else f"{ROUNDED}{name}/low"
    seen.update({name: back})
    there = [] if from_half else [onnx.helper.make_node("Cast", [raw], [low], f"{ROUNDED}{name}/there", to=kind)]
    return [*there, onnx.helper.make_node("Cast", [low], [back], f"{ROUNDED}{name}/back", to=onnx.TensorProto.FLOAT)]


def _read(node: onnx.NodeProto, seen: dict[str, str]) -> None:
    replaced = [seen.get(name, name) for name in node.input]
    del node.input[:]
    node.input.extend(replaced)


def _make_attributes_float(node: onnx.NodeProto, half: tuple[int, ...]) -> None:
    onnx = import_onnx()
    for attribute in node.attribute:
        if attribute.HasField("t") and attribute.t.data_type in half:
            attribute.t.CopyFrom(_as_float(attribute.t, half))
        if node.op_type in ("Cast", "RandomNormalLike") and attribute.name in ("to", "dtype") and attribute.i in half:
            attribute.i = onnx.TensorProto.FLOAT


def _as_float(tensor: onnx.TensorProto, half: tuple[int, ...]) -> onnx.TensorProto:
    onnx = import_onnx()
    if tensor.data_type not in half:
        return tensor
    import numpy as np

    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _replace(field: object, values: list[object]) -> None:
    copies = list(values)
    del field[:]  # type: ignore[attr-defined]
    field.extend(copies)  # type: ignore[attr-defined]
