"""Comparing what two whole detectors found.

A detector picks its own queries with a top-k inside, so rounding differences between runtimes can permute its raw rows.
Two whole detectors are therefore compared by matching: same label, IoU of at least 0.99, scores within 1e-3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detpost.detections import Detections

__all__ = ["Match", "match_detections", "pair_up"]

LEAST_IOU = 0.99
MOST_SCORE_DIFFERENCE = 1e-3

_STRIP = 256  # rows of the comparison of all with all that are held at once


@dataclass(frozen=True)
class Match:
    """How the detections of one image agree.

    Args:
        first: number of detections above the threshold on the first side.
        second: the same on the second side.
        matched: of both numbers together, how many have their partner on the other side.
        box_difference: greatest difference of a coordinate over matched pairs, in the unit of the boxes.
        score_difference: greatest difference of a score over matched pairs.
        pairs: the slots of partners, of the first and of the second side's valid detections.
    """

    first: int
    second: int
    matched: int
    box_difference: float
    score_difference: float
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every detection of either side has its partner."""
        return self.matched == self.first + self.second


def match_detections(
    first: Detections, second: Detections, threshold: float, most_score_difference: float = MOST_SCORE_DIFFERENCE
) -> list[Match]:
    """Match the detections of two detectors on the same images.

    Args:
        first: of B images.
        second: of the same B images.
        threshold: detections with ``score > threshold`` on their own side must have a partner. The partner may lie
            below it by the score tolerance, so that a score that rounds across the threshold is no difference.
        most_score_difference: the score tolerance.

    Returns:
        One :class:`Match` per image.
    """
    if len(first.scores) != len(second.scores):
        raise ValueError(f"different numbers of images: {len(first.scores)} and {len(second.scores)}")
    return [
        _match_image(one, other, threshold, most_score_difference)
        for one, other in zip(first.to_list(), second.to_list(), strict=True)
    ]


def _match_image(first: dict[str, Tensor], second: dict[str, Tensor], threshold: float, tolerance: float) -> Match:
    a, b = (
        {name: values[side["scores"] > threshold - tolerance].double().cpu() for name, values in side.items()}
        for side in (first, second)
    )
    fits = _fits(a, b, tolerance)
    counted = [[i for i, score in enumerate(side["scores"].tolist()) if score > threshold] for side in (a, b)]
    # Each side's counted detections are paired for themselves, so that one below the threshold never takes another's
    # partner. A single pairing that serves the detections of both exists then (Mendelsohn and Dulmage 1958).
    rows_served = pair_up(fits[counted[0]])
    columns_served = pair_up(fits[:, counted[1]].T)
    pairs = {(counted[0][row], column) for row, column in rows_served.items()}
    pairs |= {(row, counted[1][column]) for column, row in columns_served.items()}
    rows, columns = (torch.tensor([pair[side] for pair in pairs], dtype=torch.int64) for side in (0, 1))
    # Detections come best first, so those above a score are the first ones.
    box_gap = (a["boxes"][rows] - b["boxes"][columns]).abs()
    score_gap = (a["scores"][rows] - b["scores"][columns]).abs()
    return Match(
        first=len(counted[0]),
        second=len(counted[1]),
        matched=len(rows_served) + len(columns_served),
        box_difference=float(box_gap.max()) if pairs else 0.0,
        score_difference=float(score_gap.max()) if pairs else 0.0,
        pairs=tuple(sorted(pairs)),
    )


def _fits(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> Tensor:
    """Tell which of N detections may be partner of which of M: (N, M) bool, made in strips that bound the memory."""
    from torchvision.ops import box_iou

    strips = zip(*(torch.split(first[name], _STRIP) for name in ("scores", "labels", "boxes")), strict=True)
    return torch.cat(
        [
            (labels[:, None] == second["labels"])
            & ((scores[:, None] - second["scores"]).abs() <= tolerance)
            & (_overlap_with_points(boxes, second["boxes"], box_iou(boxes, second["boxes"])) >= LEAST_IOU)
            for scores, labels, boxes in strips
        ]
    )


def _overlap_with_points(first: Tensor, second: Tensor, overlap: Tensor) -> Tensor:
    """Count equal boxes of no area as overlapping whole: their IoU is 0 / 0."""
    same = (first[:, None] == second).all(dim=-1)
    return torch.where(same, 1.0, overlap.nan_to_num(0.0))


def pair_up(fits: Tensor) -> dict[int, int]:
    """Pair rows with columns one to one, as many as can be, by augmenting paths.

    Args:
        fits: (N, M), bool, which row may have which column.

    Returns:
        The column of each row that has one. A row's columns are one Python integer, a bit each, so that a step along
        a path takes a few hundred machine words; every sweep sees each column once.
    """
    packed = np.packbits(fits.numpy(), axis=1, bitorder="little")
    allowed = [int.from_bytes(row.tobytes(), "little") for row in packed]
    row_of: dict[int, int] = {}
    free = (1 << fits.shape[1]) - 1
    waiting = list(range(len(allowed)))
    while True:
        unseen, left = (1 << fits.shape[1]) - 1, []
        for row in waiting:
            path, unseen = _augmenting_path(allowed, row_of, free, unseen, row)
            row_of |= {column: row for row, column in path}
            free &= ~(1 << path[-1][1]) if path else -1
            left += [] if path else [row]
        if len(left) == len(waiting):
            return {row: column for column, row in row_of.items()}
        waiting = left


def _augmenting_path(
    allowed: list[int], row_of: dict[int, int], free: int, unseen: int, start: int
) -> tuple[list[tuple[int, int]], int]:
    """Find a path from a row without a column to a free column, as the pairs to make, and what is unseen after it."""
    path: list[tuple[int, int]] = []
    row = start
    while True:
        open_ = allowed[row] & unseen
        open_ = open_ & free or open_
        if not open_:  # a dead end: back to the row before
            if not path:
                return [], unseen
            row = path.pop()[0]
            continue
        lowest = open_ & -open_
        column = lowest.bit_length() - 1
        unseen ^= lowest
        path.append((row, column))
        if lowest & free:
            return path, unseen
        row = row_of[column]
