"""What is written for TensorRT, held to the tables of what its parser takes; the build script against a stand-in."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from detpost import DecodeSpec, DetectionPostProcessor
from detpost.command.cli import app
from detpost.export import to_onnx
from detpost.export.operators import missing
from detpost.export.shipped import build_engine
from detpost.export.tensorrt import check_parser, shape_profiles, to_tensorrt
from detpost.export.triton_server import to_triton

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tensorrt")
    done = CliRunner().invoke(app, ["export", "tiny", "--for", "tensorrt", "-o", str(out), "--max-batch", "4"])
    assert done.exit_code == 0, done.output
    return out


def test_the_graph_is_what_the_parser_takes(folder):
    model = onnx.load(folder / "model.onnx")
    check_parser(model)
    assert missing(model, "tensorrt-11", "detpost/") == []


@pytest.mark.parametrize("preset", ["rtdetr", "detr"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_decode_behind_half_precision_is_float32(preset, dtype, tmp_path):
    from detpost.export.decode_graph import decode_graph

    check_parser(decode_graph(DecodeSpec.preset(preset), 20, 5, opset=17, dtypes=(dtype, dtype)))


def test_planted_graphs_are_refused(folder, tmp_path):
    helper = onnx.helper
    for operator, name, domain, said in (
        ("Unique", "network/Unique", "", "Unique: not parsed"),
        ("Softmax", "detpost/Gelu", "", "Softmax of float16"),
        ("Fancy", "network/Fancy", "mine", "operators of mine"),
    ):
        values = [helper.make_tensor_value_info(each, onnx.TensorProto.FLOAT16, [1, 4]) for each in ("x", "y")]
        node = helper.make_node(operator, ["x"], ["y"], name=name, domain=domain)
        model = helper.make_model(helper.make_graph([node], "planted", values[:1], values[1:]))
        with pytest.raises(ValueError, match=said):
            check_parser(model)


def test_a_graph_that_is_refused_does_not_stay(tmp_path):
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=5000)
    with pytest.raises(ValueError, match="take top_k below 3840"):
        to_tensorrt(post, tmp_path, num_queries=300, num_classes=80)
    with pytest.raises(ValueError, match="take top_k below 3840"):
        to_triton(post, tmp_path, backend="tensorrt", num_queries=300, num_classes=80)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("top_k", "taken"), [(3839, True), (3840, False), (5000, False)])
@pytest.mark.parametrize("ties", ["exact", "onnx"])
def test_a_top_k_is_below_the_parsers_limit(top_k, taken, ties):
    from detpost.export.decode_graph import decode_graph

    model = decode_graph(DecodeSpec(top_k=top_k), 1300, 5, opset=17, ties=ties)
    if taken:
        check_parser(model)
        return
    with pytest.raises(ValueError, match=f"does not take the graph: TopK of k {top_k}: take top_k below 3840$"):
        check_parser(model)


@pytest.mark.parametrize(("k", "named"), [(4000, "network/TopK"), (300, "")])
def test_a_top_k_of_the_network_is_named(k, named):
    helper, kinds = onnx.helper, onnx.TensorProto
    number = helper.make_tensor("number", kinds.INT64, [1], [k])
    nodes = [
        helper.make_node("Constant", [], ["k"], value=number),
        helper.make_node("TopK", ["x", "k"], ["y", "places"], name="network/TopK"),
        helper.make_node("TopK", ["x", "free"], ["z", "others"], name="network/free"),
    ]
    inputs = [("x", kinds.FLOAT, [1, 5000]), ("free", kinds.INT64, [1])]
    outputs = [("y", kinds.FLOAT, [1, k])]
    values = [[helper.make_tensor_value_info(*value) for value in each] for each in (inputs, outputs)]
    model = helper.make_model(helper.make_graph(nodes, "planted", *values))
    if not named:
        check_parser(model)
        return
    with pytest.raises(ValueError, match=f"TopK of k {k}: {named} needs k below 3840$"):
        check_parser(model)


def test_the_build_command_has_a_profile_for_each_free_input(folder, tmp_path):
    text = (folder / "build.sh").read_text()
    assert "--stronglyTyped" in text
    assert not re.search("fp16|bf16|int8", text)
    shapes = re.findall(r"--(\w+)Shapes=(\S+)", text)
    side = onnx.load(folder / "model.onnx").graph.input[0].type.tensor_type.shape.dim[2].dim_value
    assert shapes == [
        (name, f"images:{batch}x3x{side}x{side},image_sizes:{batch}x2")
        for name, batch in (("min", 1), ("opt", 1), ("max", 4))
    ]
    trtexec = tmp_path / "trtexec"
    trtexec.write_text('#!/bin/sh\nfor each in "$@"; do echo "$each"; done\npwd\n')
    trtexec.chmod(0o755)
    told = subprocess.run(
        [folder / "build.sh", "--verbose"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    *arguments, place = told.stdout.split()
    assert arguments[0] == "--onnx=model.onnx"
    assert arguments[-1] == "--verbose"
    assert place == str(folder)


def stand_in(inputs, told, parses=True, flag=True):
    """A module with the calls of TensorRT's Python API that the script makes."""
    profile = SimpleNamespace(set_shape=lambda name, *shapes: told.update({name: shapes}))
    network = SimpleNamespace(num_inputs=len(inputs), get_input=lambda place: inputs[place])
    config = SimpleNamespace(
        set_memory_pool_limit=lambda pool, size: told.update(workspace=size),
        add_optimization_profile=lambda given: told.update(profile=given is profile),
    )
    builder = SimpleNamespace(
        create_network=lambda flags: (told.update(flags=flags), network)[1],
        create_builder_config=lambda: config,
        create_optimization_profile=lambda: profile,
        build_serialized_network=lambda net, conf: b"plan",
    )
    parser = SimpleNamespace(
        parse_from_file=lambda path: (told.update(parsed=path), parses)[1], num_errors=1, get_error=lambda place: "odd"
    )
    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    return SimpleNamespace(
        Logger=logger,
        Builder=lambda logger: builder,
        OnnxParser=lambda net, logger: parser,
        NetworkDefinitionCreationFlag=SimpleNamespace(**({"STRONGLY_TYPED": 3} if flag else {})),
        MemoryPoolType=SimpleNamespace(WORKSPACE=0),
    )


