"""Stand-ins for ONNX files that someone else exported, and what an attached one must give."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper

from detpost import DetectionPostProcessor

Q, C, SIDE = 20, 7, 8


def foreign(
    logits="pred_logits",
    boxes="pred_boxes",
    batch="batch",
    opset=17,
    ir_version=8,
    dtype=np.float32,
    inner="hidden",
    extra=(),
    classes=C,
):
    """A stand-in for someone's export: images (B, 3, 8, 8) through one matrix product to logits and boxes."""
    generator = np.random.default_rng(0)
    width = Q * (classes + 4)
    weight = generator.normal(size=(3 * SIDE * SIDE, width)).astype(dtype)
    nodes = [
        helper.make_node("Flatten", ["images"], [inner]),
        helper.make_node("MatMul", [inner, "weight"], ["mixed"]),
        helper.make_node("Reshape", ["mixed", "shape"], ["rows"]),
        helper.make_node("Slice", ["rows", "zero", "classes", "axis"], [logits]),
        helper.make_node("Slice", ["rows", "classes", "end", "axis"], ["raw_boxes"]),
        helper.make_node("Sigmoid", ["raw_boxes"], [boxes]),
    ]
    constants = {"shape": [-1, Q, classes + 4], "zero": [0], "classes": [classes], "end": [classes + 4], "axis": [2]}
    initialisers = [numpy_helper.from_array(weight, "weight")]
    initialisers += [numpy_helper.from_array(np.array(v, np.int64), k) for k, v in constants.items()]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    outputs = [(logits, classes), (boxes, 4), *extra]
    for name, _ in extra:
        nodes.append(helper.make_node("Identity", [logits], [name]))
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("images", kind, [batch, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(name, kind, [batch, Q, last]) for name, last in outputs],
        initialisers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="someone")
    model.ir_version = ir_version
    onnx.checker.check_model(model)
    return model


def written(tmp_path, model, name="source.onnx"):
    onnx.save(model, tmp_path / name)
    return tmp_path / name


def run(path, images, sizes, names=None, sizes_name="image_sizes"):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = names or [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images, sizes_name: sizes}), strict=True))


def images_and_sizes(batch, dtype=np.float32):
    generator = np.random.default_rng(1)
    return generator.normal(size=(batch, 3, SIDE, SIDE)).astype(dtype), generator.integers(5, 900, (batch, 2))


def assert_decodes_its_own_raw_outputs(path, batch, spec, dtype=np.float32):
    images, sizes = images_and_sizes(batch, dtype)
    got = run(path, images, sizes)
    raw = [torch.from_numpy(got[name]) for name in ("pred_logits", "pred_boxes")]
    expected = DetectionPostProcessor(spec)(*raw, torch.from_numpy(sizes))
    np.testing.assert_array_equal(got["labels"], expected.labels)
    np.testing.assert_array_equal(got["valid"], expected.valid)
    np.testing.assert_allclose(got["scores"], expected.scores, atol=1e-6)
    np.testing.assert_allclose(got["boxes"], expected.boxes, rtol=1e-5, atol=1e-3)
