"""The surface that runs between the elements of a mask: where it is, and how long or large each piece is.

At every corner where 2 x 2 (x 2) elements meet, the surface is what marching squares or cubes draw between the middles
of the edges that it crosses (Nikolov et al., "Clinically applicable segmentation of head and neck anatomy", 2021).
Which polygons these are follows from the groups of neighbouring elements among the eight, one polygon each; diagonal
neighbours do not join. A pattern and its complement have the same surface, so the smaller side is looked at.
"""

from __future__ import annotations

import itertools
import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

# Where an element stands at its corner, 0 or 1 along each axis; and a normal as long as its piece is large.
_Place: TypeAlias = tuple[int, ...]
_Normal: TypeAlias = tuple[float, ...]


def surface_elements(inside: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Find the corners that the surface passes, and its length (2-D) or area (3-D) there.

    Args:
        inside: (B, C, *spatial) boolean; beyond the image is outside.
        spacing: one length per spatial axis.

    Returns:
        (B, C, *spatial + 1) bool and float64, 0 away from the surface; one more along each axis than elements.
    """
    axes = len(spacing)
    code = F.pad(inside.to(torch.uint8), (1, 1) * axes)
    # Along each axis two neighbours become one number; after all axes it has a bit for each element at the corner.
    shift = 1
    for axis in range(inside.dim() - 1, 1, -1):
        length = code.shape[axis] - 1
        code = code.narrow(axis, 0, length) * 2**shift + code.narrow(axis, 1, length)
        shift = 2 * shift
    chosen = (code != 0) & (code != 2**shift - 1)
    sizes = _sizes(spacing)
    sizes = sizes.float() if inside.device.type == "mps" else sizes  # it has no float64
    return chosen, sizes.to(inside.device)[code.int()]


def _sizes(spacing: tuple[float, ...]) -> Tensor:
    """Size of the surface at a corner for each pattern of elements around it: (16,) or (256,)."""
    normals = torch.tensor(_NORMALS[len(spacing)], dtype=torch.float64, device="cpu")  # (patterns, pieces, axes)
    # A piece across an axis grows with the steps along the others.
    others = [math.prod(spacing[:axis] + spacing[axis + 1 :]) for axis in range(len(spacing))]
    return (normals * torch.tensor(others, dtype=torch.float64, device="cpu")).square().sum(2).sqrt().sum(1)


def _normals_of_patterns(axes: int) -> list[list[_Normal]]:
    """Give the normals of the pieces for each pattern, filled up with zeros to the same number."""
    places = list(itertools.product((0, 1), repeat=axes))
    # The first place has the highest bit, as the numbers above are put together.
    weights = {place: 1 << (len(places) - 1 - order) for order, place in enumerate(places)}
    patterns = []
    for code in range(1 << len(places)):
        held = [place for place in places if code & weights[place]]
        smaller = held if 2 * len(held) <= len(places) else [place for place in places if place not in held]
        patterns.append([normal for group in _groups(smaller) for normal in _pieces(group, axes)])
    most = max(map(len, patterns))
    return [pieces + [(0.0,) * axes] * (most - len(pieces)) for pieces in patterns]


def _groups(places: list[_Place]) -> list[list[_Place]]:
    """Split places into groups of direct neighbours."""
    left, groups = list(places), []
    while left:
        group = [left[0]]
        for place in group:  # grows while it is walked through
            group.extend(other for other in left if other not in group and _apart(place, other) == 1)
        groups.append(group)
        left = [place for place in left if place not in group]
    return groups


def _apart(one: _Place, other: _Place) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def _pieces(group: list[_Place], axes: int) -> list[_Normal]:
    """Give the normals of the polygon around one group; signs do not count."""
    varied = [axis for axis in range(axes) if len({place[axis] for place in group}) == 2]
    if axes == 2:
        # A corner is cut by the middles of two edges, a pair is passed along.
        return [(0.5, 0.5)] if not varied else [_along(axes, {1 - varied[0]: 1.0})]
    everywhere = (1.0, 1.0, 1.0)
    if len(group) == 1:  # a triangle
        return [_scaled(everywhere, 1 / 8)]
    if len(group) == 2:  # a rectangle along the pair
        return [_along(axes, {axis: 0.5 for axis in range(axes) if axis not in varied})]
    across = [axis for axis in range(axes) if axis not in varied]
    if len(group) == 3:  # a pentagon, bent between the pair of ends and the middle
        return [_along(axes, {across[0]: 0.5}), _scaled(everywhere, 3 / 8)]
    if across:  # a square across the middle
        return [_along(axes, {across[0]: 1.0})]
    most = max(sum(_apart(place, other) == 1 for other in group) for place in group)
    if most == 3:  # a hexagon around one corner
        return [_scaled(everywhere, 3 / 4)]
    # A chain along all three axes: a bent hexagon. Its middle link has an axis of its own.
    inner = [place for place in group if sum(_apart(place, other) == 1 for other in group) == 2]
    middle = next(axis for axis in range(axes) if inner[0][axis] != inner[1][axis])
    bends = [_along(axes, {middle: 0.25, axis: 0.25}) for axis in range(axes) if axis != middle]
    return [_scaled(everywhere, 1 / 2), *bends]


def _along(axes: int, parts: dict[int, float]) -> _Normal:
    return tuple(parts.get(axis, 0.0) for axis in range(axes))


def _scaled(normal: _Normal, factor: float) -> _Normal:
    return tuple(part * factor for part in normal)


_NORMALS = {axes: _normals_of_patterns(axes) for axes in (2, 3)}
