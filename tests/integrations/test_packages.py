"""Detectors of other libraries by name: kornia's here, Ultralytics' and RF-DETR's where they are installed."""

import pickle
import socket
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from detpost import Detector
from detpost.command.cli import app
from detpost.integrations import load_kornia, packages
from detpost.integrations.load import load_detector
from detpost.integrations.model_names import look_up
from detpost.integrations.weights import put_weights, read_weights
from detpost.verify import verify
from detpost.zoo import SAMPLES

rt_detr = pytest.importorskip("kornia.models.rt_detr")
safetensors = pytest.importorskip("safetensors.torch")

SIDE = 64


def small(name="rtdetr_r18vd", num_classes=80):
    """Make kornia's RT-DETR, narrow and with few queries, its logits far apart."""
    config = rt_detr.RTDETRConfig(
        "resnet18d", num_classes, neck_hidden_dim=32, neck_dim_feedforward=64, head_hidden_dim=32,
        head_num_queries=20, head_num_decoder_layers=2,
    )  # fmt: skip
    network = rt_detr.RTDETR.from_config(config)
    for head in network.decoder.dec_score_head:
        torch.nn.init.normal_(head.weight, std=0.5)
    return network


@pytest.fixture
def narrow(monkeypatch):
    """Let kornia's names stand for narrow networks."""
    monkeypatch.setattr(rt_detr.RTDETR, "from_name", staticmethod(small))
    monkeypatch.setattr(load_kornia, "Preprocessing", lambda *size: ORIGINAL(SIDE, SIDE))


ORIGINAL = load_kornia.Preprocessing


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(3)
    network = small(num_classes=7).eval()
    path = tmp_path / "seven.safetensors"
    safetensors.save_file(network.state_dict(), path)
    return network, path


def test_names_are_read_from_the_name_alone(tmp_path):
    assert packages.package_model("tiny") is None
    assert packages.package_model("owner/name") is None
    assert packages.package_model("other:name") is None
    assert packages.package_model("kornia:rtdetr_r18vd")[1:] == ("kornia", "rtdetr_r18vd", None, False)
    assert packages.package_model("rfdetr:nano@random").random
    assert look_up("kornia:rtdetr_r50vd").kind == "package"
    with pytest.raises(ValueError, match="names no model"):
        look_up("kornia:")
    with pytest.raises(FileNotFoundError, match="no file"):
        look_up(f"kornia:rtdetr_r18vd@{tmp_path}/none.safetensors")


def test_detect_export_and_verify_of_kornias_with_weights_of_a_file(narrow, weights, tmp_path):
    network, path = weights
    source = f"kornia:rtdetr_r18vd@{path}"
    images = torch.rand(2, 3, SIDE, SIDE)
    detector = Detector.load(source, device="cpu", threshold=0.0)
    with torch.no_grad():
        logits, _ = network(images)
        found = detector.run(images, torch.tensor([[48, 80]] * 2), None)
    expected = logits.sigmoid().flatten(1).sort(dim=1, descending=True, stable=True).values
    torch.testing.assert_close(found.scores, expected, atol=1e-6, rtol=0)
    assert detector.spec.selection == "flat"
    runner = CliRunner()
    file = tmp_path / "kornia.onnx"
    written = runner.invoke(app, ["export", source, "-o", str(file)])
    assert written.exit_code == 0, written.output
    assert verify(file, source).ok
    out = tmp_path / "out"
    detected = runner.invoke(app, ["detect", str(SAMPLES), "--model", source, "-o", str(out), "--device", "cpu"])
    assert detected.exit_code == 0, detected.output
    assert (out / "detections.json").is_file()


def test_names_of_the_repository_are_taken_too(narrow, weights, tmp_path):
    network, _ = weights
    theirs = {
        name.replace("encoder.ccfm.", "encoder.").replace(".convs.branch2", ".branch2"): value
        for name, value in network.state_dict().items()
    }
    assert theirs.keys() != network.state_dict().keys()
    path = tmp_path / "checkpoint.pth"
    torch.save({"ema": {"module": theirs}, "epoch": 7}, path)
    loaded = load_detector(f"kornia:rtdetr_r18vd@{path}", allow_pickle=True)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.model.state_dict().items())


