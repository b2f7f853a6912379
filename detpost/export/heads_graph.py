"""Masks, keypoints and oriented boxes of the kept queries as ONNX nodes: what :mod:`detpost.heads` does in PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from detpost.export.graph import Graph, Value
from detpost.export.heads import KeypointHead, MaskHead, OrientedHead
from detpost.export.slots import Place, RawHead, Slots, check_shape, columns, rows, scaled

__all__ = ["write_keypoints", "write_masks", "write_oriented"]

# So many masks are upsampled at a time: the floats of one part are what is held beside the masks, a quarter of them.
_MASKS_AT_A_TIME = 32
# "At least 0.5" for a runner that has no such comparison: greater than the float32 below it.
_BELOW_HALF = float(np.nextafter(np.float32(0.5), np.float32(0)))
_LOG_ZERO = -1e30  # as in detpost.heads.keypoints


def write_masks(g: Graph, raw: RawHead, value: Value, slots: Slots) -> dict[str, Value]:
    """Write masks, as :class:`detpost.heads.InstanceMasks` and :func:`detpost.heads.masks_per_image` make them."""
    return {"masks": _masks(g, raw, raw.head, value, slots)}


def write_oriented(g: Graph, raw: RawHead, value: Value, slots: Slots) -> dict[str, Value]:
    """Write oriented boxes, as :class:`detpost.heads.OrientedBoxes` makes them."""
    return {"oriented_boxes": _oriented(g, raw, raw.head, value, slots)}


def write_keypoints(g: Graph, raw: RawHead, value: Value, slots: Slots) -> dict[str, Value]:
    """Write keypoints, as :class:`detpost.heads.DETRPoseKeypoints` and ``RFDETRKeypoints`` make them."""
    if raw.head.per_class is None:
        return {"keypoints": _skeletons(g, raw, value, slots)}
    return _keypoints_of_classes(g, raw, raw.head, raw.head.per_class, value, slots)


def _masks(g: Graph, raw: RawHead, head: MaskHead, value: Value, slots: Slots) -> Value:
    check_shape(raw, "masks", len(raw.shape) == 3, "(B, Q, h, w)")
    if head.size == "network":
        return rows(g, value, slots.queries, slots.valid, 4)
    if slots.place is None:
        raise ValueError("masks in the size of the image need its size: take another io, or masks='network'")
    down, in_row = _weights(g, slots.place, 1, value, 2), _weights(g, slots.place, 0, value, 3)
    inside = _inside(g, slots, down, in_row) if head.style == "dfine_seg" else None
    parts = []
    for start in range(0, slots.kept, _MASKS_AT_A_TIME):
        ends = (start, min(start + _MASKS_AT_A_TIME, slots.kept))
        queries, valid = (_of_slots(g, each, ends, slots.kept, 1) for each in (slots.queries, slots.valid))
        found = rows(g, value, queries, valid, 4)
        found = g.node("MatMul", g.node("MatMul", down.matrix, found), in_row.matrix)
        for side in inside or ():
            found = g.node("Where", _of_slots(g, side, ends, slots.kept, 1), found, 0.0)
        parts.append(g.node("Greater", found, _BELOW_HALF if head.style == "dfine_seg" else 0.0))
    return parts[0] if len(parts) == 1 else g.node("Concat", *parts, axis=1)


class _Weights(NamedTuple):
    """How pixels along an axis are made of those of the network's masks.

    Args:
        matrix: (B or 1, 1, H, h) of rows, (B or 1, 1, w, W) of columns.
        pixels: 0 to H - 1, (H,), float32.
    """

    matrix: Value
    pixels: Value


def _weights(g: Graph, place: Place, side: int, masks: Value, axis: int) -> _Weights:
    """Write the bilinear weights along one axis; rows of pixels beyond an image's own size are 0.

    The same numbers as ``F.interpolate(mode="bilinear", align_corners=False)``, as a matrix: images of a batch may have
    different sizes, which no Resize can do.
    """

    def of_side(value: Value) -> Value:  # (B or 1, 1, 1, 1)
        return g.reshape(g.node("Gather", value, g.constant([side]), axis=0), [-1, 1, 1, 1])

    size = g.node("Gather", g.node("Shape", masks), g.constant([axis]), axis=0)
    count = g.cast(size, "FLOAT")  # (1,)
    bound = of_side(place.bound)
    pixels = _count_up(g, _greatest_of_all(g, place.bound, side))
    taps = _count_up(g, count)
    target, source = (3, 2) if axis == 3 else (2, 3)
    own = _along(g, pixels, target)
    centre = g.node("Add", own, 0.5)
    if place.shift is not None:
        centre = g.node("Add", centre, of_side(place.shift))
    at = g.node("Sub", g.node("Mul", centre, g.node("Div", count, of_side(place.factor))), 0.5)
    at = g.node("Min", g.node("Relu", at), g.node("Sub", count, 1.0))
    distance = g.node("Abs", g.node("Sub", at, _along(g, taps, source)))
    weights = g.node("Relu", g.node("Sub", 1.0, distance))
    return _Weights(g.node("Where", g.node("Less", own, bound), weights, 0.0), pixels)


def _greatest_of_all(g: Graph, bound: Value, side: int) -> Value:
    """Give the greatest width or height of a batch, (1,), float32."""
    return g.greatest(g.reshape(g.node("Gather", bound, g.constant([side]), axis=0), [-1]), 0, keep=True)


def _count_up(g: Graph, count: Value) -> Value:
    """Write 0, 1, ... below a number (1,), float32."""
    return g.node("Range", np.array(0, np.float32), g.reshape(count, []), np.array(1, np.float32))


def _along(g: Graph, values: Value, axis: int) -> Value:
    """Lay (N,) along an axis of four dimensions."""
    return g.reshape(values, [-1 if place == axis else 1 for place in range(4)])


def _inside(g: Graph, slots: Slots, down: _Weights, in_row: _Weights) -> tuple[Value, Value]:
    """Say which rows (B, K, H, 1) and columns (B, K, 1, W) lie in each box."""
    found = []
    for side, weights, axis in ((1, down, 2), (0, in_row, 3)):
        first, last = (
            g.unsqueeze(g.unsqueeze(g.node("Gather", slots.corners, g.constant(place), axis=0), 2), 3)
            for place in (side, side + 2)
        )
        pixels = _along(g, weights.pixels, axis)
        from_first = g.node("Not", g.node("Less", pixels, first))
        found.append(g.node("And", from_first, g.node("Less", pixels, last)))
    return found[0], found[1]


def _of_slots(g: Graph, value: Value, ends: tuple[int, int], kept: int, axis: int) -> Value:
    """Take a part of the slots."""
    if ends == (0, kept):
        return value
    return g.node("Slice", value, *(g.constant([each]) for each in (*ends, axis)))


def _oriented(g: Graph, raw: RawHead, head: OrientedHead, value: Value, slots: Slots) -> Value:
    check_shape(raw, "oriented boxes", len(raw.shape) == 2 and raw.shape[1] == 5, "(B, Q, 5)")
    kept = rows(g, value, slots.queries, slots.valid, 3)
    centre, size, angle = (columns(g, kept, *ends, 3) for ends in ((0, 2), (2, 4), (4, 5)))
    centre = scaled(g, centre, slots, 3)
    size = scaled(g, size, slots._replace(place=slots.place and slots.place._replace(shift=None)), 3)
    if head.angle_scale != 1:
        angle = g.node("Mul", angle, float(head.angle_scale))
    turns = g.node("Floor", g.node("Div", g.node("Add", angle, math.pi / 2), math.pi))
    angle = g.node("Sub", angle, g.node("Mul", turns, math.pi))
    # What is not valid was 0 before the shift of a letterbox.
    return g.node("Where", g.unsqueeze(slots.valid, 2), g.node("Concat", centre, size, angle, axis=2), 0.0)


def _skeletons(g: Graph, raw: RawHead, value: Value, slots: Slots) -> Value:
    """Write one skeleton for each query: (B, Q, 2 N), (B, Q, N, 2) or (B, Q, N, 3) -> (B, K, N, 3)."""
    known = all(isinstance(size, int) for size in raw.shape)
    in_row = len(raw.shape) == 2
    fits = raw.shape[1] % 2 == 0 if known and in_row else known and raw.shape[-1] in (2, 3)
    check_shape(raw, "keypoints", fits and len(raw.shape) in (2, 3), "(B, Q, 2 N), (B, Q, N, 2) or (B, Q, N, 3)")
    count = int(raw.shape[1]) // 2 if in_row else int(raw.shape[1])
    kept = rows(g, value, slots.queries, slots.valid, 3 if in_row else 4)
    if in_row:
        kept = g.reshape(kept, [0, slots.kept, count, 2])
    valid = g.unsqueeze(g.unsqueeze(slots.valid, 2), 3)
    pairs = kept if raw.shape[-1] == 2 or in_row else columns(g, kept, 0, 2, 4)
    pairs = g.node("Where", valid, scaled(g, pairs, slots, 4), 0.0)
    if not in_row and raw.shape[-1] == 3:
        visible = columns(g, kept, 2, 3, 4)
    else:
        visible = g.node("Mul", g.indicator(valid), np.ones((1, 1, count, 1), np.float32))
    return g.node("Concat", pairs, visible, axis=3)


def _keypoints_of_classes(
    g: Graph, raw: RawHead, head: KeypointHead, per_class: tuple[int, ...], value: Value, slots: Slots
) -> dict[str, Value]:
    """Write the keypoints of each detection's class: (B, Q, classes * N, D) -> (B, K, N, 3) and scores (B, K)."""
    classes, most = len(per_class), max(per_class)
    shape = raw.shape
    known = len(shape) == 3 and all(isinstance(size, int) for size in shape)
    check_shape(
        raw,
        "keypoints",
        known and shape[1] == classes * most and int(shape[2]) >= 3,
        f"(B, Q, {classes} * {most}, 3 or more)",
    )
    queries, depth = int(shape[0]), int(shape[2])
    has_class = g.node("And", slots.valid, g.node("Less", g.cast(slots.labels, "FLOAT"), float(classes)))
    label = g.node("Where", has_class, slots.labels, 0)
    by_class = g.reshape(value, [0, queries * classes, most, depth])
    places = g.node("Add", g.node("Mul", slots.queries, classes), label)
    kept = rows(g, by_class, places, has_class, 4)
    count = g.node("Gather", np.array(per_class, np.float32), label, axis=0)
    count = g.unsqueeze(g.node("Mul", g.indicator(has_class), count), 2)  # (B, K, 1)
    active = g.node("Less", np.arange(most, dtype=np.float32)[None, None], count)  # (B, K, N)
    pairs = scaled(g, columns(g, kept, 0, 2, 4), slots, 4)
    findable = g.node("Sigmoid", columns(g, kept, 2, 3, 4))
    points = g.node("Where", g.unsqueeze(active, 3), g.node("Concat", pairs, findable, axis=3), 0.0)
    scores = slots.scores
    if depth >= 7 and head.trace_alpha:
        fused = _fused(g, head.trace_alpha, kept, findable, active, slots)
        scores = g.node("Where", has_class, fused, scores)
    return {"keypoints": points, "keypoint_scores": scores}


