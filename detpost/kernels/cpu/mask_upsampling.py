"""Bilinear upsampling of mask logits straight to booleans: the full-size floats are never stored.

``F.interpolate(logits, size, mode="bilinear", align_corners=False)`` is two passes of linear interpolation. Along x it
makes few numbers (as many rows as the logits have), so it is left to ``F.interpolate``. Along y it makes all of them,
and each is needed for one comparison only: ``mask_upsampling.cpp`` blends two rows and compares what comes out in one
pass.

Without it, a band of output rows between the same two source rows is blended and compared while it is still in the
cache. A band is small enough for PyTorch to run it on the calling thread, and threads take whole masks: had each
operation its own parallel loop, tens of thousands of barriers would make it slow wherever the cores are not idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int, c_int64, c_void_p
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from detpost.kernels.cpu import library
from detpost.kernels.serving import kernel_for

__all__ = ["upsample_and_compare"]

# PyTorch runs elementwise operations on fewer numbers than this on one thread (at::internal::GRAIN_SIZE).
_SERIAL = 32768


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
    step = max(1, max_bytes // (4 * width * (source_height if separable else height)))
    for begin in range(0, count, step):
        chunk = values[begin : begin + step].to(torch.float32)
        out = masks[begin : begin + step, 0]
        if separable:
            rows = F.interpolate(chunk, size=width, mode="linear", align_corners=False)  # (n, source height, width)
            _blend_all(rows, out, threshold, inclusive)
            del rows
        else:
            upsampled = F.interpolate(chunk.unsqueeze(1), size=size, mode="bilinear", align_corners=False)[:, 0]
            (torch.ge if inclusive else torch.gt)(upsampled, threshold, out=out)
            del upsampled
        if inside is not None:
            _crop(out, inside[begin : begin + step])
    return masks


def _blend_all(rows: Tensor, out: Tensor, threshold: float, inclusive: bool) -> None:
    """Blend rows (n, source height, width) to masks (n, height, width), a share of the masks on each thread."""
    if _is_native():
        _blend_by_kernel(rows, out, threshold, inclusive)
        return
    count, source_height, width = rows.shape
    bands = _bands(source_height, out.shape[1], max(1, (_SERIAL - 1) // width))
    lower = _positions(source_height, out.shape[1]).frac().unsqueeze(-1)  # weights of the lower rows
    sizes = [size for size, _, _ in bands]
    weights = list(zip(torch.split(lower, sizes), torch.split(1 - lower, sizes), strict=True))
    is_inference = torch.is_inference_mode_enabled()  # each thread has its own mode

    def blend(first: int, last: int) -> None:
        with torch.inference_mode(is_inference), torch.no_grad():
            scratch = torch.empty((max(sizes), width), dtype=torch.float32, device="cpu")
            views = {size: scratch[:size] for size in set(sizes)}
            for sources, mask in zip(rows[first:last], out[first:last], strict=True):
                _blend(sources.split(1), mask.split(sizes), bands, weights, views, threshold, inclusive)

    workers = min(torch.get_num_threads(), count)
    if workers == 1:
        blend(0, count)
        return
    limits = [count * part // workers for part in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(blend, limits[:-1], limits[1:]))


def _is_native() -> bool:
    """Tell whether the kernel rounds as PyTorch's compiled operators do here: both fuse, or neither."""
    if library.missing() is not None or kernel_for("cpu") != "native":
        return False
    return (library.instructions() != "baseline instructions") == (torch.backends.cpu.get_cpu_capability() != "DEFAULT")


def _blend_by_kernel(rows: Tensor, out: Tensor, threshold: float, inclusive: bool) -> None:
    positions = _positions(rows.shape[1], out.shape[1])
    last = rows.shape[1] - 1
    uppers = positions.to(torch.int32).clamp(max=last)
    lowers = (uppers + 1).clamp(max=last)
    lower_weights = positions.frac()
    upper_weights = 1 - lower_weights
    library.function(
        "detpost_blend_masks",
        *(c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p),
        *(c_float, c_int, c_void_p, c_int),
    )(
        *(rows.data_ptr(), rows.shape[0], rows.shape[1], out.shape[1], out.shape[2]),
        *(uppers.data_ptr(), lowers.data_ptr(), upper_weights.data_ptr(), lower_weights.data_ptr()),
        *(threshold, inclusive, out.data_ptr(), torch.get_num_threads()),
    )


def _blend(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    bands: list[tuple[int, int, int]],
    weights: list[tuple[Tensor, Tensor]],
    views: dict[int, Tensor],
    threshold: float,
    inclusive: bool,
) -> None:
    compare = torch.ge if inclusive else torch.gt
    for (size, upper, lower), (lower_weight, upper_weight), target in zip(bands, weights, targets, strict=True):
        band = views[size]
        # One rounded product and one fused multiply-add, as in the compiled F.interpolate: the same bits.
        torch.mul(sources[lower], lower_weight, out=band)
        band.addcmul_(sources[upper], upper_weight)
        compare(band, threshold, out=target)


def _positions(source: int, target: int) -> Tensor:
    """Give where each target row lies among the source rows, in F.interpolate's own arithmetic."""
    ratio = torch.tensor(source, dtype=torch.float32, device="cpu") / target
    return ((torch.arange(target, dtype=torch.float32, device="cpu") + 0.5) * ratio - 0.5).clamp(min=0)


def _bands(source: int, target: int, most: int) -> list[tuple[int, int, int]]:
    """Group target rows by their source rows, at most so many together: (how many, upper row, lower row)."""
    upper = _positions(source, target).to(torch.int64).clamp(max=source - 1).tolist()
    bands = []
    for row, group in groupby(upper):
        length, lower = len(list(group)), min(row + 1, source - 1)
        bands += [(min(most, length - start), row, lower) for start in range(0, length, most)]
    return bands


def _crop(masks: Tensor, boxes: Tensor) -> None:
    left, top, right, bottom = boxes.unsqueeze(-1).unbind(1)  # (n, 1) each
    x = torch.arange(masks.shape[2], device=masks.device)
    y = torch.arange(masks.shape[1], device=masks.device)
    masks &= ((x >= left) & (x < right)).unsqueeze(1)
    masks &= ((y >= top) & (y < bottom)).unsqueeze(2)
