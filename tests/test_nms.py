from __future__ import annotations

import math
import warnings

import numpy as np
import onnx.compose
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torchvision.ops import batched_nms
from torchvision.ops import nms as torchvision_nms

import detpost
from detpost import DecodeSpec, DetectionPostProcessor, Detections
from detpost.export.decode_graph import decode_graph
from detpost.export.torch_exporters import export_torchscript
from detpost.nms import NonMaximumSuppression, nms
from tests.mixin import assert_same, one_line

NAN, INF = math.nan, math.inf


def reference(boxes, scores, threshold, labels=None, valid=None):
    """torchvision's nms of each image and label apart."""
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    labels = torch.zeros(scores.shape, dtype=torch.int64) if labels is None else labels
    valid = torch.ones_like(keep) if valid is None else valid
    for image in range(len(boxes)):
        for label in labels[image].unique():
            of_label = torch.nonzero((labels[image] == label) & valid[image])[:, 0]
            found = torchvision_nms(boxes[image, of_label], scores[image, of_label], threshold)
            keep[image, of_label[found]] = True
    return keep


def keep_in_every_form(*arguments):
    """What the form that is the default here keeps; PyTorch's own operators keep the same."""
    found = nms(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETPOST_KERNEL", "aten")
        assert_same(nms(*arguments), found)
    return found


def crowd(batch, count, classes, seed=0, side=640.0, extent=150.0):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(batch, count, 2, generator=generator) * side
    size = torch.rand(batch, count, 2, generator=generator) * extent + 4
    scores = torch.rand(batch, count, generator=generator).mul(50).round().div(50)  # many equal
    labels = torch.randint(classes, (batch, count), generator=generator)
    return torch.cat((centre - size / 2, centre + size / 2), -1), scores, labels


def detections_of(boxes, scores, labels, valid=None):
    valid = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid
    queries = torch.arange(labels.shape[1]).expand_as(labels)
    return Detections(
        torch.where(valid, scores, 0.0),
        torch.where(valid, labels, -1),
        torch.where(valid.unsqueeze(-1), boxes, 0.0),
        torch.where(valid, queries, -1),
        valid,
    )


def best_first(boxes, scores, labels):
    order = scores.argsort(dim=1, descending=True, stable=True)
    return boxes.gather(1, order.unsqueeze(-1).expand_as(boxes)), scores.gather(1, order), labels.gather(1, order)


def exported(module, example, outputs, dynamic=True):
    names = [f"in{i}" for i in range(len(example))]
    axes = {name: {0: "batch"} for name in (*names, *outputs)} if dynamic else {}
    model = export_torchscript(module, example, tuple(names), tuple(outputs), axes, 17)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}  # an input that is not used is left out

    def run(*values):
        feed = {name: value.numpy() for name, value in zip(names, values, strict=True) if name in taken}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return model, run


class Plain(nn.Module):
    def __init__(self, threshold=0.5):
        super().__init__()
        self.threshold = threshold

    def forward(self, boxes, scores, labels):
        return nms(boxes, scores, self.threshold, labels)


# --- equal to torchvision ---

# Few numbers, so that boxes touch, coincide, vanish, turn inside out and lie exactly at a threshold.
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, 2.0, 3.0, 4.0, 10.0, -5.0, 1e-30, 1e19, 3e38, NAN, INF, -INF])
PLAIN_NUMBERS = st.integers(0, 6).map(float)
THRESHOLDS = st.sampled_from([0.0, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.6, 0.7, 0.9, 1.0])


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.tuples(*[PLAIN_NUMBERS] * 4), st.tuples(*[NUMBERS] * 4)),
            st.integers(0, 4),
            st.integers(0, 2),
            st.booleans(),
        ),
        min_size=1,
        max_size=40,
    ),
    THRESHOLDS,
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_any_boxes_are_kept_as_torchvision_keeps_them(rows, threshold, by_class, dtype):
    boxes = torch.tensor([[row[0] for row in rows]], dtype=dtype)
    scores = torch.tensor([[row[1] / 4 for row in rows]], dtype=dtype)
    labels = torch.tensor([[row[2] for row in rows]]) if by_class else None
    valid = torch.tensor([[row[3] for row in rows]])
    assert_same(
        keep_in_every_form(boxes, scores, threshold, labels, valid), reference(boxes, scores, threshold, labels, valid)
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 700), st.integers(1, 4), THRESHOLDS, st.sampled_from([40.0, 400.0]))
def test_crowds_are_kept_as_torchvision_keeps_them(seed, count, classes, threshold, extent):
    boxes, scores, labels = crowd(2, count, classes, seed, extent=extent)
    assert_same(keep_in_every_form(boxes, scores, threshold, labels), reference(boxes, scores, threshold, labels))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 319, 320, 321, 641])
