"""The k best of N scores, in one exact order, whatever computes it.

The order is total: score descending, then index ascending, with -0.0 equal to 0.0 and NaN after every number (among
NaNs, by index). ``torch.topk`` promises no order for equal scores, and half-precision and quantised detectors
produce many of them, so every path here breaks ties itself.

Selection returns indices and nothing else. Values are gathered afterwards, so no path has a gradient to get wrong.
"""

from __future__ import annotations

from torch import Tensor

from detpost import kernels
from detpost.reference.selection import best_class

__all__ = ["best_class", "select_top_k"]


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
        >>> import torch
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
    return kernels.select(scores.detach(), k)
