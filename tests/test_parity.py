from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from detpost import DecodeSpec, DetectionPostProcessor, boxes
from tests.mixin import DTYPES, assert_same
from tests.reference import rtdetr_inplace as inplace

THRESHOLDS = (0.0, 0.1, 0.5, 0.9)


def distinct_logits(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits in (-8, 8) that differ in every dtype, so that no order among ties is asked of a peer."""
    count = torch.Size(shape).numel()
    magnitudes = (torch.arange(0x3C00, 0x4100, dtype=torch.int16)).view(torch.bfloat16)
    pool = torch.cat((magnitudes, -magnitudes))
    assert count <= len(pool)
    return pool[torch.randperm(len(pool))[:count]].reshape(shape).to(dtype)


def sample(batch=3, queries=40, classes=7, dtype=torch.float32):
    return (
        distinct_logits(batch, queries, classes, dtype=dtype),
        torch.rand(batch, queries, 4).to(dtype),
        torch.randint(20, 1500, (batch, 2)),
    )


# --- the in-place originals: equal values ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (7, 4), (2, 5, 4), (2, 3, 5, 4), (0, 4)], ids=str)
def test_box_operators_equal_the_in_place_ones(shape, dtype):
    tolerance = {"rtol": max(1e-6, 4 * torch.finfo(dtype).eps), "atol": max(1e-6, 2 * torch.finfo(dtype).eps)}
    centres = torch.rand(shape).to(dtype)
    corners = boxes.convert(centres, "cxcywh", "xyxy")
    for ours, theirs in [
        (corners, inplace.cxcywh_to_xyxy_(centres.clone())),
        (boxes.convert(corners, "xyxy", "cxcywh"), inplace.xyxy_to_cxcywh_(corners.clone())),
        (boxes.hflip(corners, 1.0), inplace.hflip_(corners.clone(), 1.0)),
        (boxes.clip(corners, (0.5, 0.75)), inplace.clip_(corners.clone(), 0.5, 0.75)),
    ]:
        torch.testing.assert_close(ours, theirs, **tolerance)
    if len(shape) == 3:
        sizes = torch.tensor([[480, 640], [1333, 800]])
        assert_same(boxes.scale(centres, sizes), inplace.scale_(centres.clone(), sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 30, 20), (3, 40, 7), (5, 10, 1), (2, 1, 9), (4, 100, 6)], ids=str)
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_the_decode_equals_the_in_place_one(shape, dtype, threshold):
    logits, normalised, sizes = sample(*shape, dtype=dtype)
    top_k = 25
    detections = DetectionPostProcessor(DecodeSpec(top_k=top_k, score_threshold=threshold))(logits, normalised, sizes)
    wide = torch.promote_types(dtype, torch.float32)  # the in-place one decodes in what it is given
    labels, pixels, scores = inplace.decode_(logits.to(wide), normalised.to(wide).clone(), sizes, top_k, threshold)
    torch.testing.assert_close(detections.scores, scores, rtol=1e-6, atol=1e-6)
    valid = detections.valid
    assert_same(valid, scores > (threshold or 0))
    assert_same(detections.labels[valid], labels[valid])
    extent = sizes.flip(-1).repeat(1, 2).unsqueeze(1)
    unit = (detections.boxes / extent)[valid]
    torch.testing.assert_close(unit, (pixels / extent)[valid], rtol=1e-6, atol=1e-6)


# --- what the in-place form breaks ---

PAIRS = {
    "convert": (lambda b: boxes.convert(b, "cxcywh", "xyxy"), inplace.cxcywh_to_xyxy_),
    "scale": (
        lambda b: boxes.scale(b, torch.tensor([[3, 5], [7, 2]])),
        lambda b: inplace.scale_(b, torch.tensor([[3, 5], [7, 2]])),
    ),
    "hflip": (lambda b: boxes.hflip(b, 2.0), lambda b: inplace.hflip_(b, 2.0)),
    "clip": (lambda b: boxes.clip(b, (0.6, 0.7)), lambda b: inplace.clip_(b, 0.6, 0.7)),
}


def ordered(dtype=torch.float64):
    low = torch.rand(2, 3, 2, dtype=dtype) * 0.4
    return torch.cat((low, low + 0.1 + torch.rand(2, 3, 2, dtype=dtype) * 0.4), -1)


@pytest.mark.parametrize("name", PAIRS)
def test_ours_leaves_the_callers_tensor_and_theirs_does_not(name):
    ours, theirs = PAIRS[name]
    values = ordered()
    before = values.clone()
    ours(values)
    assert_same(values, before)
    theirs(values)
    assert not torch.equal(values, before)


@pytest.mark.parametrize("name", PAIRS)
def test_ours_passes_gradcheck_and_theirs_does_not(name):
    ours, theirs = PAIRS[name]
    assert torch.autograd.gradcheck(ours, ordered().requires_grad_())
    with pytest.raises(RuntimeError, match=r"leaf Variable|in-place|[Jj]acobian"):
        torch.autograd.gradcheck(theirs, ordered().requires_grad_())


def test_autograd_refuses_the_in_place_threshold_and_takes_ours():
    logits = distinct_logits(2, 6, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        # The sigmoid saved its result for the backward pass, and the threshold wrote into it.
        inplace.zero_below_(logits.sigmoid(), 0.5).sum().backward()
    post = DetectionPostProcessor(DecodeSpec(score_threshold=0.5))
    post(logits, torch.rand(2, 6, 4)).scores.sum().backward()
    kept = logits.detach() > 0
    torch.testing.assert_close(logits.grad, torch.where(kept, logits.sigmoid() * (1 - logits.sigmoid()), 0.0).detach())


def heads():
    torch.manual_seed(1)
    return torch.nn.Linear(8, 5), torch.nn.Linear(8, 4)


def box_gradient(decode, run):
    """The gradient that a box loss sends through ``decode``, run as ``run(function, raw boxes)``."""
    class_head, box_head = heads()
    features = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2))
    sizes = torch.tensor([[9, 8], [7, 6]])
    raw = box_head(features).sigmoid()
    run(lambda values: decode(class_head(features), values, sizes).pow(2).sum(), raw).backward()
    return box_head.weight.grad


def ours_decode(logits, raw, sizes):
    return DetectionPostProcessor(DecodeSpec(top_k=30))(logits, raw, sizes).boxes


def theirs_decode(logits, raw, sizes):
    return inplace.decode_(logits, raw, sizes, 30)[1]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_keeps_our_gradient_and_breaks_theirs(use_reentrant):
    def directly(function, raw):
        return function(raw)

    def checkpointed(function, raw):
        return checkpoint(function, raw, use_reentrant=use_reentrant)

    truth = box_gradient(ours_decode, directly)
    assert truth.abs().sum() > 0
    torch.testing.assert_close(box_gradient(ours_decode, checkpointed), truth)
    with pytest.raises(RuntimeError, match=r"in-place operation|inplace operation"):
        box_gradient(theirs_decode, checkpointed)


# --- the libraries ---


def coordinates_close(ours, theirs, sizes):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(sizes.max()))


@pytest.mark.peers
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_equals_the_kornia_post_processor(threshold):
    post_processor = pytest.importorskip("kornia.models.rt_detr.post_processor")
    logits, normalised, sizes = sample()
    theirs = post_processor.DETRPostProcessor(threshold, num_classes=7, num_top_queries=50)(logits, normalised, sizes)
    spec = DecodeSpec(top_k=50, score_threshold=threshold)
    ours = DetectionPostProcessor(spec)(logits, normalised, sizes).to_kornia()
    for mine, yours in zip(ours, theirs, strict=True):
        assert_same(mine[:, 0], yours[:, 0])
        torch.testing.assert_close(mine[:, 1], yours[:, 1])
        coordinates_close(mine[:, 2:], yours[:, 2:], sizes)


def as_list(sizes):
    return [tuple(row) for row in sizes.tolist()]


SIZES = [pytest.param(lambda sizes: sizes, id="tensor"), pytest.param(as_list, id="list")]


def processor(family: str):
    return getattr(pytest.importorskip("transformers"), f"{family}ImageProcessor")()


def outputs_of(logits, normalised):
    return SimpleNamespace(logits=logits, pred_boxes=normalised)


def hold_to_list(ours, theirs, sizes):
    for mine, yours in zip(ours, theirs, strict=True):
        assert_same(mine["labels"], yours["labels"])
        torch.testing.assert_close(mine["scores"], yours["scores"])
        coordinates_close(mine["boxes"], yours["boxes"], sizes)


@pytest.mark.peers
@pytest.mark.parametrize("give", SIZES)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(
    ("family", "preset", "top_k", "clips"),
    [
        ("RTDetr", "rtdetr", 40, False),
        ("ConditionalDetr", "conditional_detr", 100, False),
        ("RfDetr", "rfdetr", 40, True),
    ],
)
def test_equals_transformers_with_sigmoid(family, preset, top_k, clips, threshold, give):
    logits, normalised, sizes = sample()
    theirs = processor(family).post_process_object_detection(
        outputs_of(logits, normalised), threshold=threshold, target_sizes=give(sizes)
    )
    if clips:  # as RF-DETR's own package does, and transformers' copy of it does not
        theirs = [{**one, "boxes": boxes.clip(one["boxes"], size)} for one, size in zip(theirs, sizes, strict=True)]
    post = DetectionPostProcessor.from_preset(preset, top_k=top_k, score_threshold=threshold)
    hold_to_list(post(logits, normalised, sizes).to_list(), theirs, sizes)


@pytest.mark.peers
@pytest.mark.parametrize("give", SIZES)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_equals_transformers_detr_in_score_order(threshold, give):
    logits, normalised, sizes = sample()
    theirs = processor("Detr").post_process_object_detection(
        outputs_of(logits, normalised), threshold=threshold, target_sizes=give(sizes)
    )
    by_score = []
    for one in theirs:  # it keeps the order of the queries
        order = one["scores"].argsort(descending=True, stable=True)
        by_score.append({name: values[order] for name, values in one.items()})
    post = DetectionPostProcessor.from_preset("detr", score_threshold=threshold)
    ours = post(logits, normalised, sizes).to_list()
    hold_to_list(ours, by_score, sizes)
    for mine, yours in zip(ours, theirs, strict=True):
        assert_same(mine["labels"][mine["queries"].argsort()], yours["labels"])


@pytest.mark.peers
@pytest.mark.parametrize("family", ["RTDetr", "ConditionalDetr", "Detr"])
def test_equals_transformers_without_sizes(family):
    logits, normalised, _ = sample()
    theirs = processor(family).post_process_object_detection(outputs_of(logits, normalised), threshold=0.0)
    preset = {"RTDetr": "rtdetr", "ConditionalDetr": "conditional_detr", "Detr": "detr"}[family]
    fields = {"top_k": 40} if family == "RTDetr" else {}
    ours = DetectionPostProcessor.from_preset(preset, score_threshold=0.0, **fields)(logits, normalised).to_list()
    for mine, yours in zip(ours, theirs, strict=True):
        order = yours["scores"].argsort(descending=True, stable=True)
        torch.testing.assert_close(mine["scores"], yours["scores"][order])
        torch.testing.assert_close(mine["boxes"], yours["boxes"][order])
