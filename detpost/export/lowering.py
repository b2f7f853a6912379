"""Detectors in fewer bits: ONNX Runtime's quantiser and half converter do the work, told what stays float."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from detpost.export.graph import import_onnx
from detpost.export.rounded import is_decode, value_types
from detpost.export.surgery import cut_behind, in_order, uses_of
from detpost.export.weights import inner_graphs

if TYPE_CHECKING:
    import onnx

__all__ = ["PRECISIONS", "Precision", "Ranges", "calibrate", "lower", "lowerable", "prepared"]

Precision = Literal["int8", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("int8", "fp16", "bf16")
Ranges = Mapping[str, tuple[float, float]]
"""The least and the greatest of each value on the calibration images."""

_QUANTISED = ("Conv", "MatMul", "Gemm")
# What has no half form, or takes whole numbers that halves above 2,048 do not hold.
_NEVER_HALF = frozenset(("TopK", "NonMaxSuppression", "Range", "CumSum", "Constant", "Shape", "Resize", "RoiAlign"))
_LEAST_OPSET = 13  # DequantizeLinear along an axis
# Where a node is in the network, for people and for `diagnose`; the rest is for PyTorch's exporter alone.
_KEPT_NOTES = frozenset(("namespace", "pkg.torch.onnx.name_scopes"))


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a copy that the quantisers can read: constants as weights, weights by their own names, shapes inferred.

    Nodes and values keep their names.
    """
    onnx = import_onnx()
    fresh = onnx.ModelProto()
    fresh.CopyFrom(model)
    graph = fresh.graph
    weights = {tensor.name for tensor in graph.initializer}
    other_name: dict[str, str] = {}
    edges = {value.name for value in graph.output}
    held = {name for node in graph.node for inner in inner_graphs(node) for name in uses_of_graph(inner)}
    nodes = []
    for node in graph.node:
        inputs = [other_name.get(name, name) for name in node.input]
        del node.input[:]
        node.input.extend(inputs)
        movable = node.output[0] not in edges | held
        if node.op_type == "Constant" and movable and node.attribute[0].name == "value":
            graph.initializer.add().CopyFrom(node.attribute[0].t)
            graph.initializer[-1].name = node.output[0]
            weights.add(node.output[0])
        elif node.op_type == "Identity" and movable and node.input[0] in weights:
            other_name.update({node.output[0]: node.input[0]})
        else:
            _drop_notes(node)
            nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    with contextlib.suppress(onnx.shape_inference.InferenceError, ValueError):
        fresh = onnx.shape_inference.infer_shapes(fresh)
    return fresh


def uses_of_graph(graph: onnx.GraphProto) -> set[str]:
    """Give the values that the nodes of an inner graph name."""
    return {name for node in graph.node for name in uses_of(node)} | {value.name for value in graph.output}


def lowerable(model: onnx.ModelProto, precision: Precision) -> tuple[str, ...]:
    """Name the nodes of the network that may be in fewer bits, in the order of the graph; never one of the decode.

    Args:
        model: of :func:`prepared`.
        precision: what they would be in.
    """
    onnx = import_onnx()
    types = value_types(model)
    raw = {name for node in model.graph.node if is_decode(node) for name in uses_of(node)}
    found = []
    for node in model.graph.node:
        if precision != "int8" and raw & {*node.output}:
            # Raw values have two readers, the decode and perhaps an output, and a runtime that computes half nodes in
            # float32 would round for one and not for the other; in half, boxes would move by pixels besides.
            continue
        floating = any(types.get(name) == onnx.TensorProto.FLOAT for name in node.output)
        if is_decode(node) or not node.name or not floating or inner_graphs(node):
            continue
        if node.op_type in _QUANTISED if precision == "int8" else node.op_type not in _NEVER_HALF:
            found.append(node.name)
    return tuple(found)


