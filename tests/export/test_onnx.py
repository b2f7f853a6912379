"""Whole detectors and bare decodes to ONNX."""

import io
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import detpost.export.onnx as module
from detpost import DecodeSpec, DetectionPostProcessor
from detpost.export import open_openvino, to_onnx, to_openvino
from detpost.export.runtime import onnx_session
from detpost.images import Preprocessing
from detpost.postprocess import Detections, DetectorModule, raw_outputs
from detpost.verify.compare import raw_cases
from detpost.verify.matching import match_detections
from tests.detectors import FAMILIES, SIDE, detector

NAMES = ["scores", "labels", "boxes", "queries", "valid"]
SIZES = np.array([[480, 640], [33, 77], [1000, 10]])


class Plain(nn.Module):
    """A detector that is nobody's: (logits, boxes), or a mapping with them, from the mean colour of the image."""

    def __init__(self, queries=12, classes=5, output="tuple"):
        super().__init__()
        torch.manual_seed(3)
        self.queries, self.classes, self.output = queries, classes, output
        self.head = nn.Linear(3, queries * (classes + 4))

    def forward(self, images):
        found = self.head(images.mean(dim=(2, 3))).reshape(-1, self.queries, self.classes + 4)
        logits, boxes = found[..., : self.classes], found[..., self.classes :].sigmoid()
        return (logits, boxes) if self.output == "tuple" else {"pred_logits": logits, "pred_boxes": boxes}


class Attending(Plain):
    """The same, with attention that has keys for every head and yet says that heads may share them."""

    def forward(self, images):
        logits, boxes = super().forward(images)
        heads = logits[:, None]  # (B, heads, Q, C)
        attended = nn.functional.scaled_dot_product_attention(heads, heads, heads, enable_gqa=True)
        return attended[:, 0], boxes


def run(path, **feed):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, feed)), strict=True))


def assert_graph_agrees(path, model, spec, size, batch, scale=1.0):
    images = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
    sizes = torch.from_numpy(SIZES[:batch])
    got = run(path, images=images.numpy(), image_sizes=sizes.numpy())
    post = DetectionPostProcessor(spec)
    again = post(got["pred_logits"], got["pred_boxes"], sizes)  # the decode of the same raw outputs: to the bit
    for name in ("labels", "queries", "valid"):
        assert torch.equal(got[name], getattr(again, name)), name
    assert torch.allclose(got["scores"], again.scores, atol=1e-6)
    assert torch.allclose(got["boxes"], again.boxes, rtol=1e-5, atol=1e-3)
    with torch.no_grad():
        expected = DetectorModule(model, post)(images, sizes)
    found = Detections(*(got[name] for name in NAMES))
    for match in match_detections(expected, found, threshold=0.0):
        # Rows at the detector's own query cut may come or go with rounding.
        assert match.matched >= 0.9 * (match.first + match.second), match


@pytest.mark.peers
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_every_family_exports_with_a_free_batch(tmp_path, family):
    model = detector(family)
    spec = DecodeSpec.from_config(model.config)
    result = to_onnx(model, tmp_path / "out.onnx", image_size=(SIDE, SIDE), keep_raw=True, queries=True)
    assert result.outputs == ("labels", "boxes", "scores", "valid", "queries", "pred_logits", "pred_boxes")
    for batch in (1, 3):
        assert_graph_agrees(tmp_path / "out.onnx", model, spec, (SIDE, SIDE), batch)


@pytest.mark.peers
@pytest.mark.slow
def test_kornias_rt_detr_exports(tmp_path):
    from kornia.models.rt_detr import RTDETR, RTDETRConfig

    torch.manual_seed(0)
    model = RTDETR.from_config(RTDETRConfig("resnet18d", num_classes=7, input_size=SIDE * 2)).eval()
    options = {"image_size": (SIDE * 2, SIDE * 2), "keep_raw": True, "queries": True}
    result = to_onnx(model, tmp_path / "out.onnx", **options)
    assert result.inputs == ("images", "image_sizes")
    got = run(tmp_path / "out.onnx", images=np.ones((2, 3, SIDE * 2, SIDE * 2), np.float32), image_sizes=SIZES[:2])
    again = DetectionPostProcessor(DecodeSpec())(got["pred_logits"], got["pred_boxes"], torch.from_numpy(SIZES[:2]))
    for name in ("labels", "queries", "valid"):
        assert torch.equal(got[name], getattr(again, name)), name


@pytest.mark.parametrize("output", ["tuple", "mapping"])
def test_any_module_that_gives_logits_and_boxes_exports(tmp_path, output):
    spec = DecodeSpec(top_k=7)
    options = {"image_size": (24, 40), "keep_raw": True, "queries": True, "dynamic_size": True}
    result = to_onnx(Plain(output=output), tmp_path / "out.onnx", spec, **options)
    assert result.inputs == ("images", "image_sizes")
    for size in ((24, 40), (60, 36)):
        assert_graph_agrees(tmp_path / "out.onnx", Plain(), spec, size, 2)


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_attention_that_allows_shared_keys_exports_where_none_are_shared(exporter, tmp_path):
    result = to_onnx(Attending(), tmp_path / "out.onnx", DecodeSpec(), image_size=(24, 24), exporter=exporter)
    assert result.exporter == exporter


