"""The matrix's rows of the browser: what the page runs decodes as eager PyTorch does."""

import pytest

from detpost import DetectionPostProcessor
from detpost.export import to_onnx
from scripts.same_answer import CLASSES, QUERIES, differing, in_browser


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["wasm", "webgpu"])
@pytest.mark.parametrize("preset", ["rtdetr", "detr"])
def test_the_browser_chooses_the_same(needs_browser, tmp_path, preset, backend):
    post = DetectionPostProcessor.from_preset(preset)
    made = to_onnx(post, tmp_path / "post.onnx", num_queries=QUERIES, num_classes=CLASSES, queries=True)
    with in_browser(made.path, backend, min(post.spec.top_k, QUERIES)) as found:
        if found is None:
            pytest.skip("this browser offers no adapter for WebGPU")
        wrong, total = differing(found[1], post)
        assert wrong == 0
        assert total > 5000


@pytest.mark.slow
def test_the_count_sees_another_order(needs_browser, tmp_path):
    post = DetectionPostProcessor.from_preset("rtdetr")
    made = to_onnx(post, tmp_path / "post.onnx", num_queries=QUERIES, num_classes=CLASSES, queries=True)
    other = DetectionPostProcessor.from_preset("rtdetr", selection="per_query")
    with in_browser(made.path, "wasm", 300) as found:
        wrong, total = differing(found[1], other)
    assert wrong > 0.3 * total
