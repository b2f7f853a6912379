"""The whole decode in PyTorch's own operators: what every kernel and every written graph is held to.

Logits and boxes go in; indices are selected; scores, labels and boxes are gathered by them. Only what is gathered has a
gradient, so the selection may be computed in any way that gives the same indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from detpost import boxes as box_ops
from detpost.detections import Detections, clear_invalid
from detpost.reference import softmax
from detpost.reference.derivatives import wants_derivative
from detpost.reference.selection import best_class, select_top_k
from detpost.spec import DecodeSpec

__all__ = ["Steps", "decode", "flat_rows", "take"]


def _select_pairs(logits: Tensor, spec: DecodeSpec, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the kept pairs: queries and labels (B, K), int64, and the keys that they stand in the order of (B, K)."""
    if spec.selection == "per_query":
        return _select_queries(logits.detach(), spec, steps)
    batch, queries, classes = logits.shape
    rows = logits.detach()
    keys = rows if spec.activation == "sigmoid" else steps.scores(rows)  # (B, Q, C)
    if spec.background != "none":
        # NaN is never ahead of a number and never valid: just what the channel that means "no object" should be.
        is_background = torch.arange(classes, device=logits.device) == spec.background_channel(classes)
        keys = torch.where(is_background, math.nan, keys)
    keys = keys.reshape(batch, queries * classes)
    flat = steps.select(keys, spec.top_k)
    query = flat // classes
    return query, flat - query * classes, keys.gather(1, flat)