def calibrate(model: onnx.ModelProto, batches: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Run the model on images and note the range of each value that a quantised node takes or gives.

    Args:
        model: of :func:`prepared`.
        batches: what the model takes: a NumPy array for each input.

    Returns:
        The least and greatest of each value.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> Any:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory(prefix="detpost-") as folder, _quiet():
        path = Path(folder) / "float.onnx"
        import_onnx().save_model(model, path)
        calibrator = create_calibrator(
            path, list(_QUANTISED), str(path.with_name("seen.onnx")), calibrate_method=CalibrationMethod.MinMax
        )
        calibrator.collect_data(Reader())
        found = calibrator.compute_data()
    ends = {name: [float(np.asarray(end).ravel()[0]) for end in data.range_value] for name, data in found.items()}
    return {name: (low, high) for name, (low, high) in ends.items()}


def lower(
    model: onnx.ModelProto,
    precision: Precision,
    *,
    float_nodes: Iterable[str] = (),
    weight_nodes: Iterable[str] = (),
    ranges: Ranges | None = None,
    symmetric: bool = False,
) -> onnx.ModelProto:
    """Write a model in fewer bits.

    Args:
        model: of :func:`prepared`; unchanged.
        precision: ``"int8"``: QDQ by ONNX Runtime's quantiser, weights in 7 of their 8 bits, per channel, activations
            uint8, so that no processor's sums of products overflow; ``"fp16"``: by ONNX Runtime's converter;
            ``"bf16"``: weights stored so, every value rounded by a pair of casts, computed in float32.
        float_nodes: nodes that stay float32.
        weight_nodes: with int8, nodes whose weights are int8 and whose arithmetic is float32.
        ranges: of :func:`calibrate`, for int8.
        symmetric: with int8, zero points of 0, int8 activations and all 8 bits of weights: what TensorRT takes.

    Returns:
        The model, its metadata kept. The decode is float32.

    Raises:
        ValueError: an operator set that has no scales per channel, or names of no node.
    """
    kept = {*float_nodes, *weight_nodes}
    names = {node.name for node in model.graph.node}
    if kept - names:
        raise ValueError(f"no node {sorted(kept - names)[0]!r} in the model: `detpost diagnose` names them")
    stay = kept | (names - {"", *lowerable(model, precision)})
    if precision == "int8":
        return _weights_alone(_int8(model, ranges or {}, stay, symmetric), [name for name in weight_nodes if name])
    return _fp16(model, stay) if precision == "fp16" else _bf16(model, stay)


def _int8(model: onnx.ModelProto, ranges: Ranges, stay: set[str], symmetric: bool) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    onnx = import_onnx()
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < _LEAST_OPSET:
        raise ValueError(f"int8 per channel needs operator set {_LEAST_OPSET} or later, the file has {opset}")
    known = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    fresh = onnx.ModelProto()
    fresh.CopyFrom(model)
    with _quiet():
        quantizer = QDQQuantizer(
            fresh,
            True,
            # Without instructions for it, processors add pairs of products in 16 bits: 8 whole bits overflow there.
            not symmetric,
            QuantType.QInt8,
            QuantType.QInt8 if symmetric else QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, known),
            [],
            sorted(stay),
            list(_QUANTISED),
            {"ActivationSymmetric": symmetric, "WeightSymmetric": True},
        )
        quantizer.quantize_model()
    return _tidy(quantizer.model.model, model)


def _fp16(model: onnx.ModelProto, stay: set[str]) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    fresh = import_onnx().ModelProto()
    fresh.CopyFrom(model)
    with _quiet():
        made = convert_float_to_float16(
            fresh, keep_io_types=True, node_block_list=sorted(stay), op_block_list=sorted(_NEVER_HALF)
        )
    return _tidy(_without_detours(made), model)


def _without_detours(model: onnx.ModelProto) -> onnx.ModelProto:
    """Hand values from one float node to the next as they are: the converter sends them through half in between."""
    onnx = import_onnx()
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    casts = {
        node.output[0]: (node.input[0], next(a.i for a in node.attribute if a.name == "to"))
        for node in model.graph.node
        if node.op_type == "Cast"
    }
    float_before = {
        name: casts[source][0]
        for name, (source, kind) in casts.items()
        if kind == full and source in casts and casts[source][1] == half and casts[source][0].endswith("_cast_to_fp16")
    }
    edges = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if node.output[0] in float_before.keys() & edges:
            node.CopyFrom(onnx.helper.make_node("Identity", [float_before[node.output[0]]], node.output, node.name))
            continue
        inputs = [float_before.get(name, name) for name in node.input]
        del node.input[:]
        node.input.extend(inputs)
    return model


