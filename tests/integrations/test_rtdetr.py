"""The original RT-DETR's post-processor, as tests/integrations/references.py writes it down, and ours."""

from __future__ import annotations

import pytest
import torch

from detpost.integrations.rtdetr import COCO_CATEGORY_IDS, RTDETRPostProcessor
from detpost.purity import check
from tests.integrations.references import SIZES, outputs, rtdetr
from tests.mixin import assert_same, one_line

WIDTH_HEIGHT = SIZES.flip(-1)


def hold(ours, theirs):
    labels, boxes, scores = ours
    assert_same(labels, theirs[0])
    torch.testing.assert_close(boxes, theirs[1], rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(scores, theirs[2], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("sizes", [WIDTH_HEIGHT, WIDTH_HEIGHT.float()], ids=["int", "float"])
@pytest.mark.parametrize("top", [1, 17, 280])
@pytest.mark.parametrize("focal", [True, False])
def test_deployed_and_not_it_gives_the_originals_results(focal, top, sizes):
    raw = outputs()
    post = RTDETRPostProcessor(num_classes=7, use_focal_loss=focal, num_top_queries=top)
    expected = rtdetr(raw, sizes, focal, top)
    images = post(raw, sizes)
    assert [sorted(image) for image in images] == [["boxes", "labels", "scores"]] * 3
    hold([torch.stack([image[name] for image in images]) for name in ("labels", "boxes", "scores")], expected)
    deployed = post.train().deploy()
    assert deployed is post
    assert not post.training
    found = post(raw, sizes)
    assert isinstance(found, tuple)
    hold(found, expected)


def test_few_queries_without_focal_loss_stay_in_their_order():
    found = RTDETRPostProcessor(7, False, 40).deploy()(outputs(), WIDTH_HEIGHT)
    assert (found[2].diff() > 0).any(), "not by score"
    ranked = RTDETRPostProcessor(7, False, 39).deploy()(outputs(), WIDTH_HEIGHT)
    assert (ranked[2].diff() <= 0).all()


def test_coco_categories_are_remapped_but_not_after_deploy():
    assert len(COCO_CATEGORY_IDS) == len(set(COCO_CATEGORY_IDS)) == 80
    # person, airplane, stop sign, backpack, wine glass, dining table, toilet, tv, book, toothbrush
    places = (0, 4, 11, 24, 40, 60, 61, 62, 73, 79)
    assert [COCO_CATEGORY_IDS[place] for place in places] == [1, 5, 13, 27, 46, 67, 70, 72, 84, 90]
    raw = outputs(batch=1, queries=10, classes=80)
    plain, remapped = (RTDETRPostProcessor(num_top_queries=100, remap_mscoco_category=on) for on in (False, True))
    labels = plain(raw, WIDTH_HEIGHT[:1])[0]["labels"]
    assert len(labels.unique()) > 30
    expected = torch.tensor([COCO_CATEGORY_IDS[label] for label in labels.tolist()])
    assert_same(remapped(raw, WIDTH_HEIGHT[:1])[0]["labels"], expected)
    assert_same(remapped.deploy()(raw, WIDTH_HEIGHT[:1])[0][0], labels)


@pytest.mark.parametrize("focal", [True, False])
def test_deployed_it_compiles_and_exports_in_one_graph(focal):
    torch._dynamo.reset()
    post = RTDETRPostProcessor(7, focal, 40).deploy()
    compiled = torch.compile(post, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        raw = outputs(seed=seed)
        assert_same(compiled(raw, WIDTH_HEIGHT), post(raw, WIDTH_HEIGHT))
    program = torch.export.export(post, (raw, WIDTH_HEIGHT))
    assert_same(program.module()(raw, WIDTH_HEIGHT), post(raw, WIDTH_HEIGHT))


def test_it_is_pure_also_with_the_remap():
    for post in (RTDETRPostProcessor(7).deploy(), RTDETRPostProcessor(7, remap_mscoco_category=True)):
        report = check(post, outputs(), WIDTH_HEIGHT)
        assert report.ok, report


def test_the_constructor_is_the_originals():
    post = RTDETRPostProcessor(5, False, 10, True)
    names = ["num_classes", "use_focal_loss", "num_top_queries", "remap_mscoco_category"]
    assert [getattr(post, name) for name in names] == [5, False, 10, True]
    assert RTDETRPostProcessor.__share__ == names
    assert (RTDETRPostProcessor().num_classes, RTDETRPostProcessor().num_top_queries) == (80, 300)
    assert not post.state_dict(), "a checkpoint of the original must load"
    assert post.iou_types == ("bbox",)
    assert "num_top_queries=10" in repr(post)


def test_the_callers_outputs_stay_as_they_are():
    raw = outputs()
    before = {name: value.clone() for name, value in raw.items()}
    RTDETRPostProcessor(7, num_top_queries=9)(raw, WIDTH_HEIGHT)
    assert_same(raw, before)


# --- the rows of docs/drop-ins.md ---


def test_ties_go_by_query_and_class():
    raw = outputs()
    raw["pred_logits"] = (raw["pred_logits"] / 2).round() * 2
    order = raw["pred_logits"].flatten(1).argsort(dim=1, descending=True, stable=True)[:, :50]
    assert_same(RTDETRPostProcessor(7, num_top_queries=50).deploy()(raw, WIDTH_HEIGHT)[0], order % 7)


def test_nan_is_no_detection_in_either_order():
    raw = outputs()
    raw["pred_logits"][:, 3] = float("nan")
    labels, boxes, scores = RTDETRPostProcessor(7, num_top_queries=280).deploy()(raw, WIDTH_HEIGHT)
    assert labels[:, -7:].eq(-1).all()
    assert scores[:, -7:].eq(0).all()
    assert labels[:, :-7].ge(0).all()
    by_query = RTDETRPostProcessor(7, False, 40).deploy()(raw, WIDTH_HEIGHT)[0]
    assert (by_query == -1).sum(1).tolist() == [1, 1, 1]
    assert by_query[:, -1].eq(-1).all()
    remapped = RTDETRPostProcessor(7, num_top_queries=280, remap_mscoco_category=True)(raw, WIDTH_HEIGHT)
    assert remapped[0]["labels"][-7:].eq(-1).all()
    assert boxes.isfinite().all()


def test_more_queries_asked_for_than_there_are_pairs():
    labels, _, _ = RTDETRPostProcessor(7, num_top_queries=1000).deploy()(outputs(), WIDTH_HEIGHT)
    assert labels.shape == (3, 280)


@pytest.mark.parametrize(
    ("make", "kind", "pattern"),
    [
        (lambda: RTDETRPostProcessor(91, remap_mscoco_category=True), ValueError, "num_classes of at most 80; got 91"),
        (lambda: RTDETRPostProcessor(6)(outputs(), WIDTH_HEIGHT), ValueError, "num_classes = 6 classes; got 7"),
        (lambda: RTDETRPostProcessor(7)({}, WIDTH_HEIGHT), TypeError, "pred_logits"),
        (lambda: RTDETRPostProcessor(7)(outputs(), WIDTH_HEIGHT[:2]), ValueError, "orig_target_sizes must be a tensor"),
        (lambda: RTDETRPostProcessor(num_top_queries=0), ValueError, "top_k must be at least 1"),
    ],
)
def test_a_wrong_call_is_one_clear_line(make, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        make()
    one_line(error)
