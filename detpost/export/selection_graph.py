"""The k best of each row as ONNX nodes: the order of ``select_top_k`` from operators that every runner has.

A runner's TopK may return equal values in any order and, at the k-th value, any of them; its *values* are certain. So
the exact form (1) takes the k-th value, tau; (2) finds the lowest places that equal tau, by a TopK of keys that are
unique; (3) sorts by another TopK of unique keys, made of the number of greater values and of the place. Keys are
float32, which holds whole numbers up to 2**24: integer TopK and CumSum are missing on WebGPU.

WebGPU's TopK pads a row with the lowest finite number at place -1, which outranks -inf. Hence nothing is taken from a
TopK of logits but what lies above the lowest finite number; the rest of a row that has fewer such values than k is
filled by step 2, in the order of its values too.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from detpost.export.graph import Graph, Value

__all__ = ["Chosen", "Rows", "finite_keys", "select", "select_by_runner"]

Rows = Literal["logits", "scores"]
"""What rows hold: any float32, or numbers of [0, 1] and, for what must not be chosen, negative ones."""

_LOWEST = float(np.finfo(np.float32).min)
# The next numbers above it stand for NaN, and for all that is not above the second: finite, and not WebGPU's padding.
_NAN_KEY = float(np.nextafter(np.float32(_LOWEST), np.float32(0)))
_LEAST_KEY = float(np.nextafter(np.float32(_NAN_KEY), np.float32(0)))
_WHOLE_NUMBERS = 2**24  # float32 holds all of them up to here, of both signs

# From this width on reading the row in groups first costs less than two passes of TopK over it.
_WIDE = 2**16
_RAISED_FROM = 8  # elements of a part from which a lower bound of tau pays


class Chosen(NamedTuple):
    """The k best of each row, best first.

    Args:
        values: (B, k), float32, never NaN; of no meaning where nothing was there to choose.
        places: (B, k), int32, in the row; always within it.
        is_number: (B, k), bool; False where nothing was there to choose. ``None`` for scores, whose sign tells.
    """

    values: Value
    places: Value
    is_number: Value | None


def select(g: Graph, row: Value, width: int, k: int, rows: Rows) -> Chosen:
    """Choose as ``select_top_k`` does, whatever the runner's TopK does with ties.

    Args:
        g: where to write.
        row: (B, width), float32.
        width: length of a row, at most 2**23 in groups or not.
        k: how many to choose, 1 to ``width``.
        rows: what the rows hold.

    Returns:
        What is chosen.
    """
    size = _group_size(width, k)
    if size is not None:
        return _select_by_groups(g, row, width, k, size, rows)
    numbers = _numbers(g, row, rows)
    return _select(g, row, _raised(g, numbers, width, k), width, k, rows)


def select_by_runner(g: Graph, row: Value, width: int, k: int, rows: Rows) -> Chosen:
    """Choose by the runner's TopK alone, which ONNX says takes the lower index first.

    Args and returns as :func:`select`. Logits at and below -3.40282e38, -inf too, count as equal.
    """
    keys = finite_keys(g, row) if rows == "logits" else row
    size = _group_size(width, k)
    candidates = None
    if size is not None:
        keys, groups = _in_groups(g, keys, width, size, _NAN_KEY)
        maxima = g.greatest(g.reshape(keys, [0, groups, size]), 2)
        values, places = g.top_k(maxima, k)
        candidates = _elements(g, places, size, k)
        keys = g.gather_rows(keys, candidates)
        # Out of TopK's way: k elements are at least as great as the k-th of the maxima.
        keys = g.node("Where", g.node("Less", keys, _last(g, values, k)), _NAN_KEY, keys)
    values, places = g.top_k(keys, k)
    places = g.cast(places, "INT32") if candidates is None else g.gather_rows(candidates, places)
    return Chosen(values, places, g.node("Greater", values, _NAN_KEY) if rows == "logits" else None)


def _numbers(g: Graph, row: Value, rows: Rows) -> Value:
    """Replace NaN: comparing a value with itself is the one test for it that all runners have."""
    return row if rows == "scores" else g.node("Where", g.node("Equal", row, row), row, -math.inf)


def finite_keys(g: Graph, logits: Value) -> Value:
    """Map logits to what orders alike and is above -inf: NaN comes last, and -inf level with the lowest finite ones."""
    is_number = g.node("Equal", logits, logits)
    return g.node("Where", is_number, g.node("Clip", logits, _LEAST_KEY, math.inf), _NAN_KEY)


def _raised(g: Graph, numbers: Value, width: int, k: int) -> Value:
    """Raise what is certainly not among the k greatest of (B, width), so that TopK has little to move.

    No element below the k-th of the maxima of 2 k parts of the row is: k elements are at least as great.
    """
    parts = 2 * k
    size = width // parts
    if size < _RAISED_FROM:
        return numbers
    whole = numbers
    if parts * size != width:
        whole = g.node("Slice", numbers, *(g.constant([i]) for i in (0, parts * size, 1)))
    maxima, _ = g.top_k(g.greatest(g.reshape(whole, [0, parts, size]), 2), k)
    return g.node("Max", numbers, _last(g, maxima, k))


def _last(g: Graph, values: Value, k: int) -> Value:
    """Give the k-th value (B, 1) of a TopK."""
    return g.node("Gather", values, g.constant([k - 1]), axis=1)


def _select(g: Graph, row: Value, raised: Value, width: int, k: int, rows: Rows) -> Chosen:
    """Choose from rows (B, width); ``raised`` is the same without NaN, and with nothing below some bound of tau."""
    values, indices = g.top_k(raised, k)
    places = g.cast(indices, "INT32")
    if rows == "scores" and k == width:  # all are chosen, and only their order is in question
        order = _order(g, values, g.cast(places, "FLOAT"), width, k)
        return Chosen(values, _reordered(g, places, order), None)
    tau = _last(g, values, k) if rows == "scores" else g.node("Max", _last(g, values, k), _LOWEST)  # (B, 1)
    above = g.node("Greater", values, tau)
    keys, tail = g.top_k(_tail_keys(g, row, tau, width, rows), k)
    # The first of the tail stands behind the last that is above tau.
    slot = np.arange(k, dtype=np.float32)[None]
    is_above = g.indicator(above)
    taken = g.sum(is_above, 1, keep=True)
    place_in_tail = g.cast(g.node("Relu", g.node("Sub", slot, taken)), "INT32")
    places = g.node("Where", above, places, g.gather_rows(g.cast(tail, "INT32"), place_in_tail))
    rank = g.cast(places, "FLOAT")
    is_number = None
    if rows == "logits":
        is_number = g.node("Greater", g.node("Add", is_above, g.gather_rows(keys, place_in_tail)), 0.0)
        rank = g.node("Where", above, rank, slot)  # the tail is in order already, of its values too
    order = _order(g, values, rank, width, k)
    return Chosen(values, _reordered(g, places, order), is_number)


def _tail_keys(g: Graph, row: Value, tau: Value, width: int, rows: Rows) -> Value:
    """Give keys (B, width) whose greatest are the lowest places that equal tau; nothing else has a key above 0.

    But for -inf: where tau is the lowest finite number, it is what comes next.
    """
    countdown = np.arange(width, 0, -1, dtype=np.float32)[None]
    equal = g.indicator(g.node("Equal", row, tau))
    if rows == "scores":
        return g.node("Mul", equal, countdown)
    infinite = g.indicator(g.node("Equal", row, -math.inf))
    return g.node("Add", g.node("Mul", equal, countdown + width), g.node("Mul", infinite, countdown))


def _order(g: Graph, values: Value, rank: Value, width: int, k: int) -> list[Value]:
    """Sort slots whose values (B, k) fall already, so that equal ones rise in ``rank`` (B, k), whole and below width.

    Returns:
        Indices (B, k) to gather by, one after the other: several where the number of a value and its rank make up
        more than float32 holds, and ranks are sorted digit by digit.
    """
    if k == 1:
        return []
    before = g.constant([0, *range(k - 1)])
    axis = g.constant(1)

    def runs(differs: Value) -> Value:
        return g.node("CumSum", g.indicator(differs), axis)

    run = runs(g.node("Less", values, g.node("Gather", values, before, axis=1)))
    found: list[Value] = []
    shifts = _digit_shifts(width, k)
    for place, shift in enumerate(shifts):
        digit, base = rank, width
        if len(shifts) > 1:
            base = _digit_base(k)
            digit = g.node("Floor", g.node("Mul", rank, 2.0**-shift))
            if place:
                coarser = g.node("Floor", g.node("Mul", rank, 2.0 ** -shifts[place - 1]))
                digit = g.node("Sub", digit, g.node("Mul", coarser, float(base)))
        # Whole numbers below 2**24 throughout, on both sides of zero where one side is too narrow; falling, for TopK.
        centred = run if k * base <= _WHOLE_NUMBERS else g.node("Sub", run, float(_WHOLE_NUMBERS // base))
        key = g.node("Sub", g.node("Mul", centred, float(-base)), digit)
        sorted_keys, order = g.top_k(key, k)
        found.append(order)
        if place < len(shifts) - 1:
            rank = g.gather_rows(rank, order)
            run = runs(g.node("Less", sorted_keys, g.node("Gather", sorted_keys, before, axis=1)))
    return found


def _digit_base(k: int) -> int:
    """Give the greatest power of two that leaves room for k runs."""
    return 1 << ((2 * _WHOLE_NUMBERS // (k + 1)).bit_length() - 1)


def _digit_shifts(width: int, k: int) -> list[int]:
    """Give the bits below each digit of a rank, the highest digit first; one digit where all of it fits."""
    if (k + 1) * width <= 2 * _WHOLE_NUMBERS:
        return [0]
    bits = _digit_base(k).bit_length() - 1
    return [bits * place for place in reversed(range(-(-(width - 1).bit_length() // bits)))]


def _reordered(g: Graph, values: Value, orders: list[Value]) -> Value:
    for order in orders:
        values = g.gather_rows(values, order)
    return values


def _group_size(width: int, k: int) -> int | None:
    """Give how many neighbours make a group, a divisor of the row if there is one near; ``None`` for narrow rows."""
    if width < max(_WIDE, 32 * k):
        return None
    best = max(2, math.isqrt(2 * width // k))
    near = sorted(range(max(2, best // 2), 2 * best + 1), key=lambda size: abs(math.log(size / best)))
    return next((size for size in near if width % size == 0), best)


def _select_by_groups(g: Graph, row: Value, width: int, k: int, size: int, rows: Rows) -> Chosen:
    """Choose among the k groups of neighbours with the greatest maxima, in which the k best lie.

    Each of these groups has an element at least as good as any of a group left out, which makes k of them; equal
    maxima go by the lower group, whose elements come first.
    """
    row, groups = _in_groups(g, row, width, size, math.nan if rows == "logits" else -1.0)
    keys = finite_keys(g, row) if rows == "logits" else row
    maxima = g.greatest(g.reshape(keys, [0, groups, size]), 2)  # (B, groups)
    tau = _last(g, g.top_k(_raised(g, maxima, groups, k) if rows == "logits" else maxima, k)[0], k)
    countdown = np.arange(groups, 0, -1, dtype=np.float32)[None]
    equal = g.node("Mul", g.indicator(g.node("Equal", maxima, tau)), countdown)
    above = g.node("Mul", g.indicator(g.node("Greater", maxima, tau)), countdown + groups)
    _, chosen = g.top_k(g.node("Add", equal, above), k)
    candidates = _elements(g, chosen, size, k)
    found = g.gather_rows(row, candidates)
    # The k-th of the maxima is no greater than the k-th of all. What stands for -inf or NaN is no such bound.
    bound = tau if rows == "scores" else g.node("Where", g.node("Greater", tau, _LEAST_KEY), tau, _LOWEST)
    chosen_here = _select(g, found, g.node("Max", _numbers(g, found, rows), bound), k * size, k, rows)
    return Chosen(chosen_here.values, g.gather_rows(candidates, chosen_here.places), chosen_here.is_number)


def _in_groups(g: Graph, row: Value, width: int, size: int, filler: float) -> tuple[Value, int]:
    """Fill the last group of a row up with what comes after all else; give the number of groups too."""
    groups = -(-width // size)
    if groups * size != width:
        row = g.node("Pad", row, g.constant([0, 0, 0, groups * size - width]), filler)
    return row, groups


def _elements(g: Graph, groups: Value, size: int, k: int) -> Value:
    """Give the places (B, k * size), int32, rising, of the elements of groups (B, k)."""
    # In the order of the row, so that a place among the candidates stands for one in it.
    falling, _ = g.top_k(g.node("Neg", g.cast(groups, "FLOAT")), k)
    first = g.node("Mul", g.unsqueeze(g.cast(falling, "INT32"), 2), -size)
    return g.reshape(g.node("Add", first, np.arange(size, dtype=np.int32)[None, None]), [0, k * size])
