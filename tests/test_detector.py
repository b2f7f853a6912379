"""Images in, detections out."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import batched_nms

from detpost import Detector
from detpost.images import Preprocessing, read_image
from detpost.integrations.transformers import load_detector
from detpost.zoo import TINY, sample_images


@pytest.fixture(scope="module")
def detector():
    return Detector.load("tiny", device="cpu")


def test_predict_gives_one_dict_per_image_with_names_and_pixel_boxes(detector):
    paths = sample_images()
    found = detector.predict(paths)
    assert len(found) == len(paths)
    for path, image in zip(paths, found, strict=True):
        width, height = Image.open(path).size
        assert sorted(image) == ["boxes", "label_names", "labels", "scores"]
        assert len(image["scores"]) > 0
        assert image["label_names"] == [str(label) for label in image["labels"].tolist()]
        assert (image["scores"] > 0.5).all()
        assert (image["scores"].diff() <= 0).all()
        assert image["boxes"].dtype == torch.float32
        assert image["boxes"].shape == (len(image["scores"]), 4)
        assert (image["boxes"][:, 2:] <= torch.tensor([width, height]) + 8).all()
        assert (image["boxes"][:, 2:] > image["boxes"][:, :2]).all()


def test_mixed_sources_and_sizes_in_one_batch_equal_one_at_a_time(detector):
    path = sample_images()[0]
    pixels = np.array(Image.open(path).convert("RGB"))
    sources = [path, str(sample_images()[1]), Image.open(path), pixels, torch.from_numpy(pixels).permute(2, 0, 1)]
    together = detector.predict(sources, batch_size=3)
    alone = [detector.predict(source)[0] for source in sources]
    for one, other in zip(together, alone, strict=True):
        assert one["labels"].tolist() == other["labels"].tolist()
        assert torch.allclose(one["boxes"], other["boxes"], atol=1e-2)
        assert torch.allclose(one["scores"], other["scores"], atol=1e-4)
    assert together[0]["labels"].tolist() == together[2]["labels"].tolist() == together[3]["labels"].tolist()


def test_no_images_give_no_rows(detector):
    assert detector.predict([]) == []


def test_threshold_is_strict_and_checked():
    assert all(len(image["scores"]) == 0 for image in Detector.load("tiny", threshold=1.0).predict(sample_images()))
    with pytest.raises(ValueError, match=r"threshold must lie within \[0, 1\]; got 1.5"):
        Detector.load("tiny", threshold=1.5)
    with pytest.raises(ValueError, match=r"nms must be an IoU within \[0, 1\]; got 70"):
        Detector.load("tiny", nms=70)


@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_nms_drops_what_overlaps_a_better_one_of_its_class_and_nothing_else(backend):
    path = next(path for path in sample_images() if path.stem == "petals")
    (every,) = Detector.load("tiny", backend, device="cpu", threshold=0.3).predict(path)
    (found,) = Detector.load("tiny", backend, device="cpu", threshold=0.3, nms=0.7).predict(path)
    kept = batched_nms(every["boxes"], every["scores"], every["labels"], 0.7)
    assert 0 < len(kept) < len(every["scores"])
    for name in ("scores", "labels", "boxes"):
        assert torch.equal(found[name], every[name][kept]), name
    assert found["label_names"] == [every["label_names"][place] for place in kept.tolist()]


@pytest.mark.parametrize(
    ("source", "options", "error", "pattern"),
    [
        ("tiny", {"backend": "quantum"}, ValueError, "unknown backend 'quantum': take one of eager"),
        ("missing.onnx", {}, OSError, "no file missing.onnx"),
        ("./no-such-directory", {}, OSError, "no detector at './no-such-directory'"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(source, options, error, pattern):
    with pytest.raises(error, match=pattern) as caught:
        Detector.load(source, **options)
    assert "\n" not in str(caught.value)


def test_an_image_that_cannot_be_read_is_named(detector, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(OSError, match=r"broken.png"):
        detector.predict([tmp_path / "broken.png"])
    with pytest.raises(ValueError, match="batch_size"):
        detector.predict([], batch_size=0)


def test_our_preprocessing_is_the_processors(tmp_path):
    loaded = load_detector("tiny")
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(TINY)
    images = [read_image(path) for path in sample_images()]
    theirs = processor(images=images, return_tensors="pt")["pixel_values"]
    ours, _, mask = loaded.prepare(images)
    assert mask is None
    assert loaded.preprocessing == Preprocessing(128, 128)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_directory_without_a_processor_file_takes_the_size_of_its_config(tmp_path):
    import json
    import shutil

    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, tmp_path / name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "anchor_image_size": [128, 128]}))
    assert load_detector(tmp_path).preprocessing == Preprocessing(128, 128)
    found = Detector.load(tmp_path, device="cpu").predict(sample_images())
    expected = Detector.load("tiny", device="cpu").predict(sample_images())
    assert [image["labels"].tolist() for image in found] == [image["labels"].tolist() for image in expected]


def test_an_exported_file_needs_nothing_else(tmp_path, detector):
    from detpost.export import to_onnx

    for inside in (False, True):
        to_onnx("tiny", tmp_path / "tiny.onnx", preprocess_inside=inside)
        found = Detector.load(tmp_path / "tiny.onnx").predict(sample_images())
        for one, other in zip(found, detector.predict(sample_images()), strict=True):
            assert one["label_names"] == other["label_names"]
            assert torch.allclose(one["boxes"], other["boxes"], atol=0.1)
            assert torch.allclose(one["scores"], other["scores"], atol=1e-3)
