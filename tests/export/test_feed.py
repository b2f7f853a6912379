"""A file that was attached to knows how images become its inputs, or says that it assumes it."""

import json
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from detpost import DecodeSpec, Detector
from detpost.export import attach, to_openvino
from detpost.export.opened import open_file
from detpost.images import Preprocessing
from detpost.spec import normalisation_of, presets
from detpost.verify import verify
from detpost.zoo import sample_images
from tests.export.foreign import SIDE, foreign, written

IMAGENET = Preprocessing(SIDE, SIDE, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def raw_tiny(tmp_path_factory):
    """The shipped detector as a stranger would export it: its own input name, raw outputs, nothing recorded."""
    from detpost.integrations.transformers import load_detector

    class Raw(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            found = self.model(pixel_values)
            return found.logits, found.pred_boxes

    path = tmp_path_factory.mktemp("raw") / "raw.onnx"
    names = ("pixel_values", "logits", "pred_boxes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Raw(load_detector("tiny").model).eval(),
            (torch.rand(2, 3, 128, 128),),
            str(path),
            input_names=list(names[:1]),
            output_names=list(names[1:]),
            dynamic_axes={name: {0: "batch"} for name in names},
            opset_version=17,
            dynamo=False,
        )
    return path


def preprocessing_of(path):
    return Detector.load(path).preprocessing


def attached(tmp_path, source, **options):
    return attach(source, tmp_path / "out.onnx", **options)


@pytest.mark.parametrize("preset", ["rtdetr", "lwdetr"])
def test_a_file_of_attach_opens_again_and_is_the_detector_it_was_made_of(tmp_path, raw_tiny, preset):
    result = attached(tmp_path, raw_tiny, preset=preset, keep_raw=True)
    # Each of them is normalised as its preset assumes; verify takes the preprocessing of the side that knows it.
    report = verify(result.path, "tiny")
    assert report.ok, str(report)
    assert "prepared as the other side says" in str(report)
    assert sum(check.compared for check in report.checks) > 20
    assert verify("tiny", result.path).ok


def test_a_file_of_attach_finds_what_the_detector_finds(tmp_path, raw_tiny):
    result = attached(tmp_path, raw_tiny)
    assert any("assumed to be 128x128, scaled to 0..1, not normalised" in note for note in result.notes)
    for one, other in zip(
        Detector.load(result.path).predict(sample_images()), Detector.load("tiny").predict(sample_images()), strict=True
    ):
        assert one["labels"].tolist() == other["labels"].tolist()
        assert torch.allclose(one["boxes"], other["boxes"], atol=0.1)


def test_another_formats_copy_of_it_opens_too(tmp_path, raw_tiny):
    result = attached(tmp_path, raw_tiny)
    to_openvino(result.path, tmp_path / "out.xml")
    assert verify(tmp_path / "out.xml", "tiny").ok


def test_what_the_caller_says_comes_before_what_lies_beside_and_that_before_the_preset(tmp_path):
    source = written(tmp_path, foreign())
    assert preprocessing_of(attached(tmp_path, source).path) == Preprocessing(SIDE, SIDE)
    assert preprocessing_of(attached(tmp_path, source, preset="rfdetr").path) == IMAGENET
    beside = {
        "do_normalize": True,
        "do_rescale": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 800, "longest_edge": 1333},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(beside))
    result = attached(tmp_path, source)
    assert preprocessing_of(result.path) == Preprocessing(SIDE, SIDE, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert any("preprocessor_config.json says" in note for note in result.notes)
    assert preprocessing_of(attached(tmp_path, source, preprocessing=IMAGENET).path) == IMAGENET


@pytest.mark.parametrize("text", ["", "[]", '{"size": 5}', "{" * 5000, '{"do_normalize": true, "size": {}}'])
def test_a_config_that_says_too_little_is_passed_over(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_text(text)
    (tmp_path / "config.json").write_text(text)
    result = attached(tmp_path, written(tmp_path, foreign()))
    assert any("assumed" in note for note in result.notes)


def test_a_free_size_takes_the_callers_or_the_usual_one(tmp_path):
    model = foreign()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].Clear()
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "side"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 20
    source = written(tmp_path, model)
    for size, expected in ((None, (640, 640)), ((SIDE, 16), (SIDE, 16))):
        found = preprocessing_of(attached(tmp_path, source, image_size=size).path)
        assert (found.height, found.width) == expected


def test_class_names_are_those_of_the_file_or_its_folder(tmp_path):
    model = foreign()
    model.metadata_props.add(key="names", value="{0: 'person', 1: 'bicycle'}")
    source = written(tmp_path, model)
    assert Detector.load(attached(tmp_path, source).path).class_names == {0: "person", 1: "bicycle"}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "cat", "5": "dog"}}))
    result = attached(tmp_path, source)
    assert Detector.load(result.path).class_names == {0: "cat", 5: "dog"}
    assert Detector.load(attached(tmp_path, source, class_names={1: "x"}).path).class_names == {1: "x"}


