"""The order that detections stand in: what every selection is held to.

The order is total: score descending, then index ascending, with -0.0 equal to 0.0 and NaN after every number (among
NaNs, by index).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["best_class", "select_top_k"]


def select_top_k(scores: Tensor, k: int) -> Tensor:
    """Give the indices of the k greatest scores of each row, ties by the lower index.

    Args:
        scores: (B, N), floating.
        k: how many to keep, at least 1.

    Returns:
        (B, min(k, N)), int64, best first. Carries no gradient.

    Example:
        >>> select_top_k(torch.tensor([[1.0, 3.0, float("nan"), 3.0, -0.0, 0.0]]), 6)
        tensor([[1, 3, 0, 4, 5, 2]])
    """
    rows = scores.detach()
    is_nan = rows.isnan()
    # A stable sort by value and then by "is NaN": no single float stands behind -inf.
    # Zeros of one sign: a radix sort, as on CUDA, would put -0.0 below 0.0.
    numbers = torch.where(is_nan, -math.inf, torch.where(rows == 0, 0.0, rows))
    by_value = numbers.argsort(dim=1, descending=True, stable=True)
    nan_last = is_nan.gather(1, by_value).to(torch.uint8).argsort(dim=1, stable=True)
    return by_value.gather(1, nan_last[:, :k])


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
