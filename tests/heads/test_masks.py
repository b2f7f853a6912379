from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.peers import rfdetr_class
from detpost import DetectionPostProcessor, Detections
from detpost.heads import InstanceMasks, masks_per_image, to_rle
from detpost.kernels.cpu.mask_upsampling import upsample_and_compare
from tests.mixin import assert_same, one_line
from tests.test_nms import exported


def sample(batch=2, queries=7, top_k=5, threshold=None, size=(20, 30), shape=(6, 9)):
    post = DetectionPostProcessor.from_preset("rfdetr", top_k=top_k, score_threshold=threshold)
    sizes = torch.tensor([size]).expand(batch, 2)
    found = post(torch.randn(batch, queries, 2), torch.rand(batch, queries, 4) * 0.5 + 0.25, sizes)
    return found, torch.randn(batch, queries, *shape), sizes


def interpolate(values, size):
    return F.interpolate(values.unsqueeze(1), size=size, mode="bilinear", align_corners=False)


# --- upsampling ---


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    *[st.integers(1, 40)] * 2, *[st.integers(1, 90)] * 2, st.integers(0, 5), st.booleans(), st.sampled_from([1, 20000])
)
def test_upsampling_gives_the_pixels_of_interpolate(height, width, target_height, target_width, count, dfine, budget):
    generator = torch.Generator().manual_seed(height * 91 + width)
    values = torch.randn(count, height, width, generator=generator)
    values, threshold = (values.sigmoid(), 0.5) if dfine else (values, 0.0)
    found = upsample_and_compare(values, (target_height, target_width), threshold, dfine, budget, None)
    if count == 0:
        assert found.shape == (0, 1, target_height, target_width)
        return
    expected = interpolate(values, (target_height, target_width))
    differs = found != (expected >= threshold if dfine else expected > threshold)
    # On the processors tried, none differs; elsewhere F.interpolate may be compiled to round otherwise.
    assert (expected[differs] - threshold).abs().le(1e-6).all()
    assert found.shape == expected.shape


def test_full_size_masks_differ_from_interpolate_in_no_pixel_away_from_zero():
    values = torch.randn(2, 96, 96)
    expected = interpolate(values, (1080, 1920))
    found = upsample_and_compare(values, (1080, 1920), 0.0, False, 2**25, None)
    assert expected[found != (expected > 0)].abs().le(1e-6).all()


def test_a_logit_that_is_no_number_leaves_its_neighbourhood_out():
    values = torch.ones(1, 5, 5)
    values[0, 2, 2] = float("nan")
    found = upsample_and_compare(values, (23, 17), 0.0, False, 2**20, None)
    assert_same(found, interpolate(values, (23, 17)) > 0)
    assert 0 < found.sum() < 23 * 17


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    found, logits, sizes = sample()
    masks = masks_per_image(found, logits.to(dtype), sizes)
    assert_same(masks, masks_per_image(found, logits.to(dtype).float(), sizes))


# --- RF-DETR ---


@pytest.mark.peers
@pytest.mark.parametrize("threshold", [None, 0.5, 0.99])
def test_equals_rfdetr(threshold):
    if rfdetr_class() is None:
        pytest.skip("rfdetr is not installed")
    peer = rfdetr_class()(num_select=12)
    logits, boxes, masks = torch.randn(2, 9, 3), torch.rand(2, 9, 4), torch.randn(2, 9, 8, 8)
    sizes = torch.tensor([[37, 23], [50, 64]])
    outputs = {"pred_logits": logits, "pred_boxes": boxes, "pred_masks": masks}
    expected = peer(outputs, sizes, score_threshold=threshold)
    found = DetectionPostProcessor.from_preset("rfdetr", top_k=12, score_threshold=threshold)(logits, boxes, sizes)
    ours = masks_per_image(found, masks, sizes)
    for image, detections, theirs in zip(ours, found.to_list(), expected, strict=True):
        assert_same(detections["labels"], theirs["labels"])
        assert_same(image, theirs["masks"])


def test_only_valid_detections_get_a_mask_in_their_own_size_and_order():
    found, logits, _ = sample(threshold=0.6)
    masks = masks_per_image(found, logits, [(11, 13), (5, 40)])
    for image, (size, kept) in enumerate(zip([(11, 13), (5, 40)], found.to_list(), strict=True)):
        assert 0 < len(kept["queries"]) < 5
        assert_same(masks[image], interpolate(logits[image, kept["queries"]], size) > 0)


