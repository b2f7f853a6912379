from __future__ import annotations

import pytest
import torch

from benchmarks.peers import rfdetr_class
from detpost import DetectionPostProcessor, Detections
from detpost.heads import DETRPoseKeypoints, RFDETRKeypoints
from tests.mixin import assert_same, one_line
from tests.test_nms import exported

SIZES = torch.tensor([[100, 200], [37, 23]])


def sample(queries=7, classes=3, top_k=6, threshold=None, batch=2, dtype=torch.float32):
    post = DetectionPostProcessor.from_preset("rfdetr", top_k=top_k, score_threshold=threshold)
    logits, boxes = torch.randn(batch, queries, classes), torch.rand(batch, queries, 4)
    return post(logits.to(dtype), boxes.to(dtype), SIZES[:1].expand(batch, 2) if batch > 2 else SIZES[:batch])


# --- DETRPose ---


@pytest.mark.parametrize("form", ["interleaved", "pairs", "visible"])
def test_detrpose_keypoints_are_gathered_and_scaled(form):
    found = sample(threshold=0.75)
    keypoints = torch.rand(2, 7, 5, 3 if form == "visible" else 2)
    points = DETRPoseKeypoints()(found, keypoints.flatten(2) if form == "interleaved" else keypoints, SIZES)
    assert 0 < found.valid.sum() < found.valid.numel()
    for image, (height, width) in enumerate(SIZES.tolist()):
        for slot in range(6):
            if not found.valid[image, slot]:
                assert points[image, slot].eq(0).all()
                continue
            for expected, row in zip(keypoints[image, found.queries[image, slot]], points[image, slot], strict=True):
                assert row[0] == expected[0] * width
                assert row[1] == expected[1] * height
                assert row[2] == (expected[2] if form == "visible" else 1)


def test_without_image_sizes_keypoints_stay_normalised():
    found, keypoints = sample(), torch.rand(2, 7, 4)
    points = DETRPoseKeypoints()(found, keypoints)
    assert_same(points[1, 2, 1, :2], keypoints[1, found.queries[1, 2], 2:])


# --- RF-DETR ---


@pytest.mark.peers
@pytest.mark.parametrize(("features", "alpha"), [(7, 0.2), (8, 0.7), (7, 0.0), (3, 0.2)])
@pytest.mark.parametrize("counts", [[4, 2, 0], [0, 3], [2]])
def test_equals_rfdetr(counts, features, alpha):
    if rfdetr_class() is None:
        pytest.skip("rfdetr is not installed")
    logits, boxes = torch.randn(2, 7, 3), torch.rand(2, 7, 4)
    keypoints = torch.randn(2, 7, len(counts) * max(counts), features)
    peer = rfdetr_class()(num_select=15, num_keypoints_per_class=counts, trace_alpha=alpha)
    expected = peer({"pred_logits": logits, "pred_boxes": boxes, "pred_keypoints": keypoints}, SIZES)
    found = DetectionPostProcessor.from_preset("rfdetr", top_k=15)(logits, boxes, SIZES)
    ours = RFDETRKeypoints(counts, alpha)(found, keypoints, SIZES)
    for image, theirs in enumerate(expected):
        assert_same(found.labels[image], theirs["labels"])
        torch.testing.assert_close(ours.points[image], theirs["keypoints"])
        assert_same(ours.precision[image], theirs["keypoint_precision_cholesky"])
        torch.testing.assert_close(ours.scores[image], theirs["scores"], rtol=1e-5, atol=1e-7)


def test_slots_that_are_not_valid_read_zero():
    found = sample(threshold=0.75)
    result = RFDETRKeypoints([2, 0, 1])(found, torch.randn(2, 7, 6, 7), SIZES)
    for value in result:
        assert value[~found.valid].eq(0).all()
    other = RFDETRKeypoints([2, 0, 1])(found, torch.randn(2, 7, 6, 4), SIZES)
    assert_same(other.scores, found.scores)
    assert other.precision[found.valid].isnan().all()
    assert other.precision[~found.valid].eq(0).all()


def test_a_certain_pose_raises_the_score_above_an_uncertain_one():
    found = sample(queries=2, classes=1, top_k=2, batch=1)
    found = found._replace(scores=torch.full((1, 2), 0.9))
    keypoints = torch.zeros(1, 2, 3, 7)
    keypoints[0, found.queries[0, 0], :, 4:7:2] = 3.0  # precise
    scores = RFDETRKeypoints([3])(found, keypoints).scores
    assert scores[0, 0] > scores[0, 1]


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_fused_scores_stay_within_zero_and_one_with_finite_gradients(score):
    found = sample(classes=1)
    leaf = torch.full((2, 6), score, requires_grad=True)
    keypoints = torch.full((2, 7, 2, 7), 50.0, requires_grad=True)
    scores = RFDETRKeypoints([2], 5.0)(found._replace(scores=leaf), keypoints).scores
    assert (scores < 1).all()
    scores.sum().backward()
    assert leaf.grad.isfinite().all()
    assert keypoints.grad.isfinite().all()


