"""The k best of N scores, in one exact order, whatever computes it.

The order is total: score descending, then index ascending, with -0.0 equal to 0.0 and NaN after every number (among
NaNs, by index). ``torch.topk`` promises no order for equal scores, and half-precision and quantised detectors
produce many of them, so every path here breaks ties itself.

Selection returns indices and nothing else. Values are gathered afterwards, so no path has a gradient to get wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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
    if torch.onnx.is_in_onnx_export():
        return select_portable(rows, k)
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
    is_best = is_number & (numbers == greatest(numbers))
    last = logits.shape[-1] - 1
    index = torch.arange(last + 1, dtype=torch.int32, device=logits.device)
    return torch.where(is_best, index, last).amin(dim=-1).to(torch.int64)


def greatest(values: Tensor) -> Tensor:
    """Give the greatest value along the last dimension, kept as a dimension of 1.

    Exported as a TopK: OpenVINO's reduction starts from the lowest finite number, and gives that for nothing but -inf.
    """
    if torch.onnx.is_in_onnx_export():
        return values.topk(1, dim=-1).values
    return values.amax(dim=-1, keepdim=True)


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


GroupMaxima = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def group_maxima(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Find the greatest number of each group of neighbours, and the groups that hold none.

    Args:
        values: (B, N), float32 or float64; NaN anywhere.
        size: elements of a group; the last may have fewer.

    Returns:
        Maxima (B, G), -inf for a group of nothing but NaN. Whether it is one (B, G), bool.
    """
    padded = _filled(values, size)
    is_nan = padded.isnan()
    groups = padded.shape[1] // size
    grouped = torch.where(is_nan, -math.inf, padded).reshape(-1, groups, size)
    only_nan = is_nan.to(torch.float32).reshape(-1, groups, size).amin(dim=2) > 0
    return grouped.amax(dim=2), only_nan


def select_portable(scores: Tensor, k: int, group_maxima: GroupMaxima = group_maxima) -> Tensor:
    """Select with float32 and int32 operators alone, for runtimes with no 64-bit or bit-cast ones: the exported form.

    A runtime's TopK may return equal scores in any order and, at the k-th value, any of them. Its values are certain,
    so this (1) takes the k-th value tau, (2) puts the lowest indices equal to tau in the tail, (3) re-orders the rest
    by a unique integer key made of the rank of the value and the index. Args and returns as :func:`select_top_k`;
    ``group_maxima`` may be another way to compute what the function of that name does.
    """
    width = scores.shape[1]
    kept = min(k, width)
    if kept == 0:
        return torch.zeros((scores.shape[0], 0), dtype=torch.int64, device=scores.device)
    values = scores.to(torch.promote_types(scores.dtype, torch.float32))  # rounding float64 would make new ties
    if width < _PREFILTER_MIN_RATIO * kept:
        is_nan = values.isnan()
        return _exact_order(torch.where(is_nan, -math.inf, values), is_nan, kept)
    size = _group_size(width, kept)
    candidates = _group_candidates(*group_maxima(values, size), kept, size)  # (B, M), ascending
    chosen = _filled(values, size).gather(1, candidates)
    is_nan = chosen.isnan()
    return candidates.gather(1, _exact_order(torch.where(is_nan, -math.inf, chosen), is_nan, kept))


def _filled(values: Tensor, size: int) -> Tensor:
    """Fill the last group up with NaN: it comes last, so that padding is never among the k best of k values or more."""
    missing = -values.shape[1] % size
    return torch.nn.functional.pad(values, (0, missing), value=math.nan) if missing else values


def _group_candidates(maxima: Tensor, only_nan: Tensor, k: int, size: int) -> Tensor:
    """Give the indices (B, M), ascending, of the elements of the k groups that hold the k best.

    A group stands where its best element does, so ties between groups go by the lower group, and a group of nothing but
    NaN comes after one whose best is -inf.
    """
    chosen = _ascending(_exact_set(maxima, only_nan, k)[0], maxima.shape[1])  # (B, k)
    inside = torch.arange(size, device=maxima.device)
    return (chosen.unsqueeze(2) * size + inside).reshape(-1, k * size)


def _group_size(width: int, k: int) -> int:
    """Give about the size for which the two top-k passes read least; one that divides the row if there is one near."""
    best = max(2, math.isqrt(width // k))
    near = sorted(range(max(2, best - best // 3), best + best // 2 + 1), key=lambda size: abs(size - best))
    return next((size for size in near if width % size == 0), best)


def _exact_set(values: Tensor, is_nan: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the k best of ``values`` (B, N), whatever TopK does with ties; they hold -inf where ``is_nan``.

    Returns:
        The indices (B, k), int64: those above the k-th value tau in the runtime's order, then those equal to tau in the
        right one. The greatest k values (B, k). Whether each is above tau (B, k).
    """
    width = values.shape[1]
    top, found = values.topk(k, dim=1)  # which index stands beside which of two equal values is the runtime's choice
    tau = top[:, -1:]
    index = torch.arange(width, dtype=torch.int32, device=values.device)
    countdown = torch.where(is_nan, width - index, 2 * width - index)  # numbers before NaN, then the lower index
    tail = torch.where(values == tau, countdown, 0).topk(k, dim=1).indices
    is_above = top > tau
    slot = torch.arange(k, dtype=torch.int64, device=values.device)
    # where and not clamp: ONNX has clipping of integers from opset 12 on only.
    place_in_tail = torch.where(is_above, 0, slot - is_above.to(torch.int64).sum(dim=1, keepdim=True))
    return torch.where(is_above, found, tail.gather(1, place_in_tail)), top, is_above


def _exact_order(values: Tensor, is_nan: Tensor, k: int) -> Tensor:
    """Order the k best of ``values`` (B, N) as :func:`select_top_k` does: (B, k), int64."""
    chosen, top, is_above = _exact_set(values, is_nan, k)
    width = values.shape[1]
    # Above tau, equal values may stand in any order: sort by the rank of the value and then by index, as one unique
    # integer. The tail is in order already, and its place stands for its index.
    key_dtype = torch.int32 if k * width < 2**31 else torch.int64
    steps = torch.nn.functional.pad((top[:, 1:] < top[:, :-1]).to(key_dtype), (1, 0))
    slot = torch.arange(k, dtype=torch.int64, device=values.device)
    key = steps.cumsum(dim=1).to(key_dtype) * width + torch.where(is_above, chosen, slot).to(key_dtype)
    return chosen.gather(1, (-key).topk(k, dim=1).indices)


def _ascending(indices: Tensor, width: int) -> Tensor:
    """Sort distinct indices (B, k) below ``width`` upwards."""
    return width - (width - indices).to(torch.int32).topk(indices.shape[1], dim=1).values.to(torch.int64)
