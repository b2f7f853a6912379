"""Python code that comes with weights runs where it is asked for, and nowhere else."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from detpost import Detector
from detpost.integrations.transformers import load_detector
from detpost.zoo import TINY, sample_images

CODE = """
from pathlib import Path
from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection, RTDetrImageProcessor
Path({ran!r}).write_text("ran")
class DigitConfig(RTDetrV2Config):
    model_type = {family!r}
class DigitDetector(RTDetrV2ForObjectDetection):
    config_class = DigitConfig
"""
AUTO_MAP = {"AutoConfig": "digits.DigitConfig", "AutoModelForObjectDetection": "digits.DigitDetector"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make a copy of the shipped detector that brings code of its own."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(TINY, tmp_path / "model")

    def make(family="digit_detr"):
        config = json.loads((TINY / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(
            json.dumps({**config, "model_type": family, "auto_map": AUTO_MAP})
        )
        (tmp_path / "model" / "digits.py").write_text(CODE.format(ran=str(tmp_path / "ran"), family=family))
        return tmp_path / "model"

    return make


def test_code_is_refused_in_one_line_and_nobody_is_asked(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    place = folder()
    for backend in ("eager", "onnx"):
        with pytest.raises(ValueError, match=r"brings Python code of its own, .*--trust-remote-code") as caught:
            Detector.load(place, backend=backend, device="cpu")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_processors_code_is_refused_too_and_no_default_stands_in(folder, tmp_path):
    place = folder("rt_detr_v2")
    processor = {"image_processor_type": "DigitProcessor", "auto_map": {"AutoImageProcessor": "digits.DigitProcessor"}}
    (place / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="brings Python code of its own, which is not run") as caught:
        Detector.load(place, device="cpu")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_family_that_transformers_has_itself_needs_no_code(folder, tmp_path):
    found = Detector.load(folder("rt_detr_v2"), device="cpu").predict(sample_images())
    assert not (tmp_path / "ran").exists()
    for one, other in zip(found, Detector.load("tiny", device="cpu").predict(sample_images()), strict=True):
        assert torch.equal(one["boxes"], other["boxes"])


def test_trusted_code_runs_and_takes_the_preset_of_the_family_it_derives_from(folder, tmp_path):
    place = folder()
    # transformers renames the weights of the families it knows; this one's have the names of its modules.
    weights = {name: value.clone().contiguous() for name, value in load_detector("tiny").model.state_dict().items()}
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    command = [sys.executable, "-m", "detpost", "detect", str(sample_images()[0]), "--model", str(place)]
    command = [*command, "--device", "cpu", "--out", str(tmp_path / "out")]
    refused = subprocess.run(command, capture_output=True, text=True, input="y\n", check=False)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "ran").exists()
    trusted = subprocess.run([*command, "--trust-remote-code"], capture_output=True, text=True, check=False)
    assert trusted.returncode == 0, trusted.stderr
    assert (tmp_path / "ran").exists()
    ours = json.loads((tmp_path / "out" / "detections.json").read_text())
    plain = Detector.load("tiny", device="cpu").predict(sample_images()[0])[0]
    assert [row["category_id"] for row in ours] == plain["labels"].tolist()


def test_weights_that_lack_a_parameter_are_refused(folder, tmp_path):
    weights = {name: value.clone().contiguous() for name, value in load_detector("tiny").model.state_dict().items()}
    place = folder("rt_detr_v2")
    save_file(
        {name: weights[name] for name in weights if "dec" not in name}, place / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(OSError, match=r"its weights lack \d+ of the network's parameters, the first is model\.dec"):
        Detector.load(place, device="cpu")