@pytest.mark.parametrize("step", [1, 3])
def test_a_chain_as_long_as_the_list_is_solved(count, step):
    """Each box overlaps its neighbours alone, so that every decision hangs on the one before."""
    left = torch.arange(count, dtype=torch.float32) * 4
    boxes = torch.stack((left, torch.zeros(count), left + 4 + 4 * step, torch.ones(count)), -1)[None]
    scores = torch.arange(count, 0, -1, dtype=torch.float32)[None]
    keep = keep_in_every_form(boxes, scores, 0.0)
    assert_same(keep[0], torch.arange(count) % (step + 1) == 0)
    assert_same(keep, reference(boxes, scores, 0.0))


def test_equals_batched_nms():
    boxes, scores, labels = crowd(1, 300, 80)  # small enough for torchvision's coordinate trick
    scores = scores + torch.arange(300) * 1e-5  # which sorts equal scores in no order of its own
    found = batched_nms(boxes[0], scores[0], labels[0], 0.5)
    assert_same(keep_in_every_form(boxes, scores, 0.5, labels)[0].nonzero()[:, 0], found.sort().values)


def test_far_coordinates_do_not_mix_classes_up():
    """batched_nms shifts classes apart by the greatest coordinate, which costs bits; this is the exact answer."""
    boxes, scores, labels = crowd(1, 200, 50)
    boxes = boxes + 1e6
    assert_same(keep_in_every_form(boxes, scores, 0.5, labels), reference(boxes, scores, 0.5, labels))


@pytest.mark.parametrize("threshold", [k / 10 for k in range(11)])
def test_an_iou_at_the_threshold_falls_on_torchvisions_side(threshold):
    widths = torch.arange(1, 11, dtype=torch.float32)  # IoU with the first box: exactly k tenths, rounded
    boxes = torch.zeros(10, 2, 4)
    boxes[:, 0, 2], boxes[:, 1, 2], boxes[:, :, 3] = 10, widths, 1
    scores = torch.tensor([[0.9, 0.8]]).expand(10, 2)
    assert_same(keep_in_every_form(boxes, scores, threshold), reference(boxes, scores, threshold))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_boxes_are_compared_in_single(dtype):
    boxes, scores, labels = crowd(2, 150, 3)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    assert_same(keep_in_every_form(boxes, scores, 0.5, labels), reference(boxes.float(), scores.float(), 0.5, labels))


def test_equal_scores_go_by_the_lower_index_and_nan_comes_last():
    same = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 3, 4)
    assert keep_in_every_form(same, torch.tensor([[0.5, 0.5, 0.5]]), 0.5).tolist() == [[True, False, False]]
    assert keep_in_every_form(same, torch.tensor([[NAN, 0.1, -0.0]]), 0.5).tolist() == [[False, True, False]]


def test_boxes_without_area_stay():
    points = torch.tensor([[[1.0, 1.0, 1.0, 1.0]] * 3])  # 0 / 0
    assert keep_in_every_form(points, torch.rand(1, 3), 0.0).all()


def test_not_valid_boxes_drop_nothing():
    same = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 2, 4)
    keep = keep_in_every_form(same, torch.tensor([[0.9, 0.8]]), 0.5, None, torch.tensor([[False, True]]))
    assert keep.tolist() == [[False, True]]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_gives_nothing(shape):
    assert keep_in_every_form(torch.zeros(*shape, 4), torch.zeros(shape), 0.5).shape == shape


