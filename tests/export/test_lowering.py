"""Files in fewer bits: what is lowered, what stays, and that the decode is never among it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from detpost.export.lowering import lower, lowerable
from detpost.export.rounded import decode_in_fewer_bits, fewer_bits, written_out
from detpost.export.runtime import onnx_session
from tests.fewer_bits import float_model, on_scenes, ranges


def run(model, inputs):
    return onnx_session(model.SerializeToString()).run(None, inputs)


def stock_int8(model, tmp_path):
    """What ONNX Runtime's quantiser makes of a file when nobody tells it what to leave."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = on_scenes().arrays()

        def get_next(self):
            return next(self.left, None)

    onnx.save(model, tmp_path / "float.onnx")
    quantize_static(tmp_path / "float.onnx", tmp_path / "int8.onnx", Reader(), quant_format=QuantFormat.QDQ)
    return onnx.load(tmp_path / "int8.onnx")


@pytest.mark.parametrize("precision", ["int8", "fp16", "bf16"])
def test_the_decode_stays_float_and_the_network_is_in_fewer_bits(precision):
    model = float_model()
    made = lower(model, precision, ranges=ranges())
    onnx.checker.check_model(made)
    assert precision in fewer_bits(made)
    assert decode_in_fewer_bits(made) == []
    assert not [name for name in lowerable(model, precision) if name.startswith("detpost/")]
    assert list(made.metadata_props) == list(model.metadata_props)
    assert made.ByteSize() < (0.4 if precision == "int8" else 0.62) * model.ByteSize()


def test_stock_tools_put_the_decode_in_fewer_bits_and_it_is_said(tmp_path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = convert_float_to_float16(onnx.ModelProto.FromString(float_model().SerializeToString()), keep_io_types=True)
    assert any(name.startswith("detpost/") for name in decode_in_fewer_bits(half))
    # Told to leave the decode out, the converter still rounds every value between two of its nodes.
    kept = [node.name for node in float_model().graph.node if node.name.startswith("detpost/")]
    copy = onnx.ModelProto.FromString(float_model().SerializeToString())
    assert decode_in_fewer_bits(convert_float_to_float16(copy, keep_io_types=True, node_block_list=kept))
    quantised = decode_in_fewer_bits(stock_int8(float_model(), tmp_path))
    assert quantised
    assert all(name.startswith("detpost/") for name in quantised)


def test_what_is_kept_is_not_touched():
    model = float_model()
    kept = [name for name in lowerable(model, "int8") if "class_embed" in name or "bbox_embed" in name]
    made = lower(model, "int8", ranges=ranges(), float_nodes=kept)
    weights = {tensor.name: tensor for tensor in made.graph.initializer}
    own = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in made.graph.node}
    assert len(kept) >= 6
    for node in (node for node in model.graph.node if node.name in kept):
        name = next(name for name in node.input if name in own)
        assert name in nodes[node.name].input
        assert np.array_equal(numpy_helper.to_array(weights[name]), numpy_helper.to_array(own[name]))


def test_weights_alone_keep_the_arithmetic_float_and_lose_little():
    model = float_model()
    names = lowerable(model, "int8")
    made = lower(model, "int8", ranges=ranges(), weight_nodes=names)
    assert not any(node.op_type == "QuantizeLinear" for node in made.graph.node)
    feed = next(on_scenes().arrays())
    mine, theirs = run(model, feed), run(made, feed)
    assert np.abs(mine[2] - theirs[2]).max() < 0.1
    assert made.ByteSize() < 0.4 * model.ByteSize()


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_has_a_scale_for_each_output(transposed):
    random = np.random.default_rng(0)
    weight = random.standard_normal((6, 4)).astype(np.float32) * np.array([1e-3, 1, 1, 100], np.float32)
    held = weight.T.copy() if transposed else weight
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], "gemm", transB=transposed)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(held, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made = lower(model, "int8", weight_nodes=["gemm"])
    x = random.standard_normal((2, 6)).astype(np.float32)
    expected, found = x @ weight, run(made, {"x": x})[0]
    # Half a step of 1/127 of the column's greatest weight, for each of six products.
    allowed = np.abs(x).sum(axis=1)[:, None] * np.abs(weight).max(axis=0) / 127 / 2
    assert (np.abs(expected - found) <= allowed + 1e-6).all()


def test_a_node_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no node 'nowhere' in the model"):
        lower(float_model(), "fp16", float_nodes=["nowhere"])


def test_half_overflow_passes_through_a_processor_and_not_through_what_is_written_out():
    thousands = numpy_helper.from_array(np.array([1e4], np.float16), "c")
    cast = [helper.make_node("Cast", ["x"], ["a"], "in", to=TensorProto.FLOAT16)]
    body = [helper.make_node("Mul", ["a", "c"], ["b"], "mul"), helper.make_node("Div", ["b", "c"], ["d"], "div")]
    out = [helper.make_node("Cast", ["d"], ["y"], "out", to=TensorProto.FLOAT)]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("x", "y")]
    graph = helper.make_graph([*cast, *body, *out], "half", infos[:1], infos[1:], [thousands])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.array([1, 2, 1000], np.float32)
    followed = written_out(model)
    onnx.checker.check_model(followed, full_check=True)
    assert np.array_equal(run(followed, {"x": x})[0], np.array([1, 2, np.inf], np.float32))
    assert TensorProto.FLOAT16 not in {tensor.data_type for tensor in followed.graph.initializer}


def test_what_is_written_out_of_a_float_graph_is_that_graph():
    model = float_model()
    feed = next(on_scenes().arrays())
    for mine, theirs in zip(run(model, feed), run(written_out(model), feed), strict=True):
        assert np.array_equal(mine, theirs)


def test_bfloat16_is_rounded_to_the_nearest_even():
    from detpost.export.lowering import _bfloat16_bytes

    values = np.array([1.0, 1.00390625, 1.01171875, -2.3, 3e38, 1e-40], np.float32)
    found = np.frombuffer(_bfloat16_bytes(values), np.uint16).astype(np.uint32) << 16
    import torch

    assert np.array_equal(found.view(np.float32), torch.from_numpy(values).bfloat16().float().numpy())