@pytest.mark.parametrize("max_bytes", [1, 30_000, 2**30])
def test_the_chunk_changes_nothing(max_bytes):
    found, logits, sizes = sample()
    assert_same(masks_per_image(found, logits, sizes, max_bytes=max_bytes), masks_per_image(found, logits, sizes))


def test_no_detection_gives_no_mask():
    found, logits, sizes = sample(threshold=1.0)
    assert [mask.shape for mask in masks_per_image(found, logits, sizes)] == [(0, 1, 20, 30)] * 2


# --- D-FINE-seg ---


def dfine_reference(probabilities, boxes, size):
    """Upsampled probabilities of at least a half, inside the box: (D, 1, H, W)."""
    masks = interpolate(probabilities, size) >= 0.5
    for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
        for y in range(size[0]):
            for x in range(size[1]):
                if not (left <= x < right and top <= y < bottom):
                    mask[0, y, x] = False
    return masks


def test_dfine_seg_takes_probabilities_and_crops_to_the_box():
    found, logits, sizes = sample(threshold=0.5)
    probabilities = logits.sigmoid()
    masks = masks_per_image(found, probabilities, sizes, style="dfine_seg")
    static = InstanceMasks(20, 30, style="dfine_seg")(found, probabilities)
    for image, kept in enumerate(found.to_list()):
        expected = dfine_reference(probabilities[image, kept["queries"]], kept["boxes"], (20, 30))
        assert 0 < expected.sum() < (interpolate(probabilities[image, kept["queries"]], (20, 30)) >= 0.5).sum()
        assert_same(masks[image], expected)
        assert_same(static[image, found.valid[image]], expected[:, 0])
    assert not static[~found.valid].any()


def test_a_half_is_in_for_dfine_seg_and_a_zero_is_out_for_rfdetr():
    found, _, sizes = sample(size=(4, 4))
    whole = found._replace(boxes=torch.tensor([0.0, 0.0, 4.0, 4.0]).expand(2, 5, 4))
    assert all(mask.all() for mask in masks_per_image(whole, torch.full((2, 7, 2, 2), 0.5), sizes, style="dfine_seg"))
    assert not any(mask.any() for mask in masks_per_image(whole, torch.zeros(2, 7, 2, 2), sizes))


def test_the_letterbox_is_cut_off_before_upsampling():
    found, logits, _ = sample(batch=1, shape=(16, 16))
    masks = masks_per_image(found, logits, [(30, 60)], input_size=(64, 64))  # 32 of 64 rows are image: 4 to 12 of 16
    assert_same(masks[0], interpolate(logits[0, found.queries[0], 4:12], (30, 60)) > 0)
    tall = masks_per_image(found, logits, [(64, 16)], input_size=(64, 64))
    assert_same(tall[0], interpolate(logits[0, found.queries[0], :, 6:10], (64, 16)) > 0)


# --- the static form ---


@pytest.mark.parametrize("chunk", [1, 2, 32])
def test_the_static_form_gives_the_same_masks(chunk):
    found, logits, sizes = sample(threshold=0.5)
    masks = InstanceMasks(20, 30, chunk=chunk)(found, logits)
    assert masks.shape == (2, 5, 20, 30)
    for image, expected in enumerate(masks_per_image(found, logits, sizes)):
        assert_same(masks[image, found.valid[image]], expected[:, 0])
    assert not masks[~found.valid].any()


@pytest.mark.parametrize("style", ["rfdetr", "dfine_seg"])
def test_the_static_form_compiles_and_exports(style):
    torch._dynamo.reset()
    module = InstanceMasks(20, 30, style=style, chunk=4)
    found, logits, _ = sample(threshold=0.5)
    expected = module(found, logits)
    assert_same(torch.compile(module, fullgraph=True, backend="aot_eager")(found, logits), expected)
    program = torch.export.export(module, (found, logits))
    other, other_logits, _ = sample(threshold=0.5)
    assert_same(program.module()(other, other_logits), module(other, other_logits))


@pytest.mark.parametrize("style", ["rfdetr", "dfine_seg"])
def test_the_static_form_runs_in_onnx_runtime(style):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.masks = InstanceMasks(20, 30, style=style, chunk=4)

        def forward(self, boxes, queries, valid, logits):
            return self.masks(Detections(boxes[..., 0], queries, boxes, queries, valid), logits)

    def arguments(batch):
        found, logits, _ = sample(batch, threshold=0.5)
        return found.boxes, found.queries, found.valid, logits.sigmoid() if style == "dfine_seg" else logits

    _, session = exported(Module(), arguments(2), ["masks"])
    other = arguments(3)
    differs = session(*other)[0] != Module()(*other)
    assert differs.float().mean() < 1e-3  # rounding at the threshold alone


