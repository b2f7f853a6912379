"""Whether the Triton kernels are right on this machine: tried once, on inputs that provoke what can go wrong.

A kernel is compiled on the user's machine, for a GPU and with a Triton that may be newer than any it was tried on. What
disagrees with PyTorch's own operators there, or does not compile, must not decide what is detected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detpost.spec import DecodeSpec

__all__ = ["disagreement"]


def disagreement(device: str) -> str | None:
    """Run every kernel against PyTorch's operators.

    Args:
        device: ``"cuda"``, or ``"cpu"`` under ``TRITON_INTERPRET=1``.

    Returns:
        In one line, what did not agree or did not run; ``None`` where all is well.
    """
    try:
        with torch.no_grad():
            for name, check in (("selection", _selection), ("decode", _decode), ("distances", _distances)):
                if not check(device):
                    return f"the {name} kernel gives other results than PyTorch"
            return None if _erosion(device) else "the erosion kernel gives other results than PyTorch"
    except Exception as error:  # a compiler may fail with anything, and the user has another way
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _scores(device: str) -> Tensor:
    """Rows with ties, NaN, infinities and zeros of both signs, longer than a block and no multiple of one."""
    generator = torch.Generator().manual_seed(0)
    palette = torch.tensor([0.0, -0.0, 1.5, -1.5, torch.inf, -torch.inf, torch.nan])
    few = palette[torch.randint(len(palette), (1, 1311), generator=generator)]
    steps = torch.randn(2, 1311, generator=generator).mul(4).round().div(4)
    return torch.cat((few, steps, torch.randn(1, 1311, generator=generator))).to(device)


def _selection(device: str) -> bool:
    from detpost.kernels.triton import select as triton_select
    from detpost.selection import select_packed

    scores = _scores(device)
    return all(torch.equal(triton_select.select(scores, k), select_packed(scores, k)) for k in (1, 40))


def _decode(device: str) -> bool:
    from detpost.kernels.triton import decode as triton_decode
    from detpost.postprocess import decode_plainly
    from detpost.selection import select_packed

    logits = _scores(device).reshape(4, 57, 23)
    boxes = torch.rand(4, 57, 4, generator=torch.Generator().manual_seed(1)).to(device)
    sizes = torch.tensor([[480, 640], [37, 1000], [1, 1], [333, 20]], device=device)
    for spec in (DecodeSpec(top_k=40, score_threshold=0.4), DecodeSpec(top_k=40, background="last", clip=True)):
        found = triton_decode.decode(logits, boxes, sizes, spec)
        expected = decode_plainly(logits, boxes, sizes, spec, select_packed)
        if not all(
            torch.equal(getattr(found, name), getattr(expected, name)) for name in ("labels", "queries", "valid")
        ):
            return False
        if not all(torch.allclose(getattr(found, name), getattr(expected, name)) for name in ("scores", "boxes")):
            return False
    return True


def _distances(device: str) -> bool:
    from detpost.kernels.triton import distance as triton_distance
    from detpost.reference import distance as reference

    inside = (torch.rand(2, 2, 33, 50, generator=torch.Generator().manual_seed(2)) < 0.9).to(device)
    found, _ = triton_distance.squared_distance(inside, (1.0, 1.0))
    return torch.equal(found, reference.squared_distance(inside, (1.0, 1.0))[0])


def _erosion(device: str) -> bool:
    """Values and gradients, in 2-D and 3-D, on errors thick enough for the last erosion, with many shared extremes."""
    from detpost.kernels.triton import erosion as triton_erosion
    from detpost.reference import erosion as reference

    generator, weights = torch.Generator().manual_seed(3), [1.0, 4.0, 9.0]
    for sides in ((19, 30), (9, 10, 11)):
        pred = torch.rand(2, 2, *sides, generator=generator).mul(3).round().div(8).add(0.625).to(device)
        target = (torch.rand(2, 1, *sides, generator=generator) < 0.05).long().to(device)
        given = (pred, target, torch.arange(2, device=device), weights)
        total, dilations, limits = triton_erosion.erode(*given, True)
        expected, *saved = reference.erode(*given, len(sides), True)
        if not torch.allclose(total, expected, rtol=1e-4, atol=1e-4):
            return False
        handed_out = torch.rand(pred.shape, generator=generator).to(device)
        found = triton_erosion.erosion_gradient(handed_out, *given, dilations, limits)
        slope = reference.erosion_gradient(handed_out, weights, saved, len(sides))
        slope = slope * (reference.difference(*given[:3]) * 2)
        if not torch.allclose(found, slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max())):
            return False
    return True
