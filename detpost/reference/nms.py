"""Exact greedy non-maximum suppression with static shapes, in PyTorch's own operators.

Greedy suppression walks down the scores and keeps a box unless a kept one before it overlaps it too much. That is a
recursion of K steps that no parallel scheme shortens (finding the same set is P-complete), but a step need not be one
box: here it is eight, looked up in tables that are made for all blocks at once. Shapes and control flow depend on K
alone, so the same graph is compiled, exported and captured, and is exact for every input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from detpost.detections import Detections

__all__ = [
    "best_first",
    "compacted",
    "keep",
    "keep_ranked",
    "order_portable",
    "suppress",
    "walk_portable",
    "walk_words",
]

_WORD = 8  # boxes per step: one byte of a mask each, so eight of them are one int64
_EXPORT_WORD = 6
# Tables grow with the square of what they cover: longer lists are walked in chunks of about this many boxes.
_CHUNK = 320

Walk = Callable[[Tensor, Tensor], Tensor]


def keep(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    valid: Tensor | None,
    threshold: float,
    smaller: bool = False,
) -> Tensor:
    """Say which boxes stay; as :func:`detpost.nms.nms`.

    Args:
        boxes: (B, N, 4), floating, xyxy.
        scores: (B, N), floating.
        labels: (B, N), integer, or ``None``: one class.
        valid: (B, N), bool, or ``None``: all are.
        threshold: in [0, 1].
        smaller: whether an overlap is a part of the smaller box, and not of the union.

    Returns:
        (B, N), bool.
    """
    order = best_first(scores)
    kept = keep_ranked(
        boxes.detach().gather(1, order.unsqueeze(-1).expand(-1, -1, 4)),
        None if labels is None else labels.gather(1, order),
        torch.ones_like(scores, dtype=torch.bool) if valid is None else valid.gather(1, order),
        threshold,
        smaller,
    )
    return torch.zeros_like(kept).scatter(1, order, kept)


def best_first(scores: Tensor) -> Tensor:
    """Order scores (B, N) from the greatest to the least, equal ones by index, NaN last: (B, N), int64."""
    values, is_nan = scores.detach(), scores.detach().isnan()
    # Two stable sorts: no single float stands behind -inf. Zeros of one sign, as a radix sort tells them apart.
    numbers = torch.where(is_nan, -math.inf, torch.where(values == 0, 0.0, values))
    by_value = numbers.argsort(dim=1, descending=True, stable=True)
    nan_last = is_nan.gather(1, by_value).to(torch.uint8).argsort(dim=1, stable=True)
    return by_value.gather(1, nan_last)


def suppress(detections: Detections, kept: Tensor, compact: bool) -> Detections:
    """Clear the slots of detections (B, K) that are not kept (B, K), or move those that are to the front."""
    scores, labels, corners, queries, _ = detections
    if compact:
        order = compacted(kept)
        corners = corners.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
        scores, labels, queries = (values.gather(1, order) for values in (scores, labels, queries))
        kept = kept.gather(1, order)
    return Detections(
        scores=torch.where(kept, scores, 0.0),
        labels=torch.where(kept, labels, -1),
        boxes=torch.where(kept.unsqueeze(-1), corners, 0.0),
        queries=torch.where(kept, queries, -1),
        valid=kept,
    )


def compacted(kept: Tensor) -> Tensor:
    """Order slots (B, K) with those that are kept first, each part as it was: (B, K), int64."""
    places = int(kept.shape[1])
    slot = torch.arange(places, dtype=torch.int32, device=kept.device)
    # Unique integers: any runtime's top-k gives the one order.
    return torch.where(kept, 2 * places - slot, places - slot).topk(places, dim=1).indices


def walk_words(overlaps: Tensor, free: Tensor) -> Tensor:
    """Solve keep[i] = free[i] and no kept j < i overlaps i, eight boxes a step: overlaps (B, n, n), free (B, n).

    Eight boxes are the bits of one word. Two tables hold, for each block of eight, which of them stay when a given set
    of them is dropped already (256 entries), and which boxes of the whole list a given set of them drops (256 rows of
    words). A step reads its block's word, looks up both, and drops: nothing in it depends on how long a chain of
    overlaps is.
    """
    batch, size = overlaps.shape[0], int(overlaps.shape[1])
    blocks = -(-size // _WORD)
    padding = blocks * _WORD - size
    drops = _words(F.pad(overlaps, (0, padding, 0, padding))).view(batch, blocks, _WORD, blocks)
    dropped = _words(F.pad(~free, (0, padding), value=True))  # (B, blocks)
    entry = torch.arange(2**_WORD, dtype=torch.int32, device=overlaps.device).to(torch.uint8)

    own = drops.diagonal(dim1=1, dim2=3)  # (B, 8, blocks): whom each box drops in its own block
    state, stays = entry.expand(batch, blocks, 2**_WORD), torch.zeros_like(entry)
    for bit in range(_WORD):
        stay = ((state >> bit) & 1) ^ 1
        stays = stays | (stay << bit)
        state = state | (own[:, bit].unsqueeze(-1) * stay)
    # Indices into all blocks of all images, so that a step is two plain look-ups.
    block = torch.arange(batch * blocks, dtype=torch.int32, device=overlaps.device).view(batch, blocks) * 2**_WORD
    stays = (stays + block.unsqueeze(-1)).flatten()
    effects = _unions(drops).reshape(batch * blocks * 2**_WORD, blocks)

    kept = []
    for step, first in enumerate(block.unbind(1)):
        chosen = stays.index_select(0, first + dropped[:, step])  # (B,), int32
        kept.append(chosen)
        dropped = dropped | effects.index_select(0, chosen)
    bits = torch.arange(_WORD, dtype=torch.int32, device=overlaps.device)
    found = (torch.stack(kept, dim=1).unsqueeze(-1) >> bits) & 1  # (B, blocks, 8)
    return found.view(batch, blocks * _WORD)[:, :size] == 1


def order_portable(scores: Tensor) -> Tensor:
    """Sort by score as ``select_top_k`` does, whatever a runtime's TopK does with equal ones: the exported form.

    Args:
        scores: (B, N), floating.

    Returns:
        (B, N), int64.
    """
    count = int(scores.shape[1])
    is_nan = scores.isnan()
    numbers = torch.where(is_nan, -math.inf, scores.to(torch.promote_types(scores.dtype, torch.float32)))
    values, order = numbers.topk(count, dim=1)  # which index stands beside which of two equal values is its choice
    falls = F.pad((values[:, 1:] < values[:, :-1]).to(torch.int32), (1, 0))
    run = falls.cumsum(dim=1).to(torch.int32) + count * is_nan.gather(1, order).to(torch.int32)  # NaN behind -inf
    return order.gather(1, (run * -count - order.to(torch.int32)).topk(count, dim=1).indices)


def walk_portable(overlaps: Tensor, free: Tensor) -> Tensor:
    """Solve the same with float32 operators alone, for runtimes without bitwise ones: the exported form.

    Args and returns as :func:`walk_words`.
    """
    batch, size = overlaps.shape[0], int(overlaps.shape[1])
    blocks = -(-size // _EXPORT_WORD)
    padding = blocks * _EXPORT_WORD - size
    # Not F.pad: ONNX pads no booleans before opset 19.
    drops = F.pad(overlaps.to(torch.float32), (0, padding, 0, padding))
    hits = F.pad((~free).to(torch.float32), (0, padding), value=1.0)  # how many kept boxes drop each one
    weights = 2.0 ** torch.arange(_EXPORT_WORD, dtype=torch.float32, device=overlaps.device)
    entry = torch.arange(2**_EXPORT_WORD, device=overlaps.device)
    stays: list[Tensor] = []  # (B, blocks, 64) for each place in a block
    own = torch.stack(
        [drops[:, i : i + _EXPORT_WORD, i : i + _EXPORT_WORD] for i in range(0, blocks * _EXPORT_WORD, _EXPORT_WORD)],
        dim=1,
    )  # (B, blocks, 6, 6)
    for bit in range(_EXPORT_WORD):
        gone = (entry // 2**bit % 2).to(torch.float32).expand(batch, blocks, -1)
        for earlier, stay in enumerate(stays):
            gone = gone + stay * own[:, :, earlier, bit].unsqueeze(-1)
        stays.append((gone == 0).to(torch.float32))
    table = torch.stack(stays, dim=-1)  # (B, blocks, 64, 6)
    kept = []
    for step in range(blocks):
        places = slice(step * _EXPORT_WORD, (step + 1) * _EXPORT_WORD)
        entry = ((hits[:, places] > 0).to(torch.float32) * weights).sum(dim=1).to(torch.int64)  # (B,)
        chosen = table[:, step].gather(1, entry.view(-1, 1, 1).expand(-1, 1, _EXPORT_WORD))  # (B, 1, 6)
        kept.append(chosen[:, 0])
        hits = hits + (chosen @ drops[:, places])[:, 0]
    return torch.cat(kept, dim=1)[:, :size] > 0


def keep_ranked(
    boxes: Tensor,
    labels: Tensor | None,
    valid: Tensor,
    threshold: float,
    smaller: bool = False,
    walk: Walk = walk_words,
) -> Tensor:
    """Walk boxes (B, K, 4) that come best first, in chunks; give the kept ones (B, K)."""
    places = int(boxes.shape[1])  # a number while tracing, too: the walk is unrolled
    if places == 0:
        return valid.clone()
    width = -(-places // -(-places // _CHUNK))
    sides = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).permute(2, 0, 1).contiguous()  # (4, B, K)
    kept: list[Tensor] = []
    free = valid  # (B, K - start): valid, and not dropped by an earlier chunk
    for start in range(0, places, width):
        size = min(width, places - start)
        rest = slice(start, places)
        over = overlap(sides[:, :, start : start + size].unsqueeze(-1), sides[:, :, rest].unsqueeze(-2), smaller)
        overlaps = over > _not_above(threshold, over.dtype)  # (B, size, K - start)
        if labels is not None:
            overlaps = overlaps & (labels[:, start : start + size].unsqueeze(-1) == labels[:, rest].unsqueeze(-2))
        stays = walk(overlaps[:, :, :size], free[:, :size])
        kept.append(stays)
        if start + size < places:
            drops = (overlaps[:, :, size:] & stays.unsqueeze(-1)).any(dim=1)
            free = free[:, size:] & ~drops
    return torch.cat(kept, dim=1)


def overlap(first: Tensor, second: Tensor, smaller: bool = False) -> Tensor:
    """Give the part that boxes (4, ...) share of their union, or of the smaller one; NaN where that has no area.

    The same operations in the same order as torchvision's, so that an IoU at a threshold falls on the same side.
    """
    left, top, right, bottom = first.unbind(0)
    other_left, other_top, other_right, other_bottom = second.unbind(0)
    width = (torch.minimum(right, other_right) - torch.maximum(left, other_left)).clamp(min=0)
    height = (torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)).clamp(min=0)
    shared = width * height
    area = (right - left) * (bottom - top)
    other_area = (other_right - other_left) * (other_bottom - other_top)
    return shared / (torch.minimum(area, other_area) if smaller else area + other_area - shared)


def _words(mask: Tensor) -> Tensor:
    """Pack (..., 8 n) booleans into (..., n) bytes, the first in the lowest bit."""
    # Eight bytes of 0 or 1 read as one integer; the product brings byte i to bit 56 + i, with no two in one place.
    # (Bytes first: Inductor of PyTorch 2.11 cannot read booleans as another type.)
    gathered = mask.to(torch.uint8).contiguous().view(torch.int64) * 0x0102040810204080
    return ((gathered >> 56) & 0xFF).to(torch.uint8)


def _unions(drops: Tensor) -> Tensor:
    """Union the words of every subset of each block: (B, blocks, 8, m) -> (B, blocks, 256, m)."""
    tables = drops.unsqueeze(3)  # (B, blocks, 8 groups, 1 subset without the empty one, m)
    tables = torch.cat((torch.zeros_like(tables), tables), dim=3)
    while tables.shape[2] > 1:
        lower, upper = tables[:, :, 0::2], tables[:, :, 1::2]
        tables = (upper.unsqueeze(4) | lower.unsqueeze(3)).flatten(3, 4)
    return tables[:, :, 0]


def _not_above(threshold: float, dtype: torch.dtype) -> float:
    """Give the greatest number of ``dtype`` not above: comparing floats with it is comparing them as doubles.

    torchvision compares a float32 IoU with the double threshold, torch with the threshold rounded to float32.
    """
    if dtype == torch.float64:
        return threshold
    nearest = np.float32(threshold)
    return float(np.nextafter(nearest, np.float32(-1)) if float(nearest) > threshold else nearest)
