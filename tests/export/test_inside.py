"""Files that end in post-processing of their own: the raw values behind it are found, and it is cut off."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from detpost import DecodeSpec, boxes
from detpost.export import attach
from detpost.export.raw_values import list_candidates
from tests.export import exporters
from tests.export.exporters import BOXES, LOGITS, K
from tests.export.foreign import (
    SIDE,
    C,
    Q,
    assert_decodes_its_own_raw_outputs,
    foreign,
    images_and_sizes,
    run,
    written,
)

FLAT = DecodeSpec(top_k=K)
PER_QUERY = DecodeSpec(top_k=Q, selection="per_query")
SOFTMAX = DecodeSpec.preset("detr", top_k=Q)

NEWEST = min(onnx.defs.onnx_opset_version(), 22)  # what the oldest ONNX Runtime here takes too


def theirs(path, images, sizes):
    """Run someone's file as it is: its outputs by name. Sizes are (width, height) there."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {"images": images, "orig_target_sizes": sizes[:, ::-1].copy()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {i.name: feed[i.name] for i in session.get_inputs()}), strict=True))


def quiet_images(batch, dtype=np.float32):
    """Images whose logits saturate no sigmoid: their post-processing ranks scores, ours logits."""
    images, sizes = images_and_sizes(batch, dtype)
    return images / 10, sizes


def assert_the_same_detections(got, expected, limits=None):
    np.testing.assert_array_equal(got["labels"], expected["labels"])
    np.testing.assert_allclose(got["scores"], expected["scores"], atol=1e-6)
    found = got["boxes"] if limits is None else np.clip(got["boxes"], 0, limits)
    np.testing.assert_allclose(found, expected["boxes"], atol=0.01)


def attached(tmp_path, model, spec=FLAT, **options):
    return attach(written(tmp_path, model), tmp_path / "out.onnx", spec, **options)


def note(result, start):
    (found,) = [line for line in result.notes if line.startswith(start)]
    return found


@pytest.mark.parametrize("opset", [11, 13, 17, 18, NEWEST])
@pytest.mark.parametrize("exporter", [exporters.rtdetr, exporters.dfine, exporters.clipped])
def test_their_detections_are_ours_at_every_batch_and_opset(tmp_path, exporter, opset):
    result = attached(tmp_path, exporter(opset=opset), keep_raw=True)
    assert result.opset == opset
    assert result.inputs == ("images", "image_sizes")
    for batch in (1, 2, 3, 4):
        images, sizes = quiet_images(batch)
        limits = np.tile(sizes[:, ::-1], 2)[:, None] if exporter is exporters.clipped else None
        got, expected = run(result.path, images, sizes), theirs(tmp_path / "source.onnx", images, sizes)
        assert_the_same_detections(got, expected, limits)
    assert_decodes_its_own_raw_outputs(result.path, 2, FLAT)


@pytest.mark.parametrize(
    ("exporter", "spec"),
    [
        (exporters.rtdetr, FLAT),
        (exporters.clipped, FLAT),
        (exporters.with_category_ids, FLAT),
        (exporters.ultralytics, FLAT),
        (exporters.ultralytics_dense, FLAT),
        (exporters.probabilities, FLAT),
        (exporters.deepstream, PER_QUERY),
        (exporters.deepstream_logits, PER_QUERY),
        (exporters.detr, SOFTMAX),
    ],
)
def test_the_raw_values_are_found_and_the_rest_is_cut_off(tmp_path, exporter, spec):
    result = attached(tmp_path, exporter(), spec)
    assert note(result, "logits: ") == f"logits: {LOGITS} ['N', {Q}, {C}]"
    boxes = "boxes" if exporter is exporters.probabilities else BOXES
    assert note(result, "boxes: ") == f"boxes: {boxes} ['N', {Q}, 4]"
    cut = note(result, "cut off: ")
    names = [value.name for value in onnx.load(tmp_path / "source.onnx").graph.output]
    assert all(name in cut for name in names if name != boxes)
    model = onnx.load(result.path)
    assert not [node for node in model.graph.node if any("/theirs/" in name for name in node.output)]
    assert not [tensor.name for tensor in model.graph.initializer if "/theirs/" in tensor.name]
    assert result.outputs == ("labels", "boxes", "scores", "valid")


def test_what_was_cut_is_said(tmp_path):
    cut = note(attached(tmp_path, exporters.rtdetr()), "cut off: ")
    assert "TopK" in cut or "..." in cut
    assert cut.endswith("outputs labels, boxes, scores; inputs orig_target_sizes")


