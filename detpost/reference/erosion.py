"""The erosions of the Hausdorff ER loss in PyTorch's own operators, and their gradient: what every kernel is held to.

Which elements have a field's minimum or maximum, and so its gradient, must not hang on how a sum happens to round. Two
dilations count as equal where their difference is no more than rounding can make. One has 5 roundings of a sum (7 in
3-D) and 3 of a squared difference, each half an ``eps`` of the value at most, and a comparison has two of them: 8
``eps`` (10 in 3-D). To this comes what the erosions before it left: the stretch divides an error by the range of its
field, and the mean over 5 (7) elements halves it, since the rounding errors of different elements are independent (a
5th of the root of 5 is 0.45). So it is no proven bound: a proven one, with errors that all add up, grows fourfold with
each erosion and would call equal what float32 still tells apart. Measured against exact arithmetic, over 16 erosions of
fields of every kind, rounding tears a tie apart by a third of it at most (``tests/losses/test_ties.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# 1/5 and 1/7 rounded to float32, in every dtype: kornia builds its stencil in float32 and widens it, and float64 values
# agree with it to 1e-10 only with the same rounding. Keyed by the number of spatial axes.
STENCIL_WEIGHT = {2: 13421773 / 2**26, 3: 9586981 / 2**26}
# Rounding steps (``eps``) of its own value within which a dilation ties with another. Keyed likewise.
TIE_STEPS = {2: 8, 3: 10}
# Differences of prediction and target are clamped here, so that their squares and the sums of these stay finite.
LARGEST_DIFFERENCE = 1e12


def erode(
    pred: Tensor, target: Tensor, classes: Tensor, weights: Sequence[float], axes: int, keep_field: bool
) -> tuple[Tensor, ...]:
    """Erode the squared difference ``len(weights)`` times and sum the stretched erosions.

    Args:
        pred: (B, C, *spatial), float32 or float64.
        target: (B, 1, *spatial), integer class ids.
        classes: (C,), the class id of each channel.
        weights: of each erosion in the sum.
        axes: 2 or 3.
        keep_field: whether the sum stays a field, or runs over the elements of each field too.

    Returns:
        The sum, (B, C, *spatial), or with ones for the spatial sides; then what :func:`erosion_gradient` needs: every
        dilation (B, C, *spatial), every lower bound and every range (B, C, 1, ...).
    """
    spatial = tuple(range(-axes, 0))
    bound = difference(pred, target, classes).square()
    total = torch.zeros((), dtype=pred.dtype, device=pred.device)
    dilations, lowers, ranges = [], [], []
    for weight in weights:
        dilation = stencil(bound, axes)
        lower, extent = _stretch_limits(dilation, spatial)
        bound = _stretch(dilation, lower, extent)
        total = torch.add(total, bound if keep_field else bound.sum(spatial, keepdim=True), alpha=weight)
        dilations.append(dilation)
        lowers.append(lower)
        ranges.append(extent)
    return total, *dilations, *lowers, *ranges


def erosion_gradient(grad: Tensor, weights: Sequence[float], saved: Sequence[Tensor], axes: int) -> Tensor:
    """Give the gradient with respect to the squared difference, from the last erosion back to the first.

    Args:
        grad: with respect to the sum of :func:`erode`, of its shape.
        weights: as given there.
        saved: what is returned there after the sum.
        axes: as given there.

    Returns:
        (B, C, *spatial); elements that tie for an extreme share its gradient equally.
    """
    k = len(weights)
    dilations, lowers, ranges = saved[:k], saved[k : 2 * k], saved[2 * k :]
    ties = _ties(lowers, ranges, axes)
    gradient = (grad * weights[-1]).expand_as(dilations[0])
    for i in range(k - 1, -1, -1):
        onto_dilation = _stretch_gradient(gradient, dilations[i], lowers[i], ranges[i], ties[i], axes)
        # The stencil is symmetric, so it is its own transpose.
        start = None if i == 0 else (grad * weights[i - 1]).expand_as(onto_dilation)
        gradient = stencil(onto_dilation, axes, start)
    return gradient


def erode_differentiably(
    pred: Tensor, target: Tensor, classes: Tensor, weights: Sequence[float], axes: int, keep_field: bool
) -> Tensor:
    """Give the sum of :func:`erode` with derivatives of every order and direction that PyTorch finds by itself.

    The first is that of :func:`erosion_gradient`. Each quantity is its value, fixed, plus a change that is 0 and has
    the derivative; ties decide what a change reaches.

    Args:
        pred: as in :func:`erode`.
        target: as there.
        classes: as there.
        weights: as there.
        axes: as there.
        keep_field: as there.

    Returns:
        The sum, as there.
    """
    spatial = tuple(range(-axes, 0))
    bound = difference(pred, target, classes).square()
    total = torch.zeros((), dtype=pred.dtype, device=pred.device)
    lowers, ranges = [], []
    for weight in weights:
        dilation = stencil(bound, axes)
        fixed = dilation.detach()
        lower, extent = _stretch_limits(fixed, spatial)
        lowers.append(lower)
        ranges.append(extent)
        tie = _ties(lowers, ranges, axes)[-1]
        change = torch.where(fixed >= tie.half, dilation - fixed, 0.0)
        of_lower = torch.where(tie.is_flat, 0.0, _mean_where(change, fixed <= tie.bottom, spatial))
        of_upper = torch.where(tie.is_flat, 0.0, _mean_where(change, fixed >= tie.top, spatial))
        height = torch.maximum(fixed, lower) - lower + change - of_lower
        ratio = height / (torch.where(tie.is_flat, 1.0, extent) + of_upper - of_lower)
        bound = _stretch(fixed, lower, extent) + (ratio - ratio.detach())
        total = torch.add(total, bound if keep_field else bound.sum(spatial, keepdim=True), alpha=weight)
    return total


def difference(pred: Tensor, target: Tensor, classes: Tensor) -> Tensor:
    """Prediction minus one-hot target, (B, C, *spatial), clamped to what can be squared and summed."""
    one_hot = (target == classes.reshape(1, -1, *[1] * (pred.dim() - 2))).to(pred.dtype)
    return (pred - one_hot).clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)


def stencil(field: Tensor, axes: int, start: Tensor | None = None) -> Tensor:
    """Give the mean over an element and its direct neighbours, zeros beyond the border, added to ``start``.

    The taps are added in memory order with one multiply-add each, as a convolution does.
    """
    weight = STENCIL_WEIGHT[axes]
    padded = F.pad(field, (1, 1) * axes)
    axis_order = range(-axes, 0)
    before = [_shifted(padded, axis, 0) for axis in axis_order]
    after = [_shifted(padded, axis, 2) for axis in reversed(axis_order)]
    taps = [*before, field, *after]
    result = taps[0] * weight if start is None else torch.add(start, taps[0], alpha=weight)
    for tap in taps[1:]:
        result = torch.add(result, tap, alpha=weight)
    return result


def _shifted(padded: Tensor, axis: int, start: int) -> Tensor:
    """View of the unpadded size that starts at ``start`` along one axis and at 1 along the others."""
    for other in range(2, padded.dim()):
        shift = start if other == padded.dim() + axis else 1
        padded = padded.narrow(other, shift, padded.shape[other] - 2)
    return padded


def _stretch_limits(dilation: Tensor, spatial: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Lower bound and range that take max(dilation - 0.5, 0) to [0, 1] per field; 0.5 and 0 for a flat field."""
    lowest = dilation.amin(spatial, keepdim=True).clamp(min=0.5)
    extent = dilation.amax(spatial, keepdim=True).clamp(min=0.5) - lowest
    return torch.where(extent == 0, 0.5, lowest), extent


