"""The tiny detector as a float file and scenes for it: made once for all tests of fewer bits."""

from __future__ import annotations

import functools
import importlib
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from PIL import Image

from detpost.export import to_onnx
from detpost.export.lowering import calibrate, lower, lowerable, prepared
from detpost.verify.on_images import OnImages


@functools.cache
def folder() -> Path:
    """Where everything lies until the tests end."""
    keeper = tempfile.TemporaryDirectory(prefix="detpost-tests-")
    _KEEPERS.append(keeper)
    return Path(keeper.name)


_KEEPERS: list[tempfile.TemporaryDirectory] = []


@functools.cache
def tiny_file() -> Path:
    return to_onnx("tiny", folder() / "tiny.onnx", exporter="torchscript").path


@functools.cache
def scenes(count: int = 12) -> tuple[Path, ...]:
    """Scenes of test digits, all of one size, with their ground truth beside them as ``truth.json``."""
    digit_scenes = importlib.import_module("scripts.digit_scenes")
    random = np.random.default_rng(7)
    place = folder() / f"scenes{count}"
    place.mkdir()
    made = [digit_scenes.compose(random, digit_scenes.split_digits()[1], (128, 128)) for _ in range(count)]
    names = [f"{number:03}.png" for number in range(count)]
    for scene, name in zip(made, names, strict=True):
        Image.fromarray(scene.image).save(place / name)
    (place / "truth.json").write_text(json.dumps(digit_scenes.coco_ground_truth(made, names)))
    return tuple(place / name for name in names)


@functools.cache
def float_model() -> onnx.ModelProto:
    return prepared(onnx.load(tiny_file()))


@functools.cache
def on_scenes() -> OnImages:
    return OnImages(tiny_file(), scenes())


@functools.cache
def ranges() -> dict[str, tuple[float, float]]:
    return calibrate(float_model(), on_scenes().arrays())


def planted(kind: str) -> tuple[onnx.ModelProto, onnx.ModelProto, set[str]]:
    """A float model with a fault that fewer bits bring out, its version in fewer bits, and who may be blamed."""
    model = onnx.ModelProto.FromString(float_model().SerializeToString())
    return _FAULTS[kind](model)


def _find(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def _lower_around(model, precision, module, seen):
    """Put one part of the network in fewer bits: a search among fewer nodes is as hard, and over sooner."""
    kept = [name for name in lowerable(model, precision) if module not in name and "planted" not in name]
    return lower(model, precision, ranges=seen, float_nodes=kept)


def _overflow(model):
    """A LayerNormalization that is fed 100,000 times what it was: the same numbers come out of it, in float32."""
    norm = _find(model, "/model/model/decoder/layers.0/encoder_attn_layer_norm/LayerNormalization")
    place = [node.name for node in model.graph.node].index(norm.name)
    model.graph.initializer.append(numpy_helper.from_array(np.array(1e5, np.float32), "planted"))
    scaled = onnx.helper.make_node("Mul", [norm.input[0], "planted"], ["planted_out"], "planted/Mul")
    norm.input[0] = "planted_out"
    model.graph.node.insert(place, scaled)
    model = prepared(model)
    return model, _lower_around(model, "fp16", "decoder/layers.0/", {}), {"planted/Mul", norm.name}


def _saturated(model):
    """Attention scores whose range is a thousandth of what it should be."""
    scores = _find(model, "/model/model/decoder/layers.0/self_attn/MatMul")
    narrow = {scores.output[0]: tuple(end / 1000 for end in ranges()[scores.output[0]])}
    softmax = next(node.name for node in model.graph.node if scores.output[0] in node.input)
    return (
        model,
        _lower_around(model, "int8", "decoder/layers.0/self_attn/", {**ranges(), **narrow}),
        {scores.name, softmax},
    )


def _clipped(model):
    """A box head that a Clip was put behind."""
    head = _find(model, "/model/model/decoder/bbox_embed.1/layers.2/MatMul")
    other = onnx.ModelProto.FromString(model.SerializeToString())
    copy = _find(other, head.name)
    place = [node.name for node in other.graph.node].index(head.name) + 1
    copy.output[0] = "before"
    bounds = [
        numpy_helper.from_array(np.array(end, np.float32), name) for end, name in ((-0.02, "low"), (0.02, "high"))
    ]
    other.graph.initializer.extend(bounds)
    clip = onnx.helper.make_node("Clip", ["before", "low", "high"], [head.output[0]], "planted/Clip")
    other.graph.node.insert(place, clip)
    return model, other, {head.name}


def _outlier(model):
    """A channel that is 500 times as large, and divided by as much where it is read."""
    from detpost.verify.on_images import OnImages

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    convs = [node for node in model.graph.node if node.op_type == "Conv" and "embedder" in node.name]
    one, two = convs[0], convs[1]  # with a Relu between, which a factor passes through
    for name, factor, axis in ((one.input[1], 500, 0), (one.input[2], 500, 0), (two.input[1], 1 / 500, 1)):
        array = numpy_helper.to_array(weights[name]).copy()
        index = (slice(None),) * axis + (3,)
        array[index] *= factor
        weights[name].CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, folder() / "outlier.onnx")
    seen = calibrate(model, OnImages(folder() / "outlier.onnx", scenes()).arrays())
    relu = next(node.name for node in model.graph.node if one.output[0] in node.input)
    return model, _lower_around(model, "int8", "embedder/", seen), {one.name, relu, two.name}


_FAULTS = {"overflow": _overflow, "saturated": _saturated, "clipped": _clipped, "outlier channel": _outlier}
