"""PyTorch's default device and dtype are the user's: nothing is made on the one, or rounded to the other, unasked."""

import contextlib
import functools
import subprocess
import sys

import pytest
import torch
from PIL import Image

from detpost import (
    DecodeSpec,
    DetectionPostProcessor,
    Detections,
    Detector,
    boxes,
    fusion,
    losses,
    metrics,
    select_top_k,
)
from detpost import nms as suppression
from detpost.heads import DETRPoseKeypoints, InstanceMasks, OrientedBoxes, RFDETRKeypoints, masks_per_image, to_rle
from detpost.images import Preprocessing, read_image
from detpost.integrations import kornia as kornia_drop_in
from detpost.integrations import rfdetr, rtdetr, ultralytics
from detpost.kernels.aten import decode as aten_decode
from detpost.kernels.cpu import decode as native_decode
from detpost.reference import softmax
from detpost.zoo import sample_images
from tests.mixin import assert_same

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(2, 30, 5, generator=GENERATOR).mul(4).round().div(4)
LOGITS[0, 3, 1], LOGITS[1, 2] = torch.nan, -torch.inf
BOXES = torch.rand(2, 30, 4, generator=GENERATOR)
SIZES = torch.tensor([[480, 640], [37, 1000]])
CORNERS = boxes.convert(BOXES, "cxcywh", "xyxy")
LONG = torch.randn(2, 20_000, generator=GENERATOR).mul(64).round().div(64)
MASKS = torch.randn(2, 30, 7, 9, generator=GENERATOR)
POINTS = torch.rand(2, 30, 10, 8, generator=GENERATOR)
ANGLED = torch.rand(2, 30, 5, generator=GENERATOR)
PLANES = torch.rand(2, 3, 12, 11, generator=GENERATOR)
VOLUMES = torch.rand(1, 2, 5, 6, 7, generator=GENERATOR)
TARGET = torch.randint(3, (2, 1, 12, 11), generator=GENERATOR)
DEEP_TARGET = torch.randint(2, (1, 1, 5, 6, 7), generator=GENERATOR)
SINGLE = (TARGET > 0).to(torch.float32)
MATRIX = torch.tensor([[0.5, 0.1, 3.0], [0.0, 2.0, -1.0], [0.0, 0.0, 1.0]])
PIXELS = torch.randint(256, (2, 20, 30, 3), generator=GENERATOR, dtype=torch.uint8).numpy()


def found(threshold=0.3):
    return Detections(
        torch.linspace(0.9, 0.1, 20).repeat(2, 1),
        torch.arange(20).repeat(2, 1) % 3,
        CORNERS[:, :20] * 20,
        torch.arange(20).repeat(2, 1),
        torch.linspace(0.9, 0.1, 20).repeat(2, 1) > threshold,
    )


FOUND = found()
CLASSES = [torch.arange(30) % 2] * 2


def decode(**fields):
    return lambda: DetectionPostProcessor(DecodeSpec(**fields))(LOGITS, BOXES, SIZES)


def with_gradient(loss, pred, target):
    def run():
        leaf = pred.clone().requires_grad_()
        value = loss()(leaf, target)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    return run


def gradient_of_a_decode(dtype):
    leaves = LOGITS.to(dtype).requires_grad_(), BOXES.to(dtype).requires_grad_()
    found = DetectionPostProcessor.from_preset("rtdetr", top_k=9, score_threshold=0.5)(*leaves, SIZES)
    once = torch.autograd.grad(found.scores.sum() + found.boxes.square().sum(), leaves, create_graph=True)
    return *torch.autograd.grad(once[0].square().sum() + once[1].square().sum(), leaves, retain_graph=True), *(
        torch.autograd.grad(found.scores.sum() + found.boxes.sum(), leaves)
    )


