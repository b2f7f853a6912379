from __future__ import annotations

import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from detpost import DecodeSpec, DetectionPostProcessor, Detections, presets
from tests.mixin import DTYPES, OperatorTests, assert_same, one_line

NAN, INF = math.nan, math.inf
SPECS = [
    {"activation": activation, "selection": selection, "background": background}
    for activation, selection, background in itertools.product(
        ("sigmoid", "softmax"), ("flat", "per_query"), ("none", "first", "last")
    )
]
# Every value of every field, for what takes seconds to compile.
UNLIKE = [SPECS[0], SPECS[5], SPECS[7], SPECS[11]]


def name_of(fields):
    return "-".join(str(value) for value in fields.values())


def decode(logits, boxes=None, image_sizes=None, **fields):
    """Decode logits; where no boxes come, box q is (q + 1, q + 1, 2, 2) / 100 so that a box tells its query."""
    logits = torch.as_tensor(logits)
    if boxes is None:
        place = (torch.arange(logits.shape[1], device=logits.device, dtype=torch.float32) + 1) / 100
        size = torch.full_like(place, 0.02)
        boxes = torch.stack((place, place, size, size), -1).expand(logits.shape[0], -1, 4)
    return DetectionPostProcessor(DecodeSpec(**fields))(logits, boxes, image_sizes)


