"""What changed between the detections of two versions of a detector, one by one, and how much in one number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from detpost.verify.matching import pair_up

__all__ = ["Change", "Changes", "compare_detections", "disagreement"]

Found = Mapping[str, np.ndarray[Any, Any]]
"""Detections of one image: ``scores`` (D,), ``labels`` (D,), ``boxes`` (D, 4) xyxy, best first, all of them."""

Kind = Literal["lost", "gained", "relabelled", "drifted"]

SAME_PLACE = 0.5  # COCO's least IoU: below it nobody calls two boxes one detection
DRIFT = 0.75  # COCO's strict IoU: above it a box that moved is as good
SLACK = 0.1  # a score that moved by less, over the threshold or under it, is rounding, not damage


@dataclass(frozen=True)
class Change:
    """One detection that is another in the second version, or is in one of them alone.

    Args:
        kind: ``"lost"``: the reference's alone; ``"gained"``: the other's alone; ``"relabelled"``: another class at the
            same place (IoU of at least 0.5); ``"drifted"``: the same class, IoU below 0.75.
        image: its number among the images.
        label: the reference's class; of what was gained the other's.
        score: the reference's score; 0 of what was gained where the reference has nothing there.
        other_label: the other's class, -1 where it has nothing there.
        other_score: the other's score for it, at any height; 0 where it has nothing there.
        margin: how far the score of the side that has it is above the threshold.
        iou: overlap of both boxes, 0 where there is one alone.
        box: xyxy in pixels, of the reference; of what was gained the other's.
        other_box: the other's, where it has one.
        borderline: whether both scores lie within 0.1 of each other, on two sides of the threshold: listed, uncounted.
    """

    kind: Kind
    image: int
    label: int
    score: float
    other_label: int
    other_score: float
    margin: float
    iou: float
    box: tuple[float, ...]
    other_box: tuple[float, ...] | None
    borderline: bool

    def to_dict(self) -> dict[str, Any]:
        """Give it as JSON holds it."""
        return asdict(self)


@dataclass(frozen=True)
class Changes:
    """Every change on a set of images.

    Args:
        reference: number of the reference's detections above the threshold.
        other: number of the other's.
        changes: image by image.
    """

    reference: int
    other: int
    changes: tuple[Change, ...]

    @property
    def counted(self) -> tuple[Change, ...]:
        """Those that are not borderline."""
        return tuple(change for change in self.changes if not change.borderline)

    @property
    def loss(self) -> float:
        """The share of both sides' detections that have no partner: the same class, IoU of at least 0.75."""
        unmatched = sum(2 if change.kind in ("relabelled", "drifted") else 1 for change in self.counted)
        return unmatched / max(1, self.reference + self.other)

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each kind, and how many borderline."""
        kinds = Counter(change.kind for change in self.counted)
        borderline = len(self.changes) - len(self.counted)
        return {kind: kinds[kind] for kind in ("lost", "gained", "relabelled", "drifted")} | {"borderline": borderline}


def compare_detections(reference: Sequence[Found], other: Sequence[Found], threshold: float) -> Changes:
    """List what changed.

    Args:
        reference: detections of each image.
        other: likewise, of the same images.
        threshold: detections with ``score > threshold`` are looked at.

    Returns:
        The changes.
    """
    found: list[Change] = []
    for image, (one, two) in enumerate(zip(reference, other, strict=True)):
        found.extend(_changes_of_image(image, one, two, threshold))
    above = [sum(int((each["scores"] > threshold).sum()) for each in side) for side in (reference, other)]
    return Changes(above[0], above[1], tuple(found))


def _changes_of_image(image: int, one: Found, other: Found, threshold: float) -> Iterable[Change]:
    overlap = _overlap(one["boxes"], other["boxes"])
    same = one["labels"][:, None] == other["labels"][None]
    mine, theirs = (np.flatnonzero(side["scores"] > threshold).tolist() for side in (one, other))

    def make(kind: Kind, first: int | None, second: int | None) -> Change:
        shown, beside = (one, first) if first is not None else (other, second), other
        scores = [float(side["scores"][at]) if at is not None else 0.0 for side, at in ((one, first), (other, second))]
        margin = float(shown[0]["scores"][shown[1]]) - threshold
        crossing = kind in ("lost", "gained") and abs(scores[0] - scores[1]) <= SLACK
        return Change(
            kind=kind,
            image=image,
            label=int(shown[0]["labels"][shown[1]]),
            score=scores[0],
            other_label=-1 if second is None else int(beside["labels"][second]),
            other_score=scores[1],
            margin=margin,
            iou=float(overlap[first, second]) if first is not None and second is not None else 0.0,
            box=tuple(map(float, shown[0]["boxes"][shown[1]])),
            other_box=None if second is None else tuple(map(float, beside["boxes"][second])),
            borderline=crossing and first is not None and second is not None,
        )

    # The closest first, so that a box that stayed never loses its partner to one that moved.
    for kind, fits in (
        (None, same & (overlap >= DRIFT)),
        ("drifted", same & (overlap >= SAME_PLACE)),
        ("relabelled", ~same & (overlap >= SAME_PLACE)),
    ):
        pairs = pair_up(torch.from_numpy(fits[np.ix_(mine, theirs)])) if mine and theirs else {}
        if kind is not None:
            yield from (make(kind, mine[row], theirs[column]) for row, column in pairs.items())  # type: ignore[arg-type]
        mine, theirs = (
            [at for place, at in enumerate(side) if place not in taken]
            for side, taken in ((mine, set(pairs)), (theirs, set(pairs.values())))
        )
    # What is left of those above the threshold has no partner; what lies below it may say how far a score fell.
    there = same & (overlap >= SAME_PLACE)
    for first in mine:
        yield make("lost", first, _best(other["scores"], there[first] & (other["scores"] <= threshold)))
    for second in theirs:
        yield make("gained", _best(one["scores"], there[:, second] & (one["scores"] <= threshold)), second)


def _best(scores: np.ndarray[Any, Any], fits: np.ndarray[Any, Any]) -> int | None:
    """Give the best scored of those that fit."""
    return int(np.argmax(np.where(fits, scores, -1.0))) if fits.any() else None


def disagreement(reference: Sequence[Found], other: Sequence[Found], threshold: float) -> float:
    """Give how far two versions are apart, as a number without steps: what a search can follow.

    For each detection above the threshold, of either side: 1 less the best of IoU times (1 less the scores' difference)
    over the other side's detections of its class that overlap it by half; on average.
    """
    total, count = 0.0, 0
    for one, two in zip(reference, other, strict=True):
        overlap = _overlap(one["boxes"], two["boxes"])
        fits = (one["labels"][:, None] == two["labels"][None]) & (overlap >= SAME_PLACE)
        apart = np.abs(one["scores"][:, None].astype(np.float64) - two["scores"][None])
        quality = np.where(fits, overlap * (1 - apart), 0.0)
        for side, axis in ((one, 1), (two, 0)):
            above = side["scores"] > threshold
            best = quality.max(axis=axis, initial=0.0)[above]
            total, count = total + float((1 - best).sum()), count + int(above.sum())
    return total / max(1, count)


def _overlap(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """IoU of all with all, (N, M); 0 where a box is none."""
    one, two = first[:, None].astype(np.float64), second[None].astype(np.float64)
    corner = np.minimum(one[..., 2:], two[..., 2:]) - np.maximum(one[..., :2], two[..., :2])
    inside = np.clip(corner, 0, None).prod(axis=-1)
    areas = [np.clip(side[..., 2:] - side[..., :2], 0, None).prod(axis=-1) for side in (one, two)]
    with np.errstate(invalid="ignore", divide="ignore"):
        overlap = inside / (areas[0] + areas[1] - inside)
    return np.asarray(np.nan_to_num(overlap, nan=0.0, posinf=0.0))