def test_random_weights_are_always_the_same(narrow):
    state = torch.random.get_rng_state()
    first, second = (load_detector("kornia:rtdetr_r18vd@random") for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert first.class_names[16] == "dog"


class Runs:
    """A pickle that runs code."""

    def __reduce__(self):
        return (open, (MARK, "w"))


MARK = "detpost-was-here"


def test_a_pickle_is_opened_on_request_alone_and_runs_nothing(narrow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    torch.save({"model": Runs()}, path)
    with pytest.raises(ValueError, match="--allow-pickle"):
        load_detector(f"kornia:rtdetr_r18vd@{path}")
    with pytest.raises(OSError, match="as tensors alone"):
        load_detector(f"kornia:rtdetr_r18vd@{path}", allow_pickle=True)
    path.write_bytes(pickle.dumps(Runs(), protocol=2))
    with pytest.raises(OSError, match="as tensors alone"):
        read_weights(path, allow_pickle=True)
    assert not (tmp_path / MARK).exists()


def test_weights_that_do_not_fit_are_refused(narrow, weights):
    network, path = weights
    state = network.state_dict()
    name = "decoder.dec_score_head.0.bias"
    with pytest.raises(OSError, match="lacks 1 parameters"):
        put_weights(small(num_classes=7), {key: value for key, value in state.items() if key != name}, path)
    with pytest.raises(OSError, match="has too many 1 parameters"):
        put_weights(small(num_classes=7), {**state, "more": torch.zeros(1)}, path)
    with pytest.raises(OSError, match=r"has shape \(8,\), the network's has \(7,\)"):
        put_weights(small(num_classes=7), {**state, name: torch.zeros(8)}, path)


def test_without_a_network_it_is_one_line(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda _: None)

    def unreachable(*_, **__):
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(OSError, match="kornia fetches them over the network, which failed") as failure:
        Detector.load("kornia:rtdetr_r18vd")
    assert "\n" not in str(failure.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("source", ["kornia:rtdetr_r19", "kornia:tiny"])
def test_what_kornia_does_not_have(source):
    with pytest.raises(ValueError, match="take one of rtdetr_r18vd"):
        load_detector(source)


@pytest.mark.parametrize("package", ["kornia", "ultralytics", "rfdetr"])
def test_a_library_that_is_missing_is_named(package, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    example = packages.PACKAGES[package].example
    with pytest.raises(ImportError, match=f"needs {package}: pip install {package}"):
        load_detector(f"{package}:{example}")


def test_looking_a_name_up_imports_no_library():
    code = (
        "import sys; from detpost.integrations.model_names import look_up; look_up('kornia:rtdetr_r18vd'); "
        "print({'torch', 'kornia'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_ultralytics_raw_outputs_are_its_own(tmp_path):
    pytest.importorskip("ultralytics")
    loaded = load_detector("ultralytics:rtdetr-l@random")
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        logits, boxes = loaded.model(images)
        own, _ = loaded.model.network(images)  # (B, K, 6) since 8.4, (B, Q, 4 + C) before
    assert logits.shape == (1, 300, 80)
    if own.shape[2] == 6:
        assert torch.equal(logits.sigmoid().flatten(1).sort(dim=1, descending=True).values[:, :300], own[..., 4])
    else:
        assert torch.equal(torch.cat((boxes, logits.sigmoid()), dim=2), own)
    path = tmp_path / "ultralytics.safetensors"
    safetensors.save_file(loaded.model.network.state_dict(), path)
    again = load_detector(f"ultralytics:rtdetr-l@{path}")
    with torch.no_grad():
        assert torch.equal(again.model(images)[0], logits)
    with pytest.raises(ValueError, match="--allow-pickle"):
        load_detector("ultralytics:rtdetr-l")


def test_rfdetr_raw_outputs_are_its_own(tmp_path):
    pytest.importorskip("rfdetr")
    from rfdetr import RFDETRNano

    loaded = load_detector("rfdetr:nano@random")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = RFDETRNano(pretrain_weights=None, device="cpu").model.model.eval()
    images = torch.rand(1, 3, 384, 384)
    with torch.no_grad():
        logits, boxes = loaded.model(images)
        theirs = own(images)
    torch.testing.assert_close(logits, theirs["pred_logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(boxes, theirs["pred_boxes"], atol=1e-5, rtol=1e-5)
    assert loaded.preprocessing.mean == (0.485, 0.456, 0.406)
    assert loaded.class_names[1] == "person"
    path = tmp_path / "rfdetr.safetensors"
    safetensors.save_file(own.state_dict(), path)
    with torch.no_grad():
        assert torch.equal(load_detector(f"rfdetr:nano@{path}").model(images)[0], logits)
