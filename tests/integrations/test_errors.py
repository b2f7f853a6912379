"""What is wrong for a library is caught by the same ``except`` with its drop-in, and said in one line."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detpost.integrations import kornia, rfdetr, rtdetr, transformers, ultralytics
from tests.integrations.references import SIZES, outputs
from tests.mixin import one_line

LOGITS, BOXES = outputs().values()
WRONG_SIZES = {
    "of two images": SIZES[:2],
    "of four images": torch.ones(4, 2),
    "triples": torch.ones(3, 3),
    "singles": torch.ones(3, 1),
    "one row": torch.ones(3),
}
WRONG_OUTPUTS = {
    "logits of one image": (LOGITS[0], BOXES),
    "boxes of five": (LOGITS, torch.rand(3, 40, 5)),
    "boxes of three": (LOGITS, torch.rand(3, 40, 3)),
    "boxes of other queries": (LOGITS, BOXES[:, :5]),
    "boxes of other images": (LOGITS, BOXES[:2]),
    "no logits": (None, BOXES),
    "arrays": (LOGITS.numpy(), BOXES.numpy()),
}


def hold(theirs, ours, *arguments):
    """Both refuse, and what catches theirs catches ours, which is one line of our own."""
    with pytest.raises(Exception) as expected:  # noqa: PT011
        theirs(*arguments)
    with pytest.raises((ValueError, TypeError), match=r"must (be|have|hold) .*; got ") as error:
        ours(*arguments)
    assert isinstance(error.value, expected.type), expected.value
    one_line(error)


@pytest.mark.peers
@pytest.mark.parametrize("wrong", WRONG_SIZES)
def test_sizes_that_kornia_refuses(wrong):
    theirs = pytest.importorskip("kornia.models.rt_detr").DETRPostProcessor
    both = [made(0.3, num_classes=7, num_top_queries=30) for made in (theirs, kornia.DETRPostProcessor)]
    hold(*both, LOGITS, BOXES, WRONG_SIZES[wrong])


@pytest.mark.peers
@pytest.mark.parametrize("wrong", WRONG_OUTPUTS)
def test_outputs_that_kornia_refuses(wrong):
    theirs = pytest.importorskip("kornia.models.rt_detr").DETRPostProcessor
    both = [made(0.3, num_classes=7, num_top_queries=290) for made in (theirs, kornia.DETRPostProcessor)]
    hold(*both, *WRONG_OUTPUTS[wrong], SIZES)


@pytest.mark.peers
def test_what_else_kornia_refuses():
    theirs = pytest.importorskip("kornia.models.rt_detr").DETRPostProcessor
    for sizes in (None, SIZES.tolist(), SIZES.numpy()):
        hold(theirs(0.3, 7, 30), kornia.DETRPostProcessor(0.3, 7, 30), LOGITS, BOXES, sizes)
    hold(theirs(0.3, 3, 30), kornia.DETRPostProcessor(0.3, 3, 30), LOGITS, BOXES, SIZES)  # fewer classes than logits
    hold(lambda it: theirs(it), lambda it: kornia.DETRPostProcessor(it), "high")
    hold(lambda it: theirs(0.3, it, 30)(LOGITS, BOXES, SIZES), lambda it: kornia.DETRPostProcessor(0.3, it, 30), "7")


PROCESSORS = ("Detr", "DeformableDetr", "RTDetr", "Owlv2")


def methods(name):
    """A processor's method, and the same of a patched one."""
    processor = getattr(pytest.importorskip("transformers"), f"{name}ImageProcessor")()

    def ours(raw, threshold, sizes):
        with transformers.patched(processor):
            return processor.post_process_object_detection(raw, threshold, sizes)

    return processor.post_process_object_detection, ours


def hold_where_refused(name, *arguments):
    """As ``hold``, and whether the original refuses: some processors take by luck what others do not."""
    theirs, ours = methods(name)
    try:
        theirs(*arguments)
    except Exception:
        hold(theirs, ours, *arguments)
        return True
    return False


@pytest.mark.peers
@pytest.mark.parametrize("name", PROCESSORS)
def test_sizes_that_transformers_refuses(name):
    raw = SimpleNamespace(logits=LOGITS, pred_boxes=BOXES)
    wrong = (*WRONG_SIZES.values(), [(4, 5)] * 2, [(4,)] * 3, [4, 5, 6], [None] * 3, 5)
    assert sum(hold_where_refused(name, raw, 0.3, sizes) for sizes in wrong) >= 8