# --- both ---


def heads():
    return [
        (DETRPoseKeypoints(), (2, 7, 10)),
        (DETRPoseKeypoints(), (2, 7, 5, 3)),
        (RFDETRKeypoints([2, 0, 1]), (2, 7, 6, 7)),
    ]


@pytest.mark.parametrize(("head", "shape"), heads())
def test_compiles_and_exports(head, shape):
    torch._dynamo.reset()
    arguments = sample(threshold=0.75), torch.randn(shape), SIZES
    expected = head(*arguments)
    assert_same(torch.compile(head, fullgraph=True, backend="aot_eager")(*arguments), expected)
    program = torch.export.export(head, arguments)
    other = sample(threshold=0.75), torch.randn(shape), SIZES + 5
    assert_same(program.module()(*other), head(*other))


@pytest.mark.parametrize(("head", "shape"), heads())
def test_runs_in_onnx_runtime(head, shape):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, scores, labels, queries, valid, keypoints, sizes):
            return self.head(Detections(scores, labels, scores, queries, valid), keypoints, sizes)

    def arguments(batch):
        found = sample(threshold=0.75, batch=batch)
        values = torch.randn(batch, *shape[1:])
        return found.scores, found.labels, found.queries, found.valid, values, torch.full((batch, 2), 50)

    names = ["points", "scores", "precision"] if isinstance(head, RFDETRKeypoints) else ["points"]
    _, session = exported(Module(), arguments(2), names)
    other = arguments(3)
    expected = Module()(*other)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, value in zip(session(*other), expected, strict=True):
        torch.testing.assert_close(got, value, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("head", "shape"), heads())
def test_gradcheck(head, shape):
    found = sample(threshold=0.75, dtype=torch.float64)
    keypoints = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def points_and_scores(values):
        result = head(found, values, SIZES)
        return (result.points, result.scores) if isinstance(head, RFDETRKeypoints) else result

    assert torch.autograd.gradcheck(points_and_scores, keypoints)


@pytest.mark.parametrize(("head", "shape"), heads())
def test_nan_in_a_query_that_is_not_kept_reaches_no_gradient(head, shape):
    found = sample(threshold=0.75)
    keypoints = torch.rand(shape)
    for image in range(2):
        unused = set(range(7)) - set(found.queries[image].tolist())
        keypoints[image, list(unused)] = float("nan")
    leaf = keypoints.requires_grad_()
    result = head(found, leaf, SIZES)
    (result.points.sum() + result.scores.sum() if isinstance(head, RFDETRKeypoints) else result.sum()).backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.ne(0).any()


def test_are_pure(purity):
    for head, shape in heads()[1:]:
        purity(head, sample(), torch.randn(shape), SIZES)


@pytest.mark.parametrize(
    ("head", "values", "sizes", "kind", "pattern"),
    [
        (heads()[0][0], torch.zeros(2, 7, 5), SIZES, ValueError, r"even last dimension, .*; got \(2, 7, 5\)"),
        (heads()[0][0], torch.zeros(2, 7, 5, 4), SIZES, ValueError, r"\(B, Q, N, 2 or 3\); got \(2, 7, 5, 4\)"),
        (heads()[0][0], torch.zeros(2, 7), SIZES, ValueError, r"keypoints must have shape .*; got \(2, 7\)"),
        (heads()[0][0], torch.zeros(2, 7, 4).int(), SIZES, TypeError, "keypoints must be a floating tensor"),
        (heads()[0][0], torch.zeros(3, 7, 4), SIZES, ValueError, "of the same images; got 3 and 2"),
        (heads()[0][0], torch.zeros(2, 7, 4), SIZES[:1], ValueError, r"image_sizes must have shape \(B, 2\)"),
        (heads()[0][0], torch.zeros(2, 7, 4), [(1, 2)], TypeError, "image_sizes must be an integer or floating"),
        (heads()[2][0], torch.zeros(2, 7, 5, 7), SIZES, ValueError, r"3 classes \* 2, 3 or more\); got \(2, 7, 5, 7\)"),
        (heads()[2][0], torch.zeros(2, 7, 6, 2), SIZES, ValueError, r"got \(2, 7, 6, 2\)"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(head, values, sizes, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        head(sample(), values, sizes)
    one_line(error)


@pytest.mark.parametrize("arguments", [([],), ([0, 0],), ([2, -1],), ([2.0],), ([2], -0.1), ([2], float("nan"))])
def test_a_schema_without_keypoints_is_refused(arguments):
    with pytest.raises(ValueError, match=r"num_keypoints_per_class must|trace_alpha must") as error:
        RFDETRKeypoints(*arguments)
    one_line(error)
