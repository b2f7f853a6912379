"""Files of other libraries' own exporters, with random weights, find what they found when they are attached to."""

import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from detpost import DecodeSpec, DetectionPostProcessor
from detpost.export import attach
from detpost.spec import presets_like
from tests.detectors import FAMILIES, SIDE, detector
from tests.export.foreign import run

pytestmark = [pytest.mark.peers, pytest.mark.slow]


def noise(batch, side, seed=0):
    return np.random.default_rng(seed).random((batch, 3, side, side), np.float32)


def session_outputs(path, **feed):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip((value.name for value in session.get_outputs()), session.run(None, feed), strict=True))


def assert_alike(scores, labels, corners, expected_scores, expected_labels, expected_corners, side):
    """Hold each detection of theirs to one of ours with its label, score and box: equal scores may change places."""
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
    same = (
        (np.abs(expected_scores[:, None] - scores) < 1e-4)
        & (expected_labels[:, None] == labels)
        & (np.abs(expected_corners[:, None] - corners).max(axis=2) < 1e-3 * side)
    )
    # One that ties with the last may have been left out on one side.
    assert same.any(axis=1)[expected_scores > expected_scores.min() + 1e-4].all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_ultralytics_rtdetr(tmp_path, monkeypatch, dynamic):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ultralytics = pytest.importorskip("ultralytics")
    torch.manual_seed(0)
    model = ultralytics.RTDETR("rtdetr-l.yaml")
    source = model.export(format="onnx", imgsz=320, opset=17, simplify=False, dynamic=dynamic)
    result = attach(source, tmp_path / "out.onnx", DecodeSpec.preset("rtdetr"))
    assert any("give its own 300 detections" in note for note in result.notes)
    assert any("outputs output0" in note for note in result.notes)
    for batch in (1, 2, 4) if dynamic else (1,):
        images = noise(batch, 320)
        rows = session_outputs(source, images=images)["output0"]
        got = run(result.path, images, np.full((batch, 2), 1000))
        for i in range(batch):
            middle, size = rows[i, :, :2], rows[i, :, 2:4]
            corners = np.concatenate((middle - size / 2, middle + size / 2), axis=1) * 1000
            ours = (got["scores"][i], got["labels"][i], got["boxes"][i])
            assert_alike(*ours, rows[i, :, 4], rows[i, :, 5], corners, 1000)


def test_rfdetr(tmp_path):
    rfdetr = pytest.importorskip("rfdetr")
    from rfdetr.models.postprocess import PostProcess

    torch.manual_seed(0)
    source = rfdetr.RFDETRNano(pretrain_weights=None).export(
        output_dir=str(tmp_path), dynamic_batch=True, verbose=False
    )
    result = attach(source, tmp_path / "out.onnx", preset="rfdetr", keep_raw=True)
    assert any(note.startswith("logits: labels ['batch', 300, 91]") for note in result.notes)
    for batch in (1, 2, 4):
        images, sizes = noise(batch, 384), np.full((batch, 2), 500)
        got = session_outputs(result.path, input=images, image_sizes=sizes)
        raw = {name: torch.from_numpy(got[name]) for name in ("pred_logits", "pred_boxes")}
        for i, expected in enumerate(PostProcess(num_select=300)(raw, torch.from_numpy(sizes))):
            theirs = (expected[name].numpy() for name in ("scores", "labels", "boxes"))
            ours = (got["scores"][i], got["labels"][i], got["boxes"][i])
            scores, labels, corners = theirs
            assert_alike(*ours, scores, labels, corners.clip(0, 500), 500)


class Deployed(nn.Module):
    """A network behind the post-processing that RT-DETR's and D-FINE's ``export_onnx`` put there, written afresh."""

    def __init__(self, network, keep, focal=True):
        super().__init__()
        self.network, self.keep, self.focal = network, keep, focal

    def forward(self, images, orig_target_sizes):
        from torchvision.ops import box_convert

        found = self.network(images)
        corners = box_convert(found.pred_boxes, "cxcywh", "xyxy") * orig_target_sizes.repeat(1, 2).unsqueeze(1)
        if self.focal:
            classes = found.logits.shape[2]
            scores, index = found.logits.sigmoid().flatten(1).topk(self.keep, dim=-1)
            labels, query = index - index // classes * classes, index // classes
        else:
            best, channels = found.logits.softmax(dim=-1)[:, :, :-1].max(dim=-1)
            scores, query = best.topk(self.keep, dim=-1)
            labels = channels.gather(1, query)
        return labels, corners.gather(1, query.unsqueeze(-1).repeat(1, 1, 4)), scores


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "rf_detr"])  # it has its own, above
def test_export_onnx_of_rtdetr_and_dfine(tmp_path, family):
    torch.manual_seed(0)
    network = detector(family)
    side, preset = SIDE, presets_like(DecodeSpec.from_config(network.config))[0]
    keep = 15
    module = Deployed(network.eval(), keep, focal=DecodeSpec.preset(preset).activation == "sigmoid").eval()
    example = (torch.rand(2, 3, side, side), torch.tensor([[side, side]] * 2))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            example,
            str(tmp_path / "source.onnx"),
            input_names=["images", "orig_target_sizes"],
            output_names=["labels", "boxes", "scores"],
            dynamic_axes={"images": {0: "N"}, "orig_target_sizes": {0: "N"}},
            opset_version=16,
            dynamo=False,
        )
    spec = DecodeSpec.preset(preset, top_k=keep)
    result = attach(tmp_path / "source.onnx", tmp_path / "out.onnx", spec, keep_raw=True)
    assert any("give its own 15 detections" in note for note in result.notes)
    assert result.inputs == ("images", "image_sizes")
    for batch in (1, 2, 3, 4):
        images, sizes = noise(batch, side, seed=batch), np.random.default_rng(batch).integers(100, 900, (batch, 2))
        got = run(result.path, images, sizes)
        theirs = session_outputs(tmp_path / "source.onnx", images=images, orig_target_sizes=sizes[:, ::-1].copy())
        for i in range(batch):
            one, other = ([side[name][i] for name in ("scores", "labels", "boxes")] for side in (got, theirs))
            assert_alike(*one, *other, 900)
        raw = [torch.from_numpy(got[name]) for name in ("pred_logits", "pred_boxes")]
        expected = DetectionPostProcessor(spec)(*raw, torch.from_numpy(sizes))
        np.testing.assert_array_equal(got["labels"], expected.labels)
