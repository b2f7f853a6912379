from __future__ import annotations

import math
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import detpost
from detpost import Detections
from detpost.fusion import merge, weighted_boxes
from detpost.nms import nms
from tests.mixin import assert_same, one_line
from tests.reference.merging_inplace import greedy_merging

NAN, INF = math.nan, math.inf
CONFIDENCES = ["avg", "max", "box_and_model_avg", "absent_model_aware_avg"]
METHODS = ["nms", "nmm", "wbf"]


@pytest.fixture(params=["native", "aten"])
def form(request, monkeypatch):
    from detpost.kernels.cpu import library

    if request.param == "native" and library.missing() is not None:
        pytest.skip(f"the C++ kernels are {library.missing()}")
    monkeypatch.setenv("DETPOST_KERNEL", request.param)
    return request.param


def ensemble(seed, models, most, classes, dtype=torch.float32, odd=False):
    """What some models found, in [0, 1]; odd: or outside, turned round, without area."""
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for _ in range(models):
        count = int(torch.randint(most + 1, (1,), generator=generator))
        centre = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        size = 0.02 + 0.4 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
        boxes = torch.cat((centre - size / 2, centre + size / 2), 1)
        if odd:
            other = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, INF, -INF], dtype=torch.float64)
            other = other[torch.randint(7, boxes.shape, generator=generator)]
            boxes = torch.where(torch.rand(boxes.shape, generator=generator) < 0.08, other, boxes)
        scores = torch.rand(count, generator=generator, dtype=torch.float64)
        labels = torch.randint(classes, (count,), generator=generator)
        lists.append((boxes.to(dtype), scores.to(dtype), labels))
    return [list(values) for values in zip(*lists, strict=True)]


# --- equal to ensemble-boxes ---