@pytest.mark.parametrize("flag", [True, False])
def test_the_script_builds_strongly_typed_with_a_profile(flag, tmp_path, monkeypatch):
    told = {}
    inputs = [SimpleNamespace(name="images", shape=(-1, 3, -1, -1)), SimpleNamespace(name="image_sizes", shape=(-1, 2))]
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in(inputs, told, flag=flag))
    out = tmp_path / "model.plan"
    build_engine.main(["model.onnx", "-o", str(out), "--batch", "2", "--max-batch", "4", "--side", "320", "480"])
    assert out.read_bytes() == b"plan"
    assert told["flags"] == (8 if flag else 0)
    assert told["images"] == ((1, 3, 320, 480), (2, 3, 320, 480), (4, 3, 320, 480))
    assert told["image_sizes"] == ((1, 2), (2, 2), (4, 2))
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in(inputs, told, parses=False))
    with pytest.raises(SystemExit, match=r"cannot be parsed: odd"):
        build_engine.main(["model.onnx", "-o", str(out)])


def test_tensorrt_itself_parses_it(folder):
    tensorrt = pytest.importorskip("tensorrt", reason="needs tensorrt and a GPU")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert build_engine.build(tensorrt, folder / "model.onnx", (1, 1, 4), (640, 640), 1024)


def test_a_fixed_file_needs_no_profile(tmp_path):
    post = DetectionPostProcessor.from_preset("rtdetr", top_k=5)
    written = to_onnx(post, tmp_path / "post.onnx", num_queries=8, num_classes=3, dynamic_batch=False)
    assert shape_profiles(onnx.load(written.path), 4) == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ties": "onnx"}, "says nothing of equal scores"),
        ({"preprocess_inside": "full"}, "no antialiased Resize"),
        ({"max_batch": 0}, "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        to_tensorrt(nn.Identity(), tmp_path, **options)
