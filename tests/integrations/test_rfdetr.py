"""RF-DETR's PostProcess and ours: against a reference of its behaviour, and against the package where it is there."""

from __future__ import annotations

import pytest
import torch

from detpost.integrations.rfdetr import PostProcess
from tests.integrations.references import SIZES, outputs, rfdetr
from tests.mixin import assert_same, one_line

NAMES = ("scores", "labels", "boxes")


def hold(ours, theirs, names=NAMES):
    for mine, yours in zip(ours, theirs, strict=True):
        for name in names:
            torch.testing.assert_close(mine[name], yours[name], rtol=2e-6, atol=1e-4 if name == "boxes" else 1e-7)


@pytest.fixture
def package():
    return pytest.importorskip("rfdetr.models.postprocess").PostProcess


@pytest.mark.parametrize("sizes", [SIZES, SIZES.float()], ids=["int", "float"])
@pytest.mark.parametrize("select", [1, 17, 280, 300])
def test_the_boxes_are_the_originals_with_the_queries_beside_them(select, sizes):
    ours = PostProcess(num_select=select)(outputs(), sizes)
    hold(ours, rfdetr(outputs(), sizes, select), (*NAMES, "queries"))
    assert [sorted(image) for image in ours] == [["boxes", "labels", "queries", "scores"]] * 3
    given = outputs()["pred_boxes"]
    assert ((given[..., :2] - given[..., 2:] / 2) < 0).any(), "nothing to clip"
    assert (given[..., 2:] < 0).any(), "no box of negative width"


@pytest.mark.peers
@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("sizes", [SIZES, SIZES.float()], ids=["int", "float"])
@pytest.mark.parametrize("select", [1, 17, 280, 300])
def test_the_boxes_are_the_packages(package, select, sizes, threshold):
    ours = PostProcess(num_select=select)(outputs(), sizes, threshold)
    theirs = package(num_select=select)(outputs(), sizes, threshold)
    hold(ours, theirs)
    hold(rfdetr(outputs(), sizes, select), theirs)  # the reference too


@pytest.mark.peers
def test_the_packages_tie_rule_is_ours(package):
    raw = outputs()
    raw["pred_logits"] = (raw["pred_logits"] / 2).round() * 2
    hold(PostProcess(num_select=90)(raw, SIZES), package(num_select=90)(raw, SIZES))


@pytest.mark.peers
@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.999, 1.0])
def test_the_masks_are_the_packages(package, threshold, upsample):
    raw = outputs() | {"pred_masks": torch.randn(3, 40, 6, 9)}
    sizes = torch.tensor([[48, 64], [33, 77], [50, 10]])
    theirs = package(num_select=60, upsample_masks_to_image_size=upsample)(raw, sizes, threshold)
    ours = PostProcess(num_select=60, upsample_masks_to_image_size=upsample)(raw, sizes, threshold)
    hold(ours, theirs)
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine["masks"].shape == yours["masks"].shape
        assert (mine["masks"] ^ yours["masks"]).sum() <= 1e-4 * yours["masks"].numel()  # rounding at the zero crossing