def theirs(boxes, scores, labels, *options, **more):
    original = pytest.importorskip("ensemble_boxes").weighted_boxes_fusion
    lists = ([value.numpy() for value in values] for values in (boxes, scores, labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = original(*lists, *options, **more)
    corners, confidences, numbers = map(torch.from_numpy, found)
    return corners.to(boxes[0].dtype), confidences.to(scores[0].dtype), numbers.long()


NUMPY_2 = np.lib.NumpyVersion(np.__version__) >= "2.0.0"


def assert_theirs(found, expected):
    """To the bit; with NumPy 1, in which a float32 times a number of Python's is a float64, to the last place."""
    if NUMPY_2:
        assert_same(found, expected)
    else:
        torch.testing.assert_close(list(found), list(expected), rtol=5e-7, atol=0, equal_nan=True)


@pytest.mark.peers
@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("overflow", [False, True])
def test_fused_boxes_are_those_of_ensemble_boxes(form, confidence, overflow):
    fused = 0
    for seed in range(60 if form == "native" else 16):
        dtype = (torch.float32, torch.float64)[seed % 2]
        most = (3, 20, 60, 150)[seed % 4] if form == "native" else 25
        given = ensemble(seed, 1 + seed % 5, most, (1, 3, 10)[seed % 3], dtype, odd=seed % 3 == 0)
        weights = None if seed % 2 else [1.0 + (seed + i) % 4 for i in range(len(given[0]))]
        options = weights, (0.1, 0.3, 0.55, 0.7, 0.9)[seed % 5], (0.0, 0.2)[seed % 2]
        expected = theirs(*given, *options, conf_type=confidence, allows_overflow=overflow)
        assert_theirs(weighted_boxes(*given, *options, confidence=confidence, allow_overflow=overflow), expected)
        fused += sum(map(len, given[0])) - len(expected[0])
    assert fused > 60


@pytest.mark.peers
@pytest.mark.skipif(
    not NUMPY_2, reason="NumPy 1 compares a float32 with the float64 that was written, not with its own"
)
def test_scores_at_the_skip_threshold_stay_as_in_ensemble_boxes(form):
    boxes = [torch.rand(9, 4).cumsum(1) / 4]
    scores = [torch.arange(1, 10).float() / 10]
    labels = [torch.arange(9)]
    for skip in (k / 10 for k in range(11)):
        assert_same(
            weighted_boxes(boxes, scores, labels, None, 0.5, skip), theirs(boxes, scores, labels, None, 0.5, skip)
        )


@pytest.mark.peers
@pytest.mark.parametrize("most", [0, 1])
def test_nothing_and_almost_nothing(form, most):
    for seed in range(8):
        given = ensemble(seed, 3, most, 2)
        found = weighted_boxes(*given)
        assert found[0].shape[1] == 4
        assert_same(found, theirs(*given))


# --- by hand ---


def of_one(*rows, label=0):
    """One model's boxes of one label, from (left, right, score)."""
    boxes = torch.tensor([[left, 0.0, right, 1.0] for left, right, _ in rows])
    return boxes, torch.tensor([score for *_, score in rows]), torch.full((len(rows),), label)


def fuse_lists(*lists, **options):
    return weighted_boxes(*map(list, zip(*lists, strict=True)), **options)


def test_a_mean_is_weighed_by_scores_and_divided_by_models(form):
    boxes, scores, labels = fuse_lists(of_one((0.0, 0.5, 0.75)), of_one((0.0, 0.75, 0.25)), of_one((0.75, 1.0, 0.75)))
    torch.testing.assert_close(boxes, torch.tensor([[0.0, 0.0, 0.5625, 1.0], [0.75, 0.0, 1.0, 1.0]]))
    torch.testing.assert_close(scores, torch.tensor([(0.75 + 0.25) / 3, 0.25]))
    assert labels.tolist() == [0, 0]


def test_weights_count_as_scores_do(form):
    boxes, scores, _ = fuse_lists(of_one((0.0, 0.5, 0.5)), of_one((0.0, 0.75, 0.5)), weights=[3, 1])
    torch.testing.assert_close(boxes, torch.tensor([[0.0, 0.0, 0.5625, 1.0]]))
    torch.testing.assert_close(scores, torch.tensor([0.5]))


def test_a_box_joins_the_cluster_that_it_overlaps_most_as_that_is_by_then(form):
    first, second, third = (0.0, 0.4, 0.9), (0.25, 0.65, 0.8), (0.15, 0.55, 0.1)  # third and first: 0.45, second: 0.6
    boxes, _, _ = fuse_lists(of_one(first, second, third), iou_threshold=0.25)
    assert_same(boxes[0], torch.tensor([0.0, 0.0, 0.4, 1.0]))
    torch.testing.assert_close(boxes[1], torch.tensor([0.215 / 0.9, 0.0, 0.575 / 0.9, 1.0]))
    joined = fuse_lists(of_one((0.0, 0.4, 0.9), (0.1, 0.5, 0.8), (0.18, 0.58, 0.7)), iou_threshold=0.5)[0]
    apart = fuse_lists(of_one((0.0, 0.4, 0.9), (0.18, 0.58, 0.7)), iou_threshold=0.5)[0]
    assert (len(joined), len(apart)) == (1, 2)


@pytest.mark.parametrize("between", [0, 1, 2, 3, 7, 8])
def test_of_clusters_that_a_box_overlaps_equally_it_joins_the_first(form, between):
    """Wherever the two stand in the columns that are compared at once."""
    others = [(0.75 + 0.03 * k, 0.77 + 0.03 * k, 0.8) for k in range(between)]
    boxes, _, _ = fuse_lists(
        of_one((0.0, 0.25, 0.9), *others, (0.25, 0.5, 0.7), (0.125, 0.375, 0.1)), iou_threshold=0.2
    )
    assert len(boxes) == between + 2
    assert float(boxes[0, 2]) > 0.25
    assert [0.25, 0.0, 0.5, 1.0] in boxes.tolist()


def test_of_equal_scores_the_later_begins_the_cluster(form):
    """As NumPy's sort, turned round, has it in short lists: the third and the second meet, the first stays alone."""
    chain = of_one((0.0, 0.4, 0.5), (0.15, 0.55, 0.5), (0.3, 0.7, 0.5))
    boxes, scores, _ = fuse_lists(chain, iou_threshold=0.4)
    assert_same(scores, torch.tensor([0.5, 0.5]))
    assert sorted(boxes[:, 0].tolist()) == pytest.approx([0.0, 0.225])


def test_clusters_of_equal_score_come_as_from_ensemble_boxes(form):
    """Of one label in the order of the boxes, of several with the later label first."""
    apart = of_one((0.0, 0.1, 0.5), (0.2, 0.3, 0.5), (0.4, 0.5, 0.5))
    assert fuse_lists(apart)[0][:, 0].tolist() == pytest.approx([0.0, 0.2, 0.4])
    boxes, scores, _ = apart
    assert weighted_boxes([boxes], [scores], [torch.tensor([5, 9, 5])])[2].tolist() == [9, 5, 5]


def test_labels_keep_boxes_apart_whatever_numbers_they_are(form):
    one, other = of_one((0.0, 0.5, 0.8), label=2**53), of_one((0.0, 0.5, 0.6), label=2**53 + 1)
    labels = fuse_lists(one, other)[2]
    assert labels.tolist() == [2**53, 2**53 + 1]


def test_scores_of_nothing_but_0_leave_the_first_box(form):
    """ensemble-boxes divides 0 by 0 here; a weight of 0 makes such scores."""
    boxes, scores, _ = fuse_lists(of_one((0.0, 0.5, 0.0)), of_one((0.0, 0.6, 0.0)))
    assert_same(scores, torch.zeros(1))
    assert boxes.isfinite().all()
    for confidence in CONFIDENCES:
        boxes, scores, _ = fuse_lists(
            of_one((0.0, 0.5, 0.9)), of_one((0.5, 0.9, 0.4), (0.5, 0.8, 0.8)), weights=[1, 0], confidence=confidence
        )
        assert_same(scores, torch.tensor([0.9, 0.0]))
        assert boxes.isfinite().all()


def test_a_disabled_model_moves_no_box(form):
    alone = fuse_lists(of_one((0.0, 0.5, 0.9)))
    with_other = fuse_lists(of_one((0.0, 0.5, 0.9)), of_one((0.0, 0.6, 0.9)), weights=[1, 0])
    assert_same(with_other[0], alone[0])


def test_gradients_reach_boxes_and_scores():
    boxes = [
        torch.tensor([[0.0, 0.0, 0.5, 1.0]]).requires_grad_(),
        torch.tensor([[0.0, 0.0, 0.75, 1.0]]).requires_grad_(),
    ]
    scores = [torch.tensor([0.75]).requires_grad_(), torch.tensor([0.25]).requires_grad_()]
    fused, confidence, _ = weighted_boxes(boxes, scores, [torch.zeros(1).long()] * 2)
    fused[0, 2].backward(retain_graph=True)
    assert_same(boxes[0].grad, torch.tensor([[0.0, 0.0, 0.75, 0.0]]))
    # d (s0 x0 + s1 x1) / (s0 + s1) by s0, at a total of 1: x0 - mean.
    torch.testing.assert_close(scores[0].grad, torch.tensor([0.5 - 0.5625]))
    confidence.sum().backward()
    torch.testing.assert_close(scores[1].grad, torch.tensor([0.75 - 0.5625 + 0.5]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_single(form, dtype):
    given = [
        [values.to(dtype) if values.is_floating_point() else values for values in lists]
        for lists in ensemble(1, 3, 9, 2)
    ]
    single = [[values.float() if values.is_floating_point() else values for values in lists] for lists in given]
    found = weighted_boxes(*given)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert_same(found, weighted_boxes(*single))


# --- merging ---


def tiles(seed, count, slots, classes=3, batch=1, extent=80.0):
    """Detections of tiles that overlap, and the tiles' corners."""
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for _ in range(count):
        centre = 10 + 80 * torch.rand(batch, slots, 2, generator=generator)
        size = 4 + extent * torch.rand(batch, slots, 2, generator=generator)
        scores = torch.rand(batch, slots, generator=generator).sort(dim=1, descending=True).values
        labels = torch.randint(classes, (batch, slots), generator=generator)
        valid = torch.rand(batch, slots, generator=generator) < 0.8
        lists.append(
            Detections(
                torch.where(valid, scores, 0.0),
                torch.where(valid, labels, -1),
                torch.where(valid.unsqueeze(-1), torch.cat((centre - size / 2, centre + size / 2), -1), 0.0),
                torch.where(valid, torch.arange(slots), -1),
                valid,
            )
        )
    return lists, [(80.0 * (i % 3), 80.0 * (i // 3)) for i in range(count)]


def end_to_end(lists, corners):
    """Boxes (N, 4), scores, labels and places of what is valid, of one image, in its own pixels."""
    boxes = torch.cat([found.boxes[0] + torch.tensor(corner * 2) for found, corner in zip(lists, corners, strict=True)])
    scores, labels, valid = (
        torch.cat([getattr(found, name)[0] for found in lists]) for name in ("scores", "labels", "valid")
    )
    return boxes[valid], scores[valid], labels[valid], valid.nonzero()[:, 0]


@pytest.mark.parametrize("agnostic", [False, True])
def test_nms_of_tiles_is_nms_of_all_their_boxes(form, agnostic):
    lists, corners = tiles(0, 4, 30)
    boxes, scores, labels, places = end_to_end(lists, corners)
    keep = nms(boxes[None], scores[None], 0.3, None if agnostic else labels[None])[0]
    order = scores[keep].argsort(descending=True, stable=True)
    found = merge(lists, corners, threshold=0.3, class_agnostic=agnostic)
    count = int(keep.sum())
    assert 0 < count < len(boxes)
    assert found.valid.tolist() == [[True] * count + [False] * (120 - count)]
    assert_same(found.boxes[0, :count], boxes[keep][order])
    assert_same(found.scores[0, :count], scores[keep][order])
    assert_same(found.labels[0, :count], labels[keep][order])
    assert_same(found.queries[0, :count], places[keep][order])


@pytest.mark.parametrize("metric", ["iou", "ios"])
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_is_that_of_the_written_rule(form, metric, agnostic, dtype):
    merged = 0
    for seed in range(24 if form == "native" else 6):
        lists, corners = tiles(seed, 4, 30 if form == "native" else 9)
        lists = [found._replace(boxes=found.boxes.to(dtype)) for found in lists]
        boxes, scores, labels, places = end_to_end(lists, corners)
        threshold = (0.1, 0.3, 0.5, 0.7)[seed % 4]
        found = merge(lists, corners, "nmm", threshold, metric=metric, class_agnostic=agnostic)
        arrays = boxes.numpy(), scores.numpy(), None if agnostic else labels.numpy()
        expected = greedy_merging(*arrays, threshold, metric)
        count = len(expected)
        assert int(found.valid.sum()) == count
        assert_same(found.boxes[0, :count].double(), torch.from_numpy(np.stack([box for box, *_ in expected])))
        assert_same(found.scores[0, :count], torch.tensor([score for _, score, _ in expected]))
        assert_same(found.queries[0, :count], places[[index for *_, index in expected]])
        merged += len(boxes) - count
    assert merged > 20


@pytest.mark.peers
@pytest.mark.parametrize("metric", ["iou", "ios"])
@pytest.mark.parametrize("agnostic", [False, True])
def test_merging_is_that_of_sahi(form, metric, agnostic):
    pytest.importorskip("sahi", reason="installed for the tests of tiles alone")
    from sahi.postprocess.combine import GreedyNMMPostprocess
    from sahi.prediction import ObjectPrediction

    lists, corners = tiles(3, 4, 25, extent=60.0)
    lists = [found._replace(boxes=found.boxes + 40) for found in lists]
    boxes, scores, labels, _ = end_to_end(lists, corners)
    rows = zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
    given = [
        ObjectPrediction(bbox=b, category_id=n, score=s, category_name="", full_shape=[999, 999]) for b, s, n in rows
    ]
    original = GreedyNMMPostprocess(0.4, metric.upper(), agnostic)
    expected = sorted(original(given), key=lambda row: -row.score.value)
    found = merge(lists, corners, "nmm", 0.4, metric=metric, class_agnostic=agnostic)
    count = len(expected)
    assert int(found.valid.sum()) == count < len(boxes)
    expected_boxes = torch.tensor([row.bbox.to_xyxy() for row in expected], dtype=torch.float64)
    assert_same(found.boxes[0, :count].double(), expected_boxes)
    assert_same(found.labels[0, :count], torch.tensor([row.category.id for row in expected]))


def test_an_object_that_tiles_cut_in_two_is_made_whole_and_scored_once(form):
    one = {
        "boxes": torch.tensor([[60.0, 10.0, 100.0, 30.0]]),
        "scores": torch.tensor([0.6]),
        "labels": torch.tensor([2]),
    }
    other = {
        "boxes": torch.tensor([[0.0, 10.0, 50.0, 30.0]]),
        "scores": torch.tensor([0.8]),
        "labels": torch.tensor([2]),
    }
    found = merge([one, other], [(0, 0), (80, 0)], "nmm", 0.4, metric="ios")
    assert_same(found["boxes"], torch.tensor([[60.0, 10.0, 130.0, 30.0]]))
    assert_same(found["scores"], torch.tensor([0.8]))
    assert found["queries"].tolist() == [1]


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_fusing_detections_is_fusing_their_boxes(form, confidence):
    lists, _ = tiles(5, 3, 12)
    lists = [found._replace(boxes=found.boxes / 512 + 0.2) for found in lists]
    given = [[getattr(found, name)[0][found.valid[0]] for found in lists] for name in ("boxes", "scores", "labels")]
    weights = [1.0, 2.0, 0.5]
    expected = weighted_boxes(*given, weights, 0.4, confidence=confidence)
    found = merge(lists, None, "wbf", 0.4, weights=weights, confidence=confidence).to_list()[0]
    assert len(expected[0]) < sum(map(len, given[0]))
    for name, values in zip(("boxes", "scores", "labels"), expected, strict=True):
        assert_same(found[name], values)


def test_a_tile_that_saw_an_object_alone_keeps_its_score(form):
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    one = {"boxes": torch.tensor([[1.0, 1.0, 9.0, 9.0]]), "scores": torch.tensor([0.7]), "labels": torch.tensor([1])}
    assert_same(merge([nothing, one, nothing], None, "wbf")["scores"], torch.tensor([0.7]))
    assert_same(merge([nothing, one, nothing], None, "wbf", confidence="avg")["scores"], torch.tensor([0.7 / 3]))


@pytest.mark.parametrize("method", METHODS)
def test_rows_lists_and_dicts_are_merged_alike(form, method):
    lists, corners = tiles(7, 3, 10)
    expected = merge(lists, corners, method, 0.3)
    rows = Detections(*(torch.cat(values) for values in zip(*lists, strict=True)))
    assert_same(merge(rows, torch.tensor(corners), method, 0.3), expected)
    as_dicts = merge([found.to_list()[0] for found in lists], corners, method, 0.3)
    found = expected.to_list()[0]
    for name in ("scores", "labels", "boxes"):
        assert_same(as_dicts[name], found[name])
    sources = torch.cat([image.to_list()[0]["scores"] for image in lists])
    if method != "wbf":
        assert_same(sources[as_dicts["queries"]], as_dicts["scores"])


@pytest.mark.parametrize("method", METHODS)
def test_images_do_not_see_each_other(form, method):
    lists, corners = tiles(9, 3, 8, batch=4)
    together = merge(lists, corners, method, 0.3)
    for image in range(4):
        alone = merge([Detections(*(v[image : image + 1] for v in found)) for found in lists], corners, method, 0.3)
        assert_same(Detections(*(values[image : image + 1] for values in together)), alone)


@pytest.mark.parametrize("method", METHODS)
def test_boxes_that_are_no_numbers_stay_alone(form, method):
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [NAN, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0], [0.0, 0.0, NAN, 9.0]])
    given = {"boxes": boxes, "scores": torch.tensor([0.5, 0.9, 0.4, 0.3]), "labels": torch.zeros(4, dtype=torch.int64)}
    found = merge([given], None, method, 0.5)
    assert found["queries"].tolist() == [1, 0, 3]
    assert found["boxes"][1].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_merges_to_nothing(form, method):
    lists, _ = tiles(0, 2, 0)
    found = merge(lists, None, method)
    assert found.boxes.shape == (1, 0, 4)
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    assert merge([empty], None, method)["boxes"].shape == (0, 4)
    lists, corners = tiles(0, 2, 6)
    none = [found._replace(valid=torch.zeros_like(found.valid)) for found in lists]
    found = merge(none, corners, method)
    assert not found.valid.any()
    assert (found.queries == -1).all()
    assert (found.boxes == 0).all()


class Merge(nn.Module):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, first, second):
        return merge([first, second], [(0.0, 0.0), (30.0, 0.0)], self.method, 0.3)


@pytest.mark.parametrize("method", METHODS)
def test_compiles_in_one_graph_and_exports(form, method):
    torch._dynamo.reset()
    (first, second), _ = tiles(11, 2, 4, batch=2)
    module = Merge(method)
    expected = module(first, second)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(first, second)
    assert_same(compiled, expected)
    program = torch.export.export(module, (first, second))
    assert "native" not in str(program.graph)
    assert_same(Detections(*program.module()(first, second)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_is_captured_in_a_cuda_graph(method):
    (first, second), _ = tiles(11, 2, 4, batch=2)
    module, given = Merge(method), [Detections(*(v.cuda() for v in found)) for found in (first, second)]
    for _ in range(2):
        module(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = module(*given)
    graph.replay()
    assert_same(Detections(*(v.cpu() for v in found)), module(first, second))


@pytest.mark.parametrize("method", METHODS)
def test_is_pure(purity, method):
    (first, second), _ = tiles(13, 2, 3)
    purity(Merge(method), first, second)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.tuples(*[st.sampled_from([0.0, -0.0, 1.0, 2.0, 3.0, 7.0, 1e-30, 1e19, 3e38, NAN, INF])] * 4),
                  st.integers(0, 6), st.integers(0, 1), st.integers(0, 2)),
        min_size=1, max_size=12,
    ),
    st.sampled_from(METHODS),
    st.sampled_from([0.2, 0.5, 1.0]),
)  # fmt: skip
def test_every_form_merges_any_boxes_alike(rows, method, threshold):
    lists = []
    for number in range(3):
        mine = [row for row in rows if row[3] == number]
        boxes = torch.tensor([row[0] for row in mine]).reshape(-1, 4)
        scores = torch.tensor([row[1] / 6 for row in mine])
        lists.append({"boxes": boxes, "scores": scores, "labels": torch.tensor([row[2] for row in mine]).long()})
    found = merge(lists, None, method, threshold)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETPOST_KERNEL", "aten")
        assert_same(found, merge(lists, None, method, threshold))


# --- errors ---

BOX, SCORE, LABEL = torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "kind", "pattern"),
    [
        ((BOX, [SCORE], [LABEL]), TypeError, r"boxes must be a list .* got Tensor: wrap it in \[\]"),
        (([], [], []), ValueError, "as many models; got 0, 0 and 0"),
        (([BOX], [SCORE, SCORE], [LABEL]), ValueError, "got 1, 2 and 1"),
        (([BOX.long()], [SCORE], [LABEL]), TypeError, "model 0: boxes must be a floating tensor"),
        (([BOX], [SCORE], [SCORE]), TypeError, r"model 0: labels must be an integer tensor .*\.long\(\)"),
        (
            ([BOX, BOX[:, :3]], [SCORE] * 2, [LABEL] * 2),
            ValueError,
            r"model 1: boxes must have shape \(D, 4\); got \(2, 3\)",
        ),
        (([BOX], [SCORE[:1]], [LABEL]), ValueError, r"scores must have shape \(D,\) = \(2,\); got \(1,\)"),
        (([BOX], [SCORE], [LABEL], [1, 2]), ValueError, "one number for each of 1 models; got 2"),
        (([BOX], [SCORE], [LABEL], [0]), ValueError, "at least 0, one of them above"),
        (([BOX], [SCORE], [LABEL], None, 1.5), ValueError, r"iou_threshold must be in \[0, 1\]; got 1.5"),
        (([BOX], [SCORE], [LABEL], None, 0.5, "0"), TypeError, "skip_threshold must be a number"),
        (([BOX], [SCORE], [LABEL], None, 0.5, NAN), ValueError, "skip_threshold must be a number; got nan"),
        (([BOX, BOX * NAN], [SCORE] * 2, [LABEL] * 2), ValueError, "from model 1, row 0: leave such rows out"),
        (([BOX], [SCORE + INF], [LABEL]), ValueError, "scores must be finite; got .* inf from model 0, row 0"),
    ],
)
def test_what_is_wrong_with_lists_is_said_in_one_line(arguments, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        weighted_boxes(*arguments)
    one_line(error)


ONE = {"boxes": BOX, "scores": SCORE, "labels": LABEL}


@pytest.mark.parametrize(
    ("arguments", "kind", "pattern"),
    [
        ((ONE,), TypeError, "sequence of Detections or of dicts .* got dict: put what is alone into a list"),
        ((Detections(*(value[:0] for value in tiles(0, 1, 2)[0][0])),), ValueError, "at least one list"),
        (([],), ValueError, "at least one list of detections; got none"),
        (([BOX],), TypeError, "got Tensor"),
        (([{"boxes": BOX}],), TypeError, "got boxes"),
        (([ONE], [(0, 0), (1, 1)]), ValueError, r"offsets must have shape \(T, 2\) = \(1, 2\).* got \(2, 2\)"),
        (([ONE], [(0, 0, 5)]), ValueError, r"offsets must have shape \(T, 2\)"),
        (([ONE], None, "soft"), ValueError, "method must be one of nms, nmm, wbf; got 'soft'"),
        (([ONE], None, "nms", 2), ValueError, r"threshold must be in \[0, 1\]; got 2"),
        (([ONE], None, "nmm", 0), ValueError, "above 0 with method='nmm'"),
        ((tiles(0, 1, 2)[0] + tiles(0, 1, 2, batch=2)[0],), ValueError, "batches of 1, 2"),
    ],
)
def test_what_is_wrong_with_detections_is_said_in_one_line(arguments, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        merge(*arguments)
    one_line(error)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"metric": "giou"}, "metric must be one of iou, ios"),
        ({"method": "wbf", "metric": "ios"}, "metric must be iou with method='wbf'"),
        ({"weights": [1.0]}, "weights go with method='wbf' alone"),
        ({"method": "wbf", "confidence": "mean"}, "confidence must be one of avg, max"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, pattern):
    with pytest.raises(ValueError, match=pattern) as error:
        merge([ONE], **options)
    one_line(error)


def test_is_a_public_name():
    assert detpost.fusion.merge is merge
    assert "fusion" in detpost.__all__
    assert "detpost.fusion" in sys.modules