def reference_decode(logits, boxes, image_sizes, spec):
    """The contract in NumPy and plain Python, in float64: (score, label, query, box) for each kept and valid slot."""
    images = []
    for image, rows in enumerate(logits.double().numpy()):
        classes = rows.shape[1]
        background = {"none": None, "first": 0, "last": classes - 1}[spec.background]
        candidates = []
        for query, row in enumerate(rows):
            if spec.activation == "softmax":
                exponents = np.exp(row - row.max())
                keys = np.log(exponents / exponents.sum()).astype(np.float32).astype(np.float64)
                scores = exponents / exponents.sum()
            else:
                keys, scores = row, 1 / (1 + np.exp(-row))
            found = [(-keys[c], query * classes + c, scores[c]) for c in range(classes) if c != background]
            candidates += found if spec.selection == "flat" else sorted(found)[:1]
        kept = []
        for _, flat, score in sorted(candidates)[: spec.top_k]:
            if spec.score_threshold is not None and not score > spec.score_threshold:
                continue
            a, b, c, d = boxes[image, flat // classes].double().tolist()
            box = {"cxcywh": (a - c / 2, b - d / 2, a + c / 2, b + d / 2), "xyxy": (a, b, c, d),
                   "xywh": (a, b, a + c, b + d)}[spec.box_format]  # fmt: skip
            height, width = (1.0, 1.0) if image_sizes is None else image_sizes[image].tolist()
            box = [value * extent for value, extent in zip(box, (width, height, width, height), strict=True)]
            if spec.clip:
                box = [min(max(v, 0.0), extent) for v, extent in zip(box, (width, height, width, height), strict=True)]
            kept.append((score, flat % classes, flat // classes, box))
        images.append(kept)
    return images


def hold_to_reference(detections, expected):
    for image, rows in enumerate(expected):
        valid = detections.valid[image]
        assert valid.tolist() == [True] * len(rows) + [False] * (len(valid) - len(rows))
        assert detections.labels[image, valid].tolist() == [label for _, label, _, _ in rows]
        assert detections.queries[image, valid].tolist() == [query for _, _, query, _ in rows]
        if rows:
            scores = torch.tensor([score for score, *_ in rows]).to(detections.scores.dtype)
            torch.testing.assert_close(detections.scores[image, valid], scores, rtol=2e-6, atol=1e-7)
            boxes = torch.tensor([box for *_, box in rows]).to(detections.boxes.dtype)
            torch.testing.assert_close(detections.boxes[image, valid], boxes, rtol=1e-5, atol=1e-4)


# --- the questions asked of every operator ---


def sample(dtype, batch=2, queries=6, classes=5):
    """Logits and boxes without ties or near ties."""
    logits = torch.randperm(batch * queries * classes).reshape(batch, queries, classes) / 8 - 3
    return logits.to(dtype), (0.2 + 0.5 * torch.rand(batch, queries, 4, dtype=torch.float64)).to(dtype)


class PostProcessorTests(OperatorTests):
    def output_dtype(self, dtype):
        return torch.promote_types(dtype, torch.float32)

    def arguments(self, dtype):
        return (*sample(dtype), torch.tensor([[30.0, 50.0], [70.0, 20.0]], dtype=dtype))

    def features(self):
        return []  # below, by name

    def exceptions(self):
        logits, boxes, sizes = torch.zeros(2, 3, 5), torch.zeros(2, 3, 4), torch.ones(2, 2)
        return [
            ((logits[0], boxes, sizes), ValueError, r"logits must have shape \(B, Q, C\); got \(3, 5\)"),
            ((logits[None], boxes, sizes), ValueError, r"logits must have shape \(B, Q, C\); got \(1, 2, 3, 5\)"),
            ((logits, boxes[0], sizes), ValueError, r"boxes must have shape \(B, Q, 4\); got \(3, 4\)"),
            ((logits, boxes[..., :3], sizes), ValueError, r"boxes must have shape \(B, Q, 4\); got \(2, 3, 3\)"),
            ((logits, torch.zeros(2, 3, 5), sizes), ValueError, r"boxes must have shape \(B, Q, 4\); got \(2, 3, 5\)"),
            ((logits[:1], boxes, sizes), ValueError, r"agree in images and queries; got .*\(1, 3\) and \(2, 3\)"),
            ((logits[:, :2], boxes, sizes), ValueError, r"agree in images and queries; got .*\(2, 2\) and \(2, 3\)"),
            ((logits[..., :0], boxes, sizes), ValueError, r"at least one class; got shape \(2, 3, 0\)"),
            ((logits.long(), boxes, sizes), TypeError, r"logits must be floating; got torch.int64: convert with"),
            ((logits.bool(), boxes, sizes), TypeError, "logits must be floating; got torch.bool"),
            ((logits, boxes.int(), sizes), TypeError, "boxes must be floating; got torch.int32"),
            ((logits.tolist(), boxes, sizes), TypeError, "logits must be a floating tensor.*list"),
            ((logits, None, sizes), TypeError, "boxes must be a floating tensor.*NoneType"),
            ((logits.to("meta"), boxes, sizes), ValueError, "logits are on meta and boxes on cpu"),
            ((logits, boxes.to("meta"), sizes), ValueError, "logits are on cpu and boxes on meta"),
            ((logits, boxes, sizes.to("meta")), ValueError, "image_sizes are on meta and logits on cpu"),
            ((logits, boxes, sizes[0]), ValueError, r"image_sizes must have shape \(B, 2\) = \(2, 2\).*got \(2,\)"),
            ((logits, boxes, torch.ones(2, 4)), ValueError, r"image_sizes.*got \(2, 4\)"),
            ((logits, boxes, torch.ones(1, 2)), ValueError, r"image_sizes.*got \(1, 2\)"),
            ((logits, boxes, torch.ones(3, 2)), ValueError, r"image_sizes.*got \(3, 2\)"),
            ((logits, boxes, torch.ones(2, 3, 2)), ValueError, r"image_sizes.*got \(2, 3, 2\)"),
            ((logits, boxes, sizes.bool()), TypeError, "image_sizes must be integer or floating; got torch.bool"),
            ((logits, boxes, sizes.cfloat()), TypeError, "image_sizes must be integer or floating; got torch.complex"),
            ((logits, boxes, [(3, 4), (5, 6)]), TypeError, "image_sizes must be a tensor.*list: use torch.tensor"),
            ((logits, boxes, (3, 4)), TypeError, "image_sizes must be a tensor.*tuple"),
        ]  # fmt: skip


def kept(shape, top_k, per_query):
    batch, queries, classes = shape
    return batch, min(top_k, queries if per_query else queries * classes)


SHAPES = [(0, 6, 5), (2, 0, 5), (1, 1, 1), (2, 6, 1), (3, 2, 7), (2, 40, 3), (0, 0, 1)]


class TestSigmoidFlat(PostProcessorTests):
    operator = DetectionPostProcessor(DecodeSpec(top_k=7, clip=True))

    def cardinalities(self):
        return [((torch.randn(s), torch.rand(*s[:2], 4), torch.ones(s[0], 2)), kept(s, 7, False)) for s in SHAPES]


class TestSoftmaxPerQuery(PostProcessorTests):
    operator = DetectionPostProcessor(DecodeSpec.preset("detr", top_k=4, score_threshold=0.01))

    def cardinalities(self):
        return [((torch.randn(s), torch.rand(*s[:2], 4), torch.ones(s[0], 2)), kept(s, 4, True)) for s in SHAPES]


class TestSoftmaxFlat(PostProcessorTests):
    operator = DetectionPostProcessor(DecodeSpec(activation="softmax", background="first", box_format="xywh", top_k=9))

    def cardinalities(self):
        return [((torch.randn(s), torch.rand(*s[:2], 4)), kept(s, 9, False)) for s in SHAPES]


class TestSigmoidPerQuery(PostProcessorTests):
    operator = DetectionPostProcessor(DecodeSpec(selection="per_query", background="last", box_format="xyxy"))

    def cardinalities(self):
        return [((torch.randn(s), torch.rand(*s[:2], 4)), kept(s, 300, True)) for s in SHAPES]


# --- values ---


@pytest.mark.parametrize("fields", SPECS, ids=name_of)
@pytest.mark.parametrize("box_format", ["cxcywh", "xyxy", "xywh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_spec_gives_what_the_contract_says(fields, box_format, dtype):
    for (batch, queries, classes), top_k, threshold, clip, sizes in [
        ((3, 17, 6), 300, None, False, None),
        ((2, 17, 6), 10, 0.2, True, torch.tensor([[480, 640], [33, 21]])),
        ((1, 100, 4), 30, 0.5, False, torch.tensor([[100.5, 50.25]])),
        ((2, 9, 1), 5, None, True, None),
    ]:
        spec = DecodeSpec(**fields, box_format=box_format, top_k=top_k, score_threshold=threshold, clip=clip)
        logits = torch.randn(batch, queries, classes).mul(4).round().div(4).to(dtype)  # plenty of ties
        boxes = torch.rand(batch, queries, 4).to(dtype) * 1.2
        detections = DetectionPostProcessor(spec)(logits, boxes, sizes)
        assert detections.scores.shape == kept(logits.shape, top_k, spec.selection == "per_query")
        hold_to_reference(detections, reference_decode(logits, boxes, sizes, spec))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_dtypes(dtype):
    logits, boxes = sample(dtype)
    detections = decode(logits, boxes, torch.ones(2, 2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [value.dtype for value in detections] == [wide, torch.int64, wide, torch.int64, torch.bool]
    assert isinstance(detections, Detections)


def test_half_logits_are_scored_in_float32():
    scores = decode(torch.tensor([[[1.0], [2.0]]], dtype=torch.bfloat16)).scores
    torch.testing.assert_close(scores, torch.tensor([[2.0, 1.0]]).sigmoid(), rtol=1e-6, atol=0)


def test_half_boxes_are_decoded_in_float32():
    boxes = torch.tensor([[[0.5, 0.5, 0.001, 0.001]]], dtype=torch.float16)
    decoded = decode(torch.zeros(1, 1, 1), boxes, torch.tensor([[1000, 4000]])).boxes
    half = boxes.double()[0, 0, 2].item() / 2
    expected = torch.tensor([[[4000 * (0.5 - half), 1000 * (0.5 - half), 4000 * (0.5 + half), 1000 * (0.5 + half)]]])
    torch.testing.assert_close(decoded, expected.float(), rtol=1e-6, atol=0)


def test_sizes_are_height_then_width():
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0]]])
    decoded = decode(torch.zeros(1, 1, 1), boxes, torch.tensor([[100, 200]])).boxes
    assert decoded.tolist() == [[[0.0, 0.0, 200.0, 100.0]]]


def test_each_image_has_its_own_size():
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]).expand(3, 1, 4)
    sizes = [[10, 20], [300, 400], [7, 5]]
    for dtype in (torch.int32, torch.int64, torch.uint8, torch.float16, torch.float32, torch.float64):
        if dtype == torch.uint8:
            sizes = [[10, 20], [200, 100], [7, 5]]
        decoded = decode(torch.zeros(3, 1, 1), boxes, torch.tensor(sizes, dtype=dtype)).boxes
        assert decoded[:, 0, 2:].flip(-1).tolist() == sizes


def test_large_sizes_are_exact():
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0]]], dtype=torch.bfloat16)
    decoded = decode(torch.zeros(1, 1, 1), boxes, torch.tensor([[70001, 65537]])).boxes
    assert decoded.tolist() == [[[0.0, 0.0, 65537.0, 70001.0]]]


