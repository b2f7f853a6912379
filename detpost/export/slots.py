"""What heads are written with in ONNX: their raw value, the kept slots, and rows gathered by them.

Every head gathers rows of one more value of the network by the query of each detection, and brings them to the unit
that the boxes are in. GatherND copies whole rows; an index for every number, as GatherElements has it, would take eight
times the memory of the masks themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from detpost.export.graph import Graph, Value

__all__ = ["HEADS_OPSET", "Place", "RawHead", "Slots", "check_shape", "columns", "rows", "scaled"]

HEADS_OPSET = 12  # GatherND goes image by image from here on


class RawHead(NamedTuple):
    """A head and the value that it reads.

    Args:
        head: what is made of it, one of :mod:`detpost.export.heads`.
        shape: without the batch, a name or a number for each dimension: (Q, ...).
        dtype: ONNX's number of its dtype.
    """

    head: Any
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


def check_shape(raw: RawHead, what: str, fits: bool, expected: str) -> None:
    """Refuse a raw value of a shape that is none of its head's.

    Args:
        raw: the head and its value.
        what: the head's name in words.
        fits: whether the shape will do.
        expected: which would.

    Raises:
        ValueError: it will not.
    """
    if not fits:
        raise ValueError(f"raw {what} must have shape {expected}; got {['B', *raw.shape]}")


def rows(g: Graph, value: Value, places: Value, valid: Value, rank: int) -> Value:
    """Gather (B, Q, ...) by (B, K) int32: (B, K, ...), float32, 0 where not valid; ``rank`` counts all dimensions."""
    found = g.node("GatherND", value, g.unsqueeze(g.cast(places, "INT64"), 2), batch_dims=1)
    for axis in range(2, rank):
        valid = g.unsqueeze(valid, axis)
    return g.node("Where", valid, g.cast(found, "FLOAT"), 0.0)


def scaled(g: Graph, pairs: Value, slots: Slots, rank: int) -> Value:
    """Bring x and y, the last dimension of (B, K, ..., 2), to the unit of the boxes."""
    if slots.place is None:
        return pairs

    def of_pair(value: Value) -> Value:  # (4, B or 1, 1) -> (B or 1, 1, ..., 2)
        both = g.node("Slice", value, g.constant([0]), g.constant([2]), g.constant([0]))
        return g.reshape(g.node("Transpose", both, perm=[1, 2, 0]), [-1, *[1] * (rank - 2), 2])

    moved = g.node("Mul", pairs, of_pair(slots.place.factor))
    return moved if slots.place.shift is None else g.node("Sub", moved, of_pair(slots.place.shift))


def columns(g: Graph, value: Value, first: int, last: int, rank: int) -> Value:
    """Take a part of the last dimension."""
    return g.node("Slice", value, g.constant([first]), g.constant([last]), g.constant([rank - 1]))