def test_values_are_differentiable_and_blind_to_what_is_not_valid():
    found, logits, _ = sample(threshold=0.5)
    logits[0, 0] = float("nan")
    used = set(found.queries[0, found.valid[0]].tolist())
    logits[0, list(used)] = 1.0
    leaf = logits.requires_grad_()
    values = InstanceMasks(20, 30, binary=False)(found, leaf)
    assert values.dtype == torch.float32
    assert values[~found.valid].eq(0).all()
    values.sum().backward()
    assert leaf.grad.isfinite().all()
    assert {query for query in range(7) if leaf.grad[0, query].ne(0).any()} == used


def test_is_pure(purity):
    found, logits, _ = sample()
    purity(InstanceMasks(8, 9, chunk=2), found, logits)


# --- run lengths ---

pycocotools = pytest.importorskip("pycocotools.mask")


def encode(mask):
    return pycocotools.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]), st.integers(0, 99))
def test_run_lengths_equal_those_of_pycocotools(height, width, share, seed):
    masks = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed)) < share
    assert to_rle(masks) == [encode(mask) for mask in masks]


def test_long_runs_and_falling_ones_are_written_as_pycocotools_writes_them():
    masks = torch.zeros(4, 1500, 1800, dtype=torch.bool)
    masks[1, 700:, 900:], masks[2], masks[3, :, 40] = True, True, True
    masks[3, 3, 3] = True
    assert to_rle(masks) == [encode(mask) for mask in masks]
    assert to_rle(masks.unsqueeze(1).numpy()) == to_rle(masks)
    faster = pytest.importorskip("faster_coco_eval.core.mask")
    assert to_rle(masks[1:2])[0] == faster.encode(np.asfortranarray(masks[1].numpy().astype(np.uint8)))


def test_run_lengths_decode_to_the_masks():
    found, logits, sizes = sample()
    masks = masks_per_image(found, logits, sizes)[0]
    assert_same(torch.from_numpy(pycocotools.decode(to_rle(masks))).bool().permute(2, 0, 1), masks[:, 0])


# --- errors ---


@pytest.mark.parametrize(
    ("change", "kind", "pattern"),
    [
        (
            {"mask_logits": torch.zeros(2, 7, 3)},
            ValueError,
            r"mask_logits must have shape \(B, Q, h, w\); got \(2, 7, 3",
        ),
        ({"mask_logits": torch.zeros(1, 7, 3, 3)}, ValueError, "of the same images; got 1 and 2"),
        ({"mask_logits": torch.zeros(2, 0, 3, 3)}, ValueError, "at least one query"),
        ({"mask_logits": torch.zeros(2, 7, 0, 3)}, ValueError, "at least one pixel"),
        ({"mask_logits": torch.zeros(2, 7, 3, 3).int()}, TypeError, "mask_logits must be a floating tensor"),
        ({"detections": 3}, TypeError, "detections must be Detections; got int"),
        ({"image_sizes": [(3, 4)]}, ValueError, r"one \(height, width\) per image; got 1"),
        ({"image_sizes": torch.zeros(2, 2)}, ValueError, "at least 1 by 1 pixel"),
        ({"image_sizes": torch.zeros(2, 3)}, ValueError, r"must have shape \(B, 2\)"),
        ({"style": "yolo"}, ValueError, "style must be one of rfdetr, dfine_seg; got 'yolo'"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be a whole number of at least 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(change, kind, pattern):
    found, logits, sizes = sample()
    arguments = {"detections": found, "mask_logits": logits, "image_sizes": sizes} | change
    with pytest.raises(kind, match=pattern) as error:
        masks_per_image(**arguments)
    one_line(error)


def test_a_static_size_below_one_and_masks_of_floats_are_refused():
    with pytest.raises(ValueError, match="height must be a whole number of at least 1; got 0"):
        InstanceMasks(0, 3)
    with pytest.raises(TypeError, match="masks must be bool or uint8; got float32"):
        to_rle(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"masks must have shape \(N, H, W\)"):
        to_rle(torch.zeros(2, 2).bool())
