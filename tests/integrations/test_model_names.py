"""A detector's name is looked up before anything slow is imported."""

import json
import os
import subprocess
import sys

import pytest

from detpost.integrations.model_names import look_up
from detpost.zoo import TINY


def test_what_is_there_is_found_without_torch(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"x")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "folder.onnx" / "config.json").write_text("{}")
    program = (
        "import sys\n"
        "from detpost.integrations.model_names import look_up\n"
        "print([look_up(name).kind for name in sys.argv[1:]], 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    names = ["tiny", TINY, tmp_path / "a.onnx", tmp_path / "folder.onnx", "owner/name", "owner/name.v1_2-x"]
    shown = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "['folder', 'folder', 'file', 'folder', 'hub', 'hub'] False False"
    assert look_up("tiny").path == TINY


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tinyy",
            "no detector at 'tinyy': it is no file and no folder, a hub id is owner/name and .*; did you mean tiny?",
        ),
        ("Tiny", "no detector at 'Tiny': .*; did you mean tiny?"),
        ("nothing-of-the-kind", "no detector at 'nothing-of-the-kind': .* a hub id is owner/name"),
        ("./no/such", r"no detector at './no/such': it is no file and no folder"),
        ("a/b/c", "no detector at 'a/b/c': it is no file and no folder"),
        ("digits.onx", r"no detector at 'digits.onx': .*; did you mean digits.onnx?"),
        ("digit.onnx", r"no file digit.onnx; did you mean digits.onnx?"),
        ("gone.pt2", "no file gone.pt2"),
        ("models", "no detector at 'models': a transformers directory has a config.json, this folder has none"),
        ("models/digits/config.json", "no detector at .*: take its folder, models/digits, or name tiny"),
        ("notes.txt", r"no detector at 'notes.txt': a file ends in .onnx, .xml, .pt2, or name tiny"),
        ("owner/model.safetensors", "no detector at 'owner/model.safetensors': it is no file"),
        ("", "no detector at ''"),
        ("\0", "no detector at"),
    ],
)
def test_what_is_not_there_is_one_line_that_names_what_is_spelled_alike(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "digits").mkdir(parents=True)
    (tmp_path / "models" / "digits" / "config.json").write_text("{}")
    (tmp_path / "digits.onnx").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(OSError, match=message.replace("?", r"\?") + "$" if "mean" in message else message) as caught:
        look_up(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [["detect", "."], ["export", "-o", "x.onnx"], ["verify", "rtdetr"]])
def test_the_command_refuses_a_name_before_it_imports_torch_or_asks_the_hub(tmp_path, arguments):
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))))\n"
        "from detpost.command.cli import main\n"
        "main()"
    )
    option = ["--model"] if arguments[0] == "detect" else []
    (tmp_path / "a.png").write_bytes(b"")
    for name, answer in (("tinyy", "did you mean tiny?"), ("gone.onnx", "no file gone.onnx")):
        run = subprocess.run(
            [sys.executable, "-c", program, *arguments, *option, name],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        assert run.returncode == 2
        assert run.stdout.strip() == "[]"
        assert answer in run.stderr
        assert len(run.stderr.splitlines()) == 1


def test_a_folder_that_is_no_detector_is_one_line(tmp_path):
    from detpost.integrations.transformers import load_detector

    def said(**files):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)
        with pytest.raises((OSError, ValueError), match="model") as caught:
            load_detector(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no detector at" in said(config__json="{")
    assert "no detector at" in said(config__json="[]")
    assert "no detector at" in said(config__json='{"model_type": "no_such_family"}')
    assert "no preset for model_type 'bert'" in said(config__json='{"model_type": "bert"}')
    config = (TINY / "config.json").read_text()
    assert "no detector at" in said(config__json=config)  # no weights
    assert "no detector at" in said(model__safetensors="no weights")
    whole = tmp_path / "model" / "model.safetensors"
    whole.write_bytes((TINY / "model.safetensors").read_bytes())
    # A processor that is there and cannot be read is not taken for one that is missing.
    assert "no detector at" in said(preprocessor_config__json=json.dumps({"image_processor_type": "NoSuchProcessor"}))
