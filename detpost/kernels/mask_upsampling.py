"""Bilinear upsampling of mask logits straight to booleans: the full-size floats are never stored.

``F.interpolate(logits, size, mode="bilinear", align_corners=False)`` is two passes of linear interpolation. Along x it
makes few numbers (as many rows as the logits have), so it is left to ``F.interpolate``. Along y it makes all of them,
and each is needed for one comparison only: here a band of output rows between the same two source rows is blended and
compared while it is still in the cache.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["upsample_and_compare"]


def upsample_and_compare(
    values: Tensor, size: tuple[int, int], threshold: float, inclusive: bool, max_bytes: int, inside: Tensor | None
) -> Tensor:
    """Upsample masks and compare with a threshold.

    Args:
        values: (N, h, w), floating.
        size: (height, width) of the output.
        threshold: what the upsampled values are compared with.
        inclusive: whether a value equal to the threshold is in the mask.
        max_bytes: bound on what is held beside the input and the output, as long as one mask fits into it.
        inside: (N, 4), xyxy in pixels of the output; pixels outside are left out of the mask. ``None``: all are in.

    Returns:
        (N, 1, height, width), bool.
    """
    count, source_height, _ = values.shape
    height, width = size
    masks = torch.empty((count, 1, height, width), dtype=torch.bool, device=values.device)
    if masks.numel() == 0:
        return masks
    separable = values.device.type == "cpu"
    bands = _bands(source_height, height)
    longest = max(stop - start for start, stop, _, _ in bands)
    per_mask = 4 * width * ((source_height + longest) if separable else height)
    step = max(1, max_bytes // per_mask)
    weights = _weights(source_height, height, values.device).unsqueeze(-1)  # (height, 1)
    for begin in range(0, count, step):
        chunk = values[begin : begin + step].to(torch.float32)
        out = masks[begin : begin + step, 0]
        if separable:
            _blend(chunk, out, bands, weights, longest, threshold, inclusive)
        else:
            upsampled = F.interpolate(chunk.unsqueeze(1), size=size, mode="bilinear", align_corners=False)[:, 0]
            (torch.ge if inclusive else torch.gt)(upsampled, threshold, out=out)
            del upsampled
        if inside is not None:
            _crop(out, inside[begin : begin + step])
    return masks


def _blend(
    chunk: Tensor,
    out: Tensor,
    bands: list[tuple[int, int, int, int]],
    weights: Tensor,
    longest: int,
    threshold: float,
    inclusive: bool,
) -> None:
    compare = torch.ge if inclusive else torch.gt
    rows = F.interpolate(chunk, size=out.shape[2], mode="linear", align_corners=False)  # (n, source height, width)
    scratch = torch.empty((chunk.shape[0], longest, out.shape[2]))
    for start, stop, upper, lower in bands:
        band, share = scratch[:, : stop - start], weights[start:stop]
        # One rounded product and one fused multiply-add, as in the compiled F.interpolate: the same bits.
        torch.mul(rows[:, lower : lower + 1], share, out=band)
        band.addcmul_(rows[:, upper : upper + 1], 1 - share)
        compare(band, threshold, out=out[:, start:stop])


def _weights(source: int, target: int, device: torch.device) -> Tensor:
    """Give the weight of the lower of the two source rows of each target row, in F.interpolate's own arithmetic."""
    return _positions(source, target).frac().to(device)


def _positions(source: int, target: int) -> Tensor:
    ratio = torch.tensor(source, dtype=torch.float32) / target
    return ((torch.arange(target, dtype=torch.float32) + 0.5) * ratio - 0.5).clamp(min=0)


def _bands(source: int, target: int) -> list[tuple[int, int, int, int]]:
    """Group target rows by their source rows: (first, last + 1, upper source row, lower source row)."""
    upper = _positions(source, target).to(torch.int64).clamp(max=source - 1).tolist()
    groups = [
        (row, [place for place, _ in group]) for row, group in groupby(enumerate(upper), key=lambda pair: pair[1])
    ]
    return [(places[0], places[-1] + 1, row, min(row + 1, source - 1)) for row, places in groups]


def _crop(masks: Tensor, boxes: Tensor) -> None:
    left, top, right, bottom = boxes.unsqueeze(-1).unbind(1)  # (n, 1) each
    x = torch.arange(masks.shape[2], device=masks.device)
    y = torch.arange(masks.shape[1], device=masks.device)
    masks &= ((x >= left) & (x < right)).unsqueeze(1)
    masks &= ((y >= top) & (y < bottom)).unsqueeze(2)