def test_clip_holds_boxes_within_the_image():
    boxes = torch.tensor([[[0.5, 0.5, 3.0, 2.0]]])
    logits = torch.zeros(1, 1, 1)
    assert decode(logits, boxes, clip=True).boxes.tolist() == [[[0.0, 0.0, 1.0, 1.0]]]
    assert decode(logits, boxes, torch.tensor([[10, 20]]), clip=True).boxes.tolist() == [[[0.0, 0.0, 20.0, 10.0]]]
    assert decode(logits, boxes).boxes.tolist() == [[[-1.0, -0.5, 2.0, 1.5]]]
    assert decode(logits, boxes, torch.tensor([[10, 20]])).boxes.tolist() == [[[-20.0, -5.0, 40.0, 15.0]]]


# --- order ---


def test_ties_go_by_flat_index():
    detections = decode(torch.zeros(1, 3, 2))
    assert detections.queries.tolist() == [[0, 0, 1, 1, 2, 2]]
    assert detections.labels.tolist() == [[0, 1, 0, 1, 0, 1]]


def test_ties_of_queries_go_by_query_and_of_classes_by_class():
    logits = torch.tensor([[[1.0, 2.0, 2.0], [2.0, 0.0, 2.0], [3.0, 3.0, 3.0], [0.0, 2.0, 1.0]]])
    detections = decode(logits, selection="per_query")
    assert detections.queries.tolist() == [[2, 0, 1, 3]]
    assert detections.labels.tolist() == [[0, 1, 0, 1]]