def test_raw_boxes_that_are_made_of_corners_are_not_taken_apart(tmp_path):
    result = attached(tmp_path, exporters.dfine())
    assert "/theirs/Concat" in note(result, "boxes: ")
    images, sizes = quiet_images(2)
    assert_the_same_detections(run(result.path, images, sizes), theirs(tmp_path / "source.onnx", images, sizes))


@pytest.mark.parametrize("place", [[0, 0, -2, -2], [20, 20, 20, 20]])
def test_queries_in_one_place_do_not_hide_the_order_of_the_boxes(tmp_path, place):
    # Random weights often put every box in one place: gathered by score or not, the boxes look the same then.
    model = exporters.ultralytics()
    for node in model.graph.node:
        if node.output[0] == BOXES:
            node.input[0] = "one_place"
    nodes = [helper.make_node("Mul", ["raw_boxes", "nothing"], ["zeros"])]
    nodes += [helper.make_node("Add", ["zeros", "place"], ["one_place"])]
    for node in reversed(nodes):
        model.graph.node.insert(5, node)
    for name, values in (("nothing", 0), ("place", place)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.float32), name))
    result = attached(tmp_path, model)
    assert note(result, "boxes: ").startswith(f"boxes: {BOXES} ")
    assert note(result, "in that image they are all alike")


@pytest.mark.parametrize("exporter", [exporters.ultralytics, exporters.rtdetr, exporters.dfine, exporters.deepstream])
def test_scores_that_tie_do_not_let_other_boxes_pass(tmp_path, exporter):
    # So do random weights score all alike.
    model = exporter()
    for node in model.graph.node:
        if LOGITS in node.output:
            node.output[0] = "apart"
    place = next(i for i, node in enumerate(model.graph.node) if "apart" in node.output)
    model.graph.node.insert(place + 1, helper.make_node("Mul", ["apart", "little"], [LOGITS]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(1e-7, np.float32), "little"))
    result = attached(tmp_path, model)
    assert note(result, "logits: ").startswith(f"logits: {LOGITS} ")
    expected = "boxes: /theirs/Concat" if exporter is exporters.dfine else f"boxes: {BOXES} "
    assert note(result, "boxes: ").startswith(expected)


def test_another_selection_than_the_files_own_is_said(tmp_path):
    result = attached(tmp_path, exporters.deepstream(), FLAT)
    assert any("its own post-processing selected per_query, where the spec says flat" in line for line in result.notes)
    assert not any("selected" in line for line in attached(tmp_path, exporters.deepstream(), PER_QUERY).notes)


def test_labels_that_were_category_ids_are_said_to_be_channels_now(tmp_path):
    result = attached(tmp_path, exporters.with_category_ids())
    assert any("channels of the logits (0 was 1, 1 was 2, 2 was 3)" in line for line in result.notes)
    assert not any("channels" in line for line in attached(tmp_path, exporters.rtdetr()).notes)


@pytest.mark.parametrize(
    ("exporter", "spec", "kind"),
    [
        (exporters.detr, FLAT, "softmax and background last"),
        (exporters.rtdetr, SOFTMAX, "sigmoid and background none"),
    ],
)
def test_a_preset_of_another_kind_than_the_file_is_refused(tmp_path, exporter, spec, kind):
    with pytest.raises(ValueError, match=f"with activation {kind}: take a preset of that kind") as error:
        attached(tmp_path, exporter(), spec)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.onnx").exists()


def test_detections_that_no_inner_values_give_are_refused_with_a_way_out(tmp_path):
    model, tail = exporters.start(sizes=False)
    halved = tail.node("Mul", tail.node("Sigmoid", LOGITS), tail.real(0.5))
    tail.output(halved, "scores", TensorProto.FLOAT, ["N", Q, C])
    tail.output(BOXES, "boxes", TensorProto.FLOAT, ["N", Q, 4])
    source = written(tmp_path, model)
    with pytest.raises(ValueError, match=r"scores comes out of Sigmoid.*no values inside it give its own") as error:
        attach(source, tmp_path / "out.onnx")
    assert "--list" in str(error.value)
    assert "\n" not in str(error.value)
    result = attach(source, tmp_path / "out.onnx", logits=LOGITS, boxes=BOXES)
    assert note(result, "logits: ").startswith(f"logits: {LOGITS} ")


@pytest.mark.parametrize(("given", "other"), [("logits", "boxes"), ("boxes", "logits")])
def test_one_inner_value_may_be_named_and_the_other_found(tmp_path, given, other):
    result = attached(tmp_path, exporters.rtdetr(), **{given: LOGITS if given == "logits" else BOXES})
    assert note(result, f"{other}: ").startswith(f"{other}: {BOXES if other == 'boxes' else LOGITS} ")


