"""Merging and weighted fusion of boxes, in PyTorch's own operators.

Both walk down the scores one box at a time, as what becomes of a box hangs on the boxes that were made before it.
Shapes and control flow depend on the number of boxes alone: the walk is unrolled, a few dozen operators a box.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detpost.reference.nms import overlap
from detpost.reference.selection import select_top_k

__all__ = ["fuse", "merge"]


def merge(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, valid: Tensor | None, threshold: float, smaller: bool
) -> tuple[Tensor, Tensor]:
    """Let each box swallow those after it that it overlaps: greedy non-maximum merging.

    A box goes to the first that is kept and overlaps it, as it was. The kept one grows to hold both, if what it has
    grown to meanwhile overlaps the box as well; otherwise the box is dropped.

    Args:
        boxes: (B, N, 4), floating, xyxy.
        scores: (B, N), floating.
        labels: (B, N), integer; boxes of different labels leave each other alone. ``None``: one class.
        valid: (B, N), bool, or ``None``: all are.
        threshold: above 0, at most 1; an overlap of as much counts.
        smaller: whether an overlap is a part of the smaller box, and not of the union.

    Returns:
        Which boxes stay (B, N), bool. Boxes (B, N, 4), those that stay grown; float32, or float64 if they are.

    Source:
        The greedy merging of SAHI (Akyon, Altinuc and Temizel, ICIP 2022).
    """
    ranked = _Ranked(boxes.to(torch.promote_types(boxes.dtype, torch.float32)), scores, labels, valid)
    place = torch.arange(ranked.places, device=boxes.device)
    kept, grown = torch.zeros_like(ranked.valid), ranked.boxes
    for step in range(ranked.places):
        box = ranked.boxes[:, step : step + 1]  # (B, 1, 4)
        over = _overlap(ranked.boxes[:, :step], box, smaller)  # (B, step)
        found = (over >= threshold) & kept[:, :step] & ranked.is_class_of(step)
        keeper = torch.where(found, place[:step], ranked.places).amin(dim=1, keepdim=True) if step else place[:1] - 1
        is_swallowed = found.any(dim=1, keepdim=True)  # (B, 1)
        kept = kept | ((place == step) & ranked.valid[:, step : step + 1] & ~is_swallowed)
        # In doubles, as the rule's own authors have it.
        reaches = _overlap(grown.to(torch.float64), box.to(torch.float64), smaller) >= threshold  # (B, N)
        grows = (place == keeper) & is_swallowed & ranked.valid[:, step : step + 1] & reaches
        union = torch.cat(
            (torch.minimum(grown[..., :2], box[..., :2]), torch.maximum(grown[..., 2:], box[..., 2:])), -1
        )
        grown = torch.where(grows.unsqueeze(-1), union, grown)
    return ranked.as_given(kept), ranked.as_given(grown)


def fuse(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, valid: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Fuse clusters of boxes that overlap: weighted box fusion.

    A box joins the cluster whose mean box it overlaps most, if by more than the threshold, or begins one. A mean is
    weighed by the scores. Sums and quotients of two boxes and more are rounded to float32, as in ensemble-boxes, since
    that decides between clusters. Where all scores of a cluster are 0 its first box is its mean.

    Args:
        boxes: (B, N, 4), float64, xyxy.
        scores: (B, N), float64: what the boxes are ordered and weighed by.
        labels: (B, N), integer; boxes of different labels are in different clusters. ``None``: one class.
        valid: (B, N), bool, or ``None``: all are.
        threshold: in [0, 1].

    Returns:
        Owners (B, N), int64: the index of the box that began the cluster of each box, -1 for boxes that are not valid.
        Boxes (B, N, 4) and scores (B, N): where a cluster begins, its mean box and mean score; elsewhere what came.

    Source:
        Solovyev, Wang and Gabruseva, "Weighted boxes fusion", Image and Vision Computing 107, 2021.
    """
    ranked = _Ranked(boxes, scores, labels, valid)
    place = torch.arange(ranked.places, device=boxes.device)
    means, sums = ranked.boxes, torch.zeros_like(boxes)  # (B, N, 4); a cluster stands where its first box does
    totals, members = torch.zeros_like(scores), torch.zeros_like(scores)
    begins, owners = torch.zeros_like(ranked.valid), []
    for step in range(ranked.places):
        box, score = ranked.boxes[:, step : step + 1], ranked.scores[:, step : step + 1]
        over = _overlap(means[:, :step], box, False)  # (B, step)
        found = (over > threshold) & begins[:, :step] & ranked.is_class_of(step)
        joins = found.any(dim=1, keepdim=True)  # (B, 1)
        if step:
            over = torch.where(found, over, -1.0)
            is_best = found & (over == over.amax(dim=1, keepdim=True))
            best = torch.where(is_best, place[:step], ranked.places).amin(dim=1, keepdim=True)
            owner = torch.where(joins, best, step)
        else:
            owner = torch.zeros_like(joins, dtype=torch.int64)
        owners.append(owner)
        here = (place == owner) & ranked.valid[:, step : step + 1]  # (B, N)
        begins = begins | (here & ~joins)
        sums = torch.where(here.unsqueeze(-1), _rounded(sums + score.unsqueeze(-1) * box), sums)
        totals = torch.where(here, totals + score, totals)
        members = members + here
        can_weigh = totals != 0
        mean = _rounded(sums / torch.where(can_weigh, totals, 1.0).unsqueeze(-1))
        means = torch.where((here & joins & can_weigh).unsqueeze(-1), mean, means)
    mean_scores = torch.where(members > 1, _rounded(totals / members.clamp(min=1)), ranked.scores)
    owner = torch.cat(owners, dim=1) if owners else torch.zeros_like(ranked.order)
    owner = torch.where(ranked.valid, ranked.order.gather(1, owner), -1)
    return ranked.as_given(owner), ranked.as_given(means), ranked.as_given(mean_scores)


class _Ranked:
    """Boxes of B images, best first, and the way back."""

    def __init__(self, boxes: Tensor, scores: Tensor, labels: Tensor | None, valid: Tensor | None) -> None:
        self.places = int(scores.shape[1])
        self.order = select_top_k(scores, max(1, self.places))  # (B, N)
        self.boxes = boxes.gather(1, self.order.unsqueeze(-1).expand(-1, -1, 4))
        self.scores = scores.gather(1, self.order)
        self._labels = None if labels is None else labels.gather(1, self.order)
        everything = torch.ones_like(scores, dtype=torch.bool)
        self.valid = everything if valid is None else valid.gather(1, self.order)

    def is_class_of(self, step: int) -> Tensor:
        """Say which boxes before a step may meet its box: (B, step)."""
        if self._labels is None:
            return self.valid[:, :step] & self.valid[:, step : step + 1]
        same = self._labels[:, :step] == self._labels[:, step : step + 1]
        return same & self.valid[:, :step] & self.valid[:, step : step + 1]

    def as_given(self, values: Tensor) -> Tensor:
        """Bring (B, N) or (B, N, 4) back into the order in which the boxes came."""
        order = self.order if values.ndim == 2 else self.order.unsqueeze(-1).expand(-1, -1, 4)
        return torch.zeros_like(values).scatter(1, order, values)


def _overlap(boxes: Tensor, box: Tensor, smaller: bool) -> Tensor:
    """Give the overlaps (B, n) of boxes (B, n, 4) with one (B, 1, 4)."""
    return overlap(boxes.permute(2, 0, 1), box.permute(2, 0, 1), smaller)


def _rounded(values: Tensor) -> Tensor:
    return values.to(torch.float32).to(values.dtype)
