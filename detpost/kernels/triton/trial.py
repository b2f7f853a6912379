"""Whether the Triton kernels are right on this machine: each is tried before it first serves.

A kernel is compiled on the user's machine, for a GPU and with a Triton that may be newer than any it was tried on. What
disagrees with PyTorch's own operators there, or does not compile, must not decide what is detected. A trial is of the
very code that is about to run: every dtype, activation and choice that is compiled apart is tried apart, on inputs that
provoke what can go wrong, in short rows and in such as several programs share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from detpost.kernels.aten import selection as aten
from detpost.reference import decode as reference
from detpost.spec import DecodeSpec

__all__ = ["decode", "everything", "losses", "selection"]

# Short rows are longer than a block of any kernel, and no multiple of one; long ones are shared by two programs.
_SHORT, _LONG = 1311, 33_003


def selection(device: str, dtype: torch.dtype, k: int) -> str | None:
    """Try the selection.

    Args:
        device: ``"cuda"``, or ``"cpu"`` under ``TRITON_INTERPRET=1``.
        dtype: of the scores.
        k: how many are kept.

    Returns:
        In one line, what did not agree or did not run; ``None`` where all is well.
    """
    return _said("selection kernel", lambda: _selects(device, dtype, k))


def decode(
    device: str,
    dtype: torch.dtype,
    boxes: torch.dtype,
    sizes: torch.dtype | None,
    count: int,
    activation: str,
    selection: str,
    background: str,
    box_format: str,
    clip: bool,
) -> str | None:
    """Try the decode.

    Args:
        device: as for :func:`selection`.
        dtype: of the logits.
        boxes: dtype of the boxes.
        sizes: dtype of the image sizes; ``None`` where there are none.
        count: K.
        activation: as the other choices, a field of :class:`DecodeSpec`.
        selection: likewise.
        background: likewise.
        box_format: likewise.
        clip: likewise.

    Returns:
        As :func:`selection`.
    """
    spec = DecodeSpec(activation, selection, count, None, background, box_format, clip)  # type: ignore[arg-type]
    return _said("decode kernel", lambda: _decodes(device, dtype, boxes, sizes, spec))


def losses(device: str) -> str | None:
    """Try what the losses and the distance transform run on: float32 alone.

    Args:
        device: as for :func:`selection`.

    Returns:
        As :func:`selection`.
    """
    return _said("distance kernel", lambda: _measures(device)) or _said("erosion kernel", lambda: _erodes(device))


def everything(device: str) -> str | None:
    """Try every kernel with every dtype and choice once, though not with each other choice.

    Args:
        device: as for :func:`selection`.

    Returns:
        As :func:`selection`, for the first that failed.
    """
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    sizes = (torch.int64, None, torch.float32)
    specs = (("none", "cxcywh", True), ("last", "xyxy", False), ("first", "xywh", True))
    for dtype, size, choices in zip(dtypes, sizes, specs, strict=True):
        for found in (
            selection(device, dtype, 40),
            *(
                decode(device, dtype, dtype, size, 40, activation, selected, *choices)
                for activation in ("sigmoid", "softmax")
                for selected in ("flat", "per_query")
            ),
        ):
            if found is not None:
                return found
    return losses(device)


def _said(name: str, agrees: Callable[[], bool]) -> str | None:
    try:
        with torch.no_grad(), torch.device("cpu"):  # inputs are made there, whatever the default is
            return None if agrees() else f"the {name} gives other results than PyTorch"
    except Exception as error:  # a compiler may fail with anything, and the user has another way
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"the {name}: {type(error).__name__}: {lines[0] if lines else 'no message'}"


def _rows(width: int) -> Tensor:
    """Rows (3, width) with ties, NaN, infinities and zeros of both signs, from nothing else to few of them."""
    generator = torch.Generator().manual_seed(0)
    palette = torch.tensor([0.0, -0.0, 1.5, -1.5, torch.inf, -torch.inf, torch.nan], dtype=torch.float32)
    few = palette[torch.randint(len(palette), (1, width), generator=generator)]
    ordinary, steps = (torch.randn(1, width, generator=generator, dtype=torch.float32) for _ in range(2))
    wild = torch.where(torch.rand(1, width, generator=generator) < 0.02, few, ordinary * 3)
    return torch.cat((few, steps.mul(4).round().div(4), wild))


def _selects(device: str, dtype: torch.dtype, k: int) -> bool:
    from detpost.kernels.triton import select as triton_select

    for width in (max(_SHORT, k), _LONG):
        scores = _rows(width).to(device, dtype)
        if not torch.equal(triton_select.select(scores, k), aten.select(scores, k)):
            return False
    return True


def _decodes(device: str, dtype: torch.dtype, boxes: torch.dtype, sizes: torch.dtype | None, spec: DecodeSpec) -> bool:
    return all(
        _decodes_one(logits.to(device, dtype), device, boxes, sizes, spec, threshold)
        for logits in _logits(spec)
        for threshold in (None, 0.4)
    )


def _logits(spec: DecodeSpec) -> Iterator[Tensor]:
    """Logits (3, Q, C), with as many classes as 2 and 3 limbs of a softmax's sum take, in short and in long rows."""
    for width, classes in ((_SHORT, 23), (_LONG, 293 if spec.selection == "flat" else 3)):
        by_query = spec.selection == "per_query"
        queries = max(width if by_query else -(-width // classes), spec.top_k if by_query else 0)
        queries = max(queries, -(-spec.top_k // classes))
        yield _rows(queries * classes).reshape(3, queries, classes)


def _decodes_one(
    logits: Tensor,
    device: str,
    boxes_dtype: torch.dtype,
    sizes_dtype: torch.dtype | None,
    spec: DecodeSpec,
    threshold: float | None,
) -> bool:
    from dataclasses import replace

    from detpost.kernels.triton import decode as triton_decode

    spec = replace(spec, score_threshold=threshold)
    boxes = torch.rand(*logits.shape[:2], 4, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    boxes = (boxes * 1.2 - 0.1).to(device, boxes_dtype)
    sizes = torch.tensor([[480, 640], [37, 1000], [1, 1]])
    given = (logits, boxes, None if sizes_dtype is None else sizes.to(device, sizes_dtype), spec)
    found, expected = triton_decode.decode(*given), reference.decode(*given, reference.Steps(aten.select))
    # Of softmax the score is the order, to the bit; of sigmoid exp may differ in float64's last bit.
    exact = ("labels", "queries", "valid", *(("scores",) if spec.activation == "softmax" else ()))
    return all(torch.equal(getattr(found, name), getattr(expected, name)) for name in exact) and all(
        torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-6) for name in ("scores", "boxes")
    )


def _measures(device: str) -> bool:
    """Both distances, in 2-D and 3-D, with equal and unequal spacing, in sides below and above a block."""
    from detpost.kernels.triton import distance as triton_distance
    from detpost.reference import distance

    generator = torch.Generator().manual_seed(2)
    for sides, spacing in (((33, 50), (1.0, 1.0)), ((7, 301), (0.5, 2.0)), ((5, 6, 37), (3.0, 1.0, 0.7))):
        inside = (torch.rand(1, 2, *sides, generator=generator) < 0.9).to(device)
        within, beyond = (distance.squared_distance(mask, spacing)[0] for mask in (inside, ~inside))
        if not torch.allclose(triton_distance.squared_distance(inside, spacing)[0], within, rtol=1e-6):
            return False
        both, _ = triton_distance.squared_boundary_distance(inside, spacing)
        if not torch.allclose(both, within + beyond, rtol=1e-6):
            return False
    return True


def _erodes(device: str) -> bool:
    """Values and gradients, in 2-D and 3-D, on errors thick enough for the last erosion, with many shared extremes."""
    from detpost.kernels.triton import erosion as triton_erosion
    from detpost.reference import erosion

    generator, weights = torch.Generator().manual_seed(3), [1.0, 4.0, 9.0]
    for sides in ((19, 30), (9, 10, 11)):
        pred = torch.rand(2, 2, *sides, generator=generator).mul(3).round().div(8).add(0.625).to(device)
        target = (torch.rand(2, 1, *sides, generator=generator) < 0.05).long().to(device)
        given = (pred, target, torch.arange(2, device=device), weights)
        total, dilations, limits = triton_erosion.erode(*given, True)
        expected, *saved = erosion.erode(*given, len(sides), True)
        if not torch.allclose(total, expected, rtol=1e-4, atol=1e-4):
            return False
        handed_out = torch.rand(pred.shape, generator=generator).to(device)
        found = triton_erosion.erosion_gradient(handed_out, *given, dilations, limits)
        slope = erosion.erosion_gradient(handed_out, weights, saved, len(sides))
        slope = slope * (erosion.difference(*given[:3]) * 2)
        if not torch.allclose(found, slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max())):
            return False
    return True