CALLS = {
    **{
        f"decode {activation} {selection} {background}": decode(
            activation=activation, selection=selection, background=background, top_k=9, score_threshold=0.2, clip=True
        )
        for activation in ("sigmoid", "softmax")
        for selection in ("flat", "per_query")
        for background in ("none", "first")
    },
    "decode of float64": lambda: DetectionPostProcessor.from_preset("detr")(LOGITS.double(), BOXES.double(), SIZES),
    "decode of half": lambda: DetectionPostProcessor.from_preset("rtdetr")(LOGITS.half(), BOXES.half(), SIZES),
    "decode with a gradient": lambda: DetectionPostProcessor.from_preset("detr")(
        LOGITS.clone().requires_grad_(), BOXES, SIZES
    ),
    "decode and its gradient": lambda: gradient_of_a_decode(torch.float32),
    "decode of half and its gradient": lambda: gradient_of_a_decode(torch.float16),
    "select": lambda: select_top_k(LOGITS.flatten(1), 7),
    "select of a long row": lambda: select_top_k(LONG, 100),
    "select of float64": lambda: select_top_k(LONG.double(), 100),
    "nms": lambda: suppression.nms(CORNERS, BOXES[..., 0], 0.2),
    "nms of detections": lambda: suppression.NonMaximumSuppression(0.2, compact=True)(FOUND),
    "convert": lambda: boxes.convert(BOXES, "cxcywh", "xywh"),
    "scale": lambda: boxes.scale(CORNERS, SIZES),
    "clip": lambda: boxes.clip(CORNERS * 600, SIZES),
    "hflip": lambda: boxes.hflip(CORNERS, 640),
    "vflip": lambda: boxes.vflip(CORNERS, 480),
    "transform": lambda: boxes.transform(CORNERS, MATRIX),
    "unletterbox": lambda: boxes.unletterbox(CORNERS * 640, SIZES, (640, 640)),
    "masks": lambda: InstanceMasks(30, 40)(FOUND, MASKS),
    "masks of dfine": lambda: InstanceMasks(30, 40, style="dfine_seg")(FOUND, MASKS),
    "masks per image": lambda: masks_per_image(FOUND, MASKS, [(30, 40), (50, 20)]),
    "masks per image of dfine": lambda: masks_per_image(FOUND, MASKS, [(30, 40), (50, 20)], style="dfine_seg"),
    "run lengths": lambda: to_rle(MASKS[0] > 0),
    "pose": lambda: DETRPoseKeypoints()(FOUND, POINTS[..., :2], SIZES),
    "keypoints": lambda: RFDETRKeypoints([3, 2, 5])(FOUND, torch.cat((POINTS, POINTS[:, :, :5]), 2), SIZES),
    "oriented": lambda: OrientedBoxes()(FOUND, ANGLED, SIZES),
    "fusion": lambda: fusion.weighted_boxes(list(BOXES), list(BOXES[..., 0]), CLASSES, [1, 2]),
    "merging of tiles": lambda: [
        fusion.merge(FOUND, [(0, 0), (9, 5)], method, 0.3) for method in ("nms", "nmm", "wbf")
    ],
    "erosion": with_gradient(losses.HausdorffERLoss, PLANES, TARGET),
    "erosion of a volume": with_gradient(losses.HausdorffERLoss3D, VOLUMES, DEEP_TARGET),
    "erosion of float64": with_gradient(losses.HausdorffERLoss, PLANES.double(), TARGET),
    "distance loss": with_gradient(
        lambda: losses.HausdorffDTLoss(include_background=True, sigmoid=True), PLANES[:, :1], SINGLE
    ),
    "log distance loss": with_gradient(
        lambda: losses.LogHausdorffDTLoss(to_onehot_y=True, softmax=True), PLANES.double(), TARGET
    ),
    "distance transform": lambda: losses.distance_transform_edt(SINGLE, spacing=(1.0, 2.0)),
    "distance transform of a volume": lambda: losses.distance_transform_edt(VOLUMES > 0.1),
    "hausdorff distance": lambda: metrics.hausdorff_distance(SINGLE, (PLANES[:, :1] > 0.5).float(), percentile=95),
    "to_list": lambda: FOUND.to_list(),
    "to_coco": lambda: FOUND.to_coco([1, 2]),
    "to_kornia": lambda: FOUND.to_kornia(),
    "image of a file": lambda: read_image(sample_images()[0]),
    "image of an array": lambda: read_image(PIXELS[0]),
    "image of Pillow": lambda: read_image(Image.fromarray(PIXELS[0])),
    "preprocessing": lambda: Preprocessing(16, 24, mean=(0.1, 0.2, 0.3))([read_image(image) for image in PIXELS]),
    "kornia": lambda: kornia_drop_in.DETRPostProcessor(0.3, num_classes=5)(LOGITS, BOXES, SIZES),
    "rtdetr": lambda: rtdetr.RTDETRPostProcessor(5, remap_mscoco_category=True)(
        {"pred_logits": LOGITS, "pred_boxes": BOXES}, SIZES
    ),
    "rfdetr": lambda: rfdetr.PostProcess(10)({"pred_logits": LOGITS, "pred_boxes": BOXES}, SIZES),
    "ultralytics": lambda: ultralytics.postprocess(
        torch.cat((BOXES, LOGITS.sigmoid().nan_to_num(0)), -1), [(480, 640), (37, 1000)], 0.3, classes=[1, 2]
    ),
}


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "a default device": functools.partial(default_device, "meta"),
    "a device as a context": functools.partial(torch.device, "meta"),
    "float64 by default": functools.partial(default_dtype, torch.float64),
    "bfloat16 by default": functools.partial(default_dtype, torch.bfloat16),
}


