from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch
from torch import nn

from detpost import DecodeSpec, DetectionPostProcessor, Detector
from detpost.export import open_package, package
from detpost.export.packaged import read_package_metadata
from detpost.images import Preprocessing
from tests.export.detectors import SmallDetector, adversarial, raw
from tests.mixin import assert_same, one_line

COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]
KINDS = ["export", pytest.param("aot", marks=pytest.mark.skipif(not COMPILERS, reason="no C++ compiler"))]
SPEC = DecodeSpec.preset("rtdetr", top_k=6)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Give packages of one post-processor, each kind made once: AOTInductor takes its time."""
    folder, made = tmp_path_factory.mktemp("packages"), {}

    def file(kind):
        if kind not in made:
            made[kind] = folder / f"{kind}.pt2"
            package(POST, raw(1), made[kind], kind=kind, class_names={0: "a cat", 1: 'the "dog"'})
        return made[kind]

    return file


POST = DetectionPostProcessor.from_preset("rtdetr", top_k=10)


def image(seed):
    return torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def detector_file(path, **options):
    made = SmallDetector()
    package(made, None, path, SPEC, kind="export", preprocessing=Preprocessing(32, 48), **options)
    return made


class TestPostProcessor:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.slow
    def test_chooses_what_eager_chooses_at_every_batch_size(self, files, kind):
        opened = open_package(files(kind))
        for batch in range(1, 9):
            for arguments in adversarial(batch).values():
                found, expected = opened.run(*arguments), POST(*arguments)
                for name in ("labels", "queries", "valid"):
                    assert_same(found[name], getattr(expected, name))
                for name in ("scores", "boxes"):
                    torch.testing.assert_close(found[name], getattr(expected, name))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.slow
    def test_runs_in_a_process_that_cannot_import_detpost(self, files, kind, tmp_path):
        arguments = raw(3)
        torch.save(arguments, tmp_path / "inputs.pt")
        opening = {
            "aot": "torch._inductor.aoti_load_package(sys.argv[1])",
            "export": "torch.export.load(sys.argv[1]).module()",
        }
        program = f"""
            import sys
            sys.modules["detpost"] = None  # importing it fails from here on
            import torch
            found = {opening[kind]}(*torch.load(sys.argv[2]))
            assert type(found) is dict and not any(name.startswith("detpost.") for name in sys.modules)
            torch.save(found, sys.argv[3])
        """
        command = [sys.executable, "-c", textwrap.dedent(program), files(kind)]
        subprocess.run([*command, tmp_path / "inputs.pt", tmp_path / "found.pt"], check=True, cwd=tmp_path)
        found, expected = torch.load(tmp_path / "found.pt"), POST(*arguments)
        for name in ("labels", "queries", "valid"):
            assert_same(found[name], getattr(expected, name))

    @pytest.mark.parametrize("kind", KINDS)
    def test_says_what_it_is_without_being_loaded(self, files, kind, monkeypatch):
        path = files(kind)  # made now, and not with the loaders gone
        monkeypatch.setattr(torch.export, "load", None)
        monkeypatch.setattr(torch._inductor, "aoti_load_package", None)
        metadata = read_package_metadata(path)
        assert DecodeSpec(**metadata["spec"]) == POST.spec
        assert metadata["class_names"] == {"0": "a cat", "1": 'the "dog"'}
        assert (metadata["kind"], metadata["device"]) == (kind, "cpu")
        assert metadata["inputs"] == ["pred_logits", "pred_boxes", "image_sizes"]

    def test_is_no_detector(self, files):
        with pytest.raises(ValueError, match="not a whole detector") as error:
            Detector.load(files("export"))
        assert "pred_logits" in one_line(error)

    def test_image_sizes_may_be_left_out_of_the_example(self, tmp_path):
        package(POST, raw(2)[:2], tmp_path / "post.pt2", kind="export")
        arguments = raw(3)
        assert_same(open_package(tmp_path / "post.pt2").run(*arguments)["boxes"], POST(*arguments).boxes)


class TestDetector:
    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("detector") / "small.pt2"
        return detector_file(path, class_names={0: "cat"}), path

    def test_loads_from_the_file_alone_and_finds_what_the_network_finds(self, made):
        model, path = made
        pictures = [image(seed) for seed in range(3)]
        batch, sizes = Preprocessing(32, 48)(pictures)
        with torch.no_grad():
            raw_found = model.eval()(batch)
            expected = DetectionPostProcessor(SPEC)(*raw_found.values(), sizes)
        found = Detector.load(path, threshold=0.0).predict(pictures)
        assert len(found) == 3
        for row, scores, labels in zip(found, expected.scores, expected.labels, strict=True):
            torch.testing.assert_close(row["scores"], scores)
            assert_same(row["labels"], labels)
            assert row["label_names"] == ["cat" if label == 0 else str(label) for label in labels.tolist()]

    def test_records_preprocessing_and_input_size(self, made):
        metadata = read_package_metadata(made[1])
        assert metadata["input_size"] == [32, 48]
        assert metadata["preprocessing"] == json.loads(json.dumps(Preprocessing(32, 48).to_dict()))

    def test_cannot_be_moved_where_it_was_not_made_for(self, made, tmp_path):
        copy = with_metadata(made[1], tmp_path / "aot.pt2", kind="aot", device="cuda")
        with pytest.raises(ValueError, match="compiled for cuda and cannot run on cpu"):
            open_package(copy, "cpu")

    @pytest.mark.slow
    def test_the_tiny_detector_finds_what_eager_finds(self, tmp_path):
        from detpost.zoo import sample_images

        package("tiny", None, tmp_path / "tiny.pt2", kind="export")
        found = Detector.load(tmp_path / "tiny.pt2").predict(sample_images())
        for row, expected in zip(found, Detector.load("tiny", device="cpu").predict(sample_images()), strict=True):
            assert row["label_names"] == expected["label_names"]
            torch.testing.assert_close(row["boxes"], expected["boxes"], atol=1e-2, rtol=1e-4)


class TestRefusals:
    @pytest.mark.parametrize(
        ("example", "name", "options", "message"),
        [
            (raw(1), "post.onnx", {}, "path must end in .pt2; got 'post.onnx'"),
            (raw(1), "post.pt2", {"kind": "onnx"}, "kind must be one of aot, export; got 'onnx'"),
            (None, "post.pt2", {}, "a post-processor alone needs an example"),
            (raw(1)[:1], "post.pt2", {}, "a post-processor alone needs an example"),
        ],
    )
    def test_arguments_that_do_not_fit(self, tmp_path, example, name, options, message):
        with pytest.raises(ValueError, match=message) as error:
            package(POST, example, tmp_path / name, **options)
        one_line(error)
        assert not list(tmp_path.iterdir())

    def test_an_example_of_another_size(self, tmp_path):
        with pytest.raises(ValueError, match=r"example must be images \(B, 3, 32, 48\)"):
            package(SmallDetector(), [torch.zeros(2, 3, 16, 16)], tmp_path / "x.pt2", SPEC, image_size=(32, 48))

    def test_a_model_that_looks_at_values_is_one_line_and_leaves_the_old_file(self, tmp_path):
        class Looks(SmallDetector):
            def forward(self, images):
                return super().forward(images if images.sum() > 0 else -images)

        (tmp_path / "x.pt2").write_bytes(b"old")
        with pytest.raises(ValueError, match=r"torch\.export cannot take the model") as error:
            package(Looks(), None, tmp_path / "x.pt2", SPEC, kind="export", image_size=(32, 32))
        one_line(error)
        assert [file.name for file in tmp_path.iterdir()] == ["x.pt2"]
        assert (tmp_path / "x.pt2").read_bytes() == b"old"

    def test_an_interruption_leaves_the_old_file(self, tmp_path, monkeypatch):
        def stop(line):
            if "comparing" in line:
                raise KeyboardInterrupt

        (tmp_path / "x.pt2").write_bytes(b"old")
        with pytest.raises(KeyboardInterrupt):
            package(POST, raw(1), tmp_path / "x.pt2", kind="export", progress=stop)
        assert [file.name for file in tmp_path.iterdir()] == ["x.pt2"]
        assert (tmp_path / "x.pt2").read_bytes() == b"old"

    def test_a_package_that_differs_from_pytorch_is_not_written(self, tmp_path, monkeypatch):
        module = sys.modules["detpost.export.packaged"]
        write = module._write
        other, inputs, _ = module._post_alone(
            DetectionPostProcessor.from_preset("deformable_detr", top_k=9), None, raw(2), None
        )
        program = module._export(other, inputs)
        monkeypatch.setattr(module, "_write", lambda _, *rest: write(program, *rest))
        with pytest.raises(ValueError, match="the package gives labels"):
            package(POST, raw(2), tmp_path / "x.pt2", kind="export")
        assert not list(tmp_path.iterdir())

    def test_a_file_that_someone_else_wrote(self, tmp_path):
        program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
        torch.export.save(program, tmp_path / "other.pt2")
        (tmp_path / "text.pt2").write_text("no archive")
        for name in ("other.pt2", "text.pt2"):
            with pytest.raises(ValueError, match="was not written by detpost") as error:
                Detector.load(tmp_path / name)
            one_line(error)
        with pytest.raises(FileNotFoundError, match="no file"):
            Detector.load(tmp_path / "none.pt2")

    @pytest.mark.parametrize("part", ["models/", "/sample_inputs/", "detpost.json", "_weights_config.json"])
    def test_a_damaged_file(self, files, tmp_path, part):
        def change(name, content):
            return b"{" * 40 if part in name else content

        broken = rewrite(files("export"), tmp_path / "broken.pt2", change)
        with pytest.raises(ValueError, match=r"damaged|holds a pickle|not written by") as error:
            open_package(broken)
        one_line(error)
        # A byte that is not the one the archive's checksum was made of.
        content = bytearray(files("export").read_bytes())
        with zipfile.ZipFile(files("export")) as archive:
            place = next(entry.header_offset for entry in archive.infolist() if part in entry.filename)
        content[place + 200] ^= 255
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged|holds a pickle|not written by") as error:
            open_package(broken)
        one_line(error)

    @pytest.mark.parametrize("place", ["inputs", "weights"])
    def test_a_file_with_a_pickle_is_refused_before_it_is_unpickled(self, files, tmp_path, place):
        marker = tmp_path / "ran"
        evil = with_pickle(files("export"), tmp_path / "evil.pt2", place, marker)
        with pytest.raises(ValueError, match="holds a pickle") as error:
            open_package(evil)
        one_line(error)
        assert not marker.exists()
        # The attack is real: PyTorch's own loader runs it.
        if place == "inputs":
            torch.export.load(evil)
            assert marker.exists()


class _Runs:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def rewrite(source, target, change):
    """Copy an archive, with ``change(name, content)`` in place of each entry's content."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            # The archive's top folder bears the name of the file.
            new.writestr(name, change(name, old.read(name)))
    return target


def with_metadata(source, target, **fields):
    def change(name, content):
        return json.dumps({**json.loads(content), **fields}) if name.endswith("detpost.json") else content

    return rewrite(source, target, change)


def with_pickle(source, target, place, marker):
    import io

    buffer = io.BytesIO()
    torch.save((_Runs(marker),), buffer)

    def change(name, content):
        if place == "inputs" and "/sample_inputs/" in name:
            return buffer.getvalue()
        if place == "weights" and name.endswith("_weights_config.json"):
            return json.dumps({"config": {"x": {"path_name": "x", "use_pickle": True}}})
        return content

    return rewrite(source, target, change)
