"""The surfaces of two masks and the distances between them: what every metric here is a statistic of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detpost.kernels import squared_distance, surface_distances, writes_graph
from detpost.losses._arguments import Spacing, by_image, spacings
from detpost.metrics._subvoxels import surface_elements
from detpost.reference.surface import boundary, cropped

Mask: TypeAlias = Tensor | NDArray[Any]


class Surface(NamedTuple):
    """One mask's surface, and how far each of its elements is from the other mask's.

    Attributes:
        distance: (B, C, N) float32, inf throughout where the other mask has no surface.
        size: (B, C, N), length or area of an element; 1 where elements are counted, 0 off the surface.
        chosen: (B, C, N) bool, which of the N are elements of the surface.
    """

    distance: Tensor
    size: Tensor
    chosen: Tensor


# Of the surfaces of a and b to a value for each image and channel, (B, C); the number is that of the only channel.
Statistic: TypeAlias = Callable[[Surface, Surface, int | None], Tensor]


def measure(
    statistic: Statistic, a: Mask, b: Mask, spacing: Spacing | None, ignore_index: int | None, use_subvoxels: bool
) -> Tensor:
    """Check two masks and take a statistic of the distances between their surfaces.

    Args:
        statistic: what to make of the two surfaces.
        a: (B, C, H, W) or (B, C, D, H, W) mask, inside where it is not zero.
        b: mask of the same shape and device.
        spacing: as the metrics take it.
        ignore_index: channel whose elements in ``b`` count in no channel, and which reads nan itself.
        use_subvoxels: whether the surface runs between the elements, and has lengths or areas.

    Returns:
        (B, C) float32.

    Raises:
        TypeError: a mask is neither a tensor nor an array.
        ValueError: rank, shapes, spacing or ``ignore_index`` are not as above.
    """
    a, b = _as_tensor(a), _as_tensor(b)
    _check_masks(a, b)
    if ignore_index is not None and not 0 <= ignore_index < a.shape[1]:
        raise ValueError(f"ignore_index must be a channel in [0, {a.shape[1]}); got {ignore_index}")
    each = spacings(spacing, a.shape[0], a.dim() - 2)
    with torch.no_grad():
        inside_a, inside_b = a != 0, b != 0
        if ignore_index is not None:
            counted = ~inside_b[:, ignore_index : ignore_index + 1]
            inside_a, inside_b = inside_a & counted, inside_b & counted
        found = _by_field(statistic, inside_a, inside_b, each, use_subvoxels).float()
        if ignore_index is None:
            return found
        channel = torch.arange(a.shape[1], device=a.device)
        return torch.where(channel == ignore_index, torch.nan, found)


def _by_field(
    statistic: Statistic, a: Tensor, b: Tensor, each: tuple[tuple[float, ...], ...], use_subvoxels: bool
) -> Tensor:
    """Take the statistic of whole batches, or on a CPU of each field's surface elements alone."""
    if _may_look_at_values(a):
        rows = []
        for image in range(a.shape[0]):
            steps = each[image if len(each) > 1 else 0]
            found = []
            for channel in range(a.shape[1]):
                one, other = (mask[image : image + 1, channel : channel + 1] for mask in (a, b))
                found.append(statistic(*_compact(one, other, steps, use_subvoxels), channel))
            rows.append(torch.cat(found, 1))
        return torch.cat(rows)
    return by_image(lambda one, other, s: statistic(*_surfaces(one, other, s, use_subvoxels), None), each, a, b)


def _may_look_at_values(mask: Tensor) -> bool:
    """Tell whether shapes may depend on values: eagerly on a CPU, where nothing waits for it and nobody traces."""
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or type(mask) is not Tensor
    return mask.device.type == "cpu" and not watched and not writes_graph() and mask.numel() > 0


def _compact(a: Tensor, b: Tensor, spacing: tuple[float, ...], use_subvoxels: bool) -> tuple[Surface, Surface]:
    """Give the surfaces of one field, (1, 1, ...), without all that lies off them."""
    if not use_subvoxels:
        of_a, of_b = surface_distances(a, b, spacing)
        return _counted(of_a), _counted(of_b)
    surfaces = _surfaces(*cropped(a, b), spacing, use_subvoxels)
    return _elements(surfaces[0]), _elements(surfaces[1])


def _counted(distance: Tensor) -> Surface:
    """Make a surface of the distances (N,) of its elements; one that is not chosen where there is none."""
    is_empty = distance.numel() == 0
    distance = distance.new_zeros(1) if is_empty else distance
    chosen = torch.full_like(distance, not is_empty, dtype=torch.bool)
    return Surface(distance[None, None], chosen.to(torch.float32)[None, None], chosen[None, None])


def _elements(surface: Surface) -> Surface:
    """Leave out what is off the surface; one element stays where there is none, so that nothing is empty."""
    index = torch.nonzero(surface.chosen.flatten())[:, 0]  # detpost: allow DP020 on a CPU, eagerly
    index = index if index.numel() else torch.zeros(1, dtype=torch.int64)
    return Surface(*(part.flatten()[index][None, None] for part in surface))


def _surfaces(a: Tensor, b: Tensor, spacing: tuple[float, ...], use_subvoxels: bool) -> tuple[Surface, Surface]:
    """Give both surfaces with their distances."""
    (chosen_a, size_a), (chosen_b, size_b) = (_sized(mask, spacing, use_subvoxels) for mask in (a, b))
    to_b, to_a = _distance_to(chosen_b, spacing), _distance_to(chosen_a, spacing)
    flat = [part.flatten(2) for part in (to_b, size_a, chosen_a, to_a, size_b, chosen_b)]
    return Surface(*flat[:3]), Surface(*flat[3:])


def _sized(mask: Tensor, spacing: tuple[float, ...], use_subvoxels: bool) -> tuple[Tensor, Tensor]:
    """Say which elements are surface, and how large each is."""
    if use_subvoxels:
        return surface_elements(mask, spacing)
    chosen = boundary(mask)
    return chosen, chosen.to(torch.float32)


def _distance_to(goal: Tensor, spacing: tuple[float, ...]) -> Tensor:
    squared, unit = squared_distance(~goal, spacing)
    return squared.sqrt() * unit


def _as_tensor(mask: Mask) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(mask != 0)) if isinstance(mask, np.ndarray) else mask


def _check_masks(a: Tensor, b: Tensor) -> None:
    for name, mask in (("a", a), ("b", b)):
        if not isinstance(mask, Tensor):
            kind = type(mask).__name__
            raise TypeError(f"{name} must be a torch.Tensor or an array; got {kind}: use torch.as_tensor")
    if a.dim() not in (4, 5) or 0 in a.shape[2:]:
        raise ValueError(f"masks must be (B, C, H, W) or (B, C, D, H, W) with sides >= 1; got {tuple(a.shape)}")
    if a.shape != b.shape:
        raise ValueError(f"masks must have one shape; got {tuple(a.shape)} and {tuple(b.shape)}: one-hot both alike")