def _bf16(model: onnx.ModelProto, stay: set[str]) -> onnx.ModelProto:
    """Store weights as bfloat16 and round every value of the nodes to it: runtimes have few kernels for more."""
    onnx = import_onnx()
    kind = onnx.TensorProto.BFLOAT16
    fresh = onnx.ModelProto()
    fresh.CopyFrom(model)
    graph = fresh.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    edges = {value.name for value in graph.output}
    float_readers = {name for node in graph.node if node.name in stay or not node.name for name in uses_of(node)}
    low = {name for node in graph.node if node.name and node.name not in stay for name in node.input} & weights.keys()
    low -= float_readers
    nodes = [onnx.helper.make_node("Cast", [name + "_bf16"], [name], name + "_bf16_cast", to=1) for name in sorted(low)]
    for node in graph.node:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        nodes.append(copy)
        if not node.name or node.name in stay:
            continue
        for place, name in enumerate(node.output):
            if name in edges or not name:
                continue
            raw = copy.output[place] = f"{name}_unrounded"
            nodes.append(onnx.helper.make_node("Cast", [raw], [f"{name}_bf16"], f"{name}_bf16_there", to=kind))
            nodes.append(onnx.helper.make_node("Cast", [f"{name}_bf16"], [name], f"{name}_bf16_back", to=1))
    for name in low:
        array = onnx.numpy_helper.to_array(weights[name])
        halved = onnx.helper.make_tensor(name + "_bf16", kind, weights[name].dims, _bfloat16_bytes(array), raw=True)
        weights[name].CopyFrom(halved)
    del graph.node[:]
    graph.node.extend(nodes)
    return _tidy(fresh, model)


def _bfloat16_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """Round float32 to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2").tobytes()


def _weights_alone(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Store the weights of float nodes as int8 with a scale per output channel; they are made float when read."""
    helpers = import_onnx()
    wanted = set(names)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in uses_of(node):
            readers.setdefault(name, []).append(node)
    added = []
    for node in [node for node in graph.node if node.name in wanted]:
        place = next((place for place in (1, 0) if node.input[place] in weights), None)
        if place is None:
            continue
        name = node.input[place]
        tensor = weights[name]
        if len(tensor.dims) < 2 or any(reader.name not in wanted for reader in readers[name]):
            continue
        axis = _channel_axis(node, len(tensor.dims), place)
        array = helpers.numpy_helper.to_array(tensor)
        others = tuple(other for other in range(array.ndim) if other != axis)
        scale = np.maximum(np.abs(array).max(axis=others), np.finfo(np.float32).tiny * 127) / np.float32(127)
        shape = [-1 if other == axis else 1 for other in range(array.ndim)]
        whole = np.clip(np.rint(array / scale.reshape(shape)), -127, 127).astype(np.int8)
        tensor.CopyFrom(helpers.numpy_helper.from_array(whole, f"{name}_int8"))
        graph.initializer.add().CopyFrom(
            helpers.numpy_helper.from_array(scale.astype(np.float32), f"{name}_int8_scale")
        )
        inputs = [f"{name}_int8", f"{name}_int8_scale"]
        added.append(helpers.helper.make_node("DequantizeLinear", inputs, [name], f"{name}_weights", axis=axis))
        weights.pop(name)
    nodes = [helpers.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*added, *nodes])
    return model


def _channel_axis(node: onnx.NodeProto, dims: int, place: int) -> int:
    """Give the axis of a weight along which a node's outputs lie."""
    if node.op_type == "Conv":
        return 0
    transposed = node.op_type == "Gemm" and any(
        a.name == ("transB", "transA")[1 - place] and a.i for a in node.attribute
    )
    last = dims - 1 if place == 1 else dims - 2
    return (dims - 1 - last) if transposed else last


def _tidy(made: onnx.ModelProto, source: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what nothing needs any more, and give the file the metadata and names that it had."""
    onnx = import_onnx()
    outputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in source.graph.output]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in in_order(made.graph.node)]
    del made.graph.node[:], made.graph.value_info[:]
    made.graph.node.extend(nodes)
    cut_behind(made, [value.name for value in outputs])
    made.graph.output.extend(outputs)
    del made.metadata_props[:]
    made.metadata_props.extend(source.metadata_props)
    made.producer_name, made.producer_version = source.producer_name, source.producer_version
    return made


def _drop_notes(node: onnx.NodeProto) -> None:
    kept = [(entry.key, entry.value) for entry in node.metadata_props if entry.key in _KEPT_NOTES]
    del node.metadata_props[:]
    for key, value in kept:
        node.metadata_props.add(key=key, value=value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's advice, which it gives on the root logger, off the terminal."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
