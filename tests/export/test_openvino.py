from __future__ import annotations

import builtins
import os

import pytest
import torch

from detpost import DecodeSpec, DetectionPostProcessor, Detector
from detpost.export import open_openvino, to_onnx, to_openvino
from detpost.images import Preprocessing
from tests.export.detectors import CLASSES, SmallDetector, adversarial
from tests.mixin import assert_same, one_line

openvino = pytest.importorskip("openvino")
pytest.importorskip("onnx")

SPEC = DecodeSpec.preset("rtdetr", top_k=6)


def feed(logits, boxes, sizes):
    return {"pred_logits": logits.numpy(), "pred_boxes": boxes.numpy(), "image_sizes": sizes.numpy()}


def assert_exact(run, post, batches, queries, classes):
    for batch in batches:
        for name, arguments in adversarial(batch, queries, classes).items():
            found, expected = run(feed(*arguments)), post(*arguments)
            for part in ("labels", "queries", "valid"):
                assert torch.equal(torch.from_numpy(found[part]), getattr(expected, part)), (name, batch, part)
            for part in ("scores", "boxes"):
                torch.testing.assert_close(torch.from_numpy(found[part]), getattr(expected, part), rtol=1e-5, atol=1e-5)


class TestPostProcessor:
    @pytest.mark.parametrize(("queries", "classes", "top_k"), [(20, 5, 10), (20, 5, 300), (60, 40, 30)])
    def test_chooses_what_eager_chooses(self, tmp_path, queries, classes, top_k):
        post = DetectionPostProcessor.from_preset("rfdetr", top_k=top_k)
        to_openvino(post, tmp_path / "post.xml", num_queries=queries, num_classes=classes, queries=True)
        assert_exact(open_openvino(tmp_path / "post.xml").run, post, range(1, 9), queries, classes)

    @pytest.mark.parametrize(
        "fields",
        [
            {"activation": "softmax", "background": "last", "selection": "per_query"},
            {"activation": "softmax", "background": "last"},
            {"selection": "per_query", "background": "first"},
        ],
        ids=["detr", "softmax-flat", "per-query"],
    )
    def test_softmax_and_per_query_heads_choose_what_eager_chooses(self, tmp_path, fields):
        post = DetectionPostProcessor(DecodeSpec(**fields, top_k=15))
        to_openvino(post, tmp_path / "post.xml", num_queries=20, num_classes=11, queries=True)
        assert_exact(open_openvino(tmp_path / "post.xml").run, post, (1, 2, 3, 8), 20, 11)

    def test_ties_that_are_left_to_onnx_go_by_the_lower_index_here_too(self, tmp_path):
        post = DetectionPostProcessor.from_preset("rtdetr", top_k=30)
        options = {"num_queries": 60, "num_classes": 20, "queries": True, "ties": "onnx"}
        to_openvino(post, tmp_path / "post.xml", **options)
        assert_exact(open_openvino(tmp_path / "post.xml").run, post, (1, 3), 60, 20)

    def test_answers_of_an_earlier_run_stay(self, tmp_path):
        post = DetectionPostProcessor(SPEC)
        to_openvino(post, tmp_path / "post.xml", num_queries=20, num_classes=CLASSES)
        model = open_openvino(tmp_path / "post.xml")
        cases = list(adversarial(2).values())
        first = model.run(feed(*cases[0]))
        kept = {name: value.copy() for name, value in first.items()}
        model.run(feed(*cases[1]))
        assert all((first[name] == kept[name]).all() for name in kept)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    options = {"preprocessing": Preprocessing(32, 48), "class_names": {0: 'the "cat" <&>'}}
    to_onnx(SmallDetector(), folder / "small.onnx", SPEC, **options)
    return folder, to_openvino(folder / "small.onnx", folder / "small.xml")


def pictures():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=generator) for _ in range(3)]


