"""Distances between the surfaces of two masks by ``surface.cpp``: of the surfaces alone, not of the whole volume."""

from __future__ import annotations

import functools
from ctypes import byref, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from detpost.kernels.cpu import distance, library

__all__ = ["surface_distances"]


@functools.cache
def _run_box() -> Any:
    return library.function("detpost_box_of_masks", *[c_void_p] * 2, *[c_int64] * 3, c_void_p, c_int)


@functools.cache
def _run_surface() -> Any:
    return library.function("detpost_surface", c_void_p, *[c_int64] * 3, c_void_p, c_int, c_void_p, c_void_p, c_int)


@functools.cache
def _run_distance() -> Any:
    return library.function(
        "detpost_surface_distance", *[c_void_p] * 4, *[c_int64] * 3, *[c_float] * 3, c_void_p, c_void_p, c_int
    )


def surface_distances(a: Tensor, b: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Give how far each element of one mask's surface is from the other's.

    As :func:`detpost.reference.surface.surface_distances`: to the bit where spacings are equal, to float32 elsewhere.

    Args:
        a: (1, 1, *spatial), bool, on the CPU; two or three spatial axes.
        b: a mask of the same shape.
        spacing: one length per spatial axis.

    Returns:
        (N,) and (M,), float32.
    """
    a, b = a.contiguous(), b.contiguous()
    threads, axes = torch.get_num_threads(), a.dim() - 2
    sides = (1, *a.shape[2:])[-3:]
    box = (c_int64 * 6)()
    _run_box()(a.data_ptr(), b.data_ptr(), *sides, box, threads)
    within = list(box)[3:]
    surfaces = [_surface(mask, sides, box, within, axes, threads) for mask in (a, b)]
    unit = max(spacing)
    steps = (1.0, *(length / unit for length in spacing))[-3:]
    squared = [_squared(of, to, within, axes, steps, threads) for of, to in (surfaces, surfaces[::-1])]
    return squared[0].sqrt() * unit, squared[1].sqrt() * unit


def _surface(
    mask: Tensor, sides: tuple[int, ...], box: Any, within: list[int], axes: int, threads: int
) -> tuple[Tensor, Tensor]:
    """Give the surface of a mask in a box, bool, and how many of its elements are in each row."""
    surface = torch.empty(within, dtype=torch.bool, device="cpu")
    counts = torch.empty(within[:2], dtype=torch.int64, device="cpu")
    if surface.numel():
        _run_surface()(mask.data_ptr(), *sides, box, axes, surface.data_ptr(), counts.data_ptr(), threads)
    return surface, counts


def _squared(
    of: tuple[Tensor, Tensor], to: tuple[Tensor, Tensor], within: list[int], axes: int, steps: Any, threads: int
) -> Tensor:
    """Square the distance of each element of one surface to the nearest of another: (N,)."""
    (surface, counts), (goal, goals) = of, to
    found = torch.empty(int(counts.sum()), dtype=torch.float32, device="cpu")
    if found.numel() == 0:
        return found
    is_far = c_int()
    _run_distance()(
        *(surface.data_ptr(), counts.data_ptr(), goal.data_ptr(), goals.data_ptr()),
        *(*within, *steps, found.data_ptr(), byref(is_far), threads),
    )
    if not is_far.value:
        return found
    volume = (1, 1, *within[3 - axes :])
    squared = distance.squared_distance(goal.logical_not().view(volume), steps[3 - axes :])
    return squared.view(goal.shape)[surface]
