"""Masks, keypoints and oriented boxes of the kept queries as ONNX nodes: what :mod:`detpost.heads` does in PyTorch.

Every head gathers rows of one more value of the network by the query of each detection, and brings them to the unit
that the boxes are in. GatherND copies whole rows; an index for every number, as GatherElements has it, would take eight
times the memory of the masks themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from detpost.export.graph import Graph, Value
from detpost.export.heads import Head, KeypointHead, MaskHead, OrientedHead, output_names

__all__ = ["HEADS_OPSET", "Place", "RawHead", "Slots", "bare_heads", "write_head"]

HEADS_OPSET = 12  # GatherND goes image by image from here on

# So many masks are upsampled at a time: the floats of one part are what is held beside the masks, a quarter of them.
_MASKS_AT_A_TIME = 32
# "At least 0.5" for a runner that has no such comparison: greater than the float32 below it.
_BELOW_HALF = float(np.nextafter(np.float32(0.5), np.float32(0)))
_FLOAT = 1  # ONNX's number of float32
# The raw value's shape behind (B, Q), where the head alone says it.
_BARE: Mapping[type[Head], tuple[int | str, ...]] = {MaskHead: ("mask_height", "mask_width"), OrientedHead: (5,)}
_LOG_ZERO = -1e30  # as in detpost.heads.keypoints


class RawHead(NamedTuple):
    """A head and the value that it reads.

    Args:
        head: what is made of it.
        shape: without the batch, a name or a number for each dimension: (Q, ...).
        dtype: ONNX's number of its dtype.
    """

    head: Head
    shape: tuple[int | str, ...]
    dtype: int


class Place(NamedTuple):
    """What turns coordinates of 0..1 of the network's input into those of the boxes: (4, B or 1, 1), float32, each.

    Args:
        factor: for x, y, x, y.
        shift: is taken away then; ``None`` where it is 0.
        bound: width, height, width, height of the image that they lie in.
    """

    factor: Value
    shift: Value | None
    bound: Value


class Slots(NamedTuple):
    """The detections, best first, as far as heads need them.

    Args:
        queries: (B, K), int32, always of a query.
        labels: (B, K), int32.
        scores: (B, K), float32, 0 where not valid.
        valid: (B, K), bool.
        corners: (4, B, K), float32, in the unit of the boxes.
        kept: K.
        place: what the unit is; ``None`` for 0..1.
    """

    queries: Value
    labels: Value
    scores: Value
    valid: Value
    corners: Value
    kept: int
    place: Place | None


def bare_heads(heads: tuple[Head, ...], queries: int) -> tuple[RawHead, ...]:
    """Give the raw values that a post-processor alone takes.

    Args:
        heads: which ones.
        queries: Q.

    Returns:
        Heads with the shapes of their inputs.

    Raises:
        ValueError: a head whose raw value has a shape that the network alone says, as keypoints.
    """
    found = []
    for head in heads:
        sides = _BARE.get(type(head))
        if sides is None:
            raise ValueError(f"{output_names(head)[0]} are exported with their network, which says how they come")
        found.append(RawHead(head, (queries, *sides), _FLOAT))
    return tuple(found)


def write_head(g: Graph, raw: RawHead, value: Value, slots: Slots) -> dict[str, Value]:
    """Write a head.

    Args:
        g: where to write.
        raw: which head, and what it reads.
        value: that.
        slots: the detections.

    Returns:
        Its outputs by name.

    Raises:
        ValueError: a shape that is none of such a head, or masks in the size of an image whose size is not known.
    """
    with g.part({MaskHead: "masks", KeypointHead: "keypoints", OrientedHead: "oriented"}[type(raw.head)]):
        if isinstance(raw.head, MaskHead):
            return {"masks": _masks(g, raw, raw.head, value, slots)}
        if isinstance(raw.head, OrientedHead):
            return {"oriented_boxes": _oriented(g, raw, raw.head, value, slots)}
        if raw.head.per_class is None:
            return {"keypoints": _skeletons(g, raw, value, slots)}
        return _keypoints_of_classes(g, raw, raw.head, raw.head.per_class, value, slots)


def _check(raw: RawHead, fits: bool, expected: str) -> None:
    if not fits:
        name = {MaskHead: "masks", KeypointHead: "keypoints", OrientedHead: "oriented boxes"}[type(raw.head)]
        raise ValueError(f"raw {name} must have shape {expected}; got {['B', *raw.shape]}")


def _rows(g: Graph, value: Value, places: Value, valid: Value, rank: int) -> Value:
    """Gather (B, Q, ...) by (B, K) int32: (B, K, ...), float32, 0 where not valid; ``rank`` counts all dimensions."""
    found = g.node("GatherND", value, g.unsqueeze(g.cast(places, "INT64"), 2), batch_dims=1)
    for axis in range(2, rank):
        valid = g.unsqueeze(valid, axis)
    return g.node("Where", valid, g.cast(found, "FLOAT"), 0.0)


def _masks(g: Graph, raw: RawHead, head: MaskHead, value: Value, slots: Slots) -> Value:
    _check(raw, len(raw.shape) == 3, "(B, Q, h, w)")
    if head.size == "network":
        return _rows(g, value, slots.queries, slots.valid, 4)
    if slots.place is None:
        raise ValueError("masks in the size of the image need its size: take another io, or masks='network'")
    rows, in_row = _weights(g, slots.place, 1, value, 2), _weights(g, slots.place, 0, value, 3)
    inside = _inside(g, slots, rows, in_row) if head.style == "dfine_seg" else None
    parts = []
    for start in range(0, slots.kept, _MASKS_AT_A_TIME):
        ends = (start, min(start + _MASKS_AT_A_TIME, slots.kept))
        queries, valid = (_of_slots(g, each, ends, slots.kept, 1) for each in (slots.queries, slots.valid))
        found = _rows(g, value, queries, valid, 4)
        found = g.node("MatMul", g.node("MatMul", rows.matrix, found), in_row.matrix)
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


def _inside(g: Graph, slots: Slots, rows: _Weights, in_row: _Weights) -> tuple[Value, Value]:
    """Say which rows (B, K, H, 1) and columns (B, K, 1, W) lie in each box."""
    found = []
    for side, weights, axis in ((1, rows, 2), (0, in_row, 3)):
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


def _scaled(g: Graph, pairs: Value, slots: Slots, rank: int) -> Value:
    """Bring x and y, the last dimension of (B, K, ..., 2), to the unit of the boxes."""
    if slots.place is None:
        return pairs

    def of_pair(value: Value) -> Value:  # (4, B or 1, 1) -> (B or 1, 1, ..., 2)
        both = g.node("Slice", value, g.constant([0]), g.constant([2]), g.constant([0]))
        return g.reshape(g.node("Transpose", both, perm=[1, 2, 0]), [-1, *[1] * (rank - 2), 2])

    scaled = g.node("Mul", pairs, of_pair(slots.place.factor))
    return scaled if slots.place.shift is None else g.node("Sub", scaled, of_pair(slots.place.shift))


def _columns(g: Graph, value: Value, first: int, last: int, rank: int) -> Value:
    """Take a part of the last dimension."""
    return g.node("Slice", value, g.constant([first]), g.constant([last]), g.constant([rank - 1]))


def _oriented(g: Graph, raw: RawHead, head: OrientedHead, value: Value, slots: Slots) -> Value:
    _check(raw, len(raw.shape) == 2 and raw.shape[1] == 5, "(B, Q, 5)")
    rows = _rows(g, value, slots.queries, slots.valid, 3)
    centre, size, angle = (_columns(g, rows, *ends, 3) for ends in ((0, 2), (2, 4), (4, 5)))
    centre = _scaled(g, centre, slots, 3)
    size = _scaled(g, size, slots._replace(place=slots.place and slots.place._replace(shift=None)), 3)
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
    _check(raw, fits and len(raw.shape) in (2, 3), "(B, Q, 2 N), (B, Q, N, 2) or (B, Q, N, 3)")
    count = int(raw.shape[1]) // 2 if in_row else int(raw.shape[1])
    rows = _rows(g, value, slots.queries, slots.valid, 3 if in_row else 4)
    if in_row:
        rows = g.reshape(rows, [0, slots.kept, count, 2])
    valid = g.unsqueeze(g.unsqueeze(slots.valid, 2), 3)
    pairs = rows if raw.shape[-1] == 2 or in_row else _columns(g, rows, 0, 2, 4)
    pairs = g.node("Where", valid, _scaled(g, pairs, slots, 4), 0.0)
    if not in_row and raw.shape[-1] == 3:
        visible = _columns(g, rows, 2, 3, 4)
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
    _check(raw, known and shape[1] == classes * most and int(shape[2]) >= 3, f"(B, Q, {classes} * {most}, 3 or more)")
    queries, depth = int(shape[0]), int(shape[2])
    has_class = g.node("And", slots.valid, g.node("Less", g.cast(slots.labels, "FLOAT"), float(classes)))
    label = g.node("Where", has_class, slots.labels, 0)
    by_class = g.reshape(value, [0, queries * classes, most, depth])
    places = g.node("Add", g.node("Mul", slots.queries, classes), label)
    rows = _rows(g, by_class, places, has_class, 4)
    count = g.node("Gather", np.array(per_class, np.float32), label, axis=0)
    count = g.unsqueeze(g.node("Mul", g.indicator(has_class), count), 2)  # (B, K, 1)
    active = g.node("Less", np.arange(most, dtype=np.float32)[None, None], count)  # (B, K, N)
    pairs = _scaled(g, _columns(g, rows, 0, 2, 4), slots, 4)
    findable = g.node("Sigmoid", _columns(g, rows, 2, 3, 4))
    points = g.node("Where", g.unsqueeze(active, 3), g.node("Concat", pairs, findable, axis=3), 0.0)
    scores = slots.scores
    if depth >= 7 and head.trace_alpha:
        fused = _fused(g, head.trace_alpha, rows, findable, active, slots)
        scores = g.node("Where", has_class, fused, scores)
    return {"keypoints": points, "keypoint_scores": scores}


def _fused(g: Graph, alpha: float, rows: Value, findable: Value, active: Value, slots: Slots) -> Value:
    """Lower the scores (B, K) by the expected squared error of the active keypoints, in logarithms throughout."""
    l11, cross, l22 = (_columns(g, rows, place, place + 1, 4) for place in (4, 5, 6))  # (B, K, N, 1) each
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