@pytest.mark.peers
@pytest.mark.parametrize("depth", [3, 8])
@pytest.mark.parametrize("per_class", [[0, 3, 2, 0, 1, 3, 2], [3, 3], [0, 0], None], ids=str)
def test_the_keypoints_are_the_packages(package, per_class, depth):
    slots = len(per_class or []) * max(per_class or [0])
    raw = outputs() | {"pred_keypoints": torch.randn(3, 40, slots, depth)}
    theirs = package(60, per_class)(raw, SIZES)
    ours = PostProcess(60, per_class)(raw, SIZES)
    for mine, yours in zip(ours, theirs, strict=True):
        assert set(mine) - set(yours) == {"queries"}
        for name, values in yours.items():
            torch.testing.assert_close(mine[name], values, rtol=1e-5, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("threshold", [None, 0.999, 1.0])
def test_masks_follow_their_detections_by_query(threshold):
    masks = torch.randn(3, 40, 6, 9)
    post = PostProcess(num_select=60, upsample_masks_to_image_size=False)
    ours = post(outputs() | {"pred_masks": masks}, SIZES, threshold)
    for image, mine, yours in zip(masks, ours, rfdetr(outputs(), SIZES, 60), strict=True):
        keep = slice(None) if threshold is None else yours["scores"] > threshold
        hold([mine], [{name: values[keep] for name, values in yours.items()}], (*NAMES, "queries"))
        assert_same(mine["masks"], image[yours["queries"][keep]].unsqueeze(1) > 0)
    kept = sum(len(image["scores"]) for image in ours)
    assert kept == 180 if threshold is None else kept < 180


def test_a_threshold_leaves_boxes_by_themselves_alone_as_in_the_original():
    assert [len(image["scores"]) for image in PostProcess(num_select=60)(outputs(), SIZES, 0.99)] == [60] * 3


def test_heads_is_the_place_for_what_else_the_model_says():
    class Ours(PostProcess):
        def heads(self, outputs, found, target_sizes, rows):
            assert found.queries.shape == (3, 20)
            assert_same(target_sizes, SIZES)
            points = outputs["pred_keypoints"]
            return [{"keypoints": one[row["queries"]]} for one, row in zip(points, rows, strict=True)]

    points = torch.randn(3, 40, 5, 3)
    for image, one in zip(Ours(num_select=20)(outputs() | {"pred_keypoints": points}, SIZES), points, strict=True):
        assert_same(image["keypoints"], one[image["queries"]])


def test_it_keeps_no_gradient_and_writes_to_no_input():
    raw = outputs()
    before = {name: value.clone() for name, value in raw.items()}
    raw["pred_logits"].requires_grad_()
    assert not PostProcess()(raw, SIZES)[0]["scores"].requires_grad
    assert_same({name: value.detach() for name, value in raw.items()}, before)


def test_it_compiles_in_one_graph():
    torch._dynamo.reset()
    post = PostProcess(num_select=50)
    compiled = torch.compile(post, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        assert_same(compiled(outputs(seed=seed), SIZES), post(outputs(seed=seed), SIZES))


def test_the_constructor_is_the_originals():
    post = PostProcess(10, [0, 17], 0.3, False)
    assert (post.num_select, post.num_keypoints_per_class, post.trace_alpha) == (10, [0, 17], 0.3)
    assert post.upsample_masks_to_image_size is False
    assert PostProcess().num_select == 300
    assert not post.state_dict()


# --- the rows of docs/drop-ins.md ---


def test_logits_whose_sigmoids_round_to_one_keep_their_order():
    raw = {"pred_logits": torch.tensor([[[20.0], [40.0], [30.0]]]), "pred_boxes": torch.rand(1, 3, 4)}
    assert PostProcess()(raw, SIZES[:1])[0]["queries"].tolist() == [1, 2, 0]
    assert rfdetr(raw, SIZES[:1])[0]["queries"].tolist() == [0, 1, 2]


def test_nan_takes_no_place_among_the_selected():
    raw = outputs()
    raw["pred_logits"][:, :3] = float("nan")
    ours = PostProcess(num_select=30)(raw, SIZES)
    clean = {name: values[:, 3:] for name, values in raw.items()}
    hold(ours, rfdetr(clean, SIZES, 30))
    assert rfdetr(raw, SIZES, 30)[0]["scores"][:21].isnan().all()
    assert PostProcess(num_select=280)(raw, SIZES)[0]["labels"][-21:].eq(-1).all()
    masks = PostProcess(num_select=280)(raw | {"pred_masks": torch.randn(3, 40, 2, 2)}, SIZES // 9)[1]
    assert len(masks["masks"]) == len(masks["labels"]) == 259


@pytest.mark.parametrize(
    ("make", "kind", "pattern"),
    [
        (lambda: PostProcess(0), ValueError, "top_k must be at least 1; got 0"),
        (lambda: PostProcess()(outputs(), SIZES[:2]), ValueError, "target_sizes must be a tensor"),
        (lambda: PostProcess()({}, SIZES), TypeError, "pred_boxes"),
        (
            lambda: PostProcess()(outputs() | dict.fromkeys(("pred_masks", "pred_keypoints"), torch.ones(1)), SIZES),
            ValueError,
            "pred_masks or pred_keypoints; got both",
        ),
    ],
)
def test_a_wrong_call_is_one_clear_line(make, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        make()
    one_line(error)


def test_a_score_equal_to_the_threshold_is_dropped_with_masks():
    raw = {"pred_logits": torch.zeros(1, 1, 1), "pred_boxes": torch.rand(1, 1, 4), "pred_masks": torch.ones(1, 1, 2, 2)}
    assert len(PostProcess()(raw, SIZES[1:2], 0.5)[0]["scores"]) == 0
    assert len(PostProcess()(raw, SIZES[1:2], 0.49)[0]["scores"]) == 1