@pytest.mark.slow
def test_the_newer_exporter_takes_rt_detr_v2_with_a_free_batch(tmp_path):
    result = to_onnx(detector("rt_detr_v2"), tmp_path / "out.onnx", image_size=(SIDE, SIDE), exporter="dynamo")
    assert result.exporter == "dynamo"
    batch = onnx.load(tmp_path / "out.onnx").graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param
    assert not batch.dim_value


def test_both_exporters_give_the_same_answer(tmp_path):
    answers = []
    for exporter in ("torchscript", "dynamo"):
        result = to_onnx(Plain(), tmp_path / "out.onnx", DecodeSpec(), image_size=(24, 24), exporter=exporter, opset=18)
        assert result.exporter == exporter
        answers.append(run(tmp_path / "out.onnx", images=np.ones((2, 3, 24, 24), np.float32), image_sizes=SIZES[:2]))
    for name in answers[0]:
        assert torch.allclose(answers[0][name].float(), answers[1][name].float(), atol=1e-4), name


def test_an_exporter_that_bakes_a_constant_in_is_not_believed(tmp_path, monkeypatch, exporter_order):
    class Moody(Plain):
        def forward(self, images):
            logits, boxes = super().forward(images)
            return logits + 9 * images.detach()[0, 0, 0, 0].item(), boxes  # a tracer takes this number for a constant

    with pytest.raises(ValueError, match=r"no exporter could make the graph.*differ from PyTorch's"):
        to_onnx(Moody(), tmp_path / "out.onnx", DecodeSpec(), image_size=(24, 24), exporter="torchscript")
    assert not list(tmp_path.iterdir())

    def refuses(*arguments):
        raise RuntimeError("out of order\nand a page of advice")

    monkeypatch.setattr(module, "_ORDER", exporter_order)
    monkeypatch.setitem(module._EXPORTERS, "dynamo", refuses)
    result = to_onnx(Plain(), tmp_path / "out.onnx", DecodeSpec(), image_size=(24, 24))
    assert (result.exporter, result.opset) == ("torchscript", 17)
    assert any("the dynamo exporter failed: RuntimeError: out of order" in note for note in result.notes)


@pytest.mark.parametrize(("opset", "exporter"), [(None, "dynamo"), (18, "dynamo"), (17, "torchscript")])
def test_the_newer_exporter_comes_first_where_it_writes_its_opset(
    tmp_path, monkeypatch, exporter_order, opset, exporter
):
    monkeypatch.setattr(module, "_ORDER", exporter_order)
    result = to_onnx(Plain(), tmp_path / "out.onnx", DecodeSpec(), image_size=(24, 24), opset=opset)
    assert (result.exporter, result.opset) == (exporter, opset or 18)
    assert result.notes == (f"network exported with the {exporter} exporter",)


