"""Detectors and raw outputs for the export tests."""

from __future__ import annotations

import math

import torch
from torch import nn

CLASSES = 5


class SmallDetector(nn.Module):
    """A detector of any image size that compiles in a second: a pixel grid of queries."""

    def __init__(self, queries: int = 12) -> None:
        super().__init__()
        self.queries = queries
        generator = torch.Generator().manual_seed(0)
        self.features = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.heads = nn.Linear(8, CLASSES + 4)
        self.load_state_dict(
            {name: torch.randn(value.shape, generator=generator) for name, value in self.state_dict().items()}
        )

    def forward(self, images):
        features = nn.functional.adaptive_avg_pool2d(self.features(images).relu(), (self.queries, 1))
        found = self.heads(features.flatten(2).transpose(1, 2))
        return {"logits": found[..., :CLASSES], "pred_boxes": found[..., CLASSES:].sigmoid()}


def raw(batch, queries=20, classes=CLASSES, seed=0, levels=2.0):
    """Logits with many ties, boxes, and image sizes that differ from image to image."""
    generator = torch.Generator().manual_seed(seed + batch)
    logits = (torch.randn(batch, queries, classes, generator=generator) * levels).round() / levels
    boxes = torch.rand(batch, queries, 4, generator=generator)
    return logits, boxes, torch.randint(10, 2000, (batch, 2), generator=generator)


def adversarial(batch, queries=20, classes=CLASSES):
    """Raw outputs on which runtimes are known to disagree: name to (logits, boxes, image sizes)."""
    levels, boxes, sizes = raw(batch, queries, classes)
    chance = torch.rand(levels.shape, generator=torch.Generator().manual_seed(batch))
    one_hot = torch.where(torch.arange(queries * classes).view(queries, classes) == 7, 5.0, -5.0).expand_as(levels)
    logits = {
        "random": chance * 10 - 5,
        "few levels": levels,
        "constant": torch.full_like(levels, -2.5),
        "one-hot": one_hot.contiguous(),
        "infinities": torch.where(chance < 0.3, math.inf, torch.where(chance > 0.7, -math.inf, levels)),
        "all -inf": torch.full_like(levels, -math.inf),
        "NaN": torch.where(chance < 0.3, math.nan, levels),
        "mostly NaN, else -inf": torch.where(chance < 0.9, math.nan, -math.inf),
        "an image of NaN": torch.cat((torch.full_like(levels[:1], math.nan), levels[1:])),
        "zeros of both signs": torch.where(chance < 0.5, 0.0, -0.0),
        "half": (chance * 10 - 5).half().float(),
    }
    return {name: (value, boxes, sizes) for name, value in logits.items()}
