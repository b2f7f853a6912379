"""Post-processing behind ONNX files that someone else exported."""

import subprocess
import sys
import textwrap

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from detpost import DecodeSpec, DetectionPostProcessor
from detpost.export import attach
from detpost.verify import verify
from detpost.verify.compare import raw_cases
from tests.export.foreign import SIDE, C, Q, assert_decodes_its_own_raw_outputs, foreign, images_and_sizes, run, written


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("preset", ["rtdetr", "rfdetr", "detr"])
def test_the_attached_decode_is_eagers(tmp_path, preset, batch):
    attach(written(tmp_path, foreign()), tmp_path / "out.onnx", DecodeSpec.preset(preset), keep_raw=True)
    assert_decodes_its_own_raw_outputs(tmp_path / "out.onnx", batch, DecodeSpec.preset(preset))


@pytest.mark.parametrize(("opset", "ir_version"), [(11, 6), (13, 7), (16, 8), (18, 8), (20, 9), (21, 10)])
def test_other_opsets_and_ir_versions_are_kept(tmp_path, opset, ir_version):
    source = written(tmp_path, foreign(opset=opset, ir_version=ir_version))
    result = attach(source, tmp_path / "out.onnx", keep_raw=True)
    model = onnx.load(tmp_path / "out.onnx")
    assert result.opset == opset
    assert model.opset_import[0].version == opset
    assert model.ir_version == ir_version
    assert_decodes_its_own_raw_outputs(tmp_path / "out.onnx", 2, DecodeSpec())


def test_an_older_opset_is_converted_and_said_so(tmp_path):
    nodes = [
        helper.make_node("Relu", ["images"], ["pred_logits"]),
        helper.make_node("Slice", ["images"], ["pred_boxes"], axes=[2], starts=[0], ends=[4]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "old",
        [value("images", TensorProto.FLOAT, [2, Q, C])],
        [value("pred_logits", TensorProto.FLOAT, [2, Q, C]), value("pred_boxes", TensorProto.FLOAT, [2, Q, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)])
    model.ir_version = 4
    result = attach(written(tmp_path, model), tmp_path / "out.onnx")
    assert result.opset == 17
    assert any("opset 9" in note for note in result.notes)
    onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("logits", "boxes"), [("labels", "dets"), ("scores", "boxes"), ("boxes", "labels")])
def test_names_that_collide_are_renamed_and_said_so(tmp_path, logits, boxes):
    source = written(tmp_path, foreign(logits=logits, boxes=boxes, inner="valid"))
    result = attach(source, tmp_path / "out.onnx", logits=logits, boxes=boxes, keep_raw=True)
    assert result.outputs == ("labels", "boxes", "scores", "valid", "pred_logits", "pred_boxes")
    assert any("renamed" in note and "valid" in note for note in result.notes)
    assert_decodes_its_own_raw_outputs(tmp_path / "out.onnx", 2, DecodeSpec())


def test_names_inside_subgraphs_are_renamed_too(tmp_path):
    model = foreign(logits="scores", boxes="boxes")
    value = helper.make_tensor_value_info
    branches = [
        helper.make_graph([helper.make_node(kind, ["scores"], [out])], out, [], [value(out, TensorProto.FLOAT, None)])
        for kind, out in (("Neg", "negated"), ("Identity", "kept"))
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "which"))
    model.graph.node.append(
        helper.make_node("If", ["which"], ["branched"], then_branch=branches[0], else_branch=branches[1])
    )
    model.graph.output.append(value("branched", TensorProto.FLOAT, ["batch", Q, C]))
    attach(written(tmp_path, model), tmp_path / "out.onnx", logits="branched", boxes="boxes", keep_raw=True)
    assert_decodes_its_own_raw_outputs(tmp_path / "out.onnx", 2, DecodeSpec())


def test_an_input_called_image_sizes_is_left_alone(tmp_path):
    model = foreign()
    model.graph.input.append(helper.make_tensor_value_info("image_sizes", TensorProto.INT64, ["batch", 2]))
    result = attach(written(tmp_path, model), tmp_path / "out.onnx")
    assert result.inputs == ("images", "image_sizes", "detpost_image_sizes")


