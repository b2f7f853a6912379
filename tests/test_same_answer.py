"""The matrix: the same adversarial inputs through every runtime give the same detections."""

import pytest
import torch

from detpost import DetectionPostProcessor
from detpost.export.formats import FORMATS
from scripts.same_answer import PlainTopK, differing, runtimes


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["rtdetr", "detr"])
def test_every_runtime_chooses_the_same(tmp_path, preset):
    torch.compiler.reset()  # what other tests compiled counts towards the limit of recompilations
    post = DetectionPostProcessor.from_preset(preset)
    with torch.no_grad():
        found = {name: differing(run, post) for name, run in runtimes(post, tmp_path, "exact", cuda=False)}
    assert len(found) == 3 + len(FORMATS)
    assert {name: wrong for name, (wrong, _) in found.items()} == dict.fromkeys(found, 0)
    assert all(total > 5000 for _, total in found.values()) or preset == "detr"


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["rtdetr", "detr"])
def test_the_gpu_chooses_the_same(tmp_path, preset):
    post = DetectionPostProcessor.from_preset(preset)
    with torch.no_grad():
        found = {name: differing(run, post) for name, run in runtimes(post, tmp_path, "exact", cuda=True)}
    assert len(found) == 3 + len(FORMATS) + 3
    assert {name: wrong for name, (wrong, _) in found.items()} == dict.fromkeys(found, 0)


def test_the_count_sees_a_plain_top_k():
    post = DetectionPostProcessor.from_preset("rtdetr")
    wrong, total = differing(PlainTopK(post.spec), post)
    assert wrong > 0.3 * total
