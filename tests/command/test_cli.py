"""The command as a user types it."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from torchvision.ops import box_iou
from typer.testing import CliRunner

import detpost
from detpost.command.cli import app, main
from detpost.command.demo import run_demo
from detpost.command.doctor import examine
from detpost.export import MaskHead, OrientedHead
from detpost.export.heads import recorded_heads
from detpost.export.opened import open_file
from detpost.zoo import sample_images
from tests.export import exporters
from tests.export.foreign import foreign, written


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_demo_detects_draws_exports_and_agrees(tmp_path):
    result = invoke("demo", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "detections.json").read_text())
    assert {row["file_name"] for row in rows} == {path.name for path in sample_images()}
    assert all(len(row["bbox"]) == 4 and row["bbox"][2] > 0 and 0.5 < row["score"] <= 1 for row in rows)
    for path in sample_images():
        drawn, plain = Image.open(tmp_path / path.name), Image.open(path)
        assert drawn.width % plain.width == 0
        assert drawn.tobytes() != plain.resize(drawn.size, Image.Resampling.NEAREST).tobytes()
    assert (tmp_path / "tiny.onnx").is_file()
    assert "identical" in result.output
    assert "DIFFERENT" not in result.output
    assert "doubled boxes dropped by greedy NMS (IoU above 0.7, by class): 1 in petals.png;" in result.output


def test_no_two_boxes_that_the_demo_draws_are_on_one_digit(tmp_path):
    result = run_demo(tmp_path, sample_images())
    for image in result.images:
        overlaps = box_iou(image.found["boxes"], image.found["boxes"]).triu(diagonal=1)
        assert overlaps.max() <= result.nms, image.name


def test_the_demo_takes_the_callers_images(tmp_path):
    result = invoke("demo", "--out", tmp_path, sample_images()[0])
    assert result.exit_code == 0, result.output
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".onnx", ".png"]


def test_the_demo_fails_when_the_graph_disagrees(tmp_path, monkeypatch):
    import detpost.command.demo as demo

    real = demo._compare
    monkeypatch.setattr(demo, "_compare", lambda *arguments: (real(*arguments)[0], [False]))
    result = invoke("demo", "--out", tmp_path, sample_images()[0])
    assert result.exit_code == 1
    assert "DIFFERENT" in result.output


def test_export_and_verify_agree_and_a_wrong_reference_does_not(tmp_path):
    post = tmp_path / "post.onnx"
    exported = invoke(
        "export", "post", "-o", post, "--num-queries", 20, "--num-classes", 30, "--top-k", 50, "--queries"
    )
    assert exported.exit_code == 0, exported.output
    assert invoke("verify", post, "deformable_detr").exit_code == 1  # its top_k is another
    same = invoke("verify", post, post, "--json", tmp_path / "report.json")
    assert same.exit_code == 0, same.output
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is True


def test_heads_by_their_options_and_by_their_names(tmp_path):
    bare = ("export", "post", "--num-queries", 20, "--num-classes", 3)
    words = ("--masks", "image", "--head", "oriented_boxes:angle_scale=2.5")
    exported = invoke(*bare, "-o", tmp_path / "post.onnx", *words)
    assert exported.exit_code == 0, exported.output
    assert recorded_heads(open_file(tmp_path / "post.onnx").metadata) == (MaskHead("image"), OrientedHead(2.5))
    refused = invoke(*bare, "-o", tmp_path / "post.pt2", *words, "--opset", 17)
    assert "a .pt2 file takes no masks, opset, oriented" in str(refused.exception)
    assert "takes no masks, oriented" in str(invoke(*bare, "-o", tmp_path, "--for", "litert", *words).exception)


def test_a_strangers_file_is_attached_to_verified_and_detected_with(tmp_path):
    raw, out, images = written(tmp_path, foreign(), "raw.onnx"), tmp_path / "out.onnx", sample_images()[0].parent
    refused = invoke("detect", images, "--model", raw, "--out", tmp_path / "found")
    assert refused.exit_code != 0
    assert f"`detpost attach {raw} -o OUT`" in str(refused.exception)
    attached = invoke("attach", raw, "-o", out, "--preset", "rtdetr", "--mean", "0.5,0.5,0.5", "--std", ".2,.2,.2")
    assert attached.exit_code == 0, attached.output
    assert "images are 8x8, scaled to 0..1, mean (0.5, 0.5, 0.5), std (0.2, 0.2, 0.2)" in attached.output
    assert invoke("verify", out, out).exit_code == 0
    found = invoke("detect", images, "--model", out, "--out", tmp_path / "found", "--threshold", "0.0")
    assert found.exit_code == 0, found.output
    assert len(json.loads((tmp_path / "found" / "detections.json").read_text())) > 0


def test_what_may_be_named_is_listed_and_nothing_written(tmp_path):
    source = written(tmp_path, exporters.rtdetr())
    listed = invoke("attach", source, "--list")
    assert listed.exit_code == 0, listed.output
    assert f"{exporters.LOGITS}  [N, 20, 7]  float32  made by Slice  may be logits" in listed.output.splitlines()
    assert f"{exporters.BOXES}  [N, 20, 4]  float32  made by Sigmoid  may be boxes" in listed.output.splitlines()
    assert [path.name for path in tmp_path.iterdir()] == ["source.onnx"]
    assert "no --out: name the file to write, or ask for --list" in str(invoke("attach", source).exception)


def test_a_file_with_post_processing_says_what_was_cut(tmp_path):
    attached = invoke("attach", written(tmp_path, exporters.rtdetr()), "-o", tmp_path / "out.onnx", "--top-k", 60)
    assert attached.exit_code == 0, attached.output
    assert "outputs labels, boxes, scores; inputs orig_target_sizes" in attached.output


@pytest.mark.parametrize("given", ["0.5", "0.5,0.5", "a,b,c", "1,2,3,4"])
def test_a_mean_that_is_not_three_numbers_is_refused(tmp_path, given):
    refused = invoke("attach", written(tmp_path, foreign()), "-o", tmp_path / "out.onnx", "--mean", given)
    assert f"--mean must be three numbers with commas between them; got '{given}'" in str(refused.exception)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--std", "0,0,0", "--preprocess-inside", "full"],
            "std must hold finite numbers above 0; got (0.0, 0.0, 0.0)",
        ),
        (["--std", "0,0,0"], "std must hold finite numbers above 0"),
        (["--mask-source", "x"], "--mask-source goes with --masks: give that too, or leave it out"),
        (["--mask-style", "dfine_seg"], "--mask-style goes with --masks"),
        (["--keypoint-source", "x"], "--keypoint-source goes with --keypoints"),
        (["--oriented-source", "x"], "--oriented-source goes with --oriented"),
        (["--head", "oriented_boxes:angle_scale=x"], "angle_scale must be a number other than 0; got 'x'"),
        (["--ties", "nope"], "ties must be one of exact, onnx; got 'nope'"),
    ],
)
def test_attach_refuses_what_would_do_nothing_or_harm(tmp_path, options, words):
    refused = invoke("attach", written(tmp_path, foreign()), "-o", tmp_path / "out.onnx", *options)
    assert isinstance(refused.exception, ValueError)
    assert words in str(refused.exception)
    assert not (tmp_path / "out.onnx").exists()


def test_preprocess_inside_takes_a_value_or_none(tmp_path):
    decode = ("export", "post", "--num-queries", "5", "--num-classes", "3", "--preprocess-inside")
    assert invoke(*decode, "-o", str(tmp_path / "a.onnx")).exit_code == 0
    assert invoke(*decode, "scale", "-o", str(tmp_path / "b.onnx")).exit_code == 0
    refused = invoke(*decode, "full", "-o", str(tmp_path / "c.onnx"))
    assert "is for a whole detector" in str(refused.exception)
    source = written(tmp_path, foreign())
    result = invoke("attach", str(source), "-o", str(tmp_path / "d.onnx"), "--preprocess-inside", "full", "--letterbox")
    assert result.exit_code == 0, result.output
    assert "inputs images; outputs" in result.output


def test_an_export_of_another_decode_is_caught(tmp_path):
    for preset in ("rtdetr", "rfdetr"):
        out = tmp_path / f"{preset}.onnx"
        invoke("export", "post", "-o", out, "--preset", preset, "--num-queries", 300, "--num-classes", 8)
    assert invoke("verify", tmp_path / "rtdetr.onnx", "rtdetr").exit_code == 0
    assert invoke("verify", tmp_path / "rfdetr.onnx", "rtdetr").exit_code == 1


def test_doctor_says_what_is_there_and_how_to_get_the_rest(monkeypatch):
    result = invoke("doctor")
    assert result.exit_code == 0
    for name in ("torch", "CUDA", "onnxruntime", "transformers"):
        assert name in result.output
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = next(part for part in examine() if part.name == "openvino")
    assert not missing.present
    assert "pip install 'detpost[openvino]'" in missing.detail


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["attach", "missing.onnx", "-o", "out.onnx"], "no file missing.onnx"),
        (["export", "post", "-o", "x.onnx", "--preset", "nothing"], "unknown preset 'nothing'"),
        (["export", "tiny", "-o", "x.onnx", "--size", "big"], "--size must be HEIGHTxWIDTH"),
        (["verify", "missing.onnx", "rtdetr"], "no file missing.onnx"),
        (["demo", "missing.png"], "missing.png"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(arguments, pattern, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["detpost", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert pattern in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize("arguments", [[], ["detect"], ["evaluate"], ["export"], ["check"], ["web"]], ids=str)
def test_help_and_version_import_nothing_that_is_slow(arguments):
    program = (
        "import atexit, sys\n"
        "slow = {'torch', 'numpy', 'PIL', 'transformers', 'onnx', 'pygments', 'markdown_it'}\n"
        "atexit.register(lambda: print('imported', sorted(slow & set(sys.modules))))\n"
        "from detpost.command.cli import main\n"
        "main()"
    )
    asked = ["--help"] if arguments else ["--version", "--help"]
    for option in asked:
        shown = subprocess.run([sys.executable, "-c", program, *arguments, option], capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.rstrip().endswith("imported []")
        assert ("detpost " + detpost.__version__ if option == "--version" else "Usage:") in shown.stdout
