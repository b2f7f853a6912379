"""The tiny detector's data and its training and evaluation scripts."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import digit_scenes  # noqa: E402


def run(script, *arguments):
    command = [sys.executable, ROOT / "scripts" / script, *arguments]
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


class TestScenes:
    def test_train_and_test_digits_are_disjoint_and_complete(self):
        train, test = digit_scenes.split_digits()
        assert len(test.labels) == 500
        assert not set(train.indices) & set(test.indices)
        assert set(train.indices) | set(test.indices) == set(range(1797))
        counts = np.bincount(test.labels, minlength=10)
        assert counts.min() >= 48  # stratified
        assert counts.max() <= 52

    def test_the_same_seed_makes_the_same_scene(self):
        digits = digit_scenes.split_digits()[0]
        once, again = (digit_scenes.compose(np.random.default_rng(5), digits) for _ in range(2))
        for a, b in zip(once, again, strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("recipe", [digit_scenes.TRAINING, digit_scenes.EVALUATION])
    def test_boxes_lie_inside_and_hardly_overlap(self, recipe):
        digits, rng = digit_scenes.split_digits()[0], np.random.default_rng(1)
        for _ in range(40):
            height, width = size = digit_scenes.random_size(rng)
            scene = digit_scenes.compose(rng, digits, size, recipe)
            assert scene.image.shape == (height, width, 3)
            assert scene.image.dtype == np.uint8
            assert (scene.boxes[:, :2] >= 0).all()
            assert (scene.boxes[:, 2:] <= [width, height]).all()
            assert (scene.boxes[:, 2:] > scene.boxes[:, :2]).all()
            for i, box in enumerate(scene.boxes):
                others = np.delete(scene.boxes, i, axis=0)
                sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
                assert (np.clip(sides, 0, None).prod(1) <= 0.1 * (box[2:] - box[:2]).prod() + 1e-3).all()

    def test_boxes_are_tight_around_the_ink(self, monkeypatch):
        # White ink on an even black ground, with no wear: what differs from black is the ink, and it fills the box.
        monkeypatch.setattr(digit_scenes, "_background", lambda rng, w, h, plain: np.zeros((h, w, 3), np.float32))
        monkeypatch.setattr(digit_scenes, "_wear", lambda rng, canvas: np.clip(canvas, 0, 255).astype(np.uint8))

        def paste(rng, canvas, coverage, left, top):
            canvas[top : top + coverage.shape[0], left : left + coverage.shape[1]] += 255 * coverage[..., None]

        monkeypatch.setattr(digit_scenes, "_paste", paste)
        digits, rng = digit_scenes.split_digits()[0], np.random.default_rng(2)
        for recipe in (digit_scenes.TRAINING, digit_scenes.EVALUATION):
            for _ in range(40):
                scene = digit_scenes.compose(rng, digits, recipe=recipe, count=1)
                ink = scene.image[..., 0] > 255 * digit_scenes.VISIBLE
                rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
                want = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                np.testing.assert_allclose(scene.boxes[0], want, atol=1)

    def test_coco_ground_truth_counts_every_digit(self):
        digits, rng = digit_scenes.split_digits()[1], np.random.default_rng(3)
        scenes = [digit_scenes.compose(rng, digits) for _ in range(5)]
        truth = digit_scenes.coco_ground_truth(scenes)
        assert len(truth["annotations"]) == sum(len(scene.labels) for scene in scenes)
        first = truth["annotations"][0]
        np.testing.assert_allclose(first["bbox"][2:], scenes[0].boxes[0, 2:] - scenes[0].boxes[0, :2])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "processes"), [("rtdetr", 1), ("rtdetr", 2), ("dfine", 1), ("rfdetr", 1)])
def test_two_steps_of_training_write_a_directory_that_loads(tmp_path, family, processes):
    options = ["--family", family, "--steps", 2, "--batch", 4, "--device", "cpu", "--processes", processes]
    run("train_tiny.py", *options, "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
    }
    model = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path, dtype=torch.float32).eval()
    name = {"rtdetr": "RTDetrV2", "dfine": "DFine", "rfdetr": "RfDetr"}[family]
    assert type(model).__name__ == f"{name}ForObjectDetection"
    with torch.no_grad():
        outputs = model(torch.zeros(1, 3, 128, 128))
    assert outputs.logits.shape == (1, 30, 10)
    assert torch.isfinite(outputs.logits).all()


@pytest.mark.slow
def test_shipped_weights_reach_their_promise_on_fresh_scenes(tmp_path):
    pytest.importorskip("faster_coco_eval")
    # A seed that neither training nor the card has used, and fewer scenes than the card's 500 for time's sake.
    run("evaluate_tiny.py", "--images", 120, "--seed", 4242, "--json", tmp_path / "measures.json")
    measures = json.loads((tmp_path / "measures.json").read_text())
    assert measures["AP"] >= 0.60
    assert measures["AP50"] >= 0.90