def _stretch(dilation: Tensor, lower: Tensor, extent: Tensor) -> Tensor:
    """Threshold at the lower bound and divide by the range; a flat field (range 0) is not divided."""
    return (torch.maximum(dilation, lower) - lower) / torch.where(extent == 0, 1.0, extent)


class _Ties(NamedTuple):
    """From where on dilations tie, up to rounding, with the limits of their field: each (B, C, 1, ...)."""

    top: Tensor  # and above: with the maximum
    bottom: Tensor  # and below: with the lower bound
    half: Tensor  # and above: with the threshold of 0.5, or beyond it
    is_flat: Tensor  # the maximum ties with the lower bound


def _ties(lowers: Sequence[Tensor], ranges: Sequence[Tensor], axes: int) -> list[_Ties]:
    """Give the ties of each erosion, whose errors grow from the first on; the head of this file says how."""
    step = TIE_STEPS[axes] * torch.finfo(lowers[0].dtype).eps
    carried = torch.zeros_like(lowers[0])
    found = []
    for lower, extent in zip(lowers, ranges, strict=True):
        greatest = lower + extent
        slack = carried + step * greatest
        found.append(
            _Ties(greatest - slack, lower + carried + step * lower, 0.5 - 0.5 * step - carried, extent <= slack)
        )
        carried = (0.5 * slack / torch.where(extent == 0, 1.0, extent)).clamp(max=1.0)
    return found


def _stretch_gradient(grad: Tensor, dilation: Tensor, lower: Tensor, extent: Tensor, ties: _Ties, axes: int) -> Tensor:
    """Gradient of :func:`_stretch` and of its limits, to the dilation."""
    spatial = tuple(range(-axes, 0))
    onto_dilation = grad / torch.where(ties.is_flat, 1.0, extent)
    stretched = _stretch(dilation, lower, extent)
    moves = torch.where(ties.is_flat, 0.0, 1.0).to(grad.dtype)  # the limits of a flat field are constants
    onto_range = -(onto_dilation * stretched).sum(spatial, keepdim=True) * moves
    onto_minimum = -onto_dilation.sum(spatial, keepdim=True) * moves - onto_range
    at_maximum, at_minimum = (dilation >= ties.top).to(grad.dtype), (dilation <= ties.bottom).to(grad.dtype)
    per_maximum = onto_range / at_maximum.sum(spatial, keepdim=True).clamp(min=1)
    per_minimum = onto_minimum / at_minimum.sum(spatial, keepdim=True).clamp(min=1)
    onto_dilation = torch.addcmul(onto_dilation, at_maximum, per_maximum)
    onto_dilation = torch.addcmul(onto_dilation, at_minimum, per_minimum)
    # Nothing flows below the threshold, and all of it at the threshold itself, as in kornia.
    return torch.where(dilation >= ties.half, onto_dilation, 0.0)


def _mean_where(values: Tensor, chosen: Tensor, spatial: tuple[int, ...]) -> Tensor:
    """Give the mean over the chosen elements of each field, 0 where none is."""
    count = chosen.to(values.dtype).sum(spatial, keepdim=True).clamp(min=1)
    return torch.where(chosen, values, 0.0).sum(spatial, keepdim=True) / count