@pytest.mark.peers
@pytest.mark.parametrize("name", PROCESSORS)
def test_outputs_and_thresholds_that_transformers_refuses(name):
    wrong = [SimpleNamespace(logits=logits, pred_boxes=boxes) for logits, boxes in WRONG_OUTPUTS.values()]
    assert sum(hold_where_refused(name, raw, 0.1, None) for raw in wrong) >= 4
    raw = SimpleNamespace(logits=LOGITS, pred_boxes=BOXES)
    hold(*methods(name), raw, "high", None)
    for incomplete in (SimpleNamespace(logits=LOGITS), SimpleNamespace(pred_boxes=BOXES), outputs()):
        hold(*methods(name), incomplete, 0.3, None)


@pytest.mark.peers
def test_no_queries_are_no_detections_as_in_transformers():
    for name in ("Detr", "DeformableDetr"):
        for method in methods(name):
            found = method(SimpleNamespace(logits=LOGITS[:, :0], pred_boxes=BOXES[:, :0]), 0.3, None)
            assert [len(image["scores"]) for image in found] == [0, 0, 0]


@pytest.mark.peers
def test_what_rfdetr_refuses():
    theirs, ours = pytest.importorskip("rfdetr.models.postprocess").PostProcess(30), rfdetr.PostProcess(30)
    raw = outputs()
    for sizes in (*WRONG_SIZES.values(), None, SIZES.tolist(), SIZES.numpy()):
        hold(theirs, ours, raw, sizes)
    for logits, boxes in WRONG_OUTPUTS.values():
        hold(theirs, ours, {"pred_logits": logits, "pred_boxes": boxes}, SIZES)
    for wrong in ({}, {"pred_logits": LOGITS}, {"pred_boxes": BOXES}, (LOGITS, BOXES), SimpleNamespace(**raw)):
        hold(theirs, ours, wrong, SIZES)
    masks = raw | {"pred_masks": torch.randn(3, 40, 2, 2)}
    hold(theirs, ours, masks, SIZES, "high")
    hold(theirs, ours, raw | {"pred_masks": torch.randn(3, 3, 2, 2)}, SIZES)


def test_what_rfdetr_asserts_is_an_assertion_error_also_where_it_is_not_installed():
    for sizes in (SIZES[:2], torch.ones(3, 3), torch.ones(3, 1)):
        with pytest.raises(AssertionError, match=r"target_sizes must be a tensor \(B, 2\) = \(3, 2\)"):
            rfdetr.PostProcess()(outputs(), sizes)


def test_what_the_original_rtdetr_refuses():
    post = rtdetr.RTDETRPostProcessor(7, num_top_queries=30)
    for sizes in WRONG_SIZES.values():
        with pytest.raises(RuntimeError, match=r"orig_target_sizes must be .* one \(width, height\)") as error:
            post(outputs(), sizes)
        one_line(error)
    for sizes in (None, SIZES.tolist()):
        with pytest.raises(AttributeError, match="orig_target_sizes must be a tensor"):
            post(outputs(), sizes)
    for wrong, came in (({}, "nothing"), ({"pred_logits": LOGITS}, "pred_logits"), ({"pred_boxes": BOXES}, "pred_b")):
        with pytest.raises(KeyError, match=f"^outputs must have pred_logits and pred_boxes; got {came}") as error:
            post(wrong, SIZES)
        one_line(error)
    for name in ("boxes of other queries", "boxes of other images"):
        with pytest.raises(RuntimeError, match="pred_boxes must have shape"):
            post(dict(zip(outputs(), WRONG_OUTPUTS[name], strict=True)), SIZES)
    with pytest.raises(RuntimeError, match="num_classes = 3 classes; got 7"):
        rtdetr.RTDETRPostProcessor(3)(outputs(), SIZES)


@pytest.mark.parametrize("decode", [ultralytics.postprocess, ultralytics.postprocess_selected])
def test_what_ultralytics_refuses(decode):
    shapes = SIZES.tolist()
    good = torch.rand(3, 5, 6)
    for wrong in (None, np.zeros((3, 5, 6)), []):
        with pytest.raises(AttributeError, match="preds must be a tensor"):
            decode(wrong, shapes)
    for wrong in (torch.rand(3, 6), torch.rand(3, 5, 3)):
        with pytest.raises(RuntimeError, match="preds must have shape"):
            decode(wrong, shapes)
    with pytest.raises(IndexError, match="one pair for each of 3 images"):
        decode(good, shapes[:2])
    with pytest.raises(TypeError, match="conf must be a number; got 'high'"):
        decode(good, shapes, conf="high")
