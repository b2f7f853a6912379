"""The steps of a decode on a processor, in PyTorch's own operators: for calls that no compiler or tracer watches.

What :mod:`detpost.reference` says, to the bit, in fewer passes over the memory and a few queries at a time, so that all
that these become stays in the cache. A graph made of it would be as long as there are chunks.
"""

from __future__ import annotations

import functools
import math
from typing import Final

import torch
from torch import Tensor

from detpost import boxes as box_ops
from detpost.detections import Detections, clear_invalid
from detpost.kernels.aten.selection import select
from detpost.reference.decode import Steps, take
from detpost.reference.softmax import GAP_SCALE, GREATEST_STEP, REST_SCALE, SLOPE, limbs, tables_on
from detpost.spec import DecodeSpec

__all__ = ["STEPS", "best_class", "products_on", "scores", "scores_of"]

_CHUNK: Final = 1 << 16  # numbers at a time, of each thread
_BELOW, _ABOVE = -(2.0**129), 2.0**129  # beyond every float32
_NAN = -(2.0**130)
_REFERENCE: Final = Steps()


def best_class(logits: Tensor) -> Tensor:
    """Give the best class of each query as :func:`detpost.reference.selection.best_class`: float32 or half precision.

    Args:
        logits: (..., C), not float64.

    Returns:
        (...), int64.
    """
    # On a processor argmax gives the first of equal ones; NaN is made a number below those that float32 has. Queries at
    # a time that fit into the cache: as float64, all of them are new memory, and that is slower than to look at it.
    rows = logits.detach().flatten(0, -2) if logits.dim() > 1 else logits.detach().unsqueeze(0)
    count = max(1, _CHUNK * torch.get_num_threads() // max(int(rows.shape[1]), 1))
    found = [
        chunk.to(torch.float64).nan_to_num(nan=_NAN, posinf=_ABOVE, neginf=_BELOW).argmax(dim=1)
        for chunk in torch.split(rows, count)
    ]
    return torch.cat(found).reshape(logits.shape[:-1])


def scores(logits: Tensor) -> Tensor:
    """Give every class its probability, as :func:`detpost.reference.softmax.scores`.

    Args:
        logits: (..., C), floating.

    Returns:
        (..., C), float32. Carries no gradient.
    """
    return _in_chunks(logits.detach(), None)


def scores_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Give the probability of one class of each query, as :func:`detpost.reference.softmax.scores_of`.

    Args:
        logits: (..., C), floating.
        labels: (...), int64.

    Returns:
        (...), float32. Carries no gradient.
    """
    return _in_chunks(logits.detach(), labels)


def _in_chunks(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Score a few queries at a time: every class, or that of ``labels``."""
    rows = logits.flatten(0, -2) if logits.dim() > 1 else logits.unsqueeze(0)
    count = max(1, _CHUNK * torch.get_num_threads() // max(int(rows.shape[1]), 1))
    chunks = torch.split(rows, count)
    chosen = [None] * len(chunks) if labels is None else torch.split(labels.reshape(-1, 1), count)
    found = []
    for chunk, classes in zip(chunks, chosen, strict=True):
        shares, total = _weights(chunk)
        shares = shares if classes is None else shares.gather(1, classes)
        found.append(shares * (1 / total))
    return torch.cat(found).reshape(logits.shape if labels is None else labels.shape)


def _weights(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Give what :func:`detpost.reference.softmax.weights` gives, to the bit, of rows (N, C), in half of the passes.

    The integer ``u`` is made one; COARSE[i] * FINE[j], whose indices are neighbours in it, is looked up as one rounded
    product. Of the limbs the last two are summed as one, in float64: as many bits as they and the number of classes
    have fit into it, and the sum is then rounded to float32 once, where ``weights`` adds the two and rounds once.
    """
    peak = rows.amax(dim=1, keepdim=True)
    peak = peak.to(torch.promote_types(rows.dtype, torch.float32))
    gap = torch.where(peak == -math.inf, 0.0, peak) - rows
    gap = gap.to(torch.float32).nan_to_num(nan=0.0) * GAP_SCALE
    steps = gap.clamp(max=GREATEST_STEP).to(torch.int32)  # towards 0, which is down
    place, rest = steps >> 10, steps & 1023
    shares = products_on(rows.device).index_select(0, place.flatten()).view(rows.shape)
    shares = shares * torch.rsub(rest.to(torch.float32), 1.0, alpha=REST_SCALE * SLOPE)

    bits, limb_count = limbs(int(rows.shape[1]))
    sums, left = [], shares
    for _ in range(limb_count - 2):
        scaled = left * 2.0**bits
        limb = scaled.floor()
        left = scaled - limb
        sums.append(limb.sum(dim=1, keepdim=True))
    last = min(limb_count, 2) * bits
    total = ((left * 2.0**last).floor().sum(dim=1, keepdim=True, dtype=torch.float64) * 2.0 ** (bits - last)).float()
    for coarser in reversed(sums):
        total = coarser + total * 2.0**-bits
    total = (total * 2.0**-bits).clamp(min=1)
    return shares, torch.where(peak.isnan(), math.nan, total)


@functools.lru_cache(maxsize=8)
def products_on(device: torch.device) -> Tensor:
    """Give COARSE[i] * FINE[j] at i * 256 + j."""
    coarse, fine = tables_on(device)
    with torch.inference_mode(mode=False):
        return (coarse.unsqueeze(1) * fine).flatten()


def _corners(boxes: Tensor, queries: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Tensor:
    """Give the boxes of the kept queries in pixels, in fewer operators: of one image they cost more than their work."""
    if image_sizes is None:
        return _REFERENCE.corners(boxes, queries, None, spec)
    is_one = boxes.shape[0] == 1
    kept = boxes[0].index_select(0, queries[0]).unsqueeze(0) if is_one else take(boxes, queries)
    corners = box_ops.convert(kept.to(torch.promote_types(kept.dtype, torch.float32)), spec.box_format, "xyxy")
    sides = image_sizes.to(corners.dtype).flip(1)  # width, height
    corners = corners * torch.cat((sides, sides), dim=1).unsqueeze(1)
    return box_ops.clip(corners, image_sizes) if spec.clip else corners


def _clear(scores: Tensor, labels: Tensor, boxes: Tensor, queries: Tensor, valid: Tensor) -> Detections:
    """Look whether there is anything to clear: mostly there is not."""
    if valid.all():
        return Detections(scores, labels, boxes, queries, valid)
    return clear_invalid(scores, labels, boxes, queries, valid)


STEPS = Steps(select, best_class, scores, scores_of, corners=_corners, clear=_clear)
