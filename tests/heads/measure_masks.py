"""Least time and peak memory of masks beside RF-DETR's own: ``python -m tests.heads.measure_masks``.

Needs rfdetr (``pip install --no-deps rfdetr``). Each subject runs in a process of its own, whose peak is then its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import resource
import subprocess
import sys
import time
import types

import torch

SLOTS, SIDE, SIZE = 300, 96, (1080, 1920)


@functools.cache
def rfdetr_class():
    """RF-DETR's PostProcess, without what its package imports on the way; None where it is not installed."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "rfdetr"}
    if not before:
        spec = importlib.util.find_spec("rfdetr")
        if spec is None:
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


def inputs(valid: int, kind: str, size: tuple[int, int]):
    """Logits of which ``valid`` are over 0.5, boxes, and masks that are noise or blobs."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.where(torch.arange(SLOTS) < valid, 3.0, -3.0) + torch.rand(SLOTS, generator=generator)
    boxes = 0.2 + 0.5 * torch.rand(1, SLOTS, 4, generator=generator)
    masks = torch.randn(1, SLOTS, SIDE, SIDE, generator=generator)
    if kind == "blobs":
        y, x = torch.meshgrid(torch.linspace(0, 1, SIDE), torch.linspace(0, 1, SIDE), indexing="ij")
        cx, cy, w, h = boxes[0, :, :, None, None].unbind(1)
        masks = (8 * (1 - ((x - cx) / w * 3).square() - ((y - cy) / h * 3).square()) + 0.3 * masks[0])[None]
    return scores.view(1, SLOTS, 1), boxes, masks, torch.tensor([size])


def subject(name: str, valid: int, kind: str, size: tuple[int, int]):
    logits, boxes, masks, sizes = inputs(valid, kind, size)
    if name.startswith("rfdetr"):
        post = rfdetr_class()(num_select=SLOTS)
        outputs = {"pred_logits": logits, "pred_boxes": boxes, "pred_masks": masks}
        threshold = 0.5 if name == "rfdetr threshold" and valid < SLOTS else None
        return lambda: post(outputs, sizes, score_threshold=threshold)[0]["masks"]
    from detpost import DetectionPostProcessor
    from detpost.heads import masks_per_image

    post = DetectionPostProcessor.from_preset("rfdetr", score_threshold=0.5 if valid < SLOTS else None)
    return lambda: masks_per_image(post(logits, boxes, sizes), masks, sizes)[0]


def measure(name: str, valid: int, kind: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    subject(name, valid, kind, (120, 120))()  # what is loaded on the first call is no part of the peak
    run = subject(name, valid, kind, SIZE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times, work, checksum, count = [], [], 0, 0
    for _ in range(5):
        start, begun = time.perf_counter(), time.process_time()
        result = run()
        times.append(time.perf_counter() - start)
        work.append(time.process_time() - begun)
        checksum, count = sum(int(mask.count_nonzero()) for mask in result), len(result)
        del result
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": round(min(times), 3),
        "processor seconds": round(min(work), 3),
        "MiB": round(peak - before),
        "masks": count,
        "pixels": checksum,
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
    else:
        for threads in (1, 2):
            for valid in (SLOTS, 20):
                for kind in ("noise", "blobs"):
                    for name in ("rfdetr", "rfdetr threshold", "detpost"):
                        if name == "rfdetr threshold" and valid == SLOTS:
                            continue
                        command = [sys.executable, "-m", __spec__.name, name, str(valid), kind, str(threads)]
                        done = subprocess.run(command, capture_output=True, text=True, check=True)
                        print(threads, valid, kind, name, done.stdout.strip().splitlines()[-1], flush=True)