def test_half_precision_and_uint8_images_are_fed_as_they_are_taken(tmp_path):
    attach(written(tmp_path, foreign(dtype=np.float16)), tmp_path / "half.onnx")
    model = foreign()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.node[0].input[0] = "floating"
    model.graph.node.insert(0, helper.make_node("Cast", ["images"], ["scaled"], to=TensorProto.FLOAT))
    model.graph.node.insert(1, helper.make_node("Mul", ["scaled", "factor"], ["floating"]))
    model.graph.initializer.append(helper.make_tensor("factor", TensorProto.FLOAT, [], [1 / 255]))
    attach(written(tmp_path, model, "bytes.onnx"), tmp_path / "bytes_out.onnx")
    attach(written(tmp_path, foreign(), "plain.onnx"), tmp_path / "plain_out.onnx")
    found = {
        name: Detector.load(tmp_path / f"{name}.onnx", threshold=0.0).predict(sample_images()[0])[0]
        for name in ("half", "bytes_out", "plain_out")
    }
    assert found["bytes_out"]["labels"].tolist() == found["plain_out"]["labels"].tolist()
    assert torch.allclose(found["half"]["scores"], found["plain_out"]["scores"], atol=0.05)


def test_a_mask_of_padding_is_fed_with_ones(tmp_path):
    model = foreign()
    mask = helper.make_tensor_value_info("pixel_mask", TensorProto.INT64, ["batch", SIDE, "width"])
    model.graph.input.append(mask)
    for node in model.graph.node:
        if node.output[0] == "pred_logits":
            node.output[0] = "unmasked"
    model.graph.node.extend(
        [
            helper.make_node("ReduceMin", ["pixel_mask"], ["least"], axes=[1, 2], keepdims=1),
            helper.make_node("Cast", ["least"], ["factor"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["unmasked", "factor"], ["pred_logits"]),
        ]
    )
    attach(written(tmp_path, model, "masked.onnx"), tmp_path / "masked_out.onnx")
    attach(written(tmp_path, foreign()), tmp_path / "plain_out.onnx")
    one, other = (
        Detector.load(tmp_path / f"{name}_out.onnx", threshold=0.0).predict(sample_images()[:2])
        for name in ("masked", "plain")
    )
    assert [image["labels"].tolist() for image in one] == [image["labels"].tolist() for image in other]


def test_inputs_that_nobody_can_fill_are_named(tmp_path):
    model = foreign()
    model.graph.input.append(helper.make_tensor_value_info("prompt", TensorProto.FLOAT, ["batch", 5]))
    model.graph.node.append(helper.make_node("ReduceSum", ["prompt"], ["nothing"], keepdims=0))
    for node in model.graph.node:
        if node.output[0] == "pred_logits":
            node.output[0] = "alone"
    model.graph.node.append(helper.make_node("Add", ["alone", "nothing"], ["pred_logits"]))
    result = attached(tmp_path, written(tmp_path, model))
    assert any("cannot feed this file: what its input 'prompt' wants is not known" in note for note in result.notes)
    with pytest.raises(ValueError, match="not a whole detector") as error:
        Detector.load(result.path)
    assert "prompt" in str(error.value)


def test_a_file_of_the_first_version_that_says_nothing_of_images_is_refused_in_one_line(tmp_path):
    result = attached(tmp_path, written(tmp_path, foreign()))
    model = onnx.load(result.path)
    kept = [p for p in model.metadata_props if p.key.removeprefix("detpost.") in ("spec", "io", "class_names", "ties")]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, result.path)
    for use in (Detector.load, lambda path: verify(path, "tiny")):
        with pytest.raises(ValueError, match="does not say how images become its input: write it again"):
            use(result.path)


def test_every_preset_says_how_its_detectors_were_trained(tmp_path):
    source = written(tmp_path, foreign())
    for preset in presets():
        result = attach(source, tmp_path / "out.onnx", DecodeSpec(), preset=preset)
        (said,) = [note for note in result.notes if "assumed" in note]
        assert f"as for {preset}: say so" in said
        assert open_file(result.path).metadata["preset"] == preset
        mean, std = preprocessing_of(result.path).mean, preprocessing_of(result.path).std
        assert (mean, std) == normalisation_of(preset)
        assert ("not normalised" in said) == (mean == (0, 0, 0))


def test_presets_that_decode_alike_and_were_trained_otherwise_are_named(tmp_path):
    source = written(tmp_path, foreign())
    notes = attach(source, tmp_path / "out.onnx", DecodeSpec.preset("deformable_detr")).notes
    assert any("as for rtdetr: lwdetr, deformable_detr, conditional_detr, dab_detr decode alike" in n for n in notes)
    assert not any("decode alike" in note for note in attach(source, tmp_path / "out.onnx").notes)
    assert not any("decode alike" in n for n in attach(source, tmp_path / "out.onnx", DecodeSpec(clip=True)).notes)


def test_what_detpost_recorded_in_a_source_is_kept(tmp_path):
    first = attach(written(tmp_path, foreign()), tmp_path / "first.onnx", preprocessing=IMAGENET, keep_raw=True)
    again = attached(tmp_path, first.path, preset="rtdetr")
    assert preprocessing_of(again.path) == IMAGENET
    assert any("as the source says" in note for note in again.notes)
