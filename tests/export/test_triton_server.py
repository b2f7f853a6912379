"""Model repositories of Triton Inference Server, read by its own protobuf classes; the client against ONNX Runtime."""

import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from detpost import DetectionPostProcessor, Detector
from detpost.command.cli import app
from detpost.export.shipped import triton_client
from detpost.export.targets import folder_name
from detpost.export.triton_server import to_triton
from detpost.zoo import SAMPLES

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def config_at(path):
    """Parse a configuration as the server does."""
    definitions = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]")
    from google.protobuf import text_format

    return text_format.Parse(path.read_text(), definitions.ModelConfig()), definitions


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The tiny detector in a repository, with the command, each way once."""
    folder = tmp_path_factory.mktemp("repository")
    for options in (
        ["--name", "plain"],
        ["--name", "apart", "--ensemble"],
        ["--name", "inside", "--preprocess-inside", "full", "--backend", "openvino"],
        ["--name", "fixed", "--static-batch", "--io", "rtdetr"],
        ["--name", "plan", "--backend", "tensorrt", "--max-batch", "4"],
    ):
        done = CliRunner().invoke(app, ["export", "tiny", "--for", "triton", "-o", str(folder), *options])
        assert done.exit_code == 0, done.output
    return folder


def test_the_name_is_the_models(tmp_path):
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=5)
    to_triton(post, tmp_path, num_queries=8, num_classes=3)
    assert (tmp_path / "detectionpostprocessor" / "1" / "model.onnx").is_file()
    done = CliRunner().invoke(
        app, ["export", "post", "--for", "triton", "-o", str(tmp_path), *["--num-queries", "8", "--num-classes", "3"]]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "post" / "config.pbtxt").is_file()


@pytest.mark.parametrize(
    ("name", "backend", "largest", "file"),
    [
        ("plain", "onnxruntime", 8, ""),
        ("inside", "openvino", 8, "model.onnx"),
        ("fixed", "onnxruntime", 0, ""),
        ("plan", "tensorrt", 4, "model.plan"),
        ("apart_resize", "onnxruntime", 8, ""),
    ],
)
def test_a_configuration_says_what_the_file_takes_and_gives(repository, name, backend, largest, file):
    config, definitions = config_at(repository / name / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == (name, backend, largest)
    assert config.default_model_filename == file
    assert config.HasField("dynamic_batching") == (largest > 0)
    model = onnx.load(repository / name / "1" / "model.onnx")
    for said, values in ((config.input, model.graph.input), (config.output, model.graph.output)):
        assert [tensor.name for tensor in said] == [value.name for value in values]
        for tensor, value in zip(said, values, strict=True):
            kind = value.type.tensor_type
            dims = [dim.dim_value or -1 for dim in kind.shape.dim]
            assert list(tensor.dims) == (dims[1:] if largest else dims)
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
            ours = {"float32": "FP32", "int64": "INT64", "bool": "BOOL", "uint8": "UINT8"}[dtype.name]
            assert definitions.DataType.Name(tensor.data_type) == f"TYPE_{ours}"


def test_an_ensembles_steps_fit_together(repository):
    config, _ = config_at(repository / "apart_ensemble" / "config.pbtxt")
    assert config.platform == "ensemble"
    assert (repository / "apart_ensemble" / "1").is_dir()
    known = {tensor.name for tensor in config.input}
    for step in config.ensemble_scheduling.step:
        part, _ = config_at(repository / step.model_name / "config.pbtxt")
        assert {*step.input_map} == {tensor.name for tensor in part.input}
        assert {*step.output_map} == {tensor.name for tensor in part.output}
        assert {*step.input_map.values()} <= known
        known |= {*step.output_map.values()}
    assert {tensor.name for tensor in config.output} <= known


def run_file(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return dict(zip((value.name for value in session.get_outputs()), session.run(None, inputs), strict=True))


def answer(repository, name, inputs):
    """Do what the server does with a request."""
    if not name.endswith("_ensemble"):
        return run_file(repository / name / "1" / "model.onnx", inputs)
    plain = name.removesuffix("_ensemble")
    front = run_file(repository / f"{plain}_resize" / "1" / "model.onnx", inputs)
    return answer(repository, plain, {"images": front.pop("resized"), **front})


@pytest.mark.parametrize("name", ["plain", "apart", "inside", "fixed"])
def test_the_client_gives_what_the_detector_gives(repository, name):
    settings = json.loads((repository / name / "client.json").read_text())
    detector = Detector.load("tiny", device="cpu", threshold=0.4)
    # Resized by another library, single pixels differ by one of 255; by ONNX Runtime, more of them do.
    scores, pixels = (5e-3, 0.5) if name in ("apart", "inside") else (1e-3, 0.1)
    for path in sorted(SAMPLES.glob("*.png")):
        inputs = triton_client.prepare(path, settings)
        found = triton_client.read(answer(repository, settings["model"], inputs), settings, 0.4)
        expected = detector.predict(path)[0]
        assert [row["label"] for row in found] == expected["label_names"]
        np.testing.assert_allclose([row["score"] for row in found], expected["scores"], atol=scores)
        np.testing.assert_allclose([row["box"] for row in found], expected["boxes"], atol=pixels)


def test_the_client_speaks_the_servers_language(repository, monkeypatch, capsys):
    grpc = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")

    class Answer:
        def __init__(self, values):
            self.as_numpy = values.__getitem__

    class Server:
        def __init__(self, url):
            assert url == "here:1"

        def infer(self, model, inputs, outputs):
            dtypes = {"FP32": np.float32, "INT64": np.int64}
            given = {
                each.name(): np.frombuffer(each._get_content(), dtypes[each.datatype()]).reshape(each.shape())
                for each in inputs
            }
            assert len(outputs) == 4
            return Answer(answer(repository, model, given))

    monkeypatch.setattr(grpc, "InferenceServerClient", Server)
    path = repository / "plain" / "client.py"
    spec = importlib.util.spec_from_file_location("client", path)
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    image = sorted(SAMPLES.glob("*.png"))[0]
    client.main([str(image), "--url", "here:1", "--threshold", "0.4"])
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["detections"]) == len(
        Detector.load("tiny", device="cpu", threshold=0.4).predict(image)[0]["boxes"]
    )


def test_an_ensembles_resize_is_the_detectors_own(repository):
    pixels = torch.randint(0, 256, (2, 3, 37, 91), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = run_file(repository / "apart_resize" / "1" / "model.onnx", {"images": pixels.numpy()})
    batch, sizes = Detector.load("tiny", device="cpu").preprocessing(list(pixels))
    np.testing.assert_allclose(found["resized"], batch, atol=1 / 255 + 1e-6)
    assert found["image_sizes"].tolist() == sizes.tolist() == [[37, 91]] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--for", "nowhere"], "--for must be one of triton"),
        (["--for", "triton", "--backend", "tvm"], "backend must be one of onnx"),
        (["--for", "triton", "--split"], "--for triton takes no split"),
        (["--for", "triton", "--max-batch", "0"], "max_batch must be at least 1"),
        (["--for", "triton", "--ensemble", "--letterbox"], "by stretching"),
        (["--for", "triton", "--ensemble", "--static-batch"], "an ensemble takes a free batch size"),
        (["--name", "other"], "name go with --for"),
        (["--for", "triton", "--name", "../x"], "name must be a letter or digit, .*; got '../x'"),
        (["--for", "triton", "--name", "a b"], "name must be a letter or digit, .*; got 'a b'"),
        (["--for", "triton", "--name", ".x"], "name must be a letter or digit"),
        (["--for", "triton", "--name", ""], "name must be a letter or digit, .*; got ''"),
        (["--for", "triton", "--backend", "tensorrt", "--ties", "onnx"], "TensorRT's TopK says nothing of equal"),
        (["--for", "triton", "--backend", "tensorrt", "--preprocess-inside", "full"], "no antialiased Resize"),
        (["--for", "triton", "--backend", "openvino", "--ties", "onnx"], "OpenVINO's TopK .* take ties='exact'"),
    ],
)
def test_what_does_not_fit_is_one_line(options, said, tmp_path):
    done = CliRunner().invoke(app, ["export", "tiny", "-o", str(tmp_path / "out.onnx"), *options])
    assert isinstance(done.exception, ValueError)
    assert re.search(said, str(done.exception))


def test_nothing_is_written_beside_the_repository(tmp_path):
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=5)
    for name in ("../x", "a/b", "/x", "x\n"):
        with pytest.raises(ValueError, match="name must be a letter or digit"):
            to_triton(post, tmp_path / "repository", name=name, num_queries=8, num_classes=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["_own.pt", "-x.onnx", "..hidden", "été", "a b.pt", type("_Own", (), {})()])
def test_a_models_own_name_is_one_that_the_repository_takes(model):
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", folder_name(model))


def test_an_image_that_lies_on_its_side_is_turned(repository, tmp_path):
    settings = json.loads((repository / "inside" / "client.json").read_text())
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.new("RGB", (20, 10)).save(path, exif=exif)
    assert triton_client.prepare(path, settings)["images"].shape == (1, 3, 20, 10)
