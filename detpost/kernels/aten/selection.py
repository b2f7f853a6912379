"""Selection by ``topk``, which promises no order for equal scores, made exact.

On a processor, where nobody watches, what ``topk`` gives is looked at. The k + 1 greatest values are the same however
it breaks ties; where no two of them are equal and none is NaN, it broke none, and its order is the one right order.

Where it may have, every score and its index make one float64 key, no two of which are equal: one ``topk`` of these
gives the one right set in the one right order, and makes up for what the keys cost by looking at groups first. So, too,
where values must not be looked at and there is float64.

Elsewhere the k-th greatest value is taken, which is the same whichever of equal scores a ``topk`` takes. With it every
element has a rank: above that value, equal to it, or (where it is -inf) NaN. Rank and index make one integer, no two of
which are equal, and the k greatest of these are the one right set. Only those are then put in order.

Long rows are cut into groups first. The k best elements lie in the k best groups, a group being as good as its best
element and, of equal ones, the earlier the better: each of these has an element ahead of any in a group left out.

No step reads a tensor as another dtype, gathers truth values or, below 2^24, sorts whole numbers as such: small
runtimes do none of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from detpost.reference import selection as reference

__all__ = ["select", "select_by_looking", "select_by_top_k"]

# Under this many scores per kept one, and in rows shorter than this, the group prefilter costs more than it saves.
_PREFILTER_MIN_RATIO = 8
_PREFILTER_MIN_WIDTH = 1 << 14

# A key is score - (|score| + LEAST) * index * STEP. STEP is 4 units in a float64's last place, so that the keys of
# equal scores differ, and the widest row times STEP is below half a unit of a float32, so that those of unequal ones
# stay apart. LEAST does for zeros what |score| does elsewhere; it is far below the least float32.
_STEP, _LEAST = 2.0**-50, 2.0**-160
_WIDEST = 1 << 24
_INFINITY, _NAN = 2.0**129, -(2.0**130)  # beyond every float32

# Where rows are this many times longer than what is kept: maxima of groups side by side, before there are keys.
_NEIGHBOURS, _MIN_RATIO_OF_NEIGHBOURS = 32, 128
# And then maxima of keys far apart, which are maxima of whole slices.
_LAYERS, _MIN_RATIO_OF_LAYERS = 8, 16
# Without keys, likewise: a topk of the scores themselves costs less.
_MIN_RATIO_OF_SCORES = 32


def select(scores: Tensor, k: int) -> Tensor:
    """Select as :func:`detpost.select_top_k` does.

    Args:
        scores: (B, N), floating.
        k: how many to keep, at least 1.

    Returns:
        (B, min(k, N)), int64, best first. Carries no gradient.
    """
    width = int(scores.shape[1])  # a number while tracing, too
    if width == 0:
        return reference.select_top_k(scores, k)
    if scores.dtype != torch.float64 and scores.device.type != "mps" and width <= _WIDEST:
        return _select_by_keys(scores.detach(), min(k, width))
    return reference.select_top_k(scores, k) if k >= width else _select(scores.detach(), k, _order_by_sort)


def select_by_looking(scores: Tensor, k: int) -> Tensor:
    """Select where values may be read at any time: on a processor, where nobody watches which operators run.

    Args:
        scores: (B, N), float32 or float64.
        k: how many to keep, at least 1.

    Returns:
        (B, min(k, N)), int64, best first. Carries no gradient.
    """
    width, rows = scores.shape[1], scores.detach()
    if width == 0:
        return reference.select_top_k(scores, k)
    values, places = _greatest_layer_by_layer(rows, min(k + 1, width))
    falls = values[:, 1:] < values[:, :-1]  # not where one is NaN, which a topk puts first
    chosen = places[:, :k]
    if falls.all():
        return chosen
    tied = falls.all(dim=1).logical_not().nonzero().flatten()
    return chosen.index_copy(0, tied, select(rows.index_select(0, tied), k))


def _greatest_layer_by_layer(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give the k greatest values of rows (B, N), and places where they stand: (B, k) each."""
    batch, width = rows.shape
    if width < _MIN_RATIO_OF_SCORES * k:
        values, places = rows.topk(k, dim=1)
        return values, places
    # Columns as good as their best element: the k best columns have the k greatest values among them.
    layers = 2 * _LAYERS if batch * width >= _MIN_RATIO_OF_NEIGHBOURS * k else _LAYERS
    columns = -(-width // layers)
    gap = columns * layers - width
    stacked = (F.pad(rows, (0, gap), value=-math.inf) if gap else rows).view(batch, layers, columns)
    chosen = stacked.amax(dim=1).topk(k, dim=1, sorted=False).indices
    taken = stacked.gather(2, chosen.unsqueeze(1).expand(batch, layers, k)).flatten(1)
    values, best = taken.topk(k, dim=1)
    return values, best // k * columns + chosen.gather(1, best % k)


def select_by_top_k(scores: Tensor, k: int) -> Tensor:
    """Select with no other sort than the top-k of unique integers: for runtimes whose sorts promise no order.

    Args and returns as :func:`select`.
    """
    width = int(scores.shape[1])  # a number while tracing, too
    if width == 0:
        return reference.select_top_k(scores, k)
    return _select(scores.detach(), min(k, width), _order_by_top_k)


def _select_by_keys(scores: Tensor, k: int) -> Tensor:
    """Select from rows (B, N) of float32 or half precision."""
    batch, width = scores.shape[0], int(scores.shape[1])
    if width < _MIN_RATIO_OF_NEIGHBOURS * k:
        index = torch.arange(width, dtype=torch.float64, device=scores.device)
        return _greatest(_keys(scores, index), k)
    rows = F.pad(scores, (0, -width % _NEIGHBOURS), value=math.nan)
    count = int(rows.shape[1]) // _NEIGHBOURS
    grouped = rows.view(batch, count, _NEIGHBOURS)
    most = grouped.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(dim=2)
    least = grouped.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).amin(dim=2)
    most = torch.where(least > most, math.nan, most)  # nothing but NaN
    chosen = _greatest(_keys(most, torch.arange(count, dtype=torch.float64, device=scores.device)), k)  # (B, k)
    first = torch.arange(batch, device=scores.device).unsqueeze(1) * count
    elements = rows.view(batch * count, _NEIGHBOURS).index_select(0, (chosen + first).flatten())
    index = (chosen.unsqueeze(-1) * _NEIGHBOURS + torch.arange(_NEIGHBOURS, device=scores.device)).flatten(1)
    keys = _keys(elements.view(batch, k * _NEIGHBOURS), index.to(torch.float64))
    return index.gather(1, _greatest(keys, k))


