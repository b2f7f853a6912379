"""The matrix: the same adversarial inputs through every runtime give the same detections."""

import pytest
import torch

from detpost import DetectionPostProcessor
from detpost.export.formats import FORMATS
from detpost.export.lowering import PRECISIONS
from detpost.verify.compare import raw_cases
from scripts.same_answer import CLASSES, QUERIES, FewerBits, PlainTopK, differing, in_fewer_bits, runtimes


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["rtdetr", "detr"])
def test_every_runtime_chooses_the_same(tmp_path, preset):
    torch.compiler.reset()  # what other tests compiled counts towards the limit of recompilations
    post = DetectionPostProcessor.from_preset(preset)
    with torch.no_grad():
        found = {name: differing(run, post) for name, run in runtimes(post, tmp_path, "exact", cuda=False)}
    assert len(found) == 3 + len(FORMATS) + 2 * len(PRECISIONS)
    assert {name: wrong for name, (wrong, _) in found.items()} == dict.fromkeys(found, 0)
    assert all(total > 5000 for _, total in found.values()) or preset == "detr"


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["rtdetr", "detr"])
def test_the_gpu_chooses_the_same(tmp_path, preset):
    post = DetectionPostProcessor.from_preset(preset)
    with torch.no_grad():
        found = {name: differing(run, post) for name, run in runtimes(post, tmp_path, "exact", cuda=True)}
    assert len(found) == 3 + len(FORMATS) + 2 * len(PRECISIONS) + 3
    assert {name: wrong for name, (wrong, _) in found.items()} == dict.fromkeys(found, 0)


def test_the_count_sees_a_plain_top_k():
    post = DetectionPostProcessor.from_preset("rtdetr")
    wrong, total = differing(PlainTopK(post.spec), post)
    assert wrong > 0.3 * total


@pytest.mark.parametrize("precision", PRECISIONS)
def test_files_in_fewer_bits_have_more_equal_scores_and_keep_their_order(tmp_path, precision):
    post = DetectionPostProcessor.from_preset("rtdetr")
    run = FewerBits(FORMATS[0], in_fewer_bits(post, precision, tmp_path / "few.onnx", "exact"), precision)
    with torch.no_grad():
        assert differing(run, post)[0] == 0
        drawn = next(raw for name, raw in raw_cases(QUERIES, CLASSES) if name == "random, batch 8")
        few, whole = (each.scores[:, 1:] == each.scores[:, :-1] for each in (run(*drawn), post(*drawn)))
    assert int(few.sum()) > 10 * max(1, int(whole.sum()))
    assert differing(run, DetectionPostProcessor.from_preset("rtdetr", top_k=QUERIES, selection="per_query"))[0] > 1000