def _select_queries(logits: Tensor, spec: DecodeSpec, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the kept queries with their best classes, as :func:`_select_pairs`."""
    objects = {"none": logits, "first": logits[..., 1:], "last": logits[..., :-1]}[spec.background]
    if objects.shape[2] == 0:  # nothing but the background
        dtype = logits.dtype if spec.activation == "sigmoid" else torch.float32  # of what is selected by, as below
        best = torch.zeros_like(logits[..., 0], dtype=torch.int64)
        keys = torch.full_like(logits[..., 0], math.nan, dtype=dtype)
    else:
        # By the logits and not the scores: far below the background, all of a query's scores are 0.
        best = steps.best_class(objects) + (1 if spec.background == "first" else 0)  # (B, Q)
        keys = _take_class(logits, best) if spec.activation == "sigmoid" else steps.scores_of(logits, best)
    order = steps.select(keys, spec.top_k)
    return order, best.gather(1, order), keys.gather(1, order)


def _take_class(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(2, labels.unsqueeze(-1)).squeeze(-1)


def _sigmoid(values: Tensor) -> Tensor:
    """In float64, so that equal logits score alike: float32 functions round the tail of a vector loop otherwise.

    In float32 where float64 is missing: on MPS.
    """
    return values.to(_at_least_float32(values) if values.device.type == "mps" else torch.float64).sigmoid()


def _corners(boxes: Tensor, queries: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Tensor:
    """Give the boxes of the kept queries as xyxy (B, K, 4), in pixels where there are image sizes."""
    corners = box_ops.convert(take(boxes, queries).to(_at_least_float32(boxes)), spec.box_format, "xyxy")
    if image_sizes is not None:
        corners = box_ops.scale(corners, image_sizes)
    if not spec.clip:
        return corners
    return corners.clamp(0, 1) if image_sizes is None else box_ops.clip(corners, image_sizes)


def flat_rows(queries: Tensor, count: int) -> Tensor:
    """Give the places of queries (B, K) in one list of B * ``count``: (B * K,).

    Example:
        >>> flat_rows(torch.tensor([[2, 0], [1, 1]]), 3)
        tensor([2, 0, 4, 4])
    """
    return (queries + torch.arange(queries.shape[0], device=queries.device).unsqueeze(1) * count).flatten()


def take(values: Tensor, queries: Tensor) -> Tensor:
    """Gather rows: values (B, Q, n), queries (B, K) -> (B, K, n).

    Example:
        >>> take(torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([[1]]))
        tensor([[[3, 4]]])
    """
    batch, count, length = values.shape
    # Rows of one flat list and not gather, which reads an index for every number.
    rows = values.reshape(batch * count, length).index_select(0, flat_rows(queries, count))
    return rows.view(batch, queries.shape[1], length)


def _at_least_float32(values: Tensor) -> torch.dtype:
    """float32 for float32 and narrower, float64 for float64 (so that gradcheck means something)."""
    return torch.promote_types(values.dtype, torch.float32)


class Steps(NamedTuple):
    """The steps of a decode that a kernel may take in another way, to the same bits.

    ``sigmoid``, ``corners`` and ``clear`` have gradients, the others none.

    Args:
        select: rows (B, N) and k to the places (B, k) of the k best, in the order of :func:`select_top_k`.
        best_class: logits (..., C) to the best class (...).
        scores: logits (..., C) to the probabilities (..., C) that :mod:`~detpost.reference.softmax` gives.
        scores_of: logits (..., C) and classes (...) to the probabilities (...) of these.
        select_pairs: logits (B, Q, C), a spec and these steps to queries and labels (B, K), int64, of the kept pairs,
            and the keys (B, K) that they stand in the order of.
        sigmoid: logits (B, K) to probabilities (B, K); one in float32 may differ in the last place.
        corners: boxes (B, Q, 4), queries (B, K), image sizes and a spec to xyxy (B, K, 4) of these queries.
        clear: what :func:`~detpost.detections.clear_invalid` makes detections of.
    """

    select: Callable[[Tensor, int], Tensor] = select_top_k
    best_class: Callable[[Tensor], Tensor] = best_class
    scores: Callable[[Tensor], Tensor] = softmax.scores
    scores_of: Callable[[Tensor, Tensor], Tensor] = softmax.scores_of
    select_pairs: Callable[[Tensor, DecodeSpec, Steps], tuple[Tensor, Tensor, Tensor]] = _select_pairs
    sigmoid: Callable[[Tensor], Tensor] = _sigmoid
    corners: Callable[[Tensor, Tensor, Tensor | None, DecodeSpec], Tensor] = _corners
    clear: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Detections] = clear_invalid


_REFERENCE = Steps()


def decode(
    logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec, steps: Steps = _REFERENCE
) -> Detections:
    """Decode a batch.

    Args:
        logits: (B, Q, C), floating.
        boxes: (B, Q, 4), floating, in units of the image, in ``spec.box_format``.
        image_sizes: (B, 2), (height, width) in pixels, or ``None``: boxes stay normalised.
        spec: what the decode does.
        steps: how its steps are computed.

    Returns:
        The detections, differentiable in logits and boxes.

    Example:
        >>> logits, boxes = torch.tensor([[[0.0, 4.0]]]), torch.tensor([[[0.5, 0.5, 1.0, 1.0]]])
        >>> decode(logits, boxes, None, DecodeSpec(top_k=1)).labels
        tensor([[1]])
    """
    queries, labels, keys = steps.select_pairs(logits, spec, steps)  # (B, K) each
    # A key is NaN for the background, for a NaN logit and, of softmax, for every class of a query that has one.
    is_number = keys == keys
    if spec.activation == "sigmoid":
        scores = _sigmoid_scores(logits, queries, labels, keys, is_number, steps)  # (B, K)
    else:
        scores = _softmax_scores(logits, queries, labels, keys, is_number)
    valid = is_number if spec.score_threshold is None else is_number & (scores > spec.score_threshold)
    corners = steps.corners(boxes, queries, image_sizes, spec)
    return steps.clear(scores, labels, corners, queries, valid)


def _sigmoid_scores(
    logits: Tensor, queries: Tensor, labels: Tensor, keys: Tensor, is_number: Tensor, steps: Steps
) -> Tensor:
    """Score the kept pairs (B, K), 0 where they are no number; the logits are gathered again for their gradient."""
    batch, query_count, classes = logits.shape
    if wants_derivative(logits):
        keys = logits.reshape(batch, query_count * classes).gather(1, queries * classes + labels)
    # NaN is replaced before the activation, not after: a gradient through the unused side of a where is still 0 * NaN.
    return steps.sigmoid(torch.where(is_number, keys, 0.0)).to(_at_least_float32(logits))


def _softmax_scores(logits: Tensor, queries: Tensor, labels: Tensor, keys: Tensor, is_number: Tensor) -> Tensor:
    """Score the kept pairs (B, K), 0 where they are no number: by the keys, which have no gradient of their own."""
    scores = torch.where(is_number, keys, 0.0)
    if logits.dtype != torch.float64 and not wants_derivative(logits):
        return scores
    count, classes = queries.shape[1], logits.shape[2]
    if 2 * count < logits.shape[1]:  # of few kept ones; to gather most of the logits takes longer than to use them all
        logits, queries = take(logits, queries), torch.arange(count, device=logits.device)
    scores = softmax.with_slope(scores, logits, queries * classes + labels)
    # Two float64 scores that are nearer than the keys can tell may stand in the other order: the later reads as the
    # earlier, so that scores never rise.
    return scores.cummin(dim=1).values if logits.dtype == torch.float64 and scores.shape[1] else scores