def test_logits_whose_sigmoids_are_one_float_keep_their_order():
    for logits in ([[[40.0], [41.0], [30.0]]], [[[-200.0], [-199.0], [-300.0]]]):
        for selection in ("flat", "per_query"):
            detections = decode(logits, selection=selection)
            assert detections.queries.tolist() == [[1, 0, 2]]
            assert detections.scores.unique().numel() == 1


def test_classes_far_below_the_background_keep_the_order_of_their_logits():
    just_over_one = 1.0000001
    logits = torch.tensor([[[1.0, just_over_one, 1000.0], [just_over_one, 1.0, 1000.0]]])
    detections = decode(logits, activation="softmax", selection="per_query", background="last")
    assert detections.labels.tolist() == [[1, 0]]


def test_negative_zero_is_zero():
    logits = [[[-0.0], [0.0], [-0.0], [1.0]]]
    assert decode(logits).queries.tolist() == [[3, 0, 1, 2]]


@pytest.mark.parametrize("fields", SPECS, ids=name_of)
def test_scores_never_rise_down_the_list(fields):
    for queries in (1, 7, 16, 61, 300):
        close = torch.randn(8, 1, 1) * 4 + torch.randn(8, queries, 4) * 1e-6
        scores = decode(close, torch.rand(8, queries, 4), **fields).scores
        assert (scores[:, 1:] <= scores[:, :-1]).all()


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_equal_logits_have_equal_scores_in_every_slot(activation):
    # A float32 sigmoid rounds the tail of its vector loop otherwise than the body: with 300 slots the last 12 could
    # stand above the ones before, and on the other side of a threshold.
    for value in torch.linspace(-8, 8, 101).tolist():
        logits = torch.tensor([value, 0.0]).expand(1, 45, 2)
        scores = decode(logits, activation=activation, background="last", selection="per_query").scores
        assert (scores == scores[0, 0]).all()


def test_top_k_keeps_the_best():
    detections = decode([[[1.0, 5.0], [4.0, 2.0], [3.0, 6.0]]], top_k=3)
    assert detections.queries.tolist() == [[2, 0, 1]]
    assert detections.labels.tolist() == [[1, 1, 0]]


def test_flat_keeps_a_query_for_several_classes_and_per_query_does_not():
    logits = [[[5.0, 4.0], [3.0, 2.0]]]
    assert decode(logits, top_k=2).queries.tolist() == [[0, 0]]
    assert decode(logits, top_k=2, selection="per_query").queries.tolist() == [[0, 1]]


# --- NaN, infinities, thresholds, fillers ---

FILLER = (0.0, -1, [0.0] * 4, -1, False)


def slot(detections, image, index):
    return tuple(values[image, index].tolist() for values in detections)


@pytest.mark.parametrize("fields", SPECS, ids=name_of)
def test_nan_is_never_ahead_of_a_number_and_never_valid(fields):
    logits = torch.randn(2, 6, 4)
    logits[0, 1] = NAN
    logits[0, 4, :] = NAN
    logits[1] = NAN
    detections = decode(logits, image_sizes=torch.tensor([[10, 20], [30, 40]]), **fields)
    assert not any(value.isnan().any() for value in detections)
    numbers = 4 * (1 if fields["selection"] == "per_query" else 4 - (fields["background"] != "none"))
    slots = detections.valid.shape[1]
    assert detections.valid.tolist() == [[True] * numbers + [False] * (slots - numbers), [False] * slots]
    assert set(detections.queries[0, :numbers].tolist()) == {0, 2, 3, 5}
    for image, first in ((0, numbers), (1, 0)):
        for index in range(first, slots):
            assert slot(detections, image, index) == FILLER


def test_one_nan_class_of_a_sigmoid_query_does_not_touch_the_others():
    logits = torch.tensor([[[NAN, 1.0], [-INF, NAN]]])
    flat = decode(logits)
    assert flat.valid.tolist() == [[True, True, False, False]]
    assert flat.queries.tolist() == [[0, 1, -1, -1]]
    assert flat.labels.tolist() == [[1, 0, -1, -1]]
    per_query = decode(logits, selection="per_query")
    assert per_query.labels.tolist() == [[1, 0]]
    assert per_query.valid.all()
    assert per_query.scores[0, 1] == 0


@pytest.mark.parametrize("selection", ["flat", "per_query"])
def test_one_nan_class_leaves_a_softmax_query_without_probabilities(selection):
    # -inf beside a NaN is no number either: it must not stand before the numbers of other queries.
    logits = torch.tensor([[[NAN, -INF, 1.0], [-INF, 0.0, -INF]]])
    detections = decode(logits, activation="softmax", selection=selection)
    numbers = {"flat": 3, "per_query": 1}[selection]
    assert detections.valid.sum() == numbers
    assert detections.valid[0, :numbers].all()
    assert detections.queries[0, :numbers].tolist() == [1] * numbers
    assert detections.labels[0, 0] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_score_one_and_zero(dtype):
    logits = torch.tensor([[[-INF], [INF], [0.0], [-INF]]], dtype=dtype)
    detections = decode(logits)
    assert detections.scores.tolist() == [[1.0, 0.5, 0.0, 0.0]]
    assert detections.queries.tolist() == [[1, 2, 0, 3]]
    assert detections.valid.all()


