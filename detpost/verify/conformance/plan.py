"""A decode in NumPy of which every step can be done in the ways that others do it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from detpost.detections import INVALID
from detpost.reference import softmax
from detpost.verify.conformance.cases import Array, Case

__all__ = ["Decoded", "Plan", "decode", "plan_of"]


@dataclass(frozen=True)
class Plan:
    """How a decode is done: first what a ``DecodeSpec`` says, then what the contract says, which are the defaults."""

    activation: Literal["sigmoid", "softmax", "none"]
    selection: Literal["flat", "per_query"]
    background: Literal["none", "first", "last"]
    box_format: Literal["cxcywh", "xyxy", "xywh"]
    clip: bool
    threshold: float | None
    slots: int
    keeps_threshold: bool = False  # whether a score equal to the threshold is kept
    softmax_over: Literal["all", "foreground"] = "all"
    sizes: Literal["own", "first", "last", "none"] = "own"
    sizes_read: Literal["height, width", "width, height"] = "height, width"
    written: Literal["xyxy", "xywh", "cxcywh"] = "xyxy"
    label_shift: int = 0
    pairs: Literal["query, class", "class, query"] = "query, class"  # what a flat index is taken apart into
    box_of: Literal["query", "slot"] = "query"
    most: Literal["slots", "queries"] = "slots"  # how many are kept at the most
    order_by: Literal["logits", "float32 scores", "float16 scores"] = "logits"
    ties: Literal["lower", "higher", "any"] = "lower"
    nan: Literal["last", "first", "first, valid", "zero"] = "last"
    is_sorted: bool = True
    is_reversed: bool = False  # whether what is kept comes the other way round
    invalid: Literal["cleared", "left", "anything"] = "cleared"
    score_dtype: Literal["float32", "float16"] = "float32"


@dataclass(frozen=True)
class Decoded:
    """What a decode by a plan gives, and what another answer can be judged by.

    Args:
        labels: (B, K), int64.
        boxes: (B, K, 4), float64.
        scores: (B, K), float64.
        valid: (B, K), bool.
        queries: (B, K), int64.
        every_key: (B, Q, C): what is ranked, NaN where it is never kept.
        every_box: (B, Q, 4): the boxes of all queries, as the plan writes them.
    """

    labels: Array
    boxes: Array
    scores: Array
    valid: Array
    queries: Array
    every_key: Array
    every_box: Array


def plan_of(case: Case) -> Plan:
    """Give the plan that does what a case asks for."""
    spec = case.spec
    return Plan(
        activation=spec.activation,
        selection=spec.selection,
        background=spec.background,
        box_format=spec.box_format,
        clip=spec.clip,
        threshold=spec.score_threshold,
        slots=spec.top_k,
    )


def decode(plan: Plan, case: Case) -> Decoded:
    """Decode a case by a plan.

    Args:
        plan: how.
        case: the raw outputs.

    Returns:
        The detections, K = min(slots, candidates).
    """
    logits = case.logits.astype(np.float32)  # exact
    if plan.nan == "zero":
        logits = np.nan_to_num(logits, nan=0.0, posinf=np.inf, neginf=-np.inf)
    classes = logits.shape[2]
    is_background = np.arange(classes) == replace(case.spec, background=plan.background).background_channel(classes)
    probabilities = _probabilities(plan, logits, is_background)
    keys = np.where(is_background, np.nan, _keys(plan, logits, probabilities))
    queries, labels, kept = _select(plan, logits, keys, is_background)

    rows = np.arange(len(logits))[:, None]
    inside = np.minimum(queries, logits.shape[1] - 1)
    channel = np.minimum(labels, logits.shape[2] - 1)
    if plan.pairs == "class, query" and plan.selection == "flat":  # the score comes from the ranking, and is right
        scores = probabilities.reshape(len(logits), -1)[rows, queries + labels * logits.shape[2]]
    else:
        scores = probabilities[rows, inside, channel]
    scores = scores.astype(plan.score_dtype).astype(np.float64)
    every_box = _boxes(plan, case)
    boxes = every_box[rows, inside if plan.box_of == "query" else np.arange(queries.shape[1])[None] % logits.shape[1]]
    valid = kept
    if plan.threshold is not None:
        above = scores >= plan.threshold if plan.keeps_threshold else scores > plan.threshold
        valid = kept & above
    cleared = valid | (plan.invalid != "cleared")
    return Decoded(
        labels=np.where(cleared, labels + plan.label_shift, INVALID.label),
        boxes=np.where(cleared[..., None], boxes, INVALID.box),
        scores=np.where(cleared, scores, INVALID.score),
        valid=valid,
        queries=np.where(cleared, queries, INVALID.query),
        every_key=keys,
        every_box=every_box,
    )


def _probabilities(plan: Plan, logits: Array, is_background: Array) -> Array:
    """Score every class of every query (B, Q, C), float64."""
    if plan.activation == "none":
        return logits.astype(np.float64)
    if plan.activation == "sigmoid":
        with np.errstate(over="ignore", invalid="ignore"):
            return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32).astype(np.float64)
    taken = np.where(is_background, -np.inf, logits) if plan.softmax_over == "foreground" else logits
    scores: Array = softmax.scores(torch.from_numpy(taken.astype(np.float32))).numpy().astype(np.float64)
    return scores


def _keys(plan: Plan, logits: Array, probabilities: Array) -> Array:
    """Give what is ranked (B, Q, C)."""
    if plan.order_by == "float16 scores":
        return probabilities.astype(np.float16).astype(np.float64)
    if plan.order_by == "float32 scores" or plan.activation == "softmax":
        return probabilities
    return logits.astype(np.float64)


def _select(plan: Plan, logits: Array, keys: Array, is_background: Array) -> tuple[Array, Array, Array]:
    """Choose what is kept: queries, labels (B, K), and whether it may be valid (B, K)."""
    batch, classes = len(keys), keys.shape[2]
    barred = np.broadcast_to(is_background, keys.shape)
    if plan.selection == "per_query":
        numbers = np.where(barred | np.isnan(logits), -np.inf, logits)
        is_best = (numbers == numbers.max(axis=2, keepdims=True)) & ~barred & ~np.isnan(logits)
        best = is_best.argmax(axis=2)[..., None]  # the first of them
        keys, barred = np.take_along_axis(keys, best, 2), np.take_along_axis(barred, best, 2)
    rows, barred = keys.reshape(batch, -1), barred.reshape(batch, -1)
    order = np.stack([_order(plan, row, out) for row, out in zip(rows, barred, strict=True)])
    chosen = order[:, : plan.slots]
    if not plan.is_sorted:
        chosen = np.sort(chosen, axis=1)
    is_number = ~np.isnan(np.take_along_axis(rows, chosen, 1))
    kept = ~np.take_along_axis(barred, chosen, 1) & (is_number | (plan.nan == "first, valid"))
    if plan.most == "queries":
        kept = kept & (np.arange(kept.shape[1]) < logits.shape[1])
    if plan.is_reversed:
        chosen, kept = chosen[:, ::-1], kept[:, ::-1]
    if plan.selection == "per_query":
        return chosen, np.take_along_axis(best[..., 0], chosen, 1), kept
    if plan.pairs == "class, query":
        return chosen % classes, chosen // classes, kept
    return chosen // classes, chosen % classes, kept


def _order(plan: Plan, row: Array, barred: Array) -> Array:
    """Rank one row (N,): what may not be kept last, then by value descending, then by index."""
    index = np.arange(len(row))
    is_nan = np.isnan(row)
    group = np.select([barred, is_nan], [2, -1 if plan.nan.startswith("first") else 1], 0)
    value = np.where(is_nan, 0.0, row)
    return np.lexsort((-index if plan.ties == "higher" else index, -value, group))


def _boxes(plan: Plan, case: Case) -> Array:
    """Decode the boxes of all queries (B, Q, 4), float64."""
    boxes = case.boxes.astype(np.float64)
    first, second = boxes[..., :2], boxes[..., 2:]
    low = first - second / 2 if plan.box_format == "cxcywh" else first
    corners = boxes if plan.box_format == "xyxy" else np.concatenate([low, low + second], -1)
    sizes = case.image_sizes.astype(np.float64)
    sizes = {
        "own": sizes,
        "first": np.broadcast_to(sizes[:1], sizes.shape),
        "last": np.broadcast_to(sizes[-1:], sizes.shape),
        "none": np.ones_like(sizes),
    }[plan.sizes]
    width_first = sizes if plan.sizes_read == "width, height" else sizes[:, ::-1]
    scale = np.tile(width_first, 2)[:, None]
    corners = corners * scale
    if plan.clip:
        corners = np.clip(corners, 0, scale)
    low, high = corners[..., :2], corners[..., 2:]
    if plan.written == "xywh":
        return np.concatenate([low, high - low], -1)
    return np.concatenate([(low + high) / 2, high - low], -1) if plan.written == "cxcywh" else corners
