"""The k best of N scores, in one exact order, whatever computes it.

The order is total: score descending, then index ascending, with -0.0 equal to 0.0 and NaN after every number (among
NaNs, by index). ``torch.topk`` promises no order for equal scores, and half-precision and quantised detectors
produce many of them, so every path here breaks ties itself.

Selection returns indices and nothing else. Values are gathered afterwards, so no path has a gradient to get wrong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detpost import kernels

__all__ = ["best_class", "select_top_k"]

_INT32_MIN = -(2**31)
_INDEX_BITS = 32
# Under this many scores per kept one, the group prefilter costs more than it saves.
_PREFILTER_MIN_RATIO = 8


def select_top_k(scores: Tensor, k: int) -> Tensor:
    """Give the indices of the k greatest scores of each row, ties by the lower index.

    Equal to ``torch.argsort(scores, descending=True, stable=True)[:, :k]`` on rows without NaN, for every dtype, device
    and runtime; NaN comes after every number.

    Args:
        scores: (B, N), floating; any strides. Half-precision scores are compared as they are.
        k: how many to keep, at least 1; ``min(k, N)`` come back.

    Returns:
        (B, min(k, N)), int64, best first. Carries no gradient.

    Raises:
        TypeError: scores that are not a floating tensor, or a k that is not an int.
        ValueError: another rank than 2, or k below 1.

    Example:
        >>> select_top_k(torch.tensor([[1.0, 3.0, float("nan"), 3.0, -0.0, 0.0]]), 5)
        tensor([[1, 3, 0, 4, 5]])
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        what = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores must be a floating tensor of shape (B, N); got {what}")
    if scores.ndim != 2:
        raise ValueError(f"scores must have shape (B, N); got {tuple(scores.shape)}: flatten the rest first")
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int; got {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    rows = scores.detach()
    found = kernels.select(rows, k)
    if found is not None:
        return found
    if rows.dtype == torch.float64:
        return select_stable_sort(rows, k)
    return select_packed(rows, k)


def best_class(logits: Tensor) -> Tensor:
    """Give the index of the greatest logit along the last dimension, ties by the lower index, NaN after numbers.

    Args:
        logits: (..., C), floating, C at least 1.

    Returns:
        (...), int64. Carries no gradient.

    Example:
        >>> best_class(torch.tensor([[0.0, 3.0, 3.0], [float("nan"), -1.0, -2.0]]))
        tensor([1, 1])
    """
    rows = logits.detach()
    is_number = ~rows.isnan()
    numbers = torch.where(is_number, rows, -math.inf)
    # `is_number`: where the greatest number is -inf, a NaN must not tie with it. The least index and not argmax:
    # runtimes differ on which of equal maxima argmax gives.
    is_best = is_number & (numbers == numbers.amax(dim=-1, keepdim=True))
    last = logits.shape[-1] - 1
    index = torch.arange(last + 1, dtype=torch.int32, device=logits.device)
    return torch.where(is_best, index, last).amin(dim=-1).to(torch.int64)


def select_stable_sort(scores: Tensor, k: int) -> Tensor:
    """Select by two stable sorts: the plain form that the others are held to, and the one for float64.

    Args and returns as :func:`select_top_k`.
    """
    is_nan = scores.isnan()
    # A stable sort by value and then by "is NaN" puts NaN behind -inf, which no single float can express.
    # Zeros of one sign: a radix sort, as on CUDA, would put -0.0 below 0.0.
    values = torch.where(is_nan, -math.inf, torch.where(scores == 0, 0.0, scores))
    by_value = values.argsort(dim=1, descending=True, stable=True)
    nan_last = is_nan.gather(1, by_value).to(torch.uint8).argsort(dim=1, stable=True)
    return by_value.gather(1, nan_last[:, :k])


def select_packed(scores: Tensor, k: int) -> Tensor:
    """Select through unique 64-bit integer keys: no two are equal, so any top-k gives the one right order.

    The upper half of a key is the score as an ordered integer, the lower half counts down with the index. Exact for
    float32 and narrower. Args and returns as :func:`select_top_k`.
    """
    width = scores.shape[1]
    keys = _packed_keys(scores)  # (B, N)
    kept = min(k, width)
    if kept and width >= _PREFILTER_MIN_RATIO * kept:
        keys = _group_prefilter(keys, kept)
    countdown = keys.topk(kept, dim=1).values % 2**_INDEX_BITS
    indices: Tensor = (width - 1) - countdown
    return indices


def _packed_keys(scores: Tensor) -> Tensor:
    # where, not `+ 0.0`: compilers drop the addition of zero, and -0.0 would stay below 0.0.
    values = scores.to(torch.float32)
    bits = torch.where(values == 0, 0.0, values).view(torch.int32)
    # IEEE 754 floats order like sign-magnitude integers; flipping the magnitude of negatives makes it two's complement.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = torch.where(values.isnan(), _INT32_MIN, ordered)  # -inf maps above this
    countdown = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    keys: Tensor = ordered.to(torch.int64) * 2**_INDEX_BITS + countdown
    return keys


def _group_prefilter(keys: Tensor, k: int) -> Tensor:
    """Keep the k groups with the greatest maxima; the k greatest keys lie in them.

    Each kept group has a key at least as great as any key of a group left out, which makes k of them.
    """
    batch, width = keys.shape
    size = max(2, math.isqrt(width // k))  # about the size for which the two top-k passes read least
    groups = -(-width // size)
    padded = torch.nn.functional.pad(keys, (0, groups * size - width), value=torch.iinfo(torch.int64).min)
    grouped = padded.view(batch, groups, size)
    chosen = grouped.amax(dim=2).topk(k, dim=1, sorted=False).indices  # (B, k)
    return grouped.gather(1, chosen.unsqueeze(-1).expand(batch, k, size)).reshape(batch, k * size)
