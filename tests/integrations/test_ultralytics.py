"""Ultralytics' RT-DETR rows and ours: against a reference of their making, and the package where it is there."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detpost.integrations.ultralytics import decode, patched, postprocess, postprocess_selected
from tests.integrations import references
from tests.integrations.references import SIZES, outputs
from tests.mixin import assert_same, one_line

SHAPES = [tuple(size) for size in SIZES.tolist()]


def head(**options):
    """(B, Q, 4 + C): boxes, and scores after the sigmoid."""
    raw = outputs(**options)
    return torch.cat((raw["pred_boxes"], raw["pred_logits"].sigmoid()), dim=-1)


def selecting_head(top=40, **options):
    """(B, K, 6), as the head of 8.4 gives it."""
    raw = outputs(**options)
    scores, flat = raw["pred_logits"].sigmoid().flatten(1).topk(top)
    classes = raw["pred_logits"].shape[2]
    boxes = raw["pred_boxes"].gather(1, (flat // classes).unsqueeze(-1).expand(-1, -1, 4))
    return torch.cat((boxes, scores.unsqueeze(-1), (flat % classes).unsqueeze(-1)), dim=-1)


def hold(ours, theirs):
    for mine, yours in zip(ours, theirs, strict=True):
        assert_same(mine[:, 4:], yours[:, 4:])
        torch.testing.assert_close(mine, yours, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("classes", [None, [2], [0, 5, 6]], ids=str)
@pytest.mark.parametrize("max_det", [300, 5])
@pytest.mark.parametrize("conf", [0.0, 0.25, 0.6, 0.99, 1.0])
def test_the_rows_are_the_originals(conf, max_det, classes):
    preds = head(queries=20, spread=4.0)  # no query is sure, so each threshold cuts
    expected = references.ultralytics(preds, SHAPES, conf, classes, max_det)
    for given in (preds, [preds, None], (preds, ("extra",))):
        for shapes in (SHAPES, SIZES, [np.array(shape) for shape in SHAPES]):
            hold(postprocess(given, shapes, conf, classes, max_det), expected)
    hold(postprocess(preds, SHAPES), references.ultralytics(preds, SHAPES))


@pytest.mark.parametrize("classes", [None, [2], [0, 5, 6]], ids=str)
@pytest.mark.parametrize("max_det", [300, 5])
@pytest.mark.parametrize("conf", [0.0, 0.6, 0.97, 1.0])
def test_rows_that_the_head_selected_keep_its_order(conf, max_det, classes):
    preds = selecting_head(spread=4.0)
    for image, rows, (height, width) in zip(
        preds, postprocess_selected((preds, "extra"), SHAPES, conf, classes, max_det), SHAPES, strict=True
    ):
        keep = [row for row in image.tolist() if row[4] > conf and (classes is None or row[5] in classes)][:max_det]
        expected = [
            [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height, score, label]
            for x, y, w, h, score, label in keep
        ]
        torch.testing.assert_close(rows, torch.tensor(expected).reshape(-1, 6), rtol=1e-6, atol=1e-3)


# --- the package's own predictor ---


@pytest.fixture
def predictor(monkeypatch, tmp_path):
    """A predictor as `predict` leaves it, without a network."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    module = pytest.importorskip("ultralytics.models.rtdetr.predict")
    made = module.RTDETRPredictor.__new__(module.RTDETRPredictor)
    made.args = SimpleNamespace(conf=0.3, classes=[0, 2, 5], max_det=7)
    made.batch = (["a.png", "b.png", "c.png"],)
    made.model = SimpleNamespace(names=dict(enumerate("abcdefg")))
    return made


def raw_of_the_installed_head(**options):
    from ultralytics.nn.modules.head import RTDETRDecoder

    return selecting_head(**options) if hasattr(RTDETRDecoder, "postprocess") else head(**options)


@pytest.mark.peers
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("classes", [2, 7])
def test_a_patched_predictor_gives_its_own_results(predictor, as_tensor, classes):
    images = torch.rand(3, 3, 33, 77) if as_tensor else [np.zeros((*shape, 3), np.uint8) for shape in SHAPES]
    preds = raw_of_the_installed_head(spread=3.0, classes=classes)
    theirs = predictor.postprocess((preds.clone(), None), None, images)
    with patched(predictor) as same:
        assert same is predictor
        ours = predictor.postprocess((preds, None), None, images)
    hold([one.boxes.data for one in ours], [one.boxes.data for one in theirs])
    assert sum(len(one.boxes) for one in ours) > 3
    for mine, yours in zip(ours, theirs, strict=True):
        assert (mine.path, mine.names) == (yours.path, yours.names)
        assert mine.orig_shape == yours.orig_shape
        np.testing.assert_array_equal(mine.orig_img, yours.orig_img)


