"""One table says which ending is which format: everything that writes or opens files goes by it."""

import re
import subprocess
import sys

import pytest

from detpost import DetectionPostProcessor
from detpost.export import OnnxExport, OpenVinoExport, PackageExport, WrittenFile, formats
from detpost.export.formats import ENDINGS, FORMATS, Format, format_of, has_ending
from detpost.export.opened import open_file
from detpost.integrations.model_names import look_up
from detpost.runs.settings import settings_of
from detpost.verify import open_artifact, verify

# What makes a format quicker to write in a test.
QUICK = {"package": {"kind": "export"}}


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
def test_what_a_format_writes_it_opens_and_verify_takes(tmp_path, entry):
    path = tmp_path / f"post{entry.ending}"
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=9)
    quick = QUICK.get(entry.name, {})
    written = entry.write()(model=post, path=path, num_queries=12, num_classes=5, **quick)
    assert isinstance(written, WrittenFile)
    assert (written.path, written.format) == (path, entry.name)
    opened = open_file(path)
    assert opened.is_post_processor
    assert tuple(opened.inputs) == written.inputs == ("pred_logits", "pred_boxes", "image_sizes")
    assert opened.inputs["pred_logits"][0] == (None, 12, 5)
    assert verify(path, post).ok
    assert look_up(path).kind == "file"


def test_endings_are_of_one_format_each_and_others_are_refused(tmp_path):
    assert len(set(ENDINGS)) == len(FORMATS) == len({entry.name for entry in FORMATS})
    with pytest.raises(ValueError, match=re.escape(f"must end in {', '.join(ENDINGS)}")):
        format_of(tmp_path / "model.engine")
    assert not has_ending(tmp_path / ".onnx")


@pytest.mark.parametrize("ending", [".txt", ".two.parts", ".more.onnx"])
def test_a_format_is_a_row_of_the_table(tmp_path, monkeypatch, ending):
    import detpost.export.opened as opened_module

    row = Format("text", ending, "a reader", "unused:unused", "detpost.export.opened:_text", beside=("{stem}.more",))
    monkeypatch.setattr(formats, "FORMATS", (*FORMATS, row))
    monkeypatch.setattr(opened_module, "_text", lambda path, device: ("opened", path.name), raising=False)
    path = tmp_path / f"detector{ending}"
    assert open_file(path) == ("opened", path.name)
    (tmp_path / "detector.more").touch()
    assert row.files_beside(path) == [tmp_path / "detector.more"]
    path.touch()
    assert look_up(path).kind == "file"
    assert settings_of(path, "eager", 0.5)["backend"] == ending[1:]
    with pytest.raises(FileNotFoundError, match=f"did you mean .*{re.escape(ending)}"):
        look_up(tmp_path / f"detecto{ending}")
    with pytest.raises(AttributeError, match="'tuple' object has no attribute"):
        open_artifact(path)  # it got as far as what the row opens


def test_the_result_classes_of_version_0_1_are_the_one_class():
    assert OnnxExport is OpenVinoExport is PackageExport is WrittenFile


def test_looking_an_ending_up_does_not_wait_for_torch():
    script = "import sys; from detpost.export.formats import format_of; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "False"