class TestDetector:
    def test_loads_from_the_file_alone_and_finds_what_onnx_runtime_finds(self, small):
        pytest.importorskip("onnxruntime")
        folder, written = small
        found = Detector.load(written.path, threshold=0.0).predict(pictures())
        expected = Detector.load(folder / "small.onnx", threshold=0.0).predict(pictures())
        assert len(found) == 3
        for row, other in zip(found, expected, strict=True):
            assert_same(row["labels"], other["labels"])
            assert row["label_names"] == other["label_names"]
            torch.testing.assert_close(row["scores"], other["scores"])
            torch.testing.assert_close(row["boxes"], other["boxes"])

    def test_keeps_class_names_that_need_escaping(self, small):
        assert open_openvino(small[1].path).metadata["class_names"] == {"0": 'the "cat" <&>'}

    def test_weights_stay_float32(self, small):
        model = openvino.Core().read_model(small[1].path)
        kinds = {op.get_element_type().get_type_name() for op in model.get_ops() if op.get_type_name() == "Constant"}
        assert "f16" not in kinds
        assert "f32" in kinds

    def test_computes_in_float32(self, small):
        compiled = open_openvino(small[1].path).compiled
        assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["onnx", "openvino", "compile"])
    def test_the_tiny_detector_finds_the_same_in_every_backend(self, backend):
        from detpost.zoo import sample_images

        found = Detector.load("tiny", backend=backend, device="cpu").predict(sample_images()[:1])
        expected = Detector.load("tiny", device="cpu").predict(sample_images()[:1])
        for row, other in zip(found, expected, strict=True):
            assert row["label_names"] == other["label_names"]
            torch.testing.assert_close(row["scores"], other["scores"], atol=1e-3, rtol=0)
            torch.testing.assert_close(row["boxes"], other["boxes"], atol=0.5, rtol=0)


class TestWriting:
    def files(self, folder):
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    def pair(self, small, folder):
        for suffix in (".xml", ".bin"):
            (folder / f"x{suffix}").write_bytes(small[1].path.with_suffix(suffix).read_bytes())
        return folder / "x.xml"

    @pytest.mark.parametrize("there", [True, False], ids=["over an old pair", "where nothing was"])
    def test_a_text_that_cannot_be_put_in_place_leaves_the_old_pair(self, small, tmp_path, monkeypatch, there):
        path = self.pair(small, tmp_path) if there else tmp_path / "x.xml"
        before = self.files(tmp_path)
        replace = os.replace

        def fails_for_the_text(source, target):
            if str(target).endswith(".xml"):
                raise OSError("no space left")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fails_for_the_text)
        with pytest.raises(OSError, match="no space left"):
            to_openvino(DetectionPostProcessor(SPEC), path, num_queries=7, num_classes=3)
        assert self.files(tmp_path) == before

    def test_an_interrupted_conversion_leaves_the_old_pair(self, small, tmp_path):
        path = self.pair(small, tmp_path)
        before = self.files(tmp_path)

        def stop(line):
            if "writing" in line:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            to_openvino(DetectionPostProcessor(SPEC), path, num_queries=7, num_classes=3, progress=stop)
        assert self.files(tmp_path) == before

    def test_weights_of_another_export_are_noticed(self, small, tmp_path):
        path = self.pair(small, tmp_path)
        weights = bytearray(path.with_suffix(".bin").read_bytes())
        weights[0] ^= 1
        path.with_suffix(".bin").write_bytes(weights)
        with pytest.raises(ValueError, match="does not belong to") as error:
            open_openvino(path)
        one_line(error)


class TestRefusals:
    def test_a_name_that_is_no_xml(self, tmp_path):
        with pytest.raises(ValueError, match=r"path must end in \.xml; got 'x\.bin'"):
            to_openvino(DetectionPostProcessor(SPEC), tmp_path / "x.bin", num_queries=7, num_classes=3)

    def test_options_beside_an_onnx_file(self, small, tmp_path):
        with pytest.raises(ValueError, match="spec and options inside"):
            to_openvino(small[0] / "small.onnx", tmp_path / "x.xml", queries=True)

    def test_missing_and_foreign_files(self, small, tmp_path):
        (tmp_path / "text.onnx").write_text("no model")
        with pytest.raises(FileNotFoundError, match="no file"):
            to_openvino(tmp_path / "none.onnx", tmp_path / "x.xml")
        with pytest.raises(ValueError, match=r"text\.onnx"):
            to_openvino(tmp_path / "text.onnx", tmp_path / "x.xml")
        with pytest.raises(FileNotFoundError, match="no file"):
            open_openvino(tmp_path / "none.xml")
        model = openvino.convert_model(small[0] / "small.onnx")
        openvino.save_model(model, tmp_path / "foreign.xml")
        with pytest.raises(ValueError, match="was not written by detpost") as error:
            Detector.load(tmp_path / "foreign.xml")
        one_line(error)

    def test_a_missing_openvino_names_the_extra(self, tmp_path, monkeypatch):
        original = builtins.__import__

        def absent(name, *arguments, **named):
            if name == "openvino":
                raise ImportError(name)
            return original(name, *arguments, **named)

        monkeypatch.setattr(builtins, "__import__", absent)
        with pytest.raises(ImportError, match=r"pip install 'detpost\[openvino\]'"):
            to_openvino(DetectionPostProcessor(SPEC), tmp_path / "x.xml", num_queries=7, num_classes=3)
