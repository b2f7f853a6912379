"""Where rounding enters a graph: nodes by the error that each adds, from one pass over a few images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detpost.export.mixed import Mixture
from detpost.export.rounded import is_decode
from detpost.verify.on_images import OnImages

if TYPE_CHECKING:
    import onnx

__all__ = ["own_top_k", "suspects"]

_MOST_IMAGES = 4
_MOST_BYTES = 2**28  # of values that one pass gives, as far as their shapes are known
_QUIET = 1e-4  # of the values' mean square: a channel below it is as good as empty


def own_top_k(mixture: Mixture) -> onnx.NodeProto | None:
    """Find the first TopK by which the network picks its own queries, where it is in both graphs."""
    for node in mixture.reference.graph.node:
        if node.op_type == "TopK" and not is_decode(node) and mixture.raw_value(node.output[1]):
            return node
    return None


def suspects(mixture: Mixture, path: Path, images: Sequence[Path]) -> tuple[str, ...]:
    """Sort the nodes that differ by the error that each adds, the most first.

    The error of a value is that of each channel, as a share of the channel's own size and no more than it, on average
    over channels: one large channel does not hide what becomes of the others. A node adds the error of what its readers
    take less the greatest of what it computes on. Queries that the network picks are the reference's on both sides, so
    that each row is compared with its own.

    Args:
        mixture: of the two versions.
        path: the reference's file.
        images: files of images; a few of them are run.

    Returns:
        The mixture's candidates. It says where to look first, and nothing of what detections make of it.
    """
    nodes = {name: mixture.node(name) for name in mixture.candidates}
    values = dict.fromkeys(v for node in nodes.values() for v in (*node.input, *node.output) if mixture.raw_value(v))
    on_images = OnImages(path, images[:_MOST_IMAGES], batch=1)
    errors: dict[str, tuple[float, float]] = {}
    for part in _parts(mixture, list(values)):
        errors = {**errors, **_errors(mixture, on_images, part)}

    def added(name: str) -> float:
        before = max((errors[value][0] for value in nodes[name].input if value in errors), default=0.0)
        after = max((errors[value][1] for value in nodes[name].output if value in errors), default=0.0)
        return 0.0 if np.isinf(before) else after - before

    return tuple(sorted(mixture.candidates, key=lambda name: -added(name)))


def _parts(mixture: Mixture, values: Sequence[str]) -> Iterator[list[str]]:
    """Cut the values so that each part fits into memory."""
    known = {value.name: value for value in mixture.reference.graph.value_info}
    part: list[str] = []
    size = 0
    for name in values:
        shape = known[name].type.tensor_type.shape.dim if name in known else ()
        more = 12 * prod(max(1, axis.dim_value) for axis in shape)  # of the reference, and before and after rounding
        if part and size + more > _MOST_BYTES:
            yield part
            part, size = [], 0
        part, size = [*part, name], size + more
    if part:
        yield part


def _errors(mixture: Mixture, on_images: OnImages, values: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Give the greatest error of each value on the images: before it is rounded, and as its readers take it."""
    top = own_top_k(mixture)
    reference = Mixture(mixture.reference, mixture.reference).build((), values)
    other = mixture.watched(values, None if top is None else top.output[1])
    there = [value.name for value in other.graph.output if value.name.startswith(("before/", "after/"))]
    found: dict[str, tuple[float, float]] = {}
    sides = on_images.watch(reference, [f"seen/{name}" for name in values]), on_images.watch(other, there)
    for (_, mine), (_, theirs) in zip(*sides, strict=True):
        for name in values:
            pair = [_error(mine[f"seen/{name}"], theirs, f"{place}/{name}") for place in ("before", "after")]
            worst = found.get(name, (0.0, 0.0))
            found = {**found, name: (max(worst[0], pair[0]), max(worst[1], pair[1]))}
    return found


def _error(mine: np.ndarray[Any, Any], theirs: Mapping[str, np.ndarray[Any, Any]], name: str) -> float:
    """Give the error of a value of one image as a share of its size, infinite where it overflowed."""
    if name not in theirs or mine.dtype.kind != "f" or theirs[name].shape != mine.shape or not mine.size:
        return 0.0
    seen = np.isfinite(mine)
    exact = np.where(seen, mine, 0).astype(np.float64)
    gap = np.where(seen, theirs[name], 0).astype(np.float64) - exact
    if not np.isfinite(gap).all():
        return float("inf")
    axis = 0 if mine.ndim == 3 else mine.ndim - 1  # of one image: (C, H, W) of maps, (Q, C) of rows
    others = tuple(other for other in range(mine.ndim) if other != axis)
    size, wrong = ((value**2).mean(axis=others) for value in (exact, gap))
    share = np.sqrt(wrong / (size + _QUIET * size.mean() + np.finfo(np.float32).tiny))
    return float(np.minimum(share, 1).mean())