@pytest.mark.peers
def test_a_predictor_is_as_before_after_nested_blocks_and_errors(predictor):
    before, method = dict(vars(predictor)), predictor.postprocess

    def nested():
        with patched(predictor):
            with patched(predictor):
                pass
            assert predictor.postprocess != method
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        nested()
    assert vars(predictor) == before
    assert predictor.postprocess == method


# --- static shapes ---


def test_the_decode_compiles_in_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        arguments = head(seed=seed, spread=4.0), SIZES, 0.6, [1, 2], 30
        found = decode(*arguments)
        assert_same(compiled(*arguments), found)
        assert found.scores.shape == (3, 30)
        assert 0 < found.valid.sum() < 90
        for values, empty in ((found.labels, -1), (found.queries, -1), (found.scores, 0), (found.boxes, 0)):
            assert values[~found.valid].eq(empty).all()


def test_queries_say_where_each_row_came_from_and_inputs_stay():
    preds = head()
    before = preds.clone()
    found = decode(preds, SIZES, conf=0.5)
    assert_same(preds, before)
    for scores, queries, rows in zip(found.scores, found.queries, preds, strict=True):
        chosen = queries[queries >= 0]
        assert_same(scores[: len(chosen)], rows[chosen, 4:].amax(-1))


# --- the rows of docs/drop-ins.md ---


def test_equal_scores_keep_the_order_of_the_queries():
    preds = head(queries=200, classes=2)
    coarse = torch.cat((preds[..., :4], (preds[..., 4:] * 4).round() / 4), dim=-1)
    found = decode(coarse, SIZES, 0.0, max_det=200)
    for image, queries in zip(coarse, found.queries, strict=True):
        best = image[:, 4:].amax(-1)
        order = best.argsort(descending=True, stable=True)
        assert_same(queries[queries >= 0], order[best[order] > 0])


def test_nan_is_no_detection_and_half_is_read_as_float32():
    preds = head(spread=4.0)
    preds[:, 0, 5] = float("nan")
    rest = preds.clone()
    rest[:, 0, 5] = 0.0  # the other classes of the query are still numbers
    hold(postprocess(preds, SHAPES), references.ultralytics(rest, SHAPES))
    preds[:, 0, 4:] = float("nan")
    assert (decode(preds, SIZES, 0.0).queries != 0).all()
    half = head(queries=10, classes=3, spread=2.0).half()
    assert postprocess(half, SHAPES)[0].dtype == torch.float32
    hold(postprocess(half, SHAPES), references.ultralytics(half.float(), SHAPES))


@pytest.mark.parametrize(
    ("make", "kind", "pattern"),
    [
        (lambda: postprocess(torch.rand(1, 5, 4), [(2, 3)]), ValueError, r"shape \(B, Q, 4 \+ C\); got \(1, 5, 4\)"),
        (lambda: postprocess(torch.rand(5, 6), [(2, 3)] * 5), ValueError, r"shape \(B, Q, 4 \+ C\)"),
        (lambda: postprocess_selected(torch.rand(1, 5, 7), [(2, 3)]), ValueError, r"shape \(B, Q, 6\)"),
        (lambda: postprocess(torch.ones(1, 5, 7, dtype=torch.int64), [(2, 3)]), TypeError, "must be floating"),
        (lambda: postprocess(head(), SHAPES[:2]), ValueError, "orig_shapes must have one pair for each of 3 images"),
        (lambda: postprocess(head(), SHAPES, max_det=0), ValueError, "k must be at least 1"),
        (lambda: patched(SimpleNamespace()).__enter__(), TypeError, "expected an RTDETRPredictor"),
    ],
)
def test_a_wrong_call_is_one_clear_line(make, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        make()
    one_line(error)


def test_without_ultralytics_the_message_names_it(monkeypatch):
    import importlib

    def missing(name, *more):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="patched needs ultralytics: pip install ultralytics") as error:
        patched(SimpleNamespace(postprocess=print)).__enter__()
    one_line(error)


def test_a_score_equal_to_the_threshold_is_dropped_there_and_here():
    row = torch.tensor([[[0.5, 0.5, 0.5, 0.5, 0.25, 0.0]]])
    for rows in (postprocess, postprocess_selected, references.ultralytics):
        assert [len(image) for image in rows(row, SHAPES[:1], conf=0.5)] == [0]
    assert len(postprocess(row, SHAPES[:1], conf=0.25)[0]) == len(references.ultralytics(row, SHAPES[:1])[0]) == 0
    assert len(postprocess_selected(torch.tensor([[[0.5] * 4 + [0.5, 1.0]]]), SHAPES[:1], conf=0.5)[0]) == 0
