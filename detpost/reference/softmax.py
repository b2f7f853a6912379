"""Softmax probabilities that are the same bits in every runtime, whatever order it sums in.

``exp`` differs between runtimes in its last bits, and a float sum in its order; an order of detections by such scores
is not one order. Here every step is either exact or one rounding that IEEE 754 fixes, and no fused multiply-add can
change it: wherever a product is followed by an addition, the product is one with a power of two, and exact.

All in float32; half precision is widened, which is exact. With C classes, for the logits x of one query::

    gap  = max(x) - x                      one rounding; float64 logits: the difference in float64, then rounded
    u    = min(floor(gap * 2^22), 2^28)    the gap in whole steps of 2^-22: 64 logits at the most
    t    = floor(u * 2^-10)                exact, as all up to `weight` but for its two products
    r    = u * 2^-10 - t                   [0, 1) in steps of 2^-10
    i    = floor(t * 2^-8)                 0 ... 1024
    j    = t - i * 2^8                     0 ... 255
    weight = (COARSE[i] * FINE[j]) * (1 - r * 2^-12)

so ``u`` is, as an integer, 11 bits of ``i``, 8 of ``j`` and 10 of ``r``. ``COARSE[i]`` is exp(-i / 16) rounded to
float32, ``FINE[j]`` is exp(-j / 4096), and ``COARSE[1024]`` is 0: a class 64 logits below the greatest has no share.
``weight`` is 1 for the greatest logit and never rises where the logit falls (a test looks at every step).

The sum is taken in limbs of ``w = 24 - ceil(log2 C)`` bits, so that C of them add up to 2^24 at the most: exact in
float32 in whatever order. ``n = max(1, floor(46 / w))`` of them cut off less than 2^-23 of the sum::

    rest = weight
    n times:  limb = floor(rest * 2^w);  rest = rest * 2^w - limb;  sums = sums + [sum over the classes of limb]
    total = (sums[0] + (sums[1] + (sums[2] + ...) * 2^-w) * 2^-w) * 2^-w      innermost first, one rounding each
    score = weight * (1 / max(total, 1))                                    IEEE division, then one rounding

The quotient is written as a product because OpenVINO makes one of every division.

Scores stand within 2e-7 of the exact softmax, for any number of classes (an integer of 22 bits for each class would
be 2.9e-5 off at 256 classes and 1.3e-4 at 1,204, where most of them stand 15 logits below the greatest).

float64 logits are for checking derivatives: they are ordered by these scores, and score what softmax gives in float64.

Limits: a NaN makes every score of its query NaN. A greatest logit of +inf has a gap of 0, and any other one below it
the greatest gap: +inf entries share the probability. Entries of -inf score 0, also where all of a query's are -inf
(there the greatest counts as 0).
"""

from __future__ import annotations

import functools
import math
import struct
from typing import Final

import torch
from torch import Tensor

from detpost.tensors import is_plain_call

__all__ = ["COARSE", "FINE", "limbs", "scores", "scores_of", "tables_on", "weights", "with_slope"]

GAP_SCALE: Final = 2.0**22  # steps of a logit
GREATEST_STEP: Final = 2.0**28  # 64 logits
REST_SCALE: Final = 2.0**-10  # what of a step count the tables do not tell apart
SLOPE: Final = 2.0**-12  # of exp over one entry of FINE
FINE_ENTRIES: Final = 256


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


# No entry comes nearer than 2e-12 of itself to where float32 rounds the other way: any libm gives these numbers.
COARSE: Final = (*(_float32(math.exp(-i / 16)) for i in range(1024)), 0.0)
FINE: Final = tuple(_float32(math.exp(-j / 4096)) for j in range(FINE_ENTRIES))


