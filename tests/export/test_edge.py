"""ExecuTorch, LiteRT and Core ML: written, and run where they run; ``make test-edge`` has the environments."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

from detpost import DetectionPostProcessor
from detpost.export import edge
from detpost.export.targets import TARGETS, target_of

QUERIES, CLASSES, KEPT = 40, 8, 20
WRITERS = {"executorch": edge.to_executorch, "litert": edge.to_litert, "coreml": edge.to_coreml}
PACKAGES = {"executorch": "executorch", "litert": "litert_torch", "coreml": "coremltools"}


def needs(runner):
    return pytest.mark.skipif(
        importlib.util.find_spec(PACKAGES[runner]) is None, reason=f"needs {PACKAGES[runner]}: make test-edge"
    )


def run_executorch(path, example):
    from executorch.runtime import Runtime

    return Runtime.get().load_program(str(path)).load_method("forward").execute(list(example))


def run_litert(path, example):
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path)).get_signature_runner()
    narrow = [value.to(torch.int32) if value.dtype == torch.int64 else value for value in example]
    found = runner(**{f"args_{place}": value.numpy() for place, value in enumerate(narrow)})
    return [torch.from_numpy(np.asarray(found[f"output_{place}"])) for place in range(len(found))]


RUNS = {"executorch": run_executorch, "litert": run_litert}


def raw_values(seed):
    """Logits with many ties, boxes and a size."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(1, QUERIES, CLASSES, generator=generator) * 3).round() / 2
    return logits, torch.rand(1, QUERIES, 4, generator=generator), torch.tensor([[480, 640]])


@pytest.mark.parametrize("runner", [pytest.param(name, marks=needs(name)) for name in ("executorch", "litert")])
@pytest.mark.parametrize("preset", ["rtdetr", "detr"])
def test_a_decode_is_the_same_to_the_bit_of_its_choice(runner, preset, tmp_path):
    post = DetectionPostProcessor.from_preset(preset, top_k=KEPT)
    written = WRITERS[runner](post, tmp_path, num_queries=QUERIES, num_classes=CLASSES)
    assert written.outputs == ("labels", "boxes", "scores", "valid")
    for seed in range(3):
        example = raw_values(seed)
        found = RUNS[runner](written.path, example)
        with torch.no_grad():
            expected = post(*example)
        assert torch.equal(found[0].to(torch.int64), expected.labels)
        torch.testing.assert_close(found[1], expected.boxes, atol=1e-3, rtol=1e-6)
        torch.testing.assert_close(found[2], expected.scores, atol=1e-6, rtol=0)
        assert torch.equal(found[3].to(torch.bool), expected.valid)


@needs("executorch")
def test_a_whole_detector_runs_in_executorch(tmp_path):
    pytest.importorskip("transformers")
    from detpost import Detector

    written = edge.to_executorch("tiny", tmp_path)
    detector = Detector.load("tiny", device="cpu")
    side = detector.preprocessing.height
    example = (torch.rand(1, 3, side, side), torch.tensor([[480, 640]]))
    found = RUNS["executorch"](written.path, example)
    with torch.no_grad():
        expected = detector.run(*example, None)
    torch.testing.assert_close(found[2], expected.scores, atol=1e-4, rtol=0)
    said = json.loads((tmp_path / "model.json").read_text())
    assert said["inputs"] == ["images", "image_sizes"]
    assert said["preprocessing"]["height"] == side


@needs("executorch")
def test_a_split_detector_is_a_network_and_a_decode_in_cpp(tmp_path):
    pytest.importorskip("transformers")
    from detpost.export.source import ExportSource
    from detpost.postprocess import raw_outputs

    written = edge.to_executorch("tiny", tmp_path, split=True)
    assert [path.name for path in written.beside] == [
        "model.json", "detpost_decode.h", "detpost_decode.cpp", "CMakeLists.txt"
    ]  # fmt: skip
    source = ExportSource.of("tiny", None, None, None, None)
    images = torch.rand(1, 3, *source.image_size)
    logits, boxes = RUNS["executorch"](written.path, (images,))
    with torch.no_grad():
        expected = raw_outputs(source.model(images))
    best = [values.amax(dim=2).sort(dim=1).values for values in (logits, expected[0])]
    torch.testing.assert_close(*best, atol=1e-3, rtol=1e-3)
    assert boxes.shape == expected[1].shape


@needs("coreml")
@pytest.mark.parametrize("preset", ["rtdetr", "detr"])
def test_a_decode_converts_to_core_ml(preset, tmp_path):
    import coremltools

    post = DetectionPostProcessor.from_preset(preset, top_k=KEPT)
    written = edge.to_coreml(post, tmp_path, num_queries=QUERIES, num_classes=CLASSES)
    description = coremltools.models.MLModel(str(written.path), skip_model_load=True).get_spec().description
    assert len(description.input) == 3
    assert len(description.output) == 4


@pytest.mark.parametrize("runner", sorted(WRITERS))
def test_a_package_that_is_missing_is_named(runner, tmp_path, monkeypatch):
    package = PACKAGES[runner]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=5)
    with pytest.raises(ImportError, match="in an environment of its own: pip install"):
        WRITERS[runner](post, tmp_path, num_queries=8, num_classes=3)
    assert list(tmp_path.iterdir()) == []


def test_the_targets_and_their_writers_stay_together():
    assert {target.name for target in TARGETS} == {"triton", "tensorrt", *WRITERS}
    assert all(callable(target.write()) for target in TARGETS)
    with pytest.raises(ValueError, match="takes no opset"):
        target_of("litert").check({}, {"opset": 17})


def test_nothing_is_traced_that_a_runner_lacks():
    """A view of a tensor as another dtype has no kernel in ExecuTorch."""
    for preset in ("rtdetr", "detr"):
        post = DetectionPostProcessor.from_preset(preset, top_k=KEPT)
        module = edge._Decode(post.spec).eval()
        exported = edge._exported(module, raw_values(0))
        operators = {str(node.target) for node in exported.run_decompositions({}).graph.nodes}
        assert not [name for name in operators if "view_copy.dtype" in name or "view.dtype" in name]
        assert not [name for name in operators if "_assert" in name]
