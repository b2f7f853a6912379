"""Distances at the surfaces alone: those of the whole volume's transform, where the search gives up and where not."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from detpost.kernels import squared_distance
from detpost.kernels.cpu import distance, library, surface
from detpost.reference.surface import boundary
from detpost.reference.surface import surface_distances as by_the_volume

pytestmark = pytest.mark.skipif(library.missing() is not None, reason="no C++ kernels here")


def noise(share, *sides, seed=0):
    return torch.rand(1, 1, *sides, generator=torch.Generator().manual_seed(seed)) < share


def ball(side, radius, *centre):
    axes = torch.meshgrid(*[torch.arange(side)] * len(centre), indexing="ij")
    return (sum((axis - at) ** 2 for axis, at in zip(axes, centre, strict=True)) <= radius**2)[None, None]


def by_a_tree(a, b, spacing):
    """Look for the nearest one among all: shares nothing with a transform."""
    steps = np.asarray(spacing)
    points = [np.argwhere(boundary(mask)[0, 0].numpy()) * steps for mask in (a, b)]
    return [cKDTree(to).query(of)[0] if len(to) else np.full(len(of), math.inf) for of, to in (points, points[::-1])]


def hold_to_reference(a, b, spacing):
    found = surface.surface_distances(a, b, spacing)
    wanted = by_the_volume(a, b, spacing, squared_distance)
    for one, other, nearest in zip(found, wanted, by_a_tree(a, b, spacing), strict=True):
        assert one.dtype == torch.float32
        if len({*spacing}) == 1:
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        torch.testing.assert_close(one, torch.from_numpy(nearest).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize(
    "sides", [(1, 1), (1, 40), (40, 1), (33, 70), (1, 1, 1), (2, 3, 130), (17, 16, 15), (9, 40, 66)]
)
def test_noise(share, sides):
    for seed, spacing in enumerate([(1.0,) * len(sides), (0.7,) * len(sides), (2.5, 0.8, 0.3)[-len(sides) :]]):
        hold_to_reference(noise(share, *sides, seed=seed), noise(share, *sides, seed=seed + 9), spacing)


@pytest.mark.parametrize("share", [(0.0, 0.3), (0.3, 0.0), (0.0005, 0.5), (1.0, 0.001)])
def test_masks_of_two_kinds(share):
    hold_to_reference(noise(share[0], 12, 40, 41), noise(share[1], 12, 40, 41, seed=1), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("shift", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("axes", [2, 3])
def test_from_near_to_far_the_same(shift, axes, monkeypatch):
    transformed = []
    whole = distance.squared_distance
    monkeypatch.setattr(distance, "squared_distance", lambda *given: (transformed.append(1), whole(*given))[1])
    for axis in range(axes):
        centre = [20 + shift * (other == axis) for other in range(axes)]
        given = ball(70, 9, *[20] * axes), ball(70, 8, *centre), (1.0,) * axes
        surface.surface_distances(*given)
        searched = not transformed
        assert searched or shift > 2  # the search is what is tried here
        assert not searched or shift < 40 or axes < 3  # and here what it gives way to
        hold_to_reference(*given)
        transformed.clear()


def test_a_mask_that_does_not_lie_in_one_piece():
    a, b = noise(0.4, 20, 30, 40).transpose(2, 4), noise(0.4, 20, 30, 40, seed=1).transpose(2, 4)
    hold_to_reference(a, b, (1.0, 1.0, 1.0))


def test_the_crop_is_anywhere():
    for corner in itertools.product((0, 1, 14), repeat=3):
        a = torch.zeros(1, 1, 20, 20, 20, dtype=torch.bool)
        a[0, 0, corner[0] : corner[0] + 6, corner[1] : corner[1] + 5, corner[2] : corner[2] + 4] = True
        hold_to_reference(a, a.roll(1, -1), (1.0, 1.0, 1.0))


def test_a_row_longer_than_the_kernel_counts():
    a, b = torch.zeros(2, 1, 1, 2, 70_000, dtype=torch.bool)
    a[..., 3] = True
    b[..., 69_990] = True
    assert [found.tolist() for found in surface.surface_distances(a, b, (1.0, 1.0))] == [[69_987.0] * 2] * 2


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    a, b = noise(0.3, 40, 50, 60), noise(0.3, 40, 50, 60, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        hold_to_reference(a, b, (1.0, 2.0, 0.5))
    finally:
        torch.set_num_threads(before)
