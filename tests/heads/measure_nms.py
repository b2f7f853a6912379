"""Time of NMS beside torchvision's: ``python -m tests.heads.measure_nms``; least of many runs, one thread."""

from __future__ import annotations

import time

import torch
from torchvision.ops import batched_nms

from detpost import Detections
from detpost.nms import NonMaximumSuppression


def least(run, times=40):
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return round(min(found[3:]) * 1e6)


def crowd(batch, count, classes):
    generator = torch.Generator().manual_seed(0)
    centre = torch.rand(batch, count, 2, generator=generator) * 640
    size = torch.rand(batch, count, 2, generator=generator) * 150 + 4
    scores = torch.rand(batch, count, generator=generator).sort(descending=True).values
    labels = torch.randint(classes, (batch, count), generator=generator)
    queries, valid = torch.arange(count).expand(batch, -1), torch.ones(batch, count, dtype=torch.bool)
    return Detections(scores, labels, torch.cat((centre - size / 2, centre + size / 2), -1), queries, valid)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("B K classes: torchvision, detpost eager, detpost compiled (microseconds)")
    for batch, count, classes in ((1, 300, 80), (1, 300, 1), (8, 300, 80), (1, 900, 80), (1, 900, 1)):
        found = crowd(batch, count, classes)
        suppress = NonMaximumSuppression(0.5)
        torch._dynamo.reset()
        compiled = torch.compile(suppress, fullgraph=True)
        images = list(zip(found.boxes, found.scores, found.labels, strict=True))
        print(
            *(batch, count, classes),
            *(
                least(
                    lambda images=images: [batched_nms(boxes, scores, labels, 0.5) for boxes, scores, labels in images]
                ),
                least(lambda found=found, suppress=suppress: suppress(found)),
                least(lambda found=found, compiled=compiled: compiled(found)),
            ),
            flush=True,
        )
