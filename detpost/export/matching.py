"""Comparing what two whole detectors found.

A detector picks its own queries with a top-k inside, so rounding differences between runtimes can permute its raw rows.
Two whole detectors are therefore compared by matching: same label, IoU of at least 0.99, scores within 1e-3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detpost.detections import Detections

__all__ = ["Match", "match_detections"]

LEAST_IOU = 0.99
MOST_SCORE_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Match:
    """How the detections of one image agree.

    Args:
        first: number of detections above the threshold on the first side.
        second: the same on the second side.
        matched: of both numbers together, how many have their partner on the other side.
        box_difference: greatest difference of a coordinate over matched pairs, in the unit of the boxes.
        score_difference: greatest difference of a score over matched pairs.
    """

    first: int
    second: int
    matched: int
    box_difference: float
    score_difference: float

    @property
    def ok(self) -> bool:
        """Whether every detection of either side has its partner."""
        return self.matched == self.first + self.second


def match_detections(first: Detections, second: Detections, threshold: float) -> list[Match]:
    """Match the detections of two detectors on the same images.

    Args:
        first: of B images.
        second: of the same B images.
        threshold: detections with ``score > threshold`` on their own side must have a partner. The partner may lie
            below it by the score tolerance, so that a score that rounds across the threshold is no difference.

    Returns:
        One :class:`Match` per image.
    """
    if len(first.scores) != len(second.scores):
        raise ValueError(f"different numbers of images: {len(first.scores)} and {len(second.scores)}")
    return [_match_image(one, other, threshold) for one, other in zip(first.to_list(), second.to_list(), strict=True)]


def _match_image(first: dict[str, Tensor], second: dict[str, Tensor], threshold: float) -> Match:
    from torchvision.ops import box_iou

    a, b = (
        {
            name: values[side["scores"] > threshold - MOST_SCORE_DIFFERENCE].double().cpu()
            for name, values in side.items()
        }
        for side in (first, second)
    )
    overlap = _overlap_with_points(a["boxes"], b["boxes"], box_iou(a["boxes"], b["boxes"]))
    fits = (
        (a["labels"][:, None] == b["labels"])
        & ((a["scores"][:, None] - b["scores"]).abs() <= MOST_SCORE_DIFFERENCE)
        & (overlap >= LEAST_IOU)
    )
    pairs = _pair(fits)
    counted_a, counted_b = a["scores"] > threshold, b["scores"] > threshold
    with_partner = sum(int(counted_a[i]) + int(counted_b[j]) for i, j in pairs)
    rows, columns = (torch.tensor([pair[side] for pair in pairs], dtype=torch.int64) for side in (0, 1))
    box_gap = (a["boxes"][rows] - b["boxes"][columns]).abs()
    score_gap = (a["scores"][rows] - b["scores"][columns]).abs()
    return Match(
        first=int(counted_a.sum()),
        second=int(counted_b.sum()),
        matched=with_partner,
        box_difference=float(box_gap.max()) if pairs else 0.0,
        score_difference=float(score_gap.max()) if pairs else 0.0,
    )


def _overlap_with_points(first: Tensor, second: Tensor, overlap: Tensor) -> Tensor:
    """Count equal boxes of no area as overlapping whole: their IoU is 0 / 0."""
    same = (first[:, None] == second).all(dim=-1)
    return torch.where(same, 1.0, overlap.nan_to_num(0.0))


def _pair(fits: Tensor) -> list[tuple[int, int]]:
    """Pair rows with columns one to one, as many as can be, by augmenting paths."""
    partner: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column in fits[row].nonzero().flatten().tolist():
            if column in seen:
                continue
            seen.add(column)
            if column not in partner or place(partner[column], seen):
                partner.update({column: row})
                return True
        return False

    for row in range(len(fits)):
        place(row, set())
    return [(row, column) for column, row in partner.items()]