def test_the_file_says_all_of_itself(tmp_path):
    spec = DecodeSpec.preset("rfdetr", top_k=9)
    preprocessing = Preprocessing(24, 40, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    names = {0: "cat", 1: "naïve dog"}
    to_onnx(Plain(), tmp_path / "out.onnx", spec, preprocessing=preprocessing, class_names=names, opset=16)
    model = onnx.load(tmp_path / "out.onnx")
    said = {p.key: json.loads(p.value) for p in model.metadata_props if p.key.startswith("detpost.")}
    assert said["detpost.spec"] == vars(spec)
    assert said["detpost.preset"] == "rfdetr"
    assert said["detpost.class_names"] == {"0": "cat", "1": "naïve dog"}
    assert said["detpost.input_size"] == [24, 40]
    assert said["detpost.opset"] == 16 == model.opset_import[0].version
    assert said["detpost.preprocessing"]["std"] == [1.0, 2.0, 3.0]


@pytest.mark.peers
def test_a_detector_without_a_fixed_input_keeps_its_normalisation(tmp_path):
    detector("detr").save_pretrained(tmp_path / "detr")
    to_onnx(str(tmp_path / "detr"), tmp_path / "out.onnx", image_size=(SIDE, SIDE))
    said = {p.key: p.value for p in onnx.load(tmp_path / "out.onnx").metadata_props}
    preprocessing = json.loads(said["detpost.preprocessing"])
    assert (preprocessing["height"], preprocessing["width"]) == (SIDE, SIDE)
    assert preprocessing["mean"] == [0.485, 0.456, 0.406]
    assert preprocessing["std"] == [0.229, 0.224, 0.225]


def test_preprocessing_inside_takes_bytes(tmp_path):
    preprocessing = Preprocessing(24, 24, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    for inside in (True, False):
        to_onnx(
            Plain(),
            tmp_path / f"{inside}.onnx",
            DecodeSpec(),
            preprocessing=preprocessing,
            preprocess_inside=inside,
        )
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    inside = run(tmp_path / "True.onnx", images=pixels.numpy(), image_sizes=SIZES[:2])
    images = preprocessing.normalise(pixels.float()).numpy()
    outside = run(tmp_path / "False.onnx", images=images, image_sizes=SIZES[:2])
    assert torch.equal(inside["labels"], outside["labels"])
    assert torch.allclose(inside["scores"], outside["scores"], atol=1e-5)


def test_an_export_leaves_the_mode_of_the_module_alone(tmp_path):
    model = Plain().train()
    model.head.eval()
    to_onnx(model, tmp_path / "out.onnx", DecodeSpec(), image_size=(24, 24))
    assert model.training
    assert not model.head.training


def test_a_fixed_batch_is_one(tmp_path):
    to_onnx(Plain(), tmp_path / "out.onnx", DecodeSpec(), image_size=(24, 24), dynamic_batch=False)
    model = onnx.load(tmp_path / "out.onnx")
    assert all(v.type.tensor_type.shape.dim[0].dim_value == 1 for v in (*model.graph.input, *model.graph.output))


@pytest.mark.parametrize("opset", [11, 13, 17, 20])
@pytest.mark.parametrize("preset", ["rtdetr", "detr", "rfdetr"])
def test_a_decode_alone_at_every_opset(tmp_path, opset, preset):
    post = DetectionPostProcessor.from_preset(preset, top_k=40)
    result = to_onnx(post, tmp_path / "out.onnx", num_queries=50, num_classes=11, opset=opset, queries=True)
    assert result.opset == opset
    assert result.inputs == ("pred_logits", "pred_boxes", "image_sizes")
    model = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx"}
    assert not {"NonZero", "Loop", "If", "Unique", "Compress", "NonMaxSuppression"} & {
        n.op_type for n in model.graph.node
    }
    logits, boxes = torch.randn(3, 50, 11).mul(2).round(), torch.rand(3, 50, 4)
    got = run(tmp_path / "out.onnx", pred_logits=logits.numpy(), pred_boxes=boxes.numpy(), image_sizes=SIZES)
    expected = post(logits, boxes, torch.from_numpy(SIZES))
    for name in ("labels", "queries", "valid"):
        assert torch.equal(got[name], getattr(expected, name)), name


@pytest.mark.parametrize(
    ("arguments", "options", "pattern"),
    [
        ((Plain(),), {"image_size": (24, 24)}, "a plain module needs a spec"),
        ((DetectionPostProcessor(DecodeSpec()),), {}, "needs num_queries and num_classes"),
        (
            (DetectionPostProcessor(DecodeSpec()),),
            {"num_queries": -3, "num_classes": 5},
            "must be at least 1; got -3 and 5",
        ),
        ((Plain(), DecodeSpec()), {"io": "tensorrt"}, "io must be one of detpost, rtdetr, efficientnms"),
        ((Plain(), DecodeSpec()), {"ties": "random"}, "ties must be one of exact, onnx"),
        ((Plain(), DecodeSpec()), {"opset": 9}, "opset must be 11 or later"),
        ((nn.Identity(), DecodeSpec()), {"image_size": (24, 24)}, "a detector must return"),
    ],
)
def test_what_cannot_be_exported_is_one_line(tmp_path, arguments, options, pattern):
    model, *rest = arguments
    with pytest.raises(ValueError, match=pattern) as error:
        to_onnx(model, tmp_path / "out.onnx", *rest, **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_tracing_a_decode_is_refused_and_the_way_out_named():
    post = DetectionPostProcessor(DecodeSpec()).eval()
    example = (torch.zeros(2, 5, 3), torch.zeros(2, 5, 4), torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"take detpost\.export\.to_onnx"):
        torch.onnx.export(post, example, io.BytesIO(), dynamo=False)


def test_raw_outputs_name_what_came():
    with pytest.raises(TypeError, match="got a mapping with masks"):
        raw_outputs({"masks": torch.zeros(1)})
    with pytest.raises(TypeError, match="got a tuple of 1"):
        raw_outputs((torch.zeros(1),))


@pytest.mark.slow
def test_a_wide_decode_has_no_branch_and_chooses_the_same(tmp_path):
    post = DetectionPostProcessor.from_preset("rtdetr")
    to_onnx(post, tmp_path / "out.onnx", num_queries=300, num_classes=230, queries=True)
    kinds = [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node]
    assert not {"If", "Loop", "Scan"} & set(kinds)
    to_openvino(tmp_path / "out.onnx", tmp_path / "out.xml")
    model = open_openvino(tmp_path / "out.xml")
    session = onnx_session(tmp_path / "out.onnx")
    names = [output.name for output in session.get_outputs()]
    for case, (logits, boxes, sizes) in raw_cases(300, 230):
        feed = {"pred_logits": logits.numpy(), "pred_boxes": boxes.numpy(), "image_sizes": sizes.numpy()}
        expected = post(logits, boxes, sizes)
        for got in (dict(zip(names, session.run(names, feed), strict=True)), model.run(feed)):
            for name in ("labels", "queries", "valid"):
                assert (torch.from_numpy(got[name]) == getattr(expected, name)).all(), (case, name)