def test_named_values_are_taken_as_they_are(tmp_path):
    scored = next(n.output[0] for n in exporters.rtdetr().graph.node if n.op_type == "Sigmoid" and n.input[0] == LOGITS)
    result = attached(tmp_path, exporters.rtdetr(), logits=scored, boxes=BOXES)
    assert any(f"{scored} comes out of Sigmoid: logits must be what goes into it" in line for line in result.notes)


def test_a_sigmoid_in_front_of_an_output_is_not_applied_twice(tmp_path):
    images, sizes = images_and_sizes(2)
    got = run(attached(tmp_path, exporters.probabilities()).path, images, sizes)
    scores = theirs(tmp_path / "source.onnx", images, sizes)["scores"]
    np.testing.assert_allclose(got["scores"], -np.sort(-scores.reshape(2, -1))[:, :K], atol=1e-6)


def test_half_precision_is_cut_at_the_half_values(tmp_path):
    result = attached(tmp_path, exporters.rtdetr(dtype=np.float16), keep_raw=True)
    assert_decodes_its_own_raw_outputs(result.path, 2, FLAT, np.float16)


def test_external_weights_stay_whole_when_the_file_is_run_to_look_inside(tmp_path):
    onnx.save(exporters.rtdetr(), tmp_path / "source.onnx", save_as_external_data=True, location="w", size_threshold=0)
    result = attach(tmp_path / "source.onnx", tmp_path / "out.onnx", FLAT, keep_raw=True)
    assert note(result, "boxes: ").startswith(f"boxes: {BOXES} ")
    assert_decodes_its_own_raw_outputs(result.path, 2, FLAT)


@pytest.mark.parametrize("io", ["rtdetr", "efficientnms"])
def test_their_own_names_may_be_used_again(tmp_path, io):
    result = attached(tmp_path, exporters.rtdetr(), io=io)
    assert not any("all alike" in line for line in result.notes)
    images, sizes = quiet_images(3)
    name = result.inputs[1]
    given = sizes[:, ::-1].copy() if io == "rtdetr" else sizes
    got = run(result.path, images, given, sizes_name=name)
    expected = theirs(tmp_path / "source.onnx", images, sizes)
    np.testing.assert_allclose(got["boxes" if io == "rtdetr" else "det_boxes"], expected["boxes"], atol=0.01)
    if io == "rtdetr":
        assert result.inputs == ("images", "orig_target_sizes")
        np.testing.assert_array_equal(got["labels"], expected["labels"])


def test_a_fixed_batch_is_kept(tmp_path):
    result = attached(tmp_path, exporters.rtdetr(batch=3), keep_raw=True)
    assert {value.type.tensor_type.shape.dim[0].dim_value for value in onnx.load(result.path).graph.output} == {3}
    assert_decodes_its_own_raw_outputs(result.path, 3, FLAT)


def branching(model, used):
    """Let the logits come out of an ``If`` whose branches take a value of the main graph."""
    value = helper.make_tensor_value_info
    kinds = (("Identity", "then"), ("Neg", "else"))
    branches = [
        helper.make_graph([helper.make_node(kind, [used], [name])], name, [], [value(name, TensorProto.FLOAT, None)])
        for kind, name in kinds
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "which"))
    place = next(i for i, node in enumerate(model.graph.node) if node.output[0] == LOGITS)
    model.graph.node[place].output[0] = used
    model.graph.node.insert(
        place + 1, helper.make_node("If", ["which"], [LOGITS], then_branch=branches[0], else_branch=branches[1])
    )
    return model


def test_what_a_branch_takes_from_outside_lives_on(tmp_path):
    result = attached(tmp_path, branching(exporters.rtdetr(), "taken_by_branches"), keep_raw=True)
    assert_decodes_its_own_raw_outputs(result.path, 2, FLAT)


def test_values_inside_a_branch_cannot_be_named(tmp_path):
    model = branching(exporters.rtdetr(), "taken_by_branches")
    with pytest.raises(ValueError, match="'then' is inside a graph that node If holds for logits: --list"):
        attached(tmp_path, model, logits="then", boxes=BOXES)


