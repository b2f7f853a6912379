"""The peers' own decodes, each as its user calls it today; a peer that is not installed gives nothing."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from benchmarks.inputs import Case, Size, is_installed, no_grad

__all__ = ["detr_lists", "rfdetr_class", "sigmoid_lists"]

Raw = tuple[list[Tensor], list[Tensor], Tensor]


@functools.cache
def rfdetr_class() -> Any:
    """RF-DETR's PostProcess, without what its package imports on the way; ``None`` where it is not installed."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "rfdetr"}
    if not before:
        spec = importlib.util.find_spec("rfdetr")
        if spec is None or not spec.submodule_search_locations:
            return None
        for name in ("rfdetr", "rfdetr.models", "rfdetr.utilities"):
            module = types.ModuleType(name)
            module.__path__ = [f"{spec.submodule_search_locations[0]}/{'/'.join(name.split('.')[1:])}"]
            sys.modules[name] = module
    found = importlib.import_module("rfdetr.models.postprocess").PostProcess
    if not before:
        for name in [name for name in sys.modules if name.partition(".")[0] == "rfdetr"]:
            del sys.modules[name]
    return found


def outputs_of(logits: Tensor, boxes: Tensor) -> SimpleNamespace:
    """Raw outputs as transformers hands them over."""
    return SimpleNamespace(logits=logits, pred_boxes=boxes)


def sigmoid_lists(size: Size, raw: Raw, kept: int, threshold: float) -> dict[str, Case]:
    """Sigmoid decodes that end in what their user reads: lists of one entry per image."""
    logits, boxes, sizes = raw
    contenders: dict[str, Case] = {}
    if is_installed("transformers"):
        from transformers import RTDetrImageProcessor

        processor = RTDetrImageProcessor()
        contenders |= {
            "transformers": no_grad(
                lambda i: processor.post_process_object_detection(
                    outputs_of(logits[i], boxes[i]), threshold=threshold, target_sizes=sizes
                )
            )
        }
    if is_installed("kornia"):
        from kornia.models.rt_detr.post_processor import DETRPostProcessor

        theirs = DETRPostProcessor(confidence_threshold=threshold, num_classes=size[2], num_top_queries=kept)
        contenders |= {"kornia": no_grad(lambda i: theirs(logits[i], boxes[i], sizes))}
    if rfdetr_class() is not None:
        rfdetr = rfdetr_class()(num_select=kept)
        contenders |= {
            "RF-DETR": no_grad(lambda i: rfdetr({"pred_logits": logits[i], "pred_boxes": boxes[i]}, target_sizes=sizes))
        }
    if is_installed("tests.reference.rtdetr_inplace"):  # in a checkout: the in-place original, as RT-DETR has it
        from tests.reference.rtdetr_inplace import decode_

        contenders |= {"RT-DETR (in place)": no_grad(lambda i: decode_(logits[i], boxes[i].clone(), sizes, kept))}
    return contenders


def detr_lists(raw: Raw, threshold: float) -> dict[str, Case]:
    """Softmax decodes of DETR, to lists."""
    if not is_installed("transformers"):
        return {}
    from transformers import DetrImageProcessor

    logits, boxes, sizes = raw
    processor = DetrImageProcessor()
    return {
        "transformers": no_grad(
            lambda i: processor.post_process_object_detection(
                outputs_of(logits[i], boxes[i]), threshold=threshold, target_sizes=sizes
            )
        )
    }
