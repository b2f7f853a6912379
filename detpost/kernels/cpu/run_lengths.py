"""Masks to COCO's compressed run lengths by ``run_lengths.cpp``, a mask on each thread; without it, by NumPy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_char_p, c_int64, c_void_p, create_string_buffer, string_at
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from detpost.kernels.cpu import library
from detpost.kernels.serving import kernel_for

__all__ = ["run_lengths"]

_ROOM = 1 << 16  # characters; few masks need more


def run_lengths(masks: Any) -> list[bytes]:
    """Write masks as COCO does.

    Args:
        masks: (N, H, W), NumPy, bool or uint8; what is not 0 is in the mask.

    Returns:
        The counts of each.
    """
    if library.missing() is not None or kernel_for("cpu") != "native":
        return [_written(_lengths(mask != 0)) for mask in masks]
    write = library.function("detpost_run_lengths", c_void_p, c_int64, c_int64, c_char_p, c_int64, c_void_p)

    def of_mask(mask: Any) -> bytes:
        mask = mask if mask.flags.c_contiguous else mask.copy()
        length, room = c_int64(), _ROOM
        while True:
            buffer = create_string_buffer(room)
            write(mask.ctypes.data, *mask.shape, buffer, room, byref(length))
            if length.value <= room:
                return string_at(buffer, length.value)
            room = length.value

    workers = min(torch.get_num_threads(), len(masks))
    if workers < 2:
        return [of_mask(mask) for mask in masks]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(of_mask, masks))


def _lengths(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Give the lengths of the runs down the columns, zeros first, of a mask (H, W)."""
    height = len(mask)
    if mask.size == 0:
        return np.zeros(1, np.int64)
    # Changes are looked for where the bytes lie, row by row, and few: sorting their places is cheaper than turning the
    # mask on its side.
    row, column = np.nonzero(mask[1:] != mask[:-1])
    inner = column.astype(np.int64) * height + row + 1
    at_top = np.flatnonzero(mask[0, 1:] != mask[-1, :-1]).astype(np.int64) * height + height  # column to column
    changes = np.sort(np.concatenate((inner, at_top)))
    start = np.zeros(2 if mask[0, 0] else 1, np.int64)
    return np.diff(np.concatenate((start, changes, [mask.size])))


def _written(counts: npt.NDArray[np.int64]) -> bytes:
    """Write run lengths as COCO does: from the fourth on as differences to the last but one, 5 bits a character."""
    rest = np.concatenate((counts[:3], counts[3:] - counts[1:-2]))
    characters, more = [], []
    is_open = np.ones(len(rest), bool)
    while is_open.any():
        bits, rest = rest & 0x1F, rest >> 5
        goes_on = np.where(bits & 0x10, rest != -1, rest != 0)
        characters.append(bits + np.where(goes_on, 0x20, 0) + 48)
        more.append(is_open)
        is_open = is_open & goes_on
    written: npt.NDArray[np.int64] = np.stack(characters, axis=1)[np.stack(more, axis=1)]
    return written.astype(np.uint8).tobytes()