def test_an_fp16_graph_selects_on_its_half_values(tmp_path):
    attach(written(tmp_path, foreign(dtype=np.float16)), tmp_path / "out.onnx", keep_raw=True)
    assert_decodes_its_own_raw_outputs(tmp_path / "out.onnx", 2, DecodeSpec(), np.float16)
    got = run(tmp_path / "out.onnx", *images_and_sizes(2, np.float16))
    assert got["scores"].dtype == np.float32
    assert got["boxes"].dtype == np.float32


def test_a_fixed_batch_stays_fixed(tmp_path):
    attach(written(tmp_path, foreign(batch=3)), tmp_path / "out.onnx", keep_raw=True)
    model = onnx.load(tmp_path / "out.onnx")
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_value == 3, value.name
    assert_decodes_its_own_raw_outputs(tmp_path / "out.onnx", 3, DecodeSpec())


def test_external_data_is_read(tmp_path):
    folder = tmp_path / "external"
    folder.mkdir()
    onnx.save(foreign(), folder / "source.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    attach(folder / "source.onnx", tmp_path / "out.onnx", keep_raw=True)
    assert_decodes_its_own_raw_outputs(tmp_path / "out.onnx", 2, DecodeSpec())


def test_open_dimensions_are_measured(tmp_path):
    model = foreign()
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[1].Clear()
        output.type.tensor_type.shape.dim[1].dim_param = "queries"
    result = attach(written(tmp_path, model), tmp_path / "out.onnx", keep_raw=True)
    assert any(f"{Q}, {C}" in note for note in result.notes)
    assert_decodes_its_own_raw_outputs(tmp_path / "out.onnx", 2, DecodeSpec())


def test_it_says_which_outputs_it_took(tmp_path):
    result = attach(written(tmp_path, foreign(logits="a", boxes="b")), tmp_path / "out.onnx")
    assert any(note.startswith("logits: a ") for note in result.notes)
    assert any(note.startswith("boxes: b ") for note in result.notes)


def test_four_classes_are_told_from_boxes_by_their_names(tmp_path):
    result = attach(written(tmp_path, foreign(classes=4)), tmp_path / "out.onnx")
    assert any(note.startswith("boxes: pred_boxes") for note in result.notes)


def test_ambiguous_outputs_are_listed(tmp_path):
    source = written(tmp_path, foreign(logits="a", boxes="b", extra=(("c", C),)))
    with pytest.raises(ValueError, match=r"several outputs could be the logits.*a \[.*b \[.*c \[") as error:
        attach(source, tmp_path / "out.onnx")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.onnx").exists()
    assert attach(source, tmp_path / "out.onnx", logits="a").outputs


def test_what_is_none_of_the_choices_is_refused(tmp_path):
    source = written(tmp_path, foreign())
    with pytest.raises(ValueError, match="ties must be one of exact, onnx; got 'nope'"):
        attach(source, tmp_path / "out.onnx", ties="nope")
    with pytest.raises(ValueError, match=r"preset must be one of None, rtdetr, .*; got 'nope'"):
        attach(source, tmp_path / "out.onnx", DecodeSpec(), preset="nope")
    assert not (tmp_path / "out.onnx").exists()


def test_boxes_in_pixels_are_not_decoded_twice(tmp_path):
    model = foreign(boxes="of_one")
    model.graph.initializer.append(numpy_helper.from_array(np.full(4, SIDE, np.float32), "side"))
    model.graph.node.append(helper.make_node("Mul", ["of_one", "side"], ["pred_boxes"]))
    model.graph.output[1].name = "pred_boxes"
    source = written(tmp_path, model)
    with pytest.raises(ValueError, match=r"pred_boxes looks like boxes in pixels.*with --boxes"):
        attach(source, tmp_path / "out.onnx")
    for boxes in ("of_one", "pred_boxes"):
        attach(source, tmp_path / "out.onnx", boxes=boxes, keep_raw=True)
        assert_decodes_its_own_raw_outputs(tmp_path / "out.onnx", 2, DecodeSpec())


def test_missing_outputs_are_listed(tmp_path):
    source = written(tmp_path, foreign())
    with pytest.raises(ValueError, match=r"no value 'nothing' for boxes.*--list.*pred_logits.*pred_boxes"):
        attach(source, tmp_path / "out.onnx", boxes="nothing")
    model = foreign()
    del model.graph.output[1]
    with pytest.raises(ValueError, match=r"no output of shape \(B, Q, 4\) for the boxes.*pred_logits"):
        attach(written(tmp_path, model, "headless.onnx"), tmp_path / "out.onnx")
    with pytest.raises(ValueError, match="logits must be"):
        attach(source, tmp_path / "out.onnx", logits="pred_boxes", boxes="pred_logits")


def test_a_file_that_is_not_onnx_is_one_line(tmp_path):
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(OSError, match="is not an ONNX file") as error:
        attach(tmp_path / "text.onnx", tmp_path / "out.onnx")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no file"):
        attach(tmp_path / "missing.onnx", tmp_path / "out.onnx")


def test_a_source_can_be_replaced_by_itself(tmp_path):
    source = written(tmp_path, foreign())
    attach(source, source, keep_raw=True)
    assert_decodes_its_own_raw_outputs(source, 2, DecodeSpec())
    with pytest.raises(ValueError, match="logits and boxes must be floating; labels is int64"):
        attach(source, source, logits="labels")


def test_the_attached_nodes_are_standard_and_of_static_shape(tmp_path):
    attach(written(tmp_path, foreign()), tmp_path / "out.onnx")
    model = onnx.load(tmp_path / "out.onnx")
    assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx"}
    assert not {"NonZero", "NonMaxSuppression", "Unique", "Loop", "If", "Compress"} & {
        n.op_type for n in model.graph.node
    }
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("io", ["rtdetr", "efficientnms"])
def test_the_names_of_existing_runners(tmp_path, io):
    spec = DecodeSpec(score_threshold=0.9)
    attach(written(tmp_path, foreign()), tmp_path / "plain.onnx", spec)
    attach(written(tmp_path, foreign()), tmp_path / "out.onnx", spec, io=io)
    images, sizes = images_and_sizes(2)
    plain = run(tmp_path / "plain.onnx", images, sizes)
    if io == "rtdetr":  # (width, height)
        got = run(tmp_path / "out.onnx", images, sizes[:, ::-1].copy(), sizes_name="orig_target_sizes")
        assert list(got) == ["labels", "boxes", "scores"]
        for name in got:
            np.testing.assert_array_equal(got[name], plain[name])
        return
    got = run(tmp_path / "out.onnx", images, sizes)
    assert list(got) == ["num_dets", "det_boxes", "det_scores", "det_classes"]
    assert got["num_dets"].dtype == got["det_classes"].dtype == np.int32
    np.testing.assert_array_equal(got["num_dets"][:, 0], plain["valid"].sum(axis=1))
    assert 0 < got["num_dets"].min() < Q * C
    np.testing.assert_array_equal(got["det_boxes"], plain["boxes"])
    np.testing.assert_array_equal(got["det_classes"], plain["labels"])


def test_a_decode_alone_is_verified_on_adversarial_ties(tmp_path):
    from detpost.export import to_onnx

    to_onnx(DetectionPostProcessor.from_preset("rtdetr"), tmp_path / "post.onnx", num_queries=50, num_classes=60)
    report = verify(tmp_path / "post.onnx", "rtdetr")
    assert report.ok, str(report)
    assert len(report.checks) == len(list(raw_cases(50, 60)))


@pytest.mark.slow
def test_killing_it_half_way_leaves_the_old_file_whole(tmp_path):
    source = written(tmp_path, foreign())
    attach(source, tmp_path / "out.onnx")
    before = (tmp_path / "out.onnx").read_bytes()
    # Die in the middle of the write itself.
    code = f"""
        import os, onnx
        from detpost import DecodeSpec
        from detpost.export import attach
        real = onnx.save_model
        def half(model, path, **kwargs):
            real(model, path, **kwargs)
            with open(path, "r+b") as file:
                file.truncate(100)
            os._exit(9)
        onnx.save_model = half
        attach({str(source)!r}, {str(tmp_path / "out.onnx")!r}, DecodeSpec(top_k=5))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == 9
    assert (tmp_path / "out.onnx").read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("*.onnx")) == ["out.onnx", "source.onnx"]