def _keys(scores: Tensor, index: Tensor) -> Tensor:
    """Give scores (B, N) with an index each, (N,) or (B, N), as float64 that are all unequal in a row."""
    wide = scores.to(torch.float64).nan_to_num(nan=_NAN, posinf=_INFINITY, neginf=-_INFINITY)
    # Arithmetic alone: comparisons, and choices by them, take a processor several times as long.
    return torch.addcmul(wide, wide.abs() + _LEAST, index, value=-_STEP)


def _greatest(keys: Tensor, k: int) -> Tensor:
    """Give the places of the k greatest of unequal keys (B, N), the greatest first."""
    batch, width = keys.shape[0], int(keys.shape[1])
    if width < _MIN_RATIO_OF_LAYERS * k:
        return keys.topk(k, dim=1).indices
    columns = -(-width // _LAYERS)
    layers = F.pad(keys, (0, columns * _LAYERS - width), value=-math.inf).view(batch, _LAYERS, columns)
    chosen = layers.amax(dim=1).topk(k, dim=1, sorted=False).indices  # (B, k)
    best = layers.gather(2, chosen.unsqueeze(1).expand(batch, _LAYERS, k)).flatten(1).topk(k, dim=1).indices
    return best // k * columns + chosen.gather(1, best % k)


def _select(scores: Tensor, k: int, order: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    width = int(scores.shape[1])
    is_nan = scores.isnan()
    numbers = torch.where(is_nan, -math.inf, scores)
    if k == width:
        return order(numbers, is_nan)
    groups, size = None, 1
    if width >= _PREFILTER_MIN_RATIO * k and width >= _PREFILTER_MIN_WIDTH:
        size = max(2, math.isqrt(width // k))  # about the size for which the two top-k passes read least
        groups, numbers, is_nan = _best_groups(numbers, is_nan, k, size)
    best = _best_set(numbers, is_nan, k)
    best = best.gather(1, order(numbers.gather(1, best), is_nan.to(torch.int32).gather(1, best) > 0))
    if groups is None:
        return best
    return groups.gather(1, best // size) * size + best % size


def _best_groups(numbers: Tensor, is_nan: Tensor, k: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut rows into groups; give the k best groups (B, k) by index, and their elements (B, k * size) likewise."""
    batch, width = numbers.shape[0], int(numbers.shape[1])
    gap = -width % size
    if gap:  # like NaN, and after every one
        numbers, is_nan = F.pad(numbers, (0, gap), value=-math.inf), F.pad(is_nan.to(numbers.dtype), (0, gap), value=1)
    grouped = numbers.view(batch, -1, size)
    # As a float, which reductions are fast on.
    grouped_nan = is_nan.to(numbers.dtype).view(batch, -1, size)
    chosen = _best_set(grouped.amax(dim=2), grouped_nan.amin(dim=2) > 0, k)
    places = chosen.to(_whole(int(grouped.shape[1])))
    chosen = chosen.gather(1, places.neg().topk(k, dim=1).indices)  # by index
    index = chosen.unsqueeze(-1).expand(batch, k, size)
    elements = (grouped.gather(1, index).flatten(1), grouped_nan.gather(1, index).flatten(1) > 0)
    return chosen, *elements


def _best_set(numbers: Tensor, is_nan: Tensor, k: int) -> Tensor:
    """Give the places of the k best of rows (B, N) in which NaN reads -inf: (B, k), int64, equal ones by index."""
    width = int(numbers.shape[1])
    # By its place: what uses the values alone becomes a sort in LiteRT, which cannot run one.
    last = numbers.gather(1, numbers.topk(k, dim=1).indices[:, -1:])
    index = torch.arange(width, dtype=_whole(2 * width), device=numbers.device)
    is_tied = torch.where(is_nan, -index, width - index)
    keys = torch.where(numbers > last, 2 * width - index, torch.where(numbers == last, is_tied, -width))
    return keys.topk(k, dim=1).indices


def _order_by_sort(numbers: Tensor, is_nan: Tensor) -> Tensor:
    """Order what :func:`_best_set` gave, in which equal ones stand by index, and NaN last."""
    # Zeros of one sign: a radix sort, as on CUDA, would put -0.0 below 0.0.
    return torch.where(numbers == 0, 0.0, numbers).argsort(dim=1, descending=True, stable=True)


def _order_by_top_k(numbers: Tensor, is_nan: Tensor) -> Tensor:
    """Order rows (B, K) by value, then by place, NaN last."""
    count = int(numbers.shape[1])
    values, order = numbers.topk(count, dim=1)  # which place stands beside which of two equal values is its choice
    dtype = _whole(2 * count * count)
    falls = F.pad((values[:, 1:] < values[:, :-1]).to(dtype), (1, 0))
    run = falls.cumsum(dim=1, dtype=dtype) + is_nan.to(dtype).gather(1, order) * count  # NaN behind -inf
    return order.gather(1, (run * -count - order.to(dtype)).topk(count, dim=1).indices)


def _whole(most: int) -> torch.dtype:
    """Name the dtype for whole numbers of at most ``most``: float32 where that is exact."""
    return torch.float32 if most < 1 << 24 else torch.int32