def test_functions_of_the_file_are_looked_into(tmp_path):
    model = exporters.rtdetr()
    place = next(i for i, n in enumerate(model.graph.node) if n.op_type == "Sigmoid" and n.input[0] == LOGITS)
    scored = model.graph.node[place].output[0]
    body = [helper.make_node("Sigmoid", ["x"], ["y"])]
    model.functions.append(helper.make_function("own", "Score", ["x"], ["y"], body, [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node[place].CopyFrom(helper.make_node("Score", [LOGITS], [scored], domain="own"))
    result = attached(tmp_path, model)
    assert note(result, "logits: ").startswith(f"logits: {LOGITS} ")
    assert not onnx.load(result.path).functions


def test_a_file_of_ours_may_be_attached_to_again(tmp_path):
    first = attach(written(tmp_path, foreign()), tmp_path / "first.onnx", DecodeSpec(top_k=5))
    assert "scores" in first.outputs
    again = attach(first.path, tmp_path / "again.onnx", FLAT, keep_raw=True)
    assert note(again, "logits: ").startswith("logits: pred_logits ")
    assert again.inputs == ("images", "image_sizes")
    assert_decodes_its_own_raw_outputs(again.path, 2, FLAT)
    third = attach(again.path, again.path, DecodeSpec.preset("detr"), keep_raw=True)
    assert_decodes_its_own_raw_outputs(third.path, 2, DecodeSpec.preset("detr"))
    sizes = [len(onnx.load(path).graph.node) for path in (first.path, tmp_path / "again.onnx")]
    assert sizes[1] < 2 * sizes[0]


def test_other_outputs_and_what_makes_them_are_cut_off_and_named(tmp_path):
    model = foreign(extra=(("auxiliary", C),))
    result = attached(tmp_path, model, logits="pred_logits")
    assert note(result, "cut off: ") == "cut off: 1 nodes (1 Identity); outputs auxiliary"
    assert not [node for node in onnx.load(result.path).graph.node if "auxiliary" in node.output]


def test_candidates_are_listed_with_shapes(tmp_path):
    listed = list_candidates(written(tmp_path, exporters.rtdetr()))
    assert [candidate.name for candidate in listed[:3]] == ["labels", "boxes", "scores"]
    found = {candidate.name: candidate for candidate in listed}
    assert (found[LOGITS].shape, found[LOGITS].guess, found[LOGITS].place) == (("N", Q, C), "logits", "Slice")
    assert (found[BOXES].shape, found[BOXES].guess, found[BOXES].place) == (("N", Q, 4), "boxes", "Sigmoid")
    assert found["labels"].dtype == "int64"


def test_old_models_that_list_weights_among_their_inputs(tmp_path):
    model = exporters.rtdetr(opset=11)
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    result = attached(tmp_path, model, keep_raw=True)
    assert result.inputs == ("images", "image_sizes")
    assert_decodes_its_own_raw_outputs(result.path, 2, FLAT)


def test_without_onnx_runtime_it_says_what_is_missing(tmp_path, monkeypatch):
    import sys

    source = written(tmp_path, exporters.rtdetr())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'detpost\[onnx\]'"):
        attach(source, tmp_path / "out.onnx")


def test_a_torch_module_with_post_processing_is_cut_whichever_exporter_made_it(tmp_path):
    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3 * SIDE * SIDE, Q * (C + 4))

        def forward(self, images, orig_target_sizes):
            rows = self.head(images.flatten(1)).reshape(-1, Q, C + 4)
            corners = boxes.convert(rows[..., C:].sigmoid(), "cxcywh", "xyxy")
            corners = corners * orig_target_sizes.repeat(1, 2).unsqueeze(1)
            scores, index = torch.topk(rows[..., :C].sigmoid().flatten(1), K, dim=1)
            query = index // C
            kept = corners.gather(1, query.unsqueeze(-1).repeat(1, 1, 4))
            return index - query * C, kept, scores

    example = (torch.rand(2, 3, SIDE, SIDE), torch.tensor([[640, 480], [640, 480]]))
    for dynamo in (False, True):
        path = tmp_path / f"dynamo_{dynamo}.onnx"
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            axes = (
                {"dynamic_shapes": ({0: torch.export.Dim("N")},) * 2}
                if dynamo
                else {"dynamic_axes": {"images": {0: "N"}, "orig_target_sizes": {0: "N"}}}
            )
            torch.onnx.export(
                Whole().eval(),
                example,
                str(path),
                input_names=["images", "orig_target_sizes"],
                output_names=["labels", "boxes", "scores"],
                opset_version=18,
                dynamo=dynamo,
                **axes,
            )
        result = attach(path, tmp_path / "out.onnx", FLAT, keep_raw=True)
        for batch in (1, 3):
            assert_decodes_its_own_raw_outputs(result.path, batch, FLAT)
            images, sizes = images_and_sizes(batch)
            assert_the_same_detections(run(result.path, images, sizes), theirs(path, images, sizes))