def limbs(classes: int) -> tuple[int, int]:
    """Give the bits of a limb and the number of limbs in which ``classes`` weights are summed.

    Example:
        >>> limbs(92), limbs(1204)
        ((17, 2), (13, 3))
    """
    bits = 24 - (classes - 1).bit_length()
    return bits, max(1, 46 // bits)


def scores(logits: Tensor) -> Tensor:
    """Give the probability of every class.

    Args:
        logits: (..., C), floating, C from 1 to 2**23.

    Returns:
        (..., C), float32, without a gradient; NaN where the query has a NaN.

    Example:
        >>> scores(torch.tensor([[0.0, 0.0, -float("inf")], [1.0, float("inf"), 0.0]]))
        tensor([[0.5000, 0.5000, 0.0000],
                [0.0000, 1.0000, 0.0000]])
    """
    shares, total = weights(logits)
    return shares * (1 / total)


def scores_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Give the probability of one class of each query.

    Args:
        logits: (..., C), floating, C from 1 to 2**23.
        labels: (...), int64.

    Returns:
        (...), float32, what :func:`scores` gives.

    Example:
        >>> scores_of(torch.tensor([[0.0, 0.0, -1.0], [1.0, float("inf"), 0.0]]), torch.tensor([0, 1])).tolist()[1]
        1.0
    """
    shares, total = weights(logits)
    return (shares.gather(-1, labels.unsqueeze(-1)) * (1 / total)).squeeze(-1)


def weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Give what a score is the quotient of: the weight of every class, and their sum.

    Args:
        logits: (..., C), floating, C from 1 to 2**23.

    Returns:
        exp(logit - greatest) of every class (..., C), float32, 1 for the greatest. Their sum (..., 1), float32, at
        least 1; NaN where the query has a NaN, whose weights mean nothing. Neither has a gradient.
    """
    values = logits.detach()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    peak = values.amax(dim=-1, keepdim=True)  # NaN where one of them is
    gap = torch.where(peak == -math.inf, 0.0, peak) - values
    gap = gap.to(torch.float32).nan_to_num(nan=0.0)  # inf - inf, of a greatest logit itself
    steps = (gap * GAP_SCALE).floor().clamp(max=GREATEST_STEP) * REST_SCALE
    entry = steps.floor()
    coarse = (entry / FINE_ENTRIES).floor()
    fine = entry - coarse * FINE_ENTRIES
    coarse_table, fine_table = _tables(values)
    shares = _look_up(coarse_table, coarse) * _look_up(fine_table, fine) * (1 - (steps - entry) * SLOPE)
    return shares, torch.where(peak.isnan(), math.nan, _total(shares))


def _total(shares: Tensor) -> Tensor:
    """Give sum over the classes, (..., C) -> (..., 1), to the same bits in any order."""
    bits, count = limbs(int(shares.shape[-1]))  # a number while tracing, too
    sums, rest = [], shares
    for _ in range(count):
        scaled = rest * 2.0**bits
        limb = scaled.floor()
        rest = scaled - limb
        sums.append(limb.sum(dim=-1, keepdim=True))
    total = sums.pop()
    for coarser in reversed(sums):
        total = coarser + total * 2.0**-bits
    return (total * 2.0**-bits).clamp(min=1)


def with_slope(values: Tensor, logits: Tensor, places: Tensor) -> Tensor:
    """Give scores the derivatives of softmax, forwards and backwards.

    Args:
        values: (..., K), scores.
        logits: (..., Q, C), floating.
        places: (..., K), int64: of which query and class each score is, query * C + class.

    Returns:
        (..., K): the values themselves, float32; of float64 logits the softmax in float64, within 2e-7 of them. Where
        the greatest logit is infinite, or one is NaN, the derivative is 0.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    peak = wide.detach().amax(dim=-1, keepdim=True)  # NaN where one of them is
    is_limit = peak.isinf() | peak.isnan()
    smooth = torch.where(is_limit, 0.0, wide).softmax(dim=-1).flatten(-2).gather(-1, places)
    if wide.dtype == torch.float64:
        return torch.where(is_limit.squeeze(-1).gather(-1, places // logits.shape[-1]), values.to(wide.dtype), smooth)
    return values + (smooth - smooth.detach())


def _tables(like: Tensor) -> tuple[Tensor, Tensor]:
    """Give COARSE and FINE as tensors on a tensor's device."""
    device = like.device
    # Whoever watches what runs is to see them made, not a tensor of another time; elsewhere they are made once for a
    # device: a copy to it costs more than all the rest.
    if type(like) not in (Tensor, torch.nn.Parameter) or not is_plain_call():
        return _tensor(COARSE, device), _tensor(FINE, device)
    return tables_on(device)


@functools.lru_cache(maxsize=64)
def tables_on(device: torch.device) -> tuple[Tensor, Tensor]:
    """Give COARSE and FINE on a device, the same two tensors at each call."""
    with torch.inference_mode(mode=False):  # what is made inside cannot be saved for a backward pass later
        return _tensor(COARSE, device), _tensor(FINE, device)


def _tensor(table: tuple[float, ...], device: torch.device) -> Tensor:
    # Not torch.tensor, which detaches in place where it is traced.
    return torch.as_tensor(table, dtype=torch.float32, device=device)


def _look_up(table: Tensor, places: Tensor) -> Tensor:
    # On a flat index: several times as fast as `table[places]`.
    return table.index_select(0, places.flatten().to(torch.int32)).reshape(places.shape)
