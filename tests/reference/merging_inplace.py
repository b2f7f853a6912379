"""Greedy non-maximum merging as one writes it down first: lists that change while they are walked, pair by pair."""

from __future__ import annotations

import numpy as np


def overlap(first, second, metric):
    """The part that two boxes share, rounded as their dtype is; 0 where it has no area."""
    zero = first.dtype.type(0)
    width = max(zero, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(zero, min(first[3], second[3]) - max(first[1], second[1]))
    shared = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    whole = min(areas) if metric == "ios" else areas[0] + areas[1] - shared
    return shared / whole if whole > 0 else zero


def greedy_merging(boxes, scores, labels, threshold, metric):
    """Give (box, score, index) of what is left, best first; labels ``None``: every class may swallow every other."""
    limit = boxes.dtype.type(threshold)
    remaining = sorted(range(len(boxes)), key=lambda i: -scores[i])
    left = []
    while remaining:
        best = remaining.pop(0)
        mine = [i for i in remaining if labels is None or labels[i] == labels[best]]
        mine = [i for i in mine if overlap(boxes[best], boxes[i], metric) >= limit]
        grown = boxes[best].astype(np.float64)
        for i in mine:
            remaining.remove(i)
            other = boxes[i].astype(np.float64)
            if overlap(grown, other, metric) >= threshold:
                grown[:2] = np.minimum(grown[:2], other[:2])
                grown[2:] = np.maximum(grown[2:], other[2:])
        left.append((grown, scores[best], best))
    return left
