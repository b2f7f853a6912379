"""Softmax scores as ONNX nodes: bit for bit those of :mod:`detpost.reference.softmax`, in float32 throughout.

Logits are divided by four first, which is exact down to where it no longer matters: so there is room among the finite
numbers for a peak that stands for infinity, and no difference is inf - inf.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from detpost.export.graph import Graph, Value
from detpost.reference import softmax

__all__ = ["Shares", "shares"]

_QUARTER = 0.25  # of a logit: float32 ends at 3.4e38, so these at 8.5e37
_INFINITE = 9e37  # stands for a peak of +inf: more than 64 logits above all numbers
_LOWEST_PEAK = -9e37  # for one of -inf: a query of nothing else has no share for anyone


class Shares(NamedTuple):
    """What scores are the products of, for every class.

    Args:
        weights: (B, Q, C), float32, stretched by a power of two.
        share: (B, Q, 1), float32, of a weight of 1; shrunk by the same.
        is_number: (B, Q, 1), bool; False where the query has a NaN, whose weights mean nothing.
    """

    weights: Value
    share: Value
    is_number: Value


def shares(g: Graph, logits: Value, queries: int, classes: int, fast: bool) -> Shares:
    """Write the weight of every class and what one is worth.

    Args:
        g: where to write.
        logits: (B, Q, C), float32.
        queries: Q.
        classes: C.
        fast: whether a few nodes more are written for ONNX Runtime's sake.

    Returns:
        The values.
    """
    numbers = g.least(g.indicator(g.node("Equal", logits, logits)), 2, keep=True)  # 0 for a query with a NaN
    quarters = g.node("Mul", logits, _QUARTER)
    peak = g.node("Clip", g.greatest(quarters, 2, keep=True), _LOWEST_PEAK, _INFINITE)  # (B, Q, 1)
    farthest = softmax.GREATEST_STEP / softmax.GAP_SCALE * _QUARTER
    gap = g.node("Clip", g.node("Sub", peak, quarters), 0.0, farthest)  # 0 for +inf, which lies above a finite peak
    steps = _floor(g, g.node("Mul", gap, softmax.GAP_SCALE / _QUARTER), fast)
    steps = g.node("Mul", steps, softmax.REST_SCALE)
    entry = g.cast(steps, "INT32")
    # The reference's 1 - rest / 4096 is taken 4096 times; the table makes up for it.
    slope = g.node("Sub", 1 / softmax.SLOPE, g.node("Sub", steps, g.cast(entry, "FLOAT")))
    # What a NaN becomes as an integer is the runner's choice: times zero, it is within the table.
    places = g.reshape(g.node("Mul", entry, g.cast(numbers, "INT32")), [-1])
    bits, _ = softmax.limbs(classes)
    found = g.node("GatherElements", _table(g, 2.0**bits), places, axis=0)
    weights = g.node("Mul", g.reshape(found, [-1, queries, classes]), slope)
    # ONNX Runtime makes x / y of a product x * (1 / y), and OpenVINO the product of the quotient: Clip, which changes
    # nothing, keeps both from it.
    share = g.node("Clip", g.node("Div", 1.0, _total(g, weights, classes, fast)), 0.0, 1.0)
    return Shares(weights, share, g.node("Greater", numbers, 0.5))


def _table(g: Graph, stretch: float) -> Value:
    """Write the product of the two tables, which runners compute once, when they load the file."""
    coarse = np.array(softmax.COARSE, np.float32)[:, None]
    fine = np.array(softmax.FINE, np.float32)[None] * np.float32(softmax.SLOPE * stretch)
    return g.reshape(g.node("Mul", coarse, fine), [-1])


def _total(g: Graph, scaled: Value, classes: int, fast: bool) -> Value:
    """Give sum over the classes in limbs, each of which is exact in any order; weights and sum times 2**bits."""
    bits, count = softmax.limbs(classes)
    sums: list[Value] = []
    for place in range(count):
        limb = _floor(g, scaled, fast)
        sums.append(g.sum(limb, 2, keep=True))
        if place < count - 1:
            scaled = g.node("Mul", g.node("Sub", scaled, limb), 2.0**bits)
    total = sums.pop()
    for coarser in reversed(sums):
        total = g.node("Add", coarser, g.node("Mul", total, 2.0**-bits))
    return g.node("Max", total, 2.0**bits)


def _floor(g: Graph, value: Value, fast: bool) -> Value:
    """Take the whole part of what is not negative: ONNX Runtime's Floor takes longer than two casts."""
    return g.cast(g.cast(value, "INT32"), "FLOAT") if fast else g.node("Floor", value)