def test_softmax_of_infinities_is_its_limit():
    logits = torch.tensor([[[INF, INF, 0.0], [0.0, INF, -INF], [-INF, 0.0, -INF], [-INF, -INF, -INF]]])
    detections = decode(logits, activation="softmax", selection="per_query")
    assert detections.queries.tolist() == [[1, 2, 0, 3]]
    assert detections.labels.tolist() == [[1, 1, 0, 0]]
    torch.testing.assert_close(detections.scores, torch.tensor([[1.0, 1.0, 0.5, 0.0]]))


def test_large_logits_do_not_overflow_the_softmax():
    logits = torch.tensor([[[60000.0, 59999.0], [-60000.0, -59999.0]]], dtype=torch.float32)
    scores = decode(logits, activation="softmax", selection="per_query").scores
    torch.testing.assert_close(scores, torch.tensor([[1.0, 1.0]]).sigmoid())


def test_the_threshold_is_strict_and_changes_no_shape():
    logits = torch.tensor([[[0.0], [1.0], [-1.0], [1e-6]]])
    at_half = decode(logits, score_threshold=0.5)
    assert at_half.scores.shape == (1, 4)
    assert at_half.valid.tolist() == [[True, True, False, False]]
    assert at_half.queries.tolist() == [[1, 3, -1, -1]]
    assert slot(at_half, 0, 2) == slot(at_half, 0, 3) == FILLER
    assert decode(logits, score_threshold=0.0).valid.all()
    assert not decode(logits, score_threshold=1.0).valid.any()


def test_a_score_of_zero_is_kept_without_a_threshold_and_dropped_at_zero():
    logits = torch.tensor([[[-INF], [INF]]])
    assert decode(logits).valid.tolist() == [[True, True]]
    assert decode(logits, score_threshold=0.0).valid.tolist() == [[True, False]]
    assert decode(logits, score_threshold=1.0).valid.tolist() == [[False, False]]


def test_the_threshold_only_hides_what_is_there_without_it():
    logits, boxes, sizes = torch.randn(3, 30, 5), torch.rand(3, 30, 4), torch.tensor([[9, 8], [7, 6], [5, 4]])
    plain = decode(logits, boxes, sizes)
    for threshold in (0.1, 0.5, 0.9):
        held = decode(logits, boxes, sizes, score_threshold=threshold)
        assert_same(held.valid, plain.scores > threshold)
        for some, every in zip(held.to_list(), plain.to_list(), strict=True):
            count = len(some["scores"])
            assert_same(some, {name: values[:count] for name, values in every.items()})


# --- background ---


