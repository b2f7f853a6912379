"""The erosion loss of one small field in exact arithmetic, and its gradient: what every form of ours is held to.

Everything is a ``fractions.Fraction``, the stencil's weight too: 1/5 or 1/7 rounded to float32, as kornia has it. The
gradient is the subgradient that shares an extreme's equally among the elements that have it. These are, with ``eps`` 0,
the elements that are equal; with an ``eps``, those that arithmetic of this ``eps`` cannot be asked to tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

WEIGHTS = {2: Fraction(float(np.float32(0.2))), 3: Fraction(float(np.float32(1 / 7)))}
HALF = Fraction(1, 2)


class ExactErosion(NamedTuple):
    """What comes out, as arrays of fractions."""

    field: np.ndarray  # the weighted sum of the erosions
    gradient: np.ndarray  # of sum(field * cotangent) with respect to the prediction
    # The factor by which a difference that decides about a tie misses the edge of what counts as one; great is clear.
    clearance: float


class Erosion(NamedTuple):
    """One erosion of a field: what it stretches, into what, and which elements make its limits."""

    dilation: np.ndarray
    stretched: np.ndarray
    extent: Fraction  # 0: flat, or no more than rounding
    passes: np.ndarray
    at_maximum: np.ndarray
    at_minimum: np.ndarray
    slack: Fraction  # within which others count as equal to the maximum
    clearance: float


def exact_erosion(
    pred: np.ndarray,
    truth: np.ndarray,
    weights: Sequence[float],
    cotangent: np.ndarray | None = None,
    eps: float = 0.0,
) -> ExactErosion:
    """Erode one field ``len(weights)`` times, and go back.

    Args:
        pred: (H, W) or (D, H, W), floating.
        truth: as ``pred``, 0 or 1.
        weights: of each erosion in the sum.
        cotangent: gradient of the sum, as ``pred``; ``None`` is 1 everywhere.
        eps: what arithmetic of some precision calls so; 0 tells everything apart.

    Returns:
        The sum, its gradient, and how clear the ties were.
    """
    erosions = exact_erosions(pred, truth, len(weights), eps)
    total = sum(erosion.stretched * Fraction(weight) for weight, erosion in zip(weights, erosions, strict=True))
    given = fractions_of(np.ones(pred.shape) if cotangent is None else cotangent)
    gradient = fractions_of(np.zeros(pred.shape))
    for weight, erosion in zip(reversed(weights), reversed(erosions), strict=True):
        gradient = mean_of_neighbours(_back(gradient + given * Fraction(weight), erosion))
    slope = (fractions_of(pred) - fractions_of(truth)) * 2
    return ExactErosion(total, gradient * slope, min(erosion.clearance for erosion in erosions))


def exact_erosions(pred: np.ndarray, truth: np.ndarray, steps: int, eps: float = 0.0) -> list[Erosion]:
    """Erode one field, with what rounding has made of it by then in arithmetic of an ``eps``."""
    bound = (fractions_of(pred) - fractions_of(truth)) ** 2
    step, carried, found = Fraction(eps) * (2 * pred.ndim + 4), Fraction(0), []
    for _ in range(steps):
        found.append(_erode(mean_of_neighbours(bound), step, carried))
        bound = found[-1].stretched
        extent = max(HALF, found[-1].dilation.max()) - max(HALF, found[-1].dilation.min())
        carried = min(Fraction(1), found[-1].slack / 2 / (extent or 1))
    return found


def _erode(dilation: np.ndarray, step: Fraction, carried: Fraction) -> Erosion:
    """Threshold and stretch."""
    erosion = np.maximum(dilation - HALF, 0)
    lower, extent = erosion.min() + HALF, erosion.max() - erosion.min()
    slack = carried + step * (lower + extent)
    near_lower, near_half = carried + step * lower, carried + step * HALF
    edges = [(lower + extent, slack), (lower, near_lower), (HALF, near_half)]
    return Erosion(
        dilation,
        erosion if extent == 0 else (erosion - erosion.min()) / extent,
        Fraction(0) if extent <= slack else extent,
        passes=dilation >= HALF - near_half,
        at_maximum=dilation >= lower + extent - slack,
        at_minimum=dilation <= lower + near_lower,
        slack=slack,
        clearance=min(_clearance(abs(dilation - edge), limit) for edge, limit in edges),
    )


def _clearance(gaps: np.ndarray, limit: Fraction) -> float:
    """Find how near a gap comes to the limit, as a factor of at least 1; gaps of nothing are clear."""
    if limit == 0:
        return float("inf")
    ratios = [float(gap / limit) for gap in gaps.flat if gap]
    return min((max(ratio, 1 / ratio) for ratio in ratios if ratio), default=float("inf"))


def _back(gradient: np.ndarray, erosion: Erosion) -> np.ndarray:
    """Take the gradient of a stretched field to the dilation before the threshold."""
    if erosion.extent:
        gradient = gradient / erosion.extent
        onto_maximum = -(gradient * erosion.stretched).sum()
        onto_minimum = -gradient.sum() - onto_maximum
        gradient = gradient + erosion.at_maximum * (onto_maximum / int(erosion.at_maximum.sum()))
        gradient = gradient + erosion.at_minimum * (onto_minimum / int(erosion.at_minimum.sum()))
    return gradient * erosion.passes


def mean_of_neighbours(field: np.ndarray) -> np.ndarray:
    """Weigh an element and its direct neighbours, with nothing beyond the border; its own transpose."""
    total = field
    for axis in range(field.ndim):
        along = np.moveaxis(field, axis, 0)
        nothing = np.zeros_like(along[:1]) * 0
        for shifted in (np.concatenate([along[1:], nothing]), np.concatenate([nothing, along[:-1]])):
            total = total + np.moveaxis(shifted, 0, axis)
    return total * WEIGHTS[field.ndim]


def fractions_of(values: np.ndarray) -> np.ndarray:
    """Give the very numbers that floats stand for."""
    return np.vectorize(Fraction, otypes=[object])(np.asarray(values, dtype=np.float64))
