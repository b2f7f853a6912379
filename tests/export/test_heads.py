"""Masks, keypoints and oriented boxes in the file, held to the heads in PyTorch."""

from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from detpost import DecodeSpec, DetectionPostProcessor, Detector
from detpost.export import KeypointHead, MaskHead, OrientedHead, Resize, attach, heads, to_onnx, verify
from detpost.export.decode_graph import decode_graph
from detpost.export.operators import missing
from detpost.export.slots import RawHead, rows
from detpost.heads import DETRPoseKeypoints, OrientedBoxes, RFDETRKeypoints, masks_per_image
from detpost.runs.batches import beside_of
from tests.detectors import SEGMENTATION_FAMILIES, SIDE, detector
from tests.export.detectors import SmallDetector

Q, C = 20, 7
FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
PER_CLASS = (0, 2, 3, 0, 1)


def run(model, **feed):
    source = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    values = session.run(None, {name: np.asarray(value) for name, value in feed.items()})
    return dict(zip((value.name for value in session.get_outputs()), map(torch.from_numpy, values), strict=True))


def raw(batch, seed=0):
    generator = torch.Generator().manual_seed(seed + batch)
    logits = torch.randn(batch, Q, C, generator=generator) * 2 - 1
    return logits, torch.rand(batch, Q, 4, generator=generator), torch.randint(9, 90, (batch, 2), generator=generator)


