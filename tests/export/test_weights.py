"""Weights beside a model: found, streamed and named so that no reader meets another model's."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from detpost import DecodeSpec
from detpost.export import attach, files
from detpost.export.weights import load_weights, read_onnx
from tests.export.foreign import C, Q, assert_decodes_its_own_raw_outputs, foreign, written


def outside(tmp_path, model=None, name="source.onnx", size_threshold=0):
    """Write a model with all its weights, the small ones too, in another file."""
    model = model or foreign()
    onnx.save(model, tmp_path / name, save_as_external_data=True, location="weights.bin", size_threshold=size_threshold)
    return tmp_path / name


@pytest.fixture
def little_room(monkeypatch):
    """Take any model for one above the limit of a single file."""
    monkeypatch.setattr(files, "_MOST_BYTES_INSIDE", 0)


def data_files(folder):
    return sorted(path.name for path in folder.glob("*.data"))


def refusal(source, tmp_path):
    """Give the one line with which a source is refused."""
    with pytest.raises(OSError) as error:  # noqa: PT011
        attach(source, tmp_path / "out" / "out.onnx")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    return str(error.value)


@pytest.mark.parametrize("external", [True, False])
def test_weights_beyond_one_file_go_beside_the_output(tmp_path, little_room, external):
    (tmp_path / "in").mkdir()
    source = outside(tmp_path / "in") if external else written(tmp_path / "in", foreign())
    result = attach(source, tmp_path / "out.onnx", keep_raw=True)
    (name,) = data_files(tmp_path)
    assert name.startswith("out.onnx.")
    assert result.path.stat().st_size < (tmp_path / name).stat().st_size
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    assert_decodes_its_own_raw_outputs(tmp_path / "out.onnx", 2, DecodeSpec())


def test_weights_arrive_bit_for_bit_and_on_page_boundaries(tmp_path, little_room):
    model = foreign()
    model.graph.initializer.append(numpy_helper.from_array(np.random.default_rng(0).random((999, 7)), "second"))
    model.graph.node.append(helper.make_node("Identity", ["second"], ["unused"]))
    attach(outside(tmp_path, model), tmp_path / "out.onnx", keep_raw=True)
    for tensor in onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            assert int({entry.key: entry.value for entry in tensor.external_data}["offset"]) % 4096 == 0
    source, got = (
        {t.name: t for t in onnx.load(tmp_path / name).graph.initializer} for name in ("source.onnx", "out.onnx")
    )
    np.testing.assert_array_equal(numpy_helper.to_array(got["weight"]), numpy_helper.to_array(source["weight"]))


def test_weights_in_subgraphs_and_constants_come_along(tmp_path, little_room):
    model = foreign()
    value = helper.make_tensor_value_info
    branches = []
    for number, name in enumerate(("then", "else")):
        constant = numpy_helper.from_array(np.full(Q * C, number + 1, np.float32), f"{name}_weight")
        nodes = [
            helper.make_node("Constant", [], [f"{name}_constant"], value=constant),
            helper.make_node("Reshape", [f"{name}_constant", "rows_shape"], [f"{name}_rows"]),
            helper.make_node("Add", ["plain", f"{name}_rows"], [f"{name}_sum"]),
        ]
        branches.append(helper.make_graph(nodes, name, [], [value(f"{name}_sum", TensorProto.FLOAT, None)]))
    for node in model.graph.node:
        if node.output[0] == "pred_logits":
            node.output[0] = "plain"
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "which"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([Q, C]), "rows_shape"))
    model.graph.node.append(
        helper.make_node("If", ["which"], ["pred_logits"], then_branch=branches[0], else_branch=branches[1])
    )
    source = outside(tmp_path, model)
    loaded = read_onnx(source)
    load_weights(loaded.model, loaded.folder)
    assert loaded.model.SerializeToString() == onnx.load(source).SerializeToString()
    attach(source, tmp_path / "out.onnx", keep_raw=True)
    assert_decodes_its_own_raw_outputs(tmp_path / "out.onnx", 2, DecodeSpec())


def test_no_descriptor_stays_open(tmp_path, little_room):
    source = outside(tmp_path)
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        attach(source, tmp_path / "out.onnx")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_the_same_weights_keep_their_file_and_others_get_another(tmp_path, little_room):
    source = outside(tmp_path)
    attach(source, tmp_path / "out.onnx")
    once = data_files(tmp_path)
    attach(source, tmp_path / "out.onnx", DecodeSpec(top_k=5))
    assert data_files(tmp_path) == once
    (tmp_path / "weights.bin").write_bytes((tmp_path / "weights.bin").read_bytes()[::-1])
    onnx.save(foreign(classes=8), tmp_path / "other.onnx")
    attach(tmp_path / "other.onnx", tmp_path / "out.onnx")
    assert len(data_files(tmp_path)) == 2


def test_a_failed_write_leaves_neither_model_nor_weights(tmp_path, little_room, monkeypatch):
    source = outside(tmp_path)
    real = os.replace

    def failing(one, other):
        if str(other).endswith("out.onnx"):
            raise OSError("no space left on device")
        real(one, other)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no space left"):
        attach(source, tmp_path / "out.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.onnx", "weights.bin"]


def test_a_source_with_weights_beside_it_can_be_replaced_by_itself(tmp_path, little_room):
    source = outside(tmp_path)
    attach(source, source, keep_raw=True)
    (tmp_path / "weights.bin").unlink()
    assert_decodes_its_own_raw_outputs(source, 2, DecodeSpec())


def test_weights_that_are_missing_or_cut_short_are_named(tmp_path):
    source = outside(tmp_path, size_threshold=1000)
    whole = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(whole[:-8])
    assert "weights.bin was cut short" in refusal(source, tmp_path)
    (tmp_path / "weights.bin").unlink()
    assert "no file" in (line := refusal(source, tmp_path))
    assert "weights.bin" in line


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "", "inner/../../weights.bin"])
def test_weights_outside_the_folder_are_refused(tmp_path, location):
    (tmp_path / "folder").mkdir()
    source = outside(tmp_path / "folder")
    model = onnx.load(source, load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
    onnx.save(model, source)
    assert "not beside the model" in refusal(source, tmp_path)


def test_what_is_not_a_model_is_refused_in_one_line(tmp_path):
    whole = foreign().SerializeToString()
    without_opset = foreign()
    del without_opset.opset_import[:]
    contents = {
        "empty.onnx": b"",
        "bare.onnx": onnx.ModelProto(ir_version=8).SerializeToString(),
        "graphless.onnx": onnx.ModelProto(graph=onnx.GraphProto(name="nothing")).SerializeToString(),
        "half.onnx": whole[: len(whole) // 2],
        "text.onnx": b"not a model",
        "zip.onnx": b"PK\x03\x04" + bytes(range(200)),
        "versionless.onnx": without_opset.SerializeToString(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert f"{name} is not an ONNX file" in refusal(tmp_path / name, tmp_path), name
    (tmp_path / "folder.onnx").mkdir()
    assert "is a directory" in refusal(tmp_path / "folder.onnx", tmp_path)
    assert "no file" in refusal(tmp_path / "nothing.onnx", tmp_path)


def write_large(folder, rows=2**14, columns=2**15 + 2**11):
    """Write a detector whose one matrix has more than 2 GiB, a chunk at a time."""
    queries, last = columns // 16, 16
    with (folder / "large.weights").open("wb") as file:
        generator = np.random.default_rng(0)
        for _ in range(0, rows, 1024):
            file.write(generator.random((1024, columns), np.float32).tobytes())
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[rows, columns])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="large.weights")
    constants = {"shape": [-1, queries, last], "zero": [0], "split": [12], "end": [16], "axis": [2]}
    nodes = [
        helper.make_node("MatMul", ["features", "weight"], ["mixed"]),
        helper.make_node("Reshape", ["mixed", "shape"], ["rows"]),
        helper.make_node("Slice", ["rows", "zero", "split", "axis"], ["logits"]),
        helper.make_node("Slice", ["rows", "split", "end", "axis"], ["boxes"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "large",
        [value("features", TensorProto.FLOAT, ["batch", rows])],
        [value(name, TensorProto.FLOAT, ["batch", queries, n]) for name, n in (("logits", 12), ("boxes", 4))],
        [weight, *(numpy_helper.from_array(np.array(v, np.int64), k) for k, v in constants.items())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "large.onnx").write_bytes(model.SerializeToString())
    return folder / "large.onnx"


@pytest.mark.slow
def test_a_source_above_2_gib_is_attached_to_in_little_memory(tmp_path):
    source = write_large(tmp_path)
    assert (tmp_path / "large.weights").stat().st_size > 2**31
    code = f"""
        import resource
        from detpost.export import attach
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        attach({str(source)!r}, {str(tmp_path / "out.onnx")!r}, keep_raw=True)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 2**20  # KiB: half of the weights would be more
    (tmp_path / "large.weights").unlink()
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    features = np.zeros((1, 2**14), np.float32)
    features[0, 5000] = 1.0
    found = dict(
        zip(
            (output.name for output in session.get_outputs()),
            session.run(None, {"features": features, "image_sizes": np.array([[480, 640]])}),
            strict=True,
        )
    )
    generator = np.random.default_rng(0)
    row = [generator.random((1024, 2**15 + 2**11), np.float32) for _ in range(5)][4][5000 - 4096]
    expected = row.reshape(-1, 16)
    np.testing.assert_array_equal(found["pred_logits"][0], expected[:, :12])
    best = np.argsort(-expected[:, :12].reshape(-1), kind="stable")[:300]
    np.testing.assert_array_equal(found["labels"][0], best % 12)