def forget():
    """As in a fresh process: whatever is made once is made again."""
    native_decode._templates.cache_clear()
    softmax.tables_on.cache_clear()
    aten_decode.products_on.cache_clear()


# What has more than one form goes through each of them.
FORMED = [
    name for name in CALLS if name.startswith(("decode", "select", "nms", "fusion", "merging", "erosion", "distance"))
]


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize(
    ("name", "kernel"),
    [(name, kernel) for name in CALLS for kernel in ("", "numpy", "aten") if name in FORMED or not kernel],
)
def test_defaults_change_neither_values_nor_dtypes_nor_devices(monkeypatch, name, default, kernel):
    monkeypatch.setenv("DETPOST_KERNEL", kernel)
    call = CALLS[name]
    expected = call()
    forget()
    with DEFAULTS[default]():
        inside = call()
    assert_same(inside, expected)
    assert_same(call(), expected)  # what was made inside does not serve on


# Not on meta: there transformers itself refuses to load weights.
@pytest.mark.parametrize("default", [name for name in DEFAULTS if "device" not in name])
def test_a_detector_loads_and_detects_under_any_default(default):
    images = sample_images()[:1]
    expected = Detector.load("tiny").predict(images)
    with DEFAULTS[default]():
        found = Detector.load("tiny", device="cpu").predict(images)
    assert_same([{k: v for k, v in image.items() if k != "label_names"} for image in found],
                [{k: v for k, v in image.items() if k != "label_names"} for image in expected])  # fmt: skip


@pytest.mark.parametrize("first", ["with torch.device('meta'): post(*arguments)", "torch.set_default_device('meta')"])
def test_a_process_that_starts_with_a_default_device_survives(first):
    code = f"""
import torch
from detpost import DetectionPostProcessor
post = DetectionPostProcessor.from_preset("rtdetr", top_k=3)
arguments = torch.randn(1, 20, 4), torch.rand(1, 20, 4), torch.tensor([[30, 40]])
{first}
for _ in range(3):
    found = post(*arguments)
assert found.scores.device.type == "cpu" and bool((found.scores > 0).all())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, (run.returncode, run.stderr[-500:])