def found_and_run(head, shape, value, batch, preset="rfdetr", **options):
    spec = DecodeSpec.preset(preset, top_k=80, score_threshold=0.6)
    logits, boxes, sizes = raw(batch)
    dtype = HALF if value.dtype == torch.float16 else FLOAT
    options = {"opset": 17, **options}
    graph = decode_graph(spec, Q, C, heads=[RawHead(head, shape, dtype)], **options)
    name = {MaskHead: "pred_masks", KeypointHead: "pred_keypoints", OrientedHead: "pred_oriented_boxes"}[type(head)]
    got = run(graph, pred_logits=logits, pred_boxes=boxes, image_sizes=sizes, **{name: value})
    return DetectionPostProcessor(spec)(logits, boxes, sizes), sizes, got


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("opset", [12, 17, 22])
def test_masks_of_the_networks_size_are_gathered_to_the_bit(batch, opset):
    values = torch.randn(batch, Q, 13, 9)
    found, _, got = found_and_run(MaskHead(), (Q, "h", "w"), values, batch, opset=opset)
    rows = values[torch.arange(batch)[:, None], found.queries.clamp(min=0)]
    assert (~found.valid).any()
    assert torch.equal(got["masks"], torch.where(found.valid[..., None, None], rows, 0.0))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("style", ["rfdetr", "dfine_seg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masks_of_the_images_size_are_those_of_masks_per_image(batch, style, dtype):
    values = torch.randn(batch, Q, 13, 9, generator=torch.Generator().manual_seed(batch)).to(dtype)
    values = values if style == "rfdetr" else values.sigmoid()
    found, sizes, got = found_and_run(MaskHead("image", style), (Q, "h", "w"), values, batch)
    assert got["masks"].shape == (batch, 80, *sizes.amax(dim=0))
    for image, expected in enumerate(masks_per_image(found, values.float(), sizes, style=style)):
        height, width = sizes[image].tolist()
        count = len(expected)
        assert 0 < count < 80
        differing = int((got["masks"][image, :count, :height, :width] != expected[:, 0]).sum())
        assert differing <= 1e-5 * expected.numel()
        # Nothing beyond the image, nothing in slots that are not valid.
        assert int(got["masks"][image].sum()) == int(got["masks"][image, :count, :height, :width].sum())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("visibility", [None, 2, 3])
def test_skeletons(batch, visibility):
    shape = (Q, 12) if visibility is None else (Q, 6, visibility)
    values = torch.rand(batch, *shape)
    found, sizes, got = found_and_run(KeypointHead(), shape, values, batch)
    torch.testing.assert_close(got["keypoints"], DETRPoseKeypoints()(found, values, sizes), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("depth", "alpha"), [(3, 0.2), (8, 0.2), (8, 0.0)])
def test_keypoints_of_classes(batch, depth, alpha):
    shape = (Q, len(PER_CLASS) * 3, depth)
    values = torch.randn(batch, *shape)
    found, sizes, got = found_and_run(KeypointHead(PER_CLASS, alpha), shape, values, batch)
    expected = RFDETRKeypoints(PER_CLASS, alpha)(found, values, sizes)
    torch.testing.assert_close(got["keypoints"], expected.points, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got["keypoint_scores"], expected.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_oriented_boxes(batch):
    values = torch.randn(batch, Q, 5) * 3
    found, sizes, got = found_and_run(OrientedHead(2.0), (Q, 5), values, batch)
    torch.testing.assert_close(
        got["oriented_boxes"], OrientedBoxes(2.0)(found, values, sizes).boxes, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("head", [MaskHead("image", "dfine_seg"), MaskHead(), KeypointHead(PER_CLASS), OrientedHead()])
def test_every_operator_is_in_the_table(head):
    shape = {MaskHead: (Q, 8, 8), KeypointHead: (Q, 15, 8), OrientedHead: (Q, 5)}[type(head)]
    spec = DecodeSpec.preset("rfdetr")
    graph = decode_graph(spec, Q, C, opset=17, heads=[RawHead(head, shape, FLOAT)])
    assert missing(graph, "onnxruntime-cpu") == []
    assert missing(graph, "openvino") == []


class Everything(nn.Module):
    """Logits, boxes, masks, skeletons and oriented boxes out of a convolution, for any image size."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = nn.Conv2d(3, 6, 5, stride=4, padding=2)
        self.heads = nn.Linear(6 * 16, Q * (C + 4 + 6 + 5 + 6))
        self.load_state_dict({k: torch.randn(v.shape, generator=generator) / 3 for k, v in self.state_dict().items()})

    def forward(self, images):
        features = self.features(images)
        pooled = nn.functional.adaptive_avg_pool2d(features, 4).flatten(1)
        rows = self.heads(pooled).reshape(-1, Q, C + 4 + 6 + 5 + 6)
        logits, boxes, points, oriented, weights = rows.split([C, 4, 6, 5, 6], dim=2)
        return {
            "logits": logits,
            "pred_boxes": boxes.sigmoid(),
            "pred_masks": torch.einsum("bqc,bchw->bqhw", weights, features),
            "pred_keypoints": points.sigmoid(),
            "pred_oriented_boxes": oriented.sigmoid(),
        }


ALL = {"masks": "image", "keypoints": KeypointHead(), "oriented": OrientedHead()}
QUICK = {"exporter": "torchscript", "image_size": (32, 32)}


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_whole_detector_gives_all_of_it(tmp_path, batch):
    model, spec = Everything(), DecodeSpec.preset("rfdetr", top_k=30, score_threshold=0.5)
    written = to_onnx(model, tmp_path / "all.onnx", spec, **ALL, **QUICK)
    assert written.outputs[4:] == ("masks", "keypoints", "oriented_boxes")
    images, sizes = torch.rand(batch, 3, 32, 32), raw(batch)[2]
    got = run(str(written.path), images=images, image_sizes=sizes)
    with torch.no_grad():
        outputs = model(images)
    found = DetectionPostProcessor(spec)(outputs["logits"], outputs["pred_boxes"], sizes)
    assert torch.equal(got["labels"], found.labels)
    for image, expected in enumerate(masks_per_image(found, outputs["pred_masks"], sizes)):
        height, width = sizes[image].tolist()
        ours = got["masks"][image, : len(expected), :height, :width]
        assert (ours != expected[:, 0]).float().mean() < 1e-4
    points = DETRPoseKeypoints()(found, outputs["pred_keypoints"], sizes)
    torch.testing.assert_close(got["keypoints"], points, rtol=1e-4, atol=1e-2)
    turned = OrientedBoxes()(found, outputs["pred_oriented_boxes"], sizes).boxes
    torch.testing.assert_close(got["oriented_boxes"], turned, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("size", ["network", "image"])
def test_such_a_file_opens_again_and_is_verified(tmp_path, size):
    spec = DecodeSpec.preset("rfdetr", top_k=30, score_threshold=0.5)
    options = {**ALL, **QUICK, "masks": size}
    one = to_onnx(Everything(), tmp_path / "one.onnx", spec, **options, keep_raw=True)
    other = to_onnx(Everything(), tmp_path / "other.onnx", spec, **{**options, "masks": "network"})
    report = verify(one.path, other.path, threshold=0.5)
    assert report.ok, str(report)
    names = [check.name for check in report.checks if check.name.startswith("noise 0")]
    assert {f"noise 0: {what}" for what in ("masks", "keypoints", "oriented_boxes")} <= {*names}
    assert "noise 0: masks of its own raw outputs" in names
    assert "masks equal to the bit" in str(report)
    image = Detector.load(one.path, threshold=0.5).predict(torch.rand(3, 40, 50))[0]
    count = len(image["scores"])
    assert count > 0
    assert image["masks"].shape == (count, 40, 50)
    assert image["keypoints"].shape == (count, 3, 3)
    assert image["oriented_boxes"].shape == (count, 5)


def test_verify_notices_masks_of_another_network(tmp_path):
    spec = DecodeSpec.preset("rfdetr", top_k=30, score_threshold=0.5)
    model = Everything()
    one = to_onnx(model, tmp_path / "one.onnx", spec, masks="image", **QUICK)
    mirrored = nn.Sequential(model, _Mirrored())
    other = to_onnx(mirrored, tmp_path / "other.onnx", spec, masks="image", **QUICK)
    report = verify(one.path, other.path, threshold=0.5)
    assert not report.ok
    assert {check.ok for check in report.checks if check.name.endswith("masks")} == {False}
    assert all(check.ok for check in report.checks if not check.name.endswith("masks"))


class _Mirrored(nn.Module):
    def forward(self, outputs):
        return {**outputs, "pred_masks": outputs["pred_masks"].flip(3)}


def test_attach_finds_masks_of_someone_elses_file_and_keeps_them(tmp_path):
    spec = DecodeSpec.preset("rfdetr", top_k=30, score_threshold=0.5)
    source = _as_rfdetr_exports(tmp_path)
    written = attach(source, tmp_path / "out.onnx", spec, masks="image", keep_raw=True)
    assert any(note.startswith("masks: masks ['B', 20, 8, 8]") for note in written.notes)
    assert "masks" in written.outputs
    assert "pred_masks" in written.outputs
    images, sizes = torch.rand(2, 3, 32, 32), torch.tensor([[40, 30], [20, 50]])
    got = run(str(written.path), images=images, image_sizes=sizes)
    found = DetectionPostProcessor(spec)(got["pred_logits"], got["pred_boxes"], sizes)
    for image, expected in enumerate(masks_per_image(found, got["pred_masks"], sizes)):
        height, width = sizes[image].tolist()
        assert torch.equal(got["masks"][image, : len(expected), :height, :width], expected[:, 0])


def _as_rfdetr_exports(tmp_path):
    """Write a source whose outputs are dets, labels, masks, as RF-DETR Seg's own exporter names them."""
    from detpost.export.torch_exporters import export_torchscript

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Everything()

        def forward(self, images):
            outputs = self.model(images)
            return outputs["pred_boxes"], outputs["logits"], outputs["pred_masks"]

    names = ("dets", "labels", "masks")
    free = {name: {0: "batch"} for name in ("images", *names)}
    model = export_torchscript(Three().eval(), (torch.rand(2, 3, 32, 32),), ("images",), names, free, 17)
    onnx.save(model, tmp_path / "source.onnx")
    return tmp_path / "source.onnx"


def test_masks_that_are_not_there_are_refused(tmp_path):
    source = _as_rfdetr_exports(tmp_path)
    spec = DecodeSpec.preset("rfdetr")
    with pytest.raises(ValueError, match=r"no value 'nothing' for masks: the file has outputs: dets, labels, masks"):
        attach(source, tmp_path / "out.onnx", spec, masks=MaskHead(source="nothing"))
    with pytest.raises(ValueError, match=r"has a shape for the oriented_boxes: name their source"):
        attach(source, tmp_path / "out.onnx", spec, oriented=OrientedHead())
    with pytest.raises(ValueError, match=r"must return a mapping with pred_masks"):
        to_onnx(SmallDetector(), tmp_path / "out.onnx", spec, masks="image", **QUICK)
    with pytest.raises(ValueError, match=r"masks must have a size of network, image; got 'huge'"):
        to_onnx(Everything(), tmp_path / "out.onnx", spec, masks="huge", **QUICK)
    with pytest.raises(ValueError, match=r"need opset 12"):
        to_onnx(Everything(), tmp_path / "out.onnx", spec, masks="image", opset=11, **QUICK)
    with pytest.raises(ValueError, match=r"take another io, or masks='network'"):
        to_onnx(Everything(), tmp_path / "out.onnx", spec, masks="image", io="roboflow", **QUICK)


@pytest.mark.parametrize("letterbox", [False, True])
def test_masks_lie_where_the_image_lay_in_the_input(tmp_path, letterbox):
    class Bright(nn.Module):
        """Query 0 masks what is bright."""

        def forward(self, images):
            masks = nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 4) - 0.5
            logits = torch.full((1, 1, 1), 4.0) + masks.mean(dim=(2, 3))[..., None] * 0
            return {"logits": logits, "pred_boxes": logits.expand(-1, 1, 4) * 0 + 0.5, "pred_masks": masks}

    spec = DecodeSpec.preset("rfdetr", top_k=1)
    written = to_onnx(
        Bright(),
        tmp_path / "full.onnx",
        spec,
        masks="image",
        preprocess_inside="full",
        resize=Resize(letterbox=letterbox),
        **{**QUICK, "image_size": (64, 64)},
    )
    image = torch.zeros(1, 3, 64, 128, dtype=torch.uint8)
    image[:, :, 16:48, 32:64] = 255
    got = run(str(written.path), images=image)["masks"]
    assert got.shape == (1, 1, 64, 128)
    expected = image[0, 0] > 0
    assert (got[0, 0] != expected).sum() <= 24  # a mask pixel is 8 wide: corners are rounded off
    assert got[0, 0, 20:44, 36:60].all()
    file = Detector.load(written.path).predict(image[0])[0]
    assert torch.equal(file["masks"][0], got[0, 0])


@pytest.mark.parametrize("io", ["deepstream", "roboflow", "efficientnms"])
def test_other_layouts_take_masks_along(tmp_path, io):
    spec = DecodeSpec.preset("rfdetr", top_k=30)
    size = "network" if io == "roboflow" else "image"
    written = to_onnx(Everything(), tmp_path / "io.onnx", spec, masks=size, io=io, **QUICK)
    assert written.outputs[-1] == "masks"
    feed = {"image_sizes": np.array([[40, 30]])} if io == "efficientnms" else {}
    got = run(str(written.path), images=torch.rand(1, 3, 32, 32), **feed)["masks"]
    sides = {"network": (8, 8), "image": (40, 30) if feed else (32, 32)}[size]
    assert got.shape == (1, 30, *sides)
    assert Detector.load(written.path, threshold=0.0).predict(torch.rand(3, 40, 30))[0]["masks"].shape[1:] == (40, 30)


@pytest.mark.parametrize("size", ["network", "image"])
def test_a_bare_decode_takes_raw_masks(tmp_path, size):
    spec = DecodeSpec.preset("rfdetr", top_k=30, score_threshold=0.4)
    written = to_onnx(DetectionPostProcessor(spec), tmp_path / "post.onnx", num_queries=Q, num_classes=C, masks=size)
    assert written.inputs == ("pred_logits", "pred_boxes", "pred_masks", "image_sizes")
    report = verify(written.path, DetectionPostProcessor(spec))
    assert report.ok, str(report)
    assert any(check.name == "masks" and check.compared for check in report.checks)


@pytest.mark.parametrize("io", ["detpost", "deepstream"])
def test_a_bare_decode_with_oriented_boxes_is_verified(tmp_path, io):
    spec = DecodeSpec.preset("rfdetr", top_k=30, score_threshold=0.4)
    options = {"num_queries": Q, "num_classes": C, "io": io, "image_size": (32, 32)}
    written = to_onnx(DetectionPostProcessor(spec), tmp_path / "post.onnx", oriented=OrientedHead(2.0), **options)
    report = verify(written.path, written.path)
    assert report.ok, str(report)
    assert any(check.name == "oriented_boxes" and check.compared for check in report.checks)
    model = onnx.load(written.path)
    for entry in model.metadata_props:
        entry.value = entry.value.replace('"angle_scale": 2.0', '"angle_scale": 2.1')
    onnx.save(model, tmp_path / "other.onnx")
    wrong = verify(written.path, tmp_path / "other.onnx")
    assert [check.ok for check in wrong.checks if check.name == "oriented_boxes"] == [True, False]


@dataclass(frozen=True)
class DepthHead:
    """The distance of each detection, of the network's (B, Q, 1)."""

    factor: float = 1.0
    source: str | None = None


def write_depth(g, raw, value, slots):
    found = rows(g, value, slots.queries, slots.valid, 3)
    return {"depth": g.node("Mul", g.reshape(found, [0, slots.kept]), raw.head.factor)}


def depth_in_pytorch(head, found, value, image_sizes):
    gathered = value[torch.arange(len(value))[:, None], found.queries.clamp(min=0), 0]
    return {"depth": torch.where(found.valid, gathered * head.factor, 0.0)}


DEPTH = heads.HeadRow(
    DepthHead,
    argument="depth",
    columns={"depth": ("score",)},
    outputs=lambda head, shape: {"depth": heads.Output(())},
    raw_name="pred_depth",
    other_names=(),
    words=("depth",),
    fits=lambda shape: len(shape) == 2 and shape[1] == 1,
    writer="tests.export.test_heads:write_depth",
    bare=(1,),
    in_pytorch=depth_in_pytorch,
    in_results={"depth": "distance"},
)


class WithDepth(nn.Module):
    """Another value of each query beside the rest."""

    def __init__(self):
        super().__init__()
        self.model = Everything()

    def forward(self, images):
        found = self.model(images)
        return {**found, "pred_depth": found["logits"][..., :1].sigmoid()}


def test_an_unknown_head_is_refused(tmp_path):
    post, options = DetectionPostProcessor(DecodeSpec()), {"num_queries": Q, "num_classes": C}
    with pytest.raises(ValueError, match="unknown head DepthHead: take one of masks, keypoints, oriented_boxes"):
        to_onnx(post, tmp_path / "post.onnx", heads=[DepthHead()], **options)
    with pytest.raises(ValueError, match="keypoints are exported with their network"):
        to_onnx(post, tmp_path / "post.onnx", heads=[KeypointHead()], **options)
    with pytest.raises(ValueError, match="masks can be given once"):
        to_onnx(post, tmp_path / "post.onnx", masks="image", heads=[MaskHead()], **options)
    with pytest.raises(ValueError, match="unknown head 'depth' in the file: known are masks"):
        heads.recorded_heads({"heads": {"depth": {"source": None}}})


def test_a_head_by_its_words():
    assert heads.head_named("masks:size=image:style=dfine_seg") == MaskHead("image", "dfine_seg")
    assert heads.head_named("keypoints:per_class=0,17:source=a/b:0") == KeypointHead((0, 17), source="a/b:0")
    with pytest.raises(ValueError, match="unknown head 'depth': known are masks, keypoints, oriented_boxes"):
        heads.head_named("depth")
    with pytest.raises(ValueError, match="masks has no field 'scale': it has size, style, source"):
        heads.head_named("masks:scale=2")
    for text, words in (
        ("oriented_boxes:angle_scale=x", "angle_scale must be a number other than 0; got 'x'"),
        ("keypoints:per_class=17", "per_class must hold a whole number for each class, as 0,17; got 17"),
        ("keypoints:per_class=x", "per_class must hold a whole number for each class, as 0,17; got 'x'"),
        ("keypoints:per_class=0,17:trace_alpha=x", "trace_alpha must be a number, at least 0; got 'x'"),
    ):
        with pytest.raises(ValueError, match=words):
            heads.head_named(text)


def test_a_head_is_a_row_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "HEADS", (*heads.HEADS, DEPTH))
    spec = DecodeSpec.preset("rfdetr", top_k=30, score_threshold=0.5)
    # A bare decode, which verify holds to PyTorch.
    bare = {"num_queries": Q, "num_classes": C}
    post = to_onnx(DetectionPostProcessor(spec), tmp_path / "post.onnx", heads=[DepthHead(3.0)], **bare)
    assert post.inputs == ("pred_logits", "pred_boxes", "pred_depth", "image_sizes")
    assert verify(post.path, DetectionPostProcessor(spec)).ok
    wrong = replace(DEPTH, in_pytorch=lambda *given: {"depth": depth_in_pytorch(*given)["depth"] * 1.5})
    monkeypatch.setattr(heads, "HEADS", (*heads.HEADS[:-1], wrong))
    assert not verify(post.path, DetectionPostProcessor(spec)).ok
    # A whole detector, opened again, and one whose values are off.
    whole = to_onnx(WithDepth(), tmp_path / "whole.onnx", spec, masks="network", heads=[DepthHead()], **QUICK)
    assert whole.outputs[4:] == ("masks", "depth")
    other = to_onnx(WithDepth(), tmp_path / "other.onnx", spec, masks="network", heads=[DepthHead(1.5)], **QUICK)
    assert verify(whole.path, whole.path).ok
    assert {check.name.split(": ")[1] for check in verify(whole.path, other.path).checks if not check.ok} == {"depth"}
    found = Detector.load(whole.path).predict(torch.rand(3, 40, 50))[0]
    assert found["depth"].shape == found["scores"].shape
    assert len(found["depth"])
    assert beside_of({"scores": [1.0], "depth": [2.0]}) == {"distance": [2.0]}
    # Attached to a file of someone else's, found by its name or its shape.
    network = to_onnx(WithDepth(), tmp_path / "raw.onnx", spec, heads=[DepthHead()], keep_raw=True, **QUICK)
    again = {"logits": "pred_logits", "boxes": "pred_boxes"}
    attached = attach(network.path, tmp_path / "out.onnx", spec, heads=[DepthHead()], **again)
    assert attached.outputs[-1] == "depth"
    assert heads.head_named("depth:factor=2.5") == DepthHead(2.5)


def test_the_rows_are_of_one_head_each_and_whole():
    names = [name for row in heads.HEADS for name in row.columns]
    raws = [row.raw_name for row in heads.HEADS]
    arguments = [row.argument for row in heads.HEADS]
    assert all(len({*each}) == len(each) for each in (names, raws, arguments))
    for row in heads.HEADS:
        assert all(row.columns.values()) or row.name == "masks", f"{row.name} has no units to compare in"
        assert row.bare is None or row.in_pytorch or row.name == "masks", f"{row.name}: nothing to hold it to"


def test_places_come_in_pixels_of_the_image_whatever_the_layout(tmp_path):
    spec, image = DecodeSpec.preset("rfdetr", top_k=30), torch.rand(3, 40, 50)
    options = {"keypoints": KeypointHead(), "oriented": OrientedHead(), **QUICK}
    found = [
        Detector.load(
            to_onnx(Everything(), tmp_path / f"{io}.onnx", spec, io=io, **options).path, threshold=0.6
        ).predict(image)[0]
        for io in ("detpost", "deepstream", "roboflow")
    ]
    assert len(found[0]["scores"]) > 3
    for other in found[1:]:
        for name in ("boxes", "keypoints", "oriented_boxes"):
            torch.testing.assert_close(other[name], found[0][name], rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize("family", SEGMENTATION_FAMILIES)
def test_transformers_segmentation_models(tmp_path, family):
    model = detector(family)
    written = to_onnx(model, tmp_path / "model.onnx", image_size=(SIDE, SIDE), masks="image", keep_raw=True)
    spec = DecodeSpec.from_config(model.config)
    for batch in (1, 2, 3):
        images, sizes = torch.rand(batch, 3, SIDE, SIDE), torch.randint(20, 90, (batch, 2))
        got = run(str(written.path), images=images, image_sizes=sizes)
        found = DetectionPostProcessor(spec)(got["pred_logits"], got["pred_boxes"], sizes)
        assert torch.equal(found.labels, got["labels"])
        for image, expected in enumerate(masks_per_image(found, got["pred_masks"], sizes)):
            height, width = sizes[image].tolist()
            ours = got["masks"][image, : len(expected), :height, :width]
            assert (ours != expected[:, 0]).float().mean() < 1e-4


@pytest.mark.slow
@pytest.mark.peers
def test_rfdetr_seg_by_its_own_exporter(tmp_path):
    rfdetr = pytest.importorskip("rfdetr")
    from rfdetr.models.postprocess import PostProcess

    torch.manual_seed(0)
    source = rfdetr.RFDETRSegNano(pretrain_weights=None).export(
        output_dir=str(tmp_path), dynamic_batch=True, verbose=False
    )
    written = attach(source, tmp_path / "out.onnx", preset="rfdetr", masks="image", keep_raw=True)
    side = onnx.load(written.path, load_external_data=False).graph.input[0].type.tensor_type.shape.dim[2].dim_value
    for batch in (1, 2):
        images, sizes = torch.rand(batch, 3, side, side), torch.tensor([[60, 80], [90, 50]])[:batch]
        got = run(str(written.path), input=images, image_sizes=sizes)
        outputs = {name: got[name] for name in ("pred_logits", "pred_boxes", "pred_masks")}
        for image, expected in enumerate(PostProcess(num_select=300)(outputs, sizes)):
            height, width = sizes[image].tolist()
            ours = got["masks"][image, :, :height, :width]
            torch.testing.assert_close(got["scores"][image], expected["scores"], rtol=0, atol=1e-5)
            # Equal scores may stand in another order there: those that have their place alone are compared.
            same = (got["labels"][image] == expected["labels"]) & (
                (got["boxes"][image] - expected["boxes"].clamp(min=0)).abs().amax(dim=1) < 0.05
            )
            assert same.float().mean() > 0.9
            assert (ours[same] != expected["masks"][same, 0]).float().mean() < 1e-4
