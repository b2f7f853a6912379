"""How far an answer agrees with a decode, slot by slot and part by part."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from detpost.verify.conformance.cases import Array, Case
from detpost.verify.conformance.plan import Decoded, Plan
from detpost.verify.conformance.runner import Answer

__all__ = ["PARTS", "agreement", "right_slots", "shares"]

PARTS = ("indices", "labels", "order", "scores", "boxes", "valid")
SCORE_TOLERANCE = 1e-5
BOX_TOLERANCE = 1e-5  # of the larger image side; of 1 where boxes stay normalised


def agreement(answer: Answer, decoded: Decoded, plan: Plan, case: Case) -> dict[str, float]:
    """Give the share of slots that agree, for each part; missing and surplus slots do not.

    ``indices`` are the queries that were kept, by name or by their boxes; ``order`` looks at what both kept: which
    share of it stands where it should among itself, NaN where nothing is in common.
    """
    return {**shares(answer, decoded, plan, case), "order": _order(answer, decoded, case)}


def shares(answer: Answer, decoded: Decoded, plan: Plan, case: Case) -> dict[str, float]:
    """Give :func:`agreement` without the order."""
    total = len(answer.labels) * max(answer.labels.shape[1], decoded.labels.shape[1])
    right = right_slots(answer, decoded, plan, case)
    return {part: float(same.sum()) / total if total else 1.0 for part, same in right.items()}


def right_slots(answer: Answer, decoded: Decoded, plan: Plan, case: Case) -> Mapping[str, Array]:
    """Say, for each part but the order, which of the slots that both have agree: (B, min(K, K'))."""
    count = min(answer.labels.shape[1], decoded.labels.shape[1])
    valid = answer.valid[:, :count] == decoded.valid[:, :count]
    scores = np.isclose(answer.scores[:, :count], decoded.scores[:, :count], 0, SCORE_TOLERANCE, equal_nan=True)
    queries, labels = _queries_of(answer, decoded, case)[:, :count], answer.labels[:, :count]
    boxes = _boxes_agree(answer.boxes[:, :count], decoded.boxes[:, :count], case)
    expected_queries = _expected_queries(answer, decoded, plan, case)[:, :count]
    same_query, same_label = queries == expected_queries, labels == decoded.labels[:, :count]
    if plan.ties == "any":
        tied = _is_tied(queries, labels - plan.label_shift, decoded, plan, count) & decoded.valid[:, :count]
        tied = tied & ~(same_query & same_label)  # a slot with the detection that is expected has its box to give
        if plan.box_of == "query":
            rows = np.arange(len(queries))[:, None]
            own_boxes = decoded.every_box[rows, np.clip(queries, 0, case.boxes.shape[1] - 1)]
            boxes = boxes | (tied & _boxes_agree(answer.boxes[:, :count], own_boxes, case))
        same_query, same_label = same_query | tied, same_label | tied
    if plan.invalid == "anything":
        free = valid & ~decoded.valid[:, :count]
        same_query, same_label, boxes, scores = same_query | free, same_label | free, boxes | free, scores | free
    return {"indices": same_query, "labels": same_label, "scores": scores, "boxes": boxes, "valid": valid}


def _queries_of(answer: Answer, decoded: Decoded, case: Case) -> Array:
    """Give the query of each slot (B, K): as the answer says, or that whose box it has; -1 for none."""
    if answer.queries is not None:
        return np.where(answer.valid, answer.queries, -1)
    near = _boxes_agree(answer.boxes[:, :, None], decoded.every_box[:, None], case)  # (B, K, Q)
    found = np.where(near.any(axis=-1), near.argmax(axis=-1), -1)
    return np.where(answer.valid, found, -1)


def _expected_queries(answer: Answer, decoded: Decoded, plan: Plan, case: Case) -> Array:
    """Give the query that each slot is to have (B, K), or where it is told by its box, that whose box it is to have."""
    if answer.queries is not None or plan.box_of == "query":
        return decoded.queries
    slots = np.arange(decoded.queries.shape[1]) % case.boxes.shape[1]
    return np.where(decoded.queries >= 0, slots, -1)


def _boxes_agree(given: Array, expected: Array, case: Case) -> Array:
    side = case.image_sizes.max(axis=1).astype(np.float64)
    largest = np.abs(expected).max(axis=tuple(range(1, expected.ndim)), initial=0)  # of no slots at all, too
    tolerance = BOX_TOLERANCE * np.where(largest < 4, 1.0, side)
    tolerance = tolerance.reshape(-1, *(1,) * (max(given.ndim, expected.ndim) - 1))
    with np.errstate(invalid="ignore"):
        return np.asarray((np.abs(given - expected) <= tolerance).all(axis=-1))


def _is_tied(queries: Array, labels: Array, decoded: Decoded, plan: Plan, count: int) -> Array:
    """Tell whether a slot has another detection than expected, one of the same key, and has it once."""
    rows = np.arange(len(queries))[:, None]
    last, classes = decoded.every_key.shape[1] - 1, decoded.every_key.shape[2]
    known = (queries >= 0) & (labels >= 0) & (labels < classes)
    at = (rows, np.clip(queries, 0, last), np.clip(labels, 0, classes - 1))
    expected_at = (
        rows,
        np.clip(decoded.queries[:, :count], 0, last),
        np.clip(decoded.labels[:, :count] - plan.label_shift, 0, classes - 1),
    )
    # Rounded scores are told apart by what another's sigmoid may be off in its last bit.
    step = 0.0 if plan.order_by == "logits" and plan.activation == "sigmoid" else 3e-7
    same = known & np.isclose(decoded.every_key[at], decoded.every_key[expected_at], step, 0)
    flat = np.where(known, queries * classes + labels, -1)
    once = (flat[:, :, None] == flat[:, None]).sum(axis=-1) == 1
    return np.asarray(same & once)


def _order(answer: Answer, decoded: Decoded, case: Case) -> float:
    """Give the share of the detections that both kept which stand in the same order among themselves."""
    queries = _queries_of(answer, decoded, case)
    same = total = 0
    for row in range(len(queries)):
        given = list(zip(queries[row], answer.labels[row], strict=True))
        expected = list(zip(decoded.queries[row], decoded.labels[row], strict=True))
        common = set(given) & {pair for pair in expected if pair[0] >= 0}
        ours, theirs = ([pair for pair in pairs if pair in common] for pairs in (expected, dict.fromkeys(given)))
        total += len(ours)
        same += sum(first == second for first, second in zip(ours, theirs, strict=True))
    return same / total if total else math.nan
