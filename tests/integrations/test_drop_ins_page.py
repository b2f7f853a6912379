"""Every Python example of docs/drop-ins.md runs."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detpost import Detections
from tests.integrations.references import SIZES, outputs

PAGE = Path(__file__).parents[2] / "docs" / "drop-ins.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)

pytestmark = pytest.mark.peers


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the examples take as given: a batch of one image of raw outputs, and the objects that they replace."""
    transformers = pytest.importorskip("transformers")
    detr = pytest.importorskip("transformers.models.rt_detr.modeling_rt_detr")
    kornia = pytest.importorskip("kornia.models.rt_detr")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    raw = outputs(batch=1, queries=5, classes=80)
    logits, boxes = raw.values()
    return {
        "outputs": detr.RTDetrObjectDetectionOutput(logits=logits, pred_boxes=boxes),
        "processor": transformers.RTDetrImageProcessor(),
        "model": SimpleNamespace(
            config=transformers.RTDetrV2Config(),
            predictor=SimpleNamespace(postprocess=print),
            predict=lambda path: path,
        ),
        "detector": SimpleNamespace(post_processor=kornia.DETRPostProcessor(0.3)),
        "image_sizes": SIZES[:1],
        "target_sizes": torch.tensor([[20, 30]]),
        "orig_target_sizes": SIZES[:1].flip(-1),
        "logits": logits,
        "pred_boxes": boxes,
        "pred_masks": torch.randn(1, 5, 4, 4),
        "preds": torch.cat((boxes, logits.sigmoid()), dim=-1),
        "orig_imgs": [np.zeros((20, 30, 3), np.uint8)],
    }


def test_the_page_has_its_examples():
    assert len(EXAMPLES) == 9


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_an_example_runs(names, index):
    if "predictor" in EXAMPLES[index]:
        pytest.importorskip("ultralytics")
    for earlier in EXAMPLES[index - 1 : index] if EXAMPLES[index].startswith("class") else []:
        exec(earlier, names)
    exec(EXAMPLES[index], names)
    if "detections" in names:
        assert isinstance(names["detections"], Detections)
        assert names["detections"].valid.any()
    for found in ("results", "rows"):
        if found in names and "predictor" not in EXAMPLES[index]:
            assert len(names[found]) == 1
            assert len(names[found][0]) > 0