# --- detections ---


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_detections_are_suppressed_in_place_or_moved_to_the_front(agnostic, compact):
    boxes, scores, labels = best_first(*crowd(2, 90, 4, extent=300))
    valid = torch.rand(2, 90) < 0.8
    found = NonMaximumSuppression(0.4, agnostic, compact)(detections_of(boxes, scores, labels, valid))
    keep = reference(boxes, scores, 0.4, None if agnostic else labels, valid)
    assert 0 < keep.sum() < valid.sum()
    plain = detections_of(boxes, scores, labels, keep)
    if not compact:
        assert_same(found, plain)
        return
    for image, count in enumerate(keep.sum(1).tolist()):
        assert found.valid[image].tolist() == [True] * count + [False] * (90 - count)
    for image, expected in zip(found.to_list(), plain.to_list(), strict=True):
        assert_same(image, expected)
    assert found.labels[~found.valid].eq(-1).all()
    assert found.queries[~found.valid].eq(-1).all()
    assert found.boxes[~found.valid].eq(0).all()
    assert found.scores[~found.valid].eq(0).all()


def test_gradients_reach_what_is_kept_and_nothing_else():
    boxes, scores, labels = best_first(*crowd(1, 30, 1, extent=400))
    leaves = boxes.clone().requires_grad_(), scores.clone().requires_grad_()
    valid = torch.ones_like(labels, dtype=torch.bool)
    found = NonMaximumSuppression(0.3)(Detections(leaves[1], labels, leaves[0], labels, valid))
    (found.boxes.sum() + found.scores.sum()).backward()
    assert_same(leaves[1].grad, found.valid.float())
    assert_same(leaves[0].grad, found.valid.float().unsqueeze(-1).expand(1, 30, 4))


class Composed(nn.Module):
    def __init__(self):
        super().__init__()
        self.post = DetectionPostProcessor(DecodeSpec(top_k=40, score_threshold=0.5))
        self.nms = NonMaximumSuppression(0.3, compact=True)

    def forward(self, logits, boxes, image_sizes):
        return self.nms(self.post(logits, boxes, image_sizes))


class OnTensors(nn.Module):
    """Suppression with tensors in place of Detections: what an exporter takes."""

    def __init__(self, nms):
        super().__init__()
        self.nms = nms

    def forward(self, *parts):
        return tuple(self.nms(Detections(*parts)))


def composed_inputs(batch):
    return torch.randn(batch, 60, 2), torch.rand(batch, 60, 4) * 0.3 + 0.3, torch.full((batch, 2), 100)


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    arguments, module = composed_inputs(2), Composed()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments)
    assert_same(compiled, module(*arguments))
    assert 0 < compiled.valid.sum() < 80


@pytest.mark.slow
def test_inductors_code_keeps_the_same():
    torch._dynamo.reset()
    boxes, scores, labels = best_first(*crowd(2, 20, 2, extent=600))
    found, module = detections_of(boxes, scores, labels), NonMaximumSuppression(0.3)
    compiled = torch.compile(module, fullgraph=True)(found)
    assert_same(compiled, module(found))
    assert 0 < compiled.valid.sum() < 40


def test_exports_with_a_dynamic_batch():
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Composed(), composed_inputs(2), dynamic_shapes=(batch, batch, batch))
    other = composed_inputs(3)
    assert_same(program.module()(*other), Composed()(*other))


def test_the_onnx_graph_is_static_and_gives_the_same():
    model, session = exported(Plain(), crowd(2, 340, 3), ["keep"])
    assert not {node.op_type for node in model.graph.node} & {"Loop", "If", "Scan", "NonZero", "NonMaxSuppression"}
    assert all(not node.domain for node in model.graph.node)
    for seed, extent in ((1, 100.0), (2, 600.0)):
        other = crowd(3, 340, 3, seed, extent=extent)
        assert_same(session(*other)[0], nms(other[0], other[1], 0.5, other[2]))


