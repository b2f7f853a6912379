"""The embedded detector: what ships, that it loads in silence, and that it finds what the samples show."""

import json
import logging
import warnings

import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert, box_iou

from detpost import DetectionPostProcessor, zoo

transformers = pytest.importorskip("transformers")


class Listener(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


@pytest.fixture(scope="module")
def truth():
    return json.loads((zoo.SAMPLES / "ground_truth.json").read_text())


@pytest.fixture(scope="module")
def model():
    return transformers.RTDetrV2ForObjectDetection.from_pretrained(zoo.TINY, dtype=torch.float32).eval()


def test_weights_fit_their_budget():
    assert (zoo.TINY / "model.safetensors").stat().st_size <= 5_000_000
    assert sum(path.stat().st_size for path in zoo.SAMPLES.iterdir()) <= 1_000_000


def test_loads_without_network_or_warnings(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    listener = Listener()
    library = logging.getLogger("transformers")
    library.addHandler(listener)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, report = transformers.RTDetrV2ForObjectDetection.from_pretrained(
                zoo.TINY, dtype=torch.float32, output_loading_info=True
            )
    finally:
        library.removeHandler(listener)
    assert listener.said == []
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}


def test_processor_only_resizes_and_rescales():
    processor = transformers.RTDetrImageProcessor.from_pretrained(zoo.TINY)
    pixels = processor(images=Image.new("RGB", (70, 50), (255, 0, 51)), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 128, 128)
    torch.testing.assert_close(pixels[0, :, 64, 64], torch.tensor([1.0, 0.0, 0.2]))


def test_samples_are_four_and_of_different_shapes(truth):
    paths = zoo.sample_images()
    assert paths == sorted(paths)
    assert [path.name for path in paths] == [image["file_name"] for image in truth["images"]]
    sizes = [Image.open(path).size for path in paths]
    assert sizes == [(image["width"], image["height"]) for image in truth["images"]]
    assert len(set(sizes)) == 4


@torch.no_grad()
def test_finds_the_digits_of_the_samples(truth, model):
    processor = transformers.RTDetrImageProcessor.from_pretrained(zoo.TINY)
    images = [Image.open(path).convert("RGB") for path in zoo.sample_images()]
    outputs = model(**processor(images=images, return_tensors="pt"))
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=100, score_threshold=0.5)
    sizes = torch.tensor([[image.height, image.width] for image in images])
    found = wrong = total = 0
    for image, detections in zip(
        truth["images"], post(outputs.logits, outputs.pred_boxes, sizes).to_list(), strict=True
    ):
        wanted = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        boxes = box_convert(torch.tensor([a["bbox"] for a in wanted]), "xywh", "xyxy")
        labels = torch.tensor([a["category_id"] for a in wanted])
        same = labels[:, None] == detections["labels"]
        match = (box_iou(boxes, detections["boxes"]) >= 0.5) & same  # (wanted, detected)
        found, total = found + int(match.any(1).sum()), total + len(wanted)
        wrong += int((~match.any(0)).sum())
    assert found >= 0.85 * total
    assert wrong <= 0.15 * total


def test_card_says_what_was_measured_and_under_what_licence():
    card = (zoo.TINY / "README.md").read_text()
    for word in ("AP50", "AP75", "recall", "seed", "steps", "CC BY 4.0", "CC BY 2.0", "load_digits", "train_tiny.py"):
        assert word in card, word
