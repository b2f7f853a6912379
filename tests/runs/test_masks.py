"""Masks from a detector to run lengths in the results, and to COCO's numbers on them."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from detpost import DecodeSpec, Detector
from detpost.command.cli import app, main
from detpost.export import KeypointHead, to_onnx
from detpost.heads import to_rle
from detpost.runs.detect import detect
from detpost.runs.evaluate import evaluate_model
from detpost.runs.merge import merge

SIDE = 32
# (height, width) of each image and the bright rectangle in it: left, top, width, height, on the mask's pixels.
SCENES = [((64, 64), (16, 16, 24, 32)), ((64, 96), (24, 8, 36, 40)), ((32, 32), (4, 4, 12, 20))]


class Bright(nn.Module):
    """Query 0 finds what is bright, with a mask; query 1 finds nothing."""

    def forward(self, images):
        masks = nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 4) - 0.5
        masks = torch.cat((masks, -masks), dim=1)  # (B, 2, 8, 8)
        sure = masks.flatten(2).amax(dim=2, keepdim=True) * 0
        logits = sure + torch.tensor([[4.0], [-9.0]])
        return {"logits": logits, "pred_boxes": (sure + 0.5).expand(-1, 2, 4), "pred_masks": masks}


@pytest.fixture(scope="module", params=["network", "image"])
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "bright.onnx"
    spec = DecodeSpec.preset("rfdetr", top_k=2)
    options = {"image_size": (SIDE, SIDE), "exporter": "torchscript", "class_names": {0: "bright"}}
    return to_onnx(Bright(), path, spec, masks=request.param, **options).path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    truth = {"images": [], "annotations": [], "categories": [{"id": 5, "name": "bright"}]}
    for number, ((height, width), (left, top, across, down)) in enumerate(SCENES, start=1):
        mask = np.zeros((height, width), bool)
        mask[top : top + down, left : left + across] = True
        Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)).save(folder / f"{number}.png")
        truth["images"].append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        rle = to_rle(mask[None])[0]
        row = {"image_id": number, "category_id": 5, "bbox": [left, top, across, down], "area": int(mask.sum())}
        truth["annotations"].append({**row, "segmentation": {**rle, "counts": rle["counts"].decode()}})
    (folder / "truth.json").write_text(json.dumps(truth))
    return folder


def decoded(rle):
    tool = pytest.importorskip("pycocotools.mask")
    return tool.decode({**rle, "counts": rle["counts"].encode()}).astype(bool)


def test_detect_writes_run_lengths(tmp_path, file, scenes):
    detect(sorted(scenes.glob("*.png")), tmp_path, model=file, formats=("coco", "jsonl"), batch_size=2)
    rows = json.loads((tmp_path / "detections.json").read_text())
    assert len(rows) == len(SCENES)
    predicted = Detector.load(file).predict(sorted(scenes.glob("*.png")))
    for row, (size, (left, top, across, down)), one in zip(rows, SCENES, predicted, strict=True):
        mask = decoded(row["segmentation"])
        assert mask.shape == size
        expected = np.zeros(size, bool)
        expected[top : top + down, left : left + across] = True
        # Interpolation rounds corners off, and nothing else: edges lie on the mask's pixels.
        assert (mask & expected).sum() / (mask | expected).sum() > 0.96
        np.testing.assert_array_equal(one["masks"][0].numpy(), mask)
    line = json.loads((tmp_path / "detections.jsonl").read_text().splitlines()[0])
    assert line["detections"][0]["segmentation"] == rows[0]["segmentation"]


def test_an_image_without_a_detection_has_no_mask_and_is_not_skipped(tmp_path, file):
    Image.new("RGB", (40, 30)).save(tmp_path / "dark.png")
    detect([tmp_path / "dark.png"], tmp_path, model=file, threshold=0.99)
    summary = detect([tmp_path / "dark.png"], tmp_path, model=file, threshold=0.99)
    assert (summary.images, summary.detections, summary.skipped) == (1, 0, ())


def test_masks_go_through_parquet_and_the_merge(tmp_path, file, scenes):
    pytest.importorskip("pyarrow")
    detect([scenes], tmp_path, model=file, formats=("coco", "parquet"))
    merge([tmp_path], tmp_path / "merged", formats=["coco"])
    whole, merged = (json.loads((place / "detections.json").read_text()) for place in (tmp_path, tmp_path / "merged"))
    assert all("segmentation" in row for row in merged)
    assert merged == whole


class Skeletons(nn.Module):
    """Keypoints of two classes for each of two queries."""

    def forward(self, images):
        sure = images.mean(dim=(1, 2, 3))[:, None, None] * 0
        points = (sure[..., None] + torch.linspace(0.1, 0.9, 3)).expand(-1, 2, 4, 3)
        return {
            "logits": sure + torch.tensor([[4.0, -4.0], [-9.0, 3.0]]),
            "pred_boxes": (sure + 0.5).expand(-1, 2, 4),
            "pred_keypoints": points,
        }


def test_detect_keeps_all_that_a_detector_gives_or_says_what_it_leaves_out(tmp_path, scenes):
    options = {"image_size": (SIDE, SIDE), "exporter": "torchscript"}
    spec, head = DecodeSpec.preset("rfdetr", top_k=2), KeypointHead((2, 1))
    model = to_onnx(Skeletons(), tmp_path / "points.onnx", spec, keypoints=head, **options).path
    formats = ("coco", "jsonl", "csv", "parquet") if importlib.util.find_spec("pyarrow") else ("coco", "jsonl", "csv")
    with pytest.warns(UserWarning, match="coco and jsonl hold them") as said:
        detect([scenes], tmp_path / "out", model=model, formats=formats)
    told = {str(warning.message).split(":")[0] for warning in said}
    assert "CSV holds boxes and no keypoint_scores, keypoints" in told
    assert "Parquet has no column for keypoint_scores, keypoints" in told or "parquet" not in formats
    predicted = Detector.load(model).predict(sorted(scenes.glob("*.png")))
    scores = [score for one in predicted for score in one["keypoint_scores"].tolist()]
    assert len(scores) == 2 * len(SCENES)
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [row["keypoint_scores"] for row in rows] == scores
    assert all(len(row["keypoints"]) == 2 * 3 for row in rows)
    lines = [json.loads(line) for line in (tmp_path / "out" / "detections.jsonl").read_text().splitlines()]
    assert [found["keypoint_scores"] for line in lines for found in line["detections"]] == scores


def test_evaluate_measures_masks(tmp_path, file, scenes):
    found, _ = evaluate_model(scenes / "truth.json", scenes, iou_type="segm", model=file, threshold=0.5)
    assert found.iou_type == "segm"
    assert found.metrics["AP75"] == pytest.approx(1.0)
    assert found.metrics["AP"] > 0.9
    # By boxes, which are half the image each, it finds little: it is the masks that were measured.
    boxes, _ = evaluate_model(scenes / "truth.json", scenes, model=file, threshold=0.5)
    assert boxes.metrics["AP75"] < 0.8
    truth = json.loads((scenes / "truth.json").read_text())
    moved = [np.roll(decoded(row["segmentation"]), 12, axis=1) for row in truth["annotations"]]
    for row, mask in zip(truth["annotations"], moved, strict=True):
        rle = to_rle(mask[None])[0]
        row["segmentation"] = {**rle, "counts": rle["counts"].decode()}
    (tmp_path / "moved.json").write_text(json.dumps(truth))
    worse, _ = evaluate_model(tmp_path / "moved.json", scenes, iou_type="segm", model=file, threshold=0.5)
    assert worse.metrics["AP75"] < 0.1


def test_the_command_evaluates_masks(file, scenes):
    options = ["--model", str(file), "--images", str(scenes), "--iou-type", "segm", "--threshold", "0.5", "--json", "-"]
    ran = CliRunner().invoke(app, ["evaluate", str(scenes / "truth.json"), *options])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.output)["metrics"]["AP75"] == pytest.approx(1.0)


def test_a_detector_without_masks_is_refused(scenes, monkeypatch, capsys):
    words = ["evaluate", str(scenes / "truth.json"), "--model", "tiny", "--images", str(scenes), "--iou-type", "segm"]
    monkeypatch.setattr("sys.argv", ["detpost", *words, "--categories", "label"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "tiny gives no masks" in capsys.readouterr().err


@pytest.mark.slow
def test_a_transformers_folder_with_masks(tmp_path, scenes):
    from tests.detectors import detector

    model = detector("detr_segmentation")
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path / "model")
    images = sorted(scenes.glob("*.png"))
    together = Detector.load(tmp_path / "model", device="cpu", threshold=0.05).predict(images)
    assert [one["masks"].shape[1:] for one in together] == [size for size, _ in SCENES]
    assert all(len(one["masks"]) == len(one["scores"]) > 0 for one in together)
    exported = Detector.load(tmp_path / "model", backend="onnx", threshold=0.05).predict(images[0])[0]
    assert exported["masks"].shape[1:] == SCENES[0][0]