@pytest.mark.parametrize(("background", "channel"), [("first", 0), ("last", 3)])
@pytest.mark.parametrize("selection", ["flat", "per_query"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_background_is_never_reported_and_labels_stay_channels(background, channel, selection, activation):
    logits = torch.randn(2, 5, 4)
    logits[..., channel] = 20.0
    detections = decode(logits, background=background, selection=selection, activation=activation)
    valid = detections.valid
    assert valid.sum(1).tolist() == [15, 15] if selection == "flat" else [5, 5]
    assert channel not in detections.labels[valid].tolist()
    image = torch.arange(2).unsqueeze(1).expand_as(valid)
    chosen = logits[image[valid], detections.queries[valid]]
    expected = (chosen.softmax(-1) if activation == "softmax" else chosen.sigmoid()).gather(
        1, detections.labels[valid].unsqueeze(1)
    )
    torch.testing.assert_close(detections.scores[valid], expected.squeeze(1))


@pytest.mark.parametrize("background", ["first", "last"])
@pytest.mark.parametrize("selection", ["flat", "per_query"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_with_the_background_as_only_class_nothing_is_valid(background, selection, activation):
    detections = decode(torch.randn(2, 3, 1), background=background, selection=selection, activation=activation)
    assert all(slot(detections, i, j) == FILLER for i in range(2) for j in range(3))


# --- memory, devices, graphs ---


@pytest.mark.parametrize("fields", SPECS, ids=name_of)
def test_any_strides_give_the_same_detections(fields):
    logits, boxes = torch.randn(3, 7, 4), torch.rand(3, 7, 4)
    sizes = torch.tensor([[9, 8], [7, 6], [5, 4]])
    expected = decode(logits, boxes, sizes, **fields)
    transposed = (logits.permute(2, 1, 0).contiguous().permute(2, 1, 0), boxes.mT.contiguous().mT)
    sliced = (torch.stack((logits, -logits), -1)[..., 0], torch.stack((boxes, -boxes), 1)[:, 0])
    for pair in (transposed, sliced):
        assert not pair[0].is_contiguous()
        assert_same(decode(*pair, torch.stack((sizes, sizes), -1)[..., 1], **fields), expected)


def test_images_do_not_touch_each_other():
    logits, boxes, sizes = torch.randn(4, 9, 5), torch.rand(4, 9, 4), torch.randint(1, 99, (4, 2))
    together = decode(logits, boxes, sizes)
    for i in range(4):
        alone = decode(logits[i : i + 1], boxes[i : i + 1], sizes[i : i + 1])
        assert_same(tuple(values[i : i + 1] for values in together), tuple(alone))


class NoHostRead(TorchDispatchMode):
    """Refuse every operation that would need a value on the host."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal", "item", "allclose")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN or name.startswith(("_unique", "nonzero_")):
            raise AssertionError(f"{name} reads on the host")
        if name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise AssertionError("indexing by a mask reads on the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fields", SPECS, ids=name_of)
def test_forward_reads_nothing_on_the_host(fields):
    for sizes in (None, torch.tensor([[9, 8], [7, 6]])):
        for top_k in (3, 300):
            with NoHostRead():
                decode(torch.randn(2, 40, 4), torch.rand(2, 40, 4), sizes, score_threshold=0.5, top_k=top_k, clip=True,
                       **fields)  # fmt: skip


def test_the_host_read_check_can_fail():
    values = torch.rand(3)
    for read in (
        lambda: float(values[0]),
        lambda: bool(values.any()),
        lambda: values[values > 0.5],
        lambda: values.nonzero(),
        lambda: values.unique(),
        lambda: torch.equal(values, values),
    ):
        with pytest.raises(AssertionError, match="on the host"), NoHostRead():
            read()


@pytest.mark.parametrize("fields", SPECS, ids=name_of)
def test_meta_tensors_need_no_values(fields):
    spec = DecodeSpec(**fields, top_k=10, score_threshold=0.5, clip=True)
    meta = DetectionPostProcessor(spec)(
        torch.empty(2, 7, 4, device="meta"), torch.empty(2, 7, 4, device="meta"), torch.empty(2, 2, device="meta")
    )
    real = DetectionPostProcessor(spec)(torch.randn(2, 7, 4), torch.rand(2, 7, 4), torch.ones(2, 2))
    for value, like in zip(meta, real, strict=True):
        assert value.is_meta
        assert (value.shape, value.dtype) == (like.shape, like.dtype)


@pytest.mark.parametrize("fields", UNLIKE, ids=name_of)
def test_compiles_whole_with_ties_and_nan(fields):
    torch._dynamo.reset()
    post = DetectionPostProcessor(DecodeSpec(**fields, top_k=30, score_threshold=0.2, clip=True))
    compiled = torch.compile(post, fullgraph=True, backend="aot_eager")
    logits = torch.randn(2, 90, 4).mul(4).round().div(4)
    logits = torch.where(torch.rand_like(logits) < 0.05, NAN, logits)
    arguments = logits, torch.rand(2, 90, 4), torch.tensor([[9, 8], [7, 6]])
    detections = compiled(*arguments)
    assert isinstance(detections, Detections)
    assert_same(detections, post(*arguments))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_inductor_chooses_the_same_detections():
    torch._dynamo.reset()
    post = DetectionPostProcessor(DecodeSpec(top_k=50, score_threshold=0.2))
    logits = torch.randn(2, 90, 10).mul(4).round().div(4)
    special = torch.tensor([NAN, -INF, INF, -0.0])[torch.randint(4, logits.shape)]
    logits = torch.where(torch.rand_like(logits) < 0.05, special, logits)
    arguments = logits, torch.rand(2, 90, 4), torch.tensor([[9, 8], [7, 6]])
    compiled, eager = torch.compile(post, fullgraph=True)(*arguments), post(*arguments)
    for name in ("labels", "queries", "valid"):
        assert_same(getattr(compiled, name), getattr(eager, name))
    torch.testing.assert_close(compiled.scores, eager.scores)
    torch.testing.assert_close(compiled.boxes, eager.boxes)


@pytest.mark.parametrize("fields", UNLIKE, ids=name_of)
def test_exports_with_a_dynamic_batch(fields):
    post = DetectionPostProcessor(DecodeSpec(**fields, top_k=10, score_threshold=0.3, clip=True))
    batch = {0: torch.export.Dim("batch")}
    example = torch.randn(2, 90, 4), torch.rand(2, 90, 4), torch.tensor([[9, 8], [7, 6]])
    program = torch.export.export(post, example, dynamic_shapes=(batch, batch, batch))
    other = torch.randn(3, 90, 4), torch.rand(3, 90, 4), torch.tensor([[9, 8], [7, 6], [5, 4]])
    detections = program.module()(*other)
    assert isinstance(detections, Detections)
    assert_same(detections, post(*other))


@pytest.mark.gpu
@pytest.mark.parametrize("fields", UNLIKE, ids=name_of)
def test_a_gpu_chooses_the_same_detections_without_waiting(fields):
    post = DetectionPostProcessor(DecodeSpec(**fields, top_k=50, score_threshold=0.2, clip=True))
    logits = torch.randn(4, 300, 20).mul(4).round().div(4)
    special = torch.tensor([NAN, -INF, INF, -0.0])[torch.randint(4, logits.shape)]
    logits = torch.where(torch.rand_like(logits) < 0.01, special, logits)
    arguments = logits, torch.rand(4, 300, 4), torch.randint(1, 99, (4, 2))
    there = [value.cuda() for value in arguments]
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = post(*there)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    expected = post(*arguments)
    for name in ("labels", "queries", "valid"):
        assert_same(getattr(found, name).cpu(), getattr(expected, name))
    torch.testing.assert_close(found.scores.cpu(), expected.scores)
    torch.testing.assert_close(found.boxes.cpu(), expected.boxes)


# --- gradients ---


@pytest.mark.parametrize("fields", SPECS, ids=name_of)
@pytest.mark.parametrize("threshold", [None, 0.15])
def test_gradcheck_of_scores_and_boxes(fields, threshold):
    logits, boxes = sample(torch.float64, queries=4, classes=3)
    post = DetectionPostProcessor(DecodeSpec(**fields, top_k=5, score_threshold=threshold))
    sizes = torch.tensor([[3, 5], [7, 2]])
    assert torch.autograd.gradcheck(
        lambda a, b: post(a, b, sizes)[::2][:2], (logits.requires_grad_(), boxes.requires_grad_())
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["rtdetr", "detr"])
def test_checkpointing_gives_the_same_gradients(name, use_reentrant):
    post = DetectionPostProcessor.from_preset(name, top_k=10)
    class_head, box_head = torch.nn.Linear(8, 5), torch.nn.Linear(8, 4)
    features = torch.randn(2, 20, 8, requires_grad=True)
    parameters = [features, *class_head.parameters(), *box_head.parameters()]

    def loss(x):
        detections = post(class_head(x), box_head(x).sigmoid(), torch.tensor([[9, 8], [7, 6]]))
        return (detections.scores * detections.boxes.sum(-1)).sum()

    plain = torch.autograd.grad(loss(features), parameters)
    total = checkpoint(loss, features, use_reentrant=use_reentrant)
    for parameter in parameters:
        parameter.grad = None
    total.backward()
    for parameter, expected in zip(parameters, plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected)
    assert any(gradient.abs().sum() > 0 for gradient in plain)


@pytest.mark.parametrize("fields", SPECS, ids=name_of)
def test_nan_and_infinite_logits_leave_every_gradient_finite(fields):
    logits = torch.randn(2, 6, 4)
    logits[0, 1, 2], logits[0, 2], logits[0, 3, 1], logits[1, 0, 0], logits[1, 1] = NAN, NAN, INF, -INF, -INF
    boxes = torch.rand(2, 6, 4)
    boxes[0, 2] = NAN
    leaves = logits.requires_grad_(), boxes.requires_grad_()
    detections = decode(*leaves, torch.tensor([[9, 8], [7, 6]]), **fields)
    detections.scores.sum().backward(retain_graph=True)
    detections.boxes.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert leaves[0].grad.abs().sum() > 0


def test_gradients_reach_only_what_was_kept():
    logits, boxes = (
        torch.tensor([[[3.0, 1.0], [2.0, 0.0]]], requires_grad=True),
        torch.rand(1, 2, 4, requires_grad=True),
    )
    detections = decode(logits, boxes, top_k=1)
    (detections.scores.sum() + detections.boxes.sum()).backward()
    assert logits.grad.ne(0).tolist() == [[[True, False], [False, False]]]
    assert boxes.grad[0, 1].eq(0).all()
    assert boxes.grad[0, 0, :2].ne(0).all()


def test_saved_inputs_may_be_used_again_after_the_decode():
    logits, boxes = torch.randn(1, 4, 3, requires_grad=True), torch.rand(1, 4, 4, requires_grad=True)
    inner = boxes * 2
    detections = decode(logits, inner, torch.tensor([[5, 6]]))
    (detections.boxes.sum() + inner.pow(2).sum()).backward()
    assert boxes.grad.isfinite().all()


KERNELS = ["native", "numpy", "aten"]


def tangents_of_tensors(post, arguments, tangents):
    """The tangents of scores and boxes, by dual tensors."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(arguments, tangents, strict=True)]
        found = post(*duals)
        return [forward_ad.unpack_dual(value).tangent for value in (found.scores, found.boxes)]


def tangents_of_functions(post, arguments, tangents):
    """The tangents of scores and boxes, by ``torch.func``."""
    return torch.func.jvp(lambda *values: post(*values)[::2][:2], arguments, tangents)[1]


def by_differences(post, arguments, tangents, step=1e-6):
    """The tangents of scores and boxes, in float64, which no kernel takes."""
    wide = [(value.double(), tangent.double()) for value, tangent in zip(arguments, tangents, strict=True)]
    ahead, behind = (post(*(value + side * step * tangent for value, tangent in wide)) for side in (1, -1))
    return [(a - b) / (2 * step) for a, b in ((ahead.scores, behind.scores), (ahead.boxes, behind.boxes))]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tangents_of", [tangents_of_tensors, tangents_of_functions])
@pytest.mark.parametrize("fields", SPECS, ids=name_of)
def test_forward_mode_gives_the_tangents_of_scores_and_boxes(monkeypatch, fields, tangents_of, kernel):
    monkeypatch.setenv("DETPOST_KERNEL", kernel)
    post = DetectionPostProcessor(DecodeSpec(**fields, top_k=7))
    arguments = (*sample(torch.float32), torch.tensor([[30.0, 50.0], [70.0, 20.0]]))
    tangents = tuple(torch.randn_like(value) for value in arguments)
    found, expected = tangents_of(post, arguments, tangents), by_differences(post, arguments, tangents)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
        assert other.abs().max() > 0.01


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_tensor_with_a_tangent_is_enough(which):
    post = DetectionPostProcessor(DecodeSpec(top_k=7))
    arguments = [*sample(torch.float32), torch.tensor([[30.0, 50.0], [70.0, 20.0]])]
    with forward_ad.dual_level():
        arguments[which] = forward_ad.make_dual(arguments[which], torch.ones_like(arguments[which]))
        found = post(*arguments)
        tangents = [forward_ad.unpack_dual(value).tangent for value in (found.scores, found.boxes)]
    assert [tangent is not None and bool(tangent.any()) for tangent in tangents] == [which == 0, which != 0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fields", UNLIKE, ids=name_of)
def test_the_gradient_reaches_the_image_sizes(monkeypatch, fields, kernel):
    monkeypatch.setenv("DETPOST_KERNEL", kernel)
    logits, boxes = sample(torch.float32)
    sizes = torch.tensor([[30.0, 50.0], [70.0, 20.0]], requires_grad=True)
    detections = decode(logits, boxes, sizes, **fields, top_k=7)
    detections.boxes.sum().backward()
    # Corners are units of the image times its width or its height.
    units = decode(logits, boxes, **fields, top_k=7).boxes
    expected = torch.stack((units[..., 1::2].sum((1, 2)), units[..., 0::2].sum((1, 2))), dim=1)
    torch.testing.assert_close(sizes.grad, expected, rtol=1e-5, atol=0)


def test_tangents_are_kept_where_the_decode_is_compiled():
    torch._dynamo.reset()
    post = DetectionPostProcessor(DecodeSpec(top_k=7))
    arguments = (*sample(torch.float32), torch.tensor([[30.0, 50.0], [70.0, 20.0]]))
    tangents = tuple(torch.randn_like(value) for value in arguments)
    compiled = torch.compile(post, backend="aot_eager")
    compiled(*arguments)  # without tangents: what was compiled for that must not serve the next calls
    for tangents_of in (tangents_of_tensors, tangents_of_functions):
        found, expected = tangents_of(compiled, arguments, tangents), tangents_of(post, arguments, tangents)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["rtdetr", "detr"])
def test_derivatives_taken_inside_what_is_compiled_are_kept(name):
    post = DetectionPostProcessor.from_preset(name, top_k=7)
    logits, boxes = sample(torch.float32)
    sizes = torch.tensor([[30.0, 50.0], [70.0, 20.0]])

    def tangents(*values):
        return tangents_of_functions(post, values, values)

    def gradient(*values):
        return torch.func.grad(lambda first, *rest: post(first, *rest).scores.square().sum())(*values)

    for function in (tangents, gradient):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        expected = function(logits, boxes, sizes)
        torch.testing.assert_close(compiled(logits, boxes, sizes), expected)
        assert all(value.abs().max() > 0.01 for value in tree_leaves(expected))


# --- the module ---


@pytest.mark.parametrize("spec", ["rtdetr", {"top_k": 5}, None, DecodeSpec])
def test_a_spec_that_is_none_is_one_clear_line(spec):
    with pytest.raises(TypeError, match="spec must be a DecodeSpec") as error:
        DetectionPostProcessor(spec)
    one_line(error)


@pytest.mark.parametrize("name", presets())
def test_every_preset_makes_a_post_processor(name):
    post = DetectionPostProcessor.from_preset(name, top_k=3)
    assert post.spec == DecodeSpec.preset(name, top_k=3)
    assert not list(post.parameters())
    assert not post.state_dict()
    assert repr(post.spec) in repr(post)
    assert post(torch.randn(1, 5, 4), torch.rand(1, 5, 4)).scores.shape == (1, 3)