def test_decode_and_suppression_join_in_one_onnx_graph():
    decode = decode_graph(Composed().post.spec, 60, 2, opset=17, queries=True)
    names = ("scores", "labels", "boxes", "queries", "valid")
    example = tuple(Composed().post(*composed_inputs(2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nms, _ = exported(OnTensors(Composed().nms), example, [f"kept_{name}" for name in names])
    joined = onnx.compose.merge_models(
        decode, nms, io_map=[(name, f"in{i}") for i, name in enumerate(names)], prefix2="nms/"
    )
    session = onnxruntime.InferenceSession(joined.SerializeToString(), providers=["CPUExecutionProvider"])
    other = composed_inputs(3)
    feed = dict(zip(("pred_logits", "pred_boxes", "image_sizes"), (value.numpy() for value in other), strict=True))
    found = Detections(*map(torch.from_numpy, session.run([f"nms/kept_{name}" for name in names], feed)))
    expected = Composed()(*other)
    assert_same(found.valid, expected.valid)
    assert_same(found.queries, expected.queries)
    assert_same(found.labels, expected.labels)
    torch.testing.assert_close(found.boxes, expected.boxes)


def test_is_pure(purity):
    purity(NonMaximumSuppression(0.5, compact=True), detections_of(*best_first(*crowd(2, 20, 2))))


@pytest.mark.gpu
def test_is_captured_in_a_cuda_graph_and_never_waits():
    boxes, scores, labels = (value.cuda() for value in crowd(2, 300, 3))
    for _ in range(2):
        nms(boxes, scores, 0.5, labels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = nms(boxes, scores, 0.5, labels)
    other = [value.cuda() for value in crowd(2, 300, 3, seed=5)]
    for place, value in zip((boxes, scores, labels), other, strict=True):
        place.copy_(value)
    graph.replay()
    assert_same(keep.cpu(), nms(*(value.cpu() for value in other[:2]), 0.5, other[2].cpu()))


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "kind", "pattern"),
    [
        ((torch.zeros(3, 4), torch.zeros(1, 3), 0.5), ValueError, r"\(B, N, 4\); got \(3, 4\): unsqueeze"),
        ((torch.zeros(1, 3, 5), torch.zeros(1, 3), 0.5), ValueError, r"\(B, N, 4\); got \(1, 3, 5\)"),
        ((torch.zeros(1, 3, 4), torch.zeros(1, 2), 0.5), ValueError, r"scores must .* \(1, 3\); got \(1, 2\)"),
        ((torch.zeros(1, 3, 4).long(), torch.zeros(1, 3), 0.5), TypeError, "boxes must be a floating tensor"),
        ((torch.zeros(1, 3, 4), [0.5], 0.5), TypeError, "scores must be a floating tensor .* list"),
        ((torch.zeros(1, 3, 4), torch.zeros(1, 3), 1.5), ValueError, r"iou_threshold must be in \[0, 1\]; got 1.5"),
        ((torch.zeros(1, 3, 4), torch.zeros(1, 3), NAN), ValueError, "iou_threshold must be in"),
        ((torch.zeros(1, 3, 4), torch.zeros(1, 3), "0.5"), TypeError, "iou_threshold must be a number"),
        ((torch.zeros(1, 3, 4), torch.zeros(1, 3), 0.5, torch.zeros(1, 3)), TypeError, "labels must be an integer"),
        ((torch.zeros(1, 3, 4), torch.zeros(1, 3), 0.5, None, torch.zeros(1, 3)), TypeError, "valid must be a bool"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        nms(*arguments)
    one_line(error)


def test_the_module_wants_detections():
    with pytest.raises(TypeError, match="detections must be Detections; got tuple") as error:
        NonMaximumSuppression(0.5)((1, 2))
    one_line(error)
    with pytest.raises(ValueError, match="iou_threshold"):
        NonMaximumSuppression(-0.1)


def test_is_a_public_name():
    assert detpost.nms.NonMaximumSuppression is NonMaximumSuppression
    assert np.dtype(bool) == np.asarray(nms(torch.zeros(1, 1, 4), torch.zeros(1, 1), 0.5)).dtype


@pytest.mark.parametrize("compact", [False, True])
def test_tangents_go_through_the_suppression(compact):
    boxes = torch.rand(2, 9, 4).cumsum(-1)
    labels, queries = torch.zeros(2, 9, dtype=torch.int64), torch.arange(9).repeat(2, 1)
    scores = torch.rand(2, 9).sort(descending=True).values
    found = Detections(scores, labels, boxes, queries, torch.ones(2, 9, dtype=torch.bool))
    suppress = NonMaximumSuppression(0.3, compact=compact)
    plain = suppress(found)
    assert 0 < plain.valid.sum() < plain.valid.numel()
    with forward_ad.dual_level():
        scores, boxes = (forward_ad.make_dual(values, values * 3) for values in (found.scores, found.boxes))
        followed = suppress(found._replace(scores=scores, boxes=boxes))
        tangents = [forward_ad.unpack_dual(values).tangent for values in (followed.scores, followed.boxes)]
    assert_same(tangents, [plain.scores * 3, plain.boxes * 3])