def _fused(g: Graph, alpha: float, points: Value, findable: Value, active: Value, slots: Slots) -> Value:
    """Lower the scores (B, K) by the expected squared error of the active keypoints, in logarithms throughout."""
    l11, cross, l22 = (columns(g, points, place, place + 1, 4) for place in (4, 5, 6))  # (B, K, N, 1) each
    skew = g.node("Log", g.node("Max", g.node("Abs", cross), 1e-12))
    skew = g.node("Sub", g.node("Sub", skew, l11), l22)
    terms = g.node("Mul", g.node("Concat", g.node("Neg", l11), g.node("Neg", l22), skew, axis=3), 2.0)
    trace = _log_sum(g, terms, 3, 4)  # (B, K, N, 1)
    weight = g.node("Log", g.node("Max", findable, 1e-12))
    active = g.unsqueeze(active, 3)
    weighted, weights = (
        _log_sum(g, g.node("Where", active, each, _LOG_ZERO), 2, 4) for each in (g.node("Add", trace, weight), weight)
    )
    mean = g.reshape(g.node("Sub", weighted, weights), [0, slots.kept])
    info = np.finfo(np.float32)
    logits = g.node("Log", g.node("Max", slots.scores, float(info.tiny)))
    fused = g.node("Sigmoid", g.node("Sub", logits, g.node("Mul", mean, float(alpha))))
    return g.node("Min", fused, float(np.float32(1) - np.float32(info.eps / 2)))


def _log_sum(g: Graph, values: Value, axis: int, rank: int) -> Value:
    """Write the logarithm of the sum of exponentials along an axis, which stays."""
    peak = g.greatest(values, axis, keep=True)
    total = g.sum(g.node("Exp", g.node("Sub", values, peak)), axis, keep=True)
    return g.node("Add", g.node("Log", total), peak)
