"""Pixels in, detections out: what a file does before its network is what the trained pipeline does."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from detpost import DecodeSpec, DetectionPostProcessor, Detector
from detpost.export import LAYOUTS, Resize, attach, to_onnx
from detpost.export.front_graph import put_resize_in_front
from detpost.images import FixedSize, Preprocessing
from detpost.verify import verify
from detpost.zoo import sample_images
from tests.export.foreign import foreign, written

SIZE = Preprocessing(96, 128, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SPEC = DecodeSpec(top_k=12)


def noise(height, width, batch=1, seed=0):
    return torch.randint(
        0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def front_alone(resize):
    """A network that gives its own input back."""
    value = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 96, 128]) for name in ("images", "seen")
    ]
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["seen"])], "front", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    put_resize_in_front(model, "images", SIZE, resize)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("size", [(96, 128), (37, 53), (480, 640), (700, 100), (1, 1)])
def test_the_network_sees_what_the_pipeline_outside_gives(size):
    images = noise(*size, batch=2)
    (seen,) = front_alone(Resize()).run(None, {"images": images.numpy()})
    batch, _, _ = FixedSize(SIZE)(list(images))
    one = 1 / 255 / 0.224  # torchvision rounds between the directions too
    assert np.abs(seen - batch.numpy()).max() <= one * 1.01


def test_without_antialiasing_it_is_torchvisions_without():
    from torchvision.transforms.v2 import functional as vision

    images = noise(480, 640)
    (seen,) = front_alone(Resize(antialias=False)).run(None, {"images": images.numpy()})
    wanted = SIZE.normalise(vision.resize(images, [96, 128], antialias=False).float())
    assert np.abs(seen - wanted.numpy()).max() <= 1 / 255 / 0.224 * 1.01
    (other,) = front_alone(Resize()).run(None, {"images": images.numpy()})
    assert np.abs(seen - other).max() > 1


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (37, 53), (2000, 30)])
def test_a_letterbox_keeps_proportions_and_pads_evenly(size):
    images = noise(*size)
    (seen,) = front_alone(Resize(letterbox=True)).run(None, {"images": images.numpy()})
    scale = min(96 / size[0], 128 / size[1])
    height, width = (max(1, round(side * scale)) for side in size)
    top, left = (96 - height) // 2, (128 - width) // 2
    inside, _, _ = FixedSize(Preprocessing(height, width, mean=SIZE.mean, std=SIZE.std))(list(images))
    wanted = SIZE.normalise(torch.full((1, 3, 96, 128), 114.0)).numpy()
    wanted[:, :, top : top + height, left : left + width] = inside
    assert np.abs(seen - wanted).max() <= 1 / 255 / 0.224 * 1.01


@pytest.mark.parametrize("io", ["detpost", "rtdetr", "efficientnms"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("resize", [Resize(), Resize(letterbox=True)], ids=["stretch", "letterbox"])
def test_boxes_are_in_pixels_of_the_images_as_they_came(tmp_path, io, clip, resize):
    spec = DecodeSpec(top_k=12, clip=clip)
    size = Preprocessing(8, 8)
    result = attach(
        written(tmp_path, foreign()), tmp_path / "out.onnx", spec, io=io, preprocessing=size, resize_inside=resize,
        keep_raw=True,
    )  # fmt: skip
    assert result.inputs == ("images",)
    session = onnxruntime.InferenceSession(str(result.path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    for height, width in ((30, 50), (75, 20)):
        found = dict(zip(names, session.run(names, {"images": noise(height, width, batch=2).numpy()}), strict=True))
        logits, boxes = (torch.from_numpy(found[name]) for name in ("pred_logits", "pred_boxes"))
        wanted = DetectionPostProcessor(DecodeSpec(top_k=12, clip=clip and not resize.letterbox))(
            logits, boxes, torch.tensor([[8, 8] if resize.letterbox else [height, width]] * 2)
        ).boxes
        if resize.letterbox:
            scale = min(8 / height, 8 / width)
            new = [max(1, round(side * scale)) for side in (height, width)]
            top, left = ((8 - side) // 2 for side in new)
            wanted = (wanted - torch.tensor([left, top] * 2)) * torch.tensor([width / new[1], height / new[0]] * 2)
            wanted = wanted.clamp(min=torch.zeros(4), max=torch.tensor([width, height] * 2)) if clip else wanted
        got = found["det_boxes" if io == "efficientnms" else "boxes"]
        np.testing.assert_allclose(got, wanted, atol=1e-3, rtol=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return to_onnx("tiny", tmp_path_factory.mktemp("whole") / "whole.onnx", preprocess_inside="full", keep_raw=True)


def test_an_export_takes_pixels_and_is_the_detector_it_was_made_of(whole):
    assert (whole.inputs, whole.opset) == (("images",), 18)
    report = verify(whole.path, "tiny")
    assert report.ok, str(report)
    (found,) = Detector.load(whole.path).predict(sample_images()[0])
    (wanted,) = Detector.load("tiny", device="cpu").predict(sample_images()[0])
    assert found["labels"].tolist() == wanted["labels"].tolist() != []
    assert torch.allclose(found["boxes"], wanted["boxes"], atol=0.5)


def test_an_older_source_is_converted_and_that_is_said(tmp_path):
    source = written(tmp_path, foreign(opset=13))
    result = attach(source, tmp_path / "out.onnx", SPEC, resize_inside=Resize())
    assert result.opset == 18
    assert any("from opset 13 to 18: a resize like the trained one needs 18" in note for note in result.notes)


@pytest.mark.parametrize("io", [name for name, layout in LAYOUTS.items() if layout.pixels is not None])
def test_layouts_of_runners_that_resize_themselves_are_refused(tmp_path, io):
    with pytest.raises(ValueError, match=f"runner of io '{io}' resizes images itself"):
        attach(written(tmp_path, foreign()), tmp_path / "out.onnx", SPEC, io=io, resize_inside=Resize())


def test_a_source_whose_images_are_bytes_already_is_refused(tmp_path, whole):
    with pytest.raises(ValueError, match="takes uint8 images already"):
        attach(whole.path, tmp_path / "again.onnx", SPEC, resize_inside=Resize())


def test_what_does_not_go_together_is_refused(tmp_path):
    post = DetectionPostProcessor(SPEC)
    with pytest.raises(ValueError, match="is for a whole detector with an input of one size"):
        to_onnx(post, tmp_path / "x.onnx", num_queries=5, num_classes=3, preprocess_inside="full")
    with pytest.raises(ValueError, match="preprocess_inside must be one of False, True, scale, full; got 'all'"):
        to_onnx("tiny", tmp_path / "x.onnx", preprocess_inside="all")
