"""Run lengths in C++: the characters of the NumPy form, whatever the mask."""

import numpy as np
import pytest

from detpost.heads.masks import mask_of_rle, to_rle
from detpost.kernels.cpu import library
from detpost.kernels.cpu import run_lengths as module
from detpost.kernels.cpu.run_lengths import _lengths, _written, run_lengths

NATIVE = pytest.mark.skipif(library.missing() is not None, reason=f"the C++ kernels are {library.missing()}")


def in_numpy(masks):
    return [_written(_lengths(mask != 0)) for mask in masks]


@NATIVE
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (7, 1), (2, 2), (5, 31), (9, 32), (33, 65), (64, 128), (70, 129), (0, 4), (4, 0)]
)
def test_any_mask(shape, share):
    masks = np.random.default_rng(0).random((4, *shape)) < share
    assert run_lengths(masks) == in_numpy(masks)


@NATIVE
def test_blobs_and_bytes_of_any_value():
    y, x = np.mgrid[:200, :301]
    masks = np.stack([((y - 90) ** 2 + (x - cx) ** 2 < 60**2) * value for cx, value in ((40, 1), (150, 7), (299, 255))])
    masks = masks.astype(np.uint8)
    found = run_lengths(masks)
    assert found == in_numpy(masks)
    for counts, mask in zip(found, masks, strict=True):
        assert np.array_equal(mask_of_rle(counts.decode(), mask.shape), mask != 0)
    turned = np.asfortranarray(masks.transpose(0, 2, 1))
    assert run_lengths(turned) == in_numpy(turned)


@NATIVE
def test_a_mask_that_needs_more_room_is_written_again_with_it(monkeypatch):
    monkeypatch.setattr(module, "_ROOM", 16)
    masks = np.random.default_rng(1).random((3, 40, 50)) < 0.5
    assert run_lengths(masks) == in_numpy(masks)


def test_without_the_kernels_numpy_writes_the_same(monkeypatch):
    masks = np.random.default_rng(2).random((2, 20, 30)) < 0.4
    expected = [each["counts"] for each in to_rle(masks)]
    monkeypatch.setenv("DETPOST_KERNEL", "numpy")
    monkeypatch.setattr(library, "function", lambda *given: pytest.fail("the kernel was asked"))
    assert [each["counts"] for each in to_rle(masks)] == expected
