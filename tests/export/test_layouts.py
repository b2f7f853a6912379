"""A file in a runner's layout, read by that runner's own parser, gives eager's detections."""

import configparser

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from detpost import DecodeSpec, DetectionPostProcessor, Detector
from detpost.export import LAYOUTS, Layout, attach, to_onnx, to_openvino
from detpost.export.decode_graph import decode_graph
from detpost.export.layouts import recorded_layout
from detpost.export.opened import open_file
from detpost.images import Preprocessing
from detpost.verify import verify
from detpost.zoo import sample_images
from tests.export.detectors import SmallDetector, adversarial
from tests.export.foreign import SIDE, foreign, written
from tests.export.runners import RUNNERS

SPECS = {
    "sigmoid": DecodeSpec(top_k=15, score_threshold=0.2),
    "clipped": DecodeSpec(top_k=15, clip=True),
    "softmax": DecodeSpec(activation="softmax", background="last", selection="per_query", top_k=12),
}
HEIGHT, WIDTH = 96, 128
IMAGENET = Preprocessing(HEIGHT, WIDTH, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
OWN = [name for name in LAYOUTS if name != "detpost"]


def run(path, images, sizes):
    """Run a file as its runner does: sizes only where it takes them, all outputs in their order."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = {names[0]: images, **({names[1]: sizes} if len(names) > 1 else {})}
    outputs = [value.name for value in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, feed), strict=True))


def fed_sizes(io, height, width):
    """What the runner feeds: Frigate gives (height, width) to what reads (width, height), and divides accordingly."""
    return np.array([[width, height] if io == "rtdetr" else [height, width]], np.int64)


def expected(found, width, height, threshold):
    """Eager's detections above a threshold, those that DeepStream's parser would drop for their size left out."""
    keep = found.valid[0] & (found.scores[0] > threshold)
    return [
        (label, score, tuple(box))
        for label, score, box in zip(
            found.labels[0][keep].tolist(), found.scores[0][keep].tolist(), found.boxes[0][keep].tolist(), strict=True
        )
    ]


def clamped(rows, width, height):
    limit = np.array([width, height, width, height])
    rows = [(label, score, np.clip(box, 0, limit)) for label, score, box in rows]
    return [row for row in rows if (row[2][2:] - row[2][:2] >= 1).all()]


def assert_same(got, wanted):
    """The same detections; equal scores may have changed places where a runner sorts again."""
    assert len(got) == len(wanted) > 0

    def ordered(rows):
        return sorted(rows, key=lambda row: (-round(float(row[1]), 4), row[0], *np.round(row[2], 1).tolist()))

    for one, other in zip(ordered(got), ordered(wanted), strict=True):
        assert one[0] == other[0]
        assert one[1] == pytest.approx(other[1], abs=2e-6)
        np.testing.assert_allclose(one[2], other[2], atol=0.01)


@pytest.fixture(scope="module")
def detector():
    return SmallDetector().eval()


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("io", OWN)
def test_an_export_read_by_its_runner_gives_eagers_detections(tmp_path, detector, io, kind):
    spec = SPECS[kind]
    result = to_onnx(detector, tmp_path / "out.onnx", spec, io=io, preprocessing=Preprocessing(HEIGHT, WIDTH))
    images = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))
    layout = LAYOUTS[io]
    if layout.sizes is None:
        assert result.inputs == ("images",)
    own = layout.pixels if isinstance(layout.pixels, tuple) else ((0,) * 3, (1,) * 3)
    given = (images - torch.tensor(own[0]).view(3, 1, 1)) / torch.tensor(own[1]).view(3, 1, 1)
    outputs = run(result.path, given.numpy().astype(np.float32), fed_sizes(io, HEIGHT, WIDTH))
    with torch.no_grad():
        raw = detector(images)
        found = DetectionPostProcessor(spec)(raw["logits"], raw["pred_boxes"], torch.tensor([[HEIGHT, WIDTH]]))
    wanted = expected(found, WIDTH, HEIGHT, 0.3)
    got = RUNNERS[io](outputs, WIDTH, HEIGHT, 0.3)
    if io in ("deepstream", "roboflow"):
        got, wanted = (clamped(rows, WIDTH, HEIGHT) for rows in (got, wanted))
    assert_same(got, wanted)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("io", OWN)
def test_an_attached_file_read_by_its_runner_gives_eagers_detections(tmp_path, io, kind):
    spec = SPECS[kind]
    size = Preprocessing(SIDE, SIDE)
    source = written(tmp_path, foreign())
    result = attach(source, tmp_path / "out.onnx", spec, io=io, preprocessing=size, keep_raw=True)
    images = np.random.default_rng(1).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    outputs = run(result.path, images, fed_sizes(io, SIDE, SIDE))
    logits, boxes = (torch.from_numpy(outputs.pop(name)) for name in ("pred_logits", "pred_boxes"))
    found = DetectionPostProcessor(spec)(logits, boxes, torch.tensor([[SIDE, SIDE]]))
    got = RUNNERS[io](outputs, SIDE, SIDE, 0.3)
    wanted = expected(found, SIDE, SIDE, 0.3)
    if io in ("deepstream", "roboflow"):
        got, wanted = (clamped(rows, SIDE, SIDE) for rows in (got, wanted))
    if io == "frigate":
        wanted = wanted[:20]
    assert_same(got, wanted)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("io", OWN)
@pytest.mark.parametrize("ties", ["exact", "onnx"])
def test_a_bare_decode_in_every_layout_is_verified_on_adversarial_ties(tmp_path, io, kind, ties):
    post = DetectionPostProcessor(SPECS[kind])
    to_onnx(post, tmp_path / "a.onnx", num_queries=20, num_classes=5, io=io, ties=ties, image_size=(480, 640))
    if (ties, kind) == ("onnx", "softmax"):
        return  # scores one rounding apart may change places there
    file = open_file(tmp_path / "a.onnx")
    layout = recorded_layout(file.metadata)
    for name, (logits, boxes, sizes) in adversarial(3).items():
        given = sizes.flip(1) if layout.sizes_order == "wh" else sizes
        feed = {"pred_logits": logits, "pred_boxes": boxes, **({layout.sizes: given} if layout.sizes else {})}
        got, wanted = file.detections(file.run(feed), sizes), post(logits, boxes, sizes)
        assert torch.equal(got.valid, wanted.valid), name
        assert torch.equal(got.labels, wanted.labels), name
        torch.testing.assert_close(got.scores, wanted.scores, atol=1e-6, rtol=0, msg=name)
        torch.testing.assert_close(got.boxes, wanted.boxes, atol=1e-2, rtol=1e-5, msg=name)


@pytest.fixture(scope="module")
def raw_tiny(tmp_path_factory):
    """The shipped detector in one file, to be attached to again in every layout."""
    return to_onnx("tiny", tmp_path_factory.mktemp("raw") / "tiny.onnx").path


@pytest.mark.parametrize("io", OWN)
def test_detect_takes_every_layout(tmp_path, raw_tiny, io):
    attach(raw_tiny, tmp_path / "out.onnx", DecodeSpec.preset("rtdetr", top_k=30), io=io)
    image = sample_images()[0]
    (found,) = Detector.load(tmp_path / "out.onnx").predict(image)
    (wanted,) = Detector.load(raw_tiny).predict(image)
    assert found["labels"].tolist() == wanted["labels"].tolist() != []
    assert torch.allclose(found["boxes"], wanted["boxes"], atol=0.1)


@pytest.mark.parametrize("io", ["deepstream", "roboflow"])
def test_verify_takes_other_layouts(tmp_path, raw_tiny, io):
    attach(raw_tiny, tmp_path / "out.onnx", DecodeSpec.preset("rtdetr", top_k=30), io=io, keep_raw=True)
    report = verify(tmp_path / "out.onnx", "tiny")
    assert report.ok, str(report)
    assert any("raw outputs" in check.name for check in report.checks)


def test_a_layout_reaches_openvino_and_opens_there(tmp_path):
    to_openvino("tiny", tmp_path / "out.xml", io="deepstream")
    (found,) = Detector.load(tmp_path / "out.xml").predict(sample_images()[0])
    (wanted,) = Detector.load("tiny", device="cpu").predict(sample_images()[0])
    assert found["labels"].tolist() == wanted["labels"].tolist() != []


def test_boxes_are_in_pixels_of_an_input_whose_size_is_free():
    model = decode_graph(SPECS["clipped"], 20, 5, opset=17, io="deepstream", input_size="images")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits, boxes, _ = adversarial(2)["random"]
    for height, width in ((64, 64), (96, 160)):
        images = np.zeros((2, 3, height, width), np.float32)
        feed = {"pred_logits": logits.numpy(), "pred_boxes": boxes.numpy(), "images": images}
        (rows,) = session.run(None, feed)
        found = DetectionPostProcessor(SPECS["clipped"])(logits, boxes, torch.tensor([[height, width]] * 2))
        np.testing.assert_allclose(rows[..., :4], found.boxes, atol=1e-2)
        np.testing.assert_array_equal(rows[..., 5], found.labels)


class TestUsersOwn:
    def test_a_layout_of_ones_own_in_five_lines(self, tmp_path):
        mine = Layout("mine", {"rows": ("labels", "scores", "boxes")}, box_format="xywh")
        result = to_onnx("tiny", tmp_path / "mine.onnx", io=mine)
        assert (result.inputs, result.outputs) == (("images",), ("rows",))
        (found,) = Detector.load(result.path).predict(sample_images()[0])
        (wanted,) = Detector.load("tiny", device="cpu").predict(sample_images()[0])
        assert found["labels"].tolist() == wanted["labels"].tolist() != []
        assert torch.allclose(found["boxes"], wanted["boxes"], atol=0.1)

    @pytest.mark.parametrize(
        ("outputs", "words"),
        [
            ({"a": "boxes"}, "needs outputs with boxes, and scores and labels"),
            ({"a": ("boxes", "scores", "label")}, "cannot hold 'label': take of labels, boxes"),
            ({"a": ("boxes", "count"), "b": "scores", "c": "labels"}, "cannot hold 'count' beside others"),
        ],
    )
    def test_what_nobody_could_read_is_refused(self, outputs, words):
        with pytest.raises(ValueError, match=words):
            Layout("mine", outputs)

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"sizes_order": "zz"}, "sizes_order of mine must be one of hw, wh; got 'zz'"),
            ({"box_format": "nope"}, "box_format of mine must be one of .*xyxy.*; got 'nope'"),
            ({"label_dtype": "int8"}, "label_dtype of mine must be one of int64, int32; got 'int8'"),
            ({"normalised": "yes"}, "normalised of mine must be one of True, False; got 'yes'"),
            ({"empty_label": 1.5}, "empty_label of mine must be a whole number of int32; got 1.5"),
            ({"empty_label": 2**40}, "empty_label of mine must be a whole number of int32"),
            ({"pixels": "two"}, "pixels of mine must be None, 'one scale', or three means .*; got 'two'"),
            ({"pixels": ((0, 0, 0), (1, 0, 1))}, "three deviations above 0"),
            ({"pixels": ((0, 0), (1, 1, 1))}, "pixels of mine must be"),
            ({"pixels": ((0, 0, "0"), (1, 1, 1))}, "pixels of mine must be"),
            ({"pixels": ((0, 0, 0), (1, 1, float("inf")))}, "pixels of mine must be"),
            ({"pixels": (0, (1, 1, 1))}, "pixels of mine must be"),
            ({"pixels": 3}, "pixels of mine must be"),
            ({"sizes": "rows"}, "sizes of mine has the name of an output, 'rows'"),
            ({"sizes": "pred_boxes"}, "mine cannot name an output or sizes 'pred_boxes'"),
            ({"sizes": "images"}, "mine cannot name an output or sizes 'images'"),
            ({"sizes": ""}, "need names that are not empty; got ''"),
            (
                {"outputs": {"pred_logits": ("labels", "scores", "boxes")}},
                "cannot name an output or sizes 'pred_logits'",
            ),
        ],
    )
    def test_a_field_that_is_none_of_its_choices_is_refused(self, fields, words):
        with pytest.raises(ValueError, match=words):
            Layout(**{"name": "mine", "outputs": {"rows": ("labels", "scores", "boxes")}, **fields})

    @pytest.mark.parametrize(
        ("layout", "options", "name"),
        [
            (Layout("mine", {"queries": ("labels", "scores", "boxes")}), {"queries": True}, "queries"),
            (Layout("mine", {"masks": ("labels", "scores", "boxes")}), {"masks": "network"}, "masks"),
            (Layout("mine", {"rows": ("labels", "scores", "boxes")}, "pred_masks"), {"masks": "network"}, "pred_masks"),
        ],
    )
    def test_a_name_that_is_asked_for_beside_it_is_refused(self, tmp_path, layout, options, name):
        post = DetectionPostProcessor(DecodeSpec())
        size = {"num_queries": 20, "num_classes": 5, "image_size": (64, 64)}
        with pytest.raises(ValueError, match=f"io 'mine' has the name '{name}', which is asked for beside it"):
            to_onnx(post, tmp_path / "x.onnx", io=layout, **options, **size)

    def test_an_unknown_name_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="io must be one of detpost, rtdetr, efficientnms, deepstream"):
            to_onnx("tiny", tmp_path / "x.onnx", io="deepstram")

    def test_a_bare_decode_must_know_the_size_that_its_boxes_are_in(self):
        with pytest.raises(ValueError, match="io 'deepstream' gives boxes in pixels of the network's input"):
            decode_graph(DecodeSpec(), 20, 5, opset=17, io="deepstream")


class TestForRunners:
    @pytest.mark.parametrize("io", ["deepstream", "frigate", "ultralytics", "roboflow"])
    def test_what_a_runner_cannot_do_to_pixels_is_done_in_the_file(self, tmp_path, detector, io):
        """A runner scales and shifts as it can; the network still sees what it was trained on."""
        result = to_onnx(detector, tmp_path / "out.onnx", SPECS["sigmoid"], io=io, preprocessing=IMAGENET)
        pixels = torch.randint(0, 256, (1, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0)).float()
        file = Detector.load(result.path)
        given = file.preprocessing.normalise(pixels).numpy()
        if io == "deepstream":
            config = configparser.ConfigParser()
            config.read(tmp_path / "config_infer_out.txt")
            said = config["property"]
            offsets = np.array([float(value) for value in said["offsets"].split(";")], np.float32)[:, None, None]
            np.testing.assert_allclose(float(said["net-scale-factor"]) * (pixels - offsets), given, atol=1e-5)
        outputs = run(result.path, given, fed_sizes(io, HEIGHT, WIDTH))
        with torch.no_grad():
            raw = detector(IMAGENET.normalise(pixels))
        sizes = torch.tensor([[HEIGHT, WIDTH]])
        found = DetectionPostProcessor(SPECS["sigmoid"])(raw["logits"], raw["pred_boxes"], sizes)
        got, wanted = RUNNERS[io](outputs, WIDTH, HEIGHT, 0.3), expected(found, WIDTH, HEIGHT, 0.3)
        got, wanted = (clamped(rows, WIDTH, HEIGHT) for rows in (got, wanted))
        assert len(got) == len(wanted) > 0
        for one, other in zip(got, wanted, strict=True):
            assert one[1] == pytest.approx(other[1], abs=1e-4)

    def test_deepstreams_configuration_and_labels_lie_beside(self, tmp_path):
        result = to_onnx("tiny", tmp_path / "digits.onnx", io="deepstream")
        assert [path.name for path in result.beside] == ["config_infer_digits.txt", "digits.labels.txt"]
        config = configparser.ConfigParser()
        config.read(result.beside[0])
        said = config["property"]
        assert said["onnx-file"] == "digits.onnx"
        assert said["parse-bbox-func-name"] == "NvDsInferParseYolo"
        assert said["labelfile-path"] == "digits.labels.txt"
        assert said["cluster-mode"] == "4"  # no suppression: the decode chose already
        assert result.beside[1].read_text().split() == [str(digit) for digit in range(10)]
        assert int(said["num-detected-classes"]) == 10
        assert config["class-attrs-all"]["topk"] == "30"

    def test_frigates_model_block_and_label_map_lie_beside(self, tmp_path):
        result = to_onnx("tiny", tmp_path / "digits.onnx", io="frigate")
        text = result.beside[0].read_text()
        assert "model_type: dfine" in text
        assert "labelmap_path: /config/model_cache/digits.labelmap.txt" in text
        assert result.beside[1].read_text().splitlines()[7] == "7 7"

    def test_ultralytics_finds_its_properties(self, tmp_path):
        import ast

        result = to_onnx("tiny", tmp_path / "digits.onnx", io="ultralytics")
        said = {entry.key: entry.value for entry in onnx.load(result.path).metadata_props}
        assert (said["task"], ast.literal_eval(said["end2end"])) == ("detect", True)
        assert ast.literal_eval(said["imgsz"]) == [128, 128]
        assert ast.literal_eval(said["names"])[7] == "7"
