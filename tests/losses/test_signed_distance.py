import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from detpost.losses import signed_distance_transform
from detpost.losses.signed_distance import kervadec_map, squared_surface_map
from tests.mixin import one_line
from tests.reference import boundary_losses

FIELDS = {
    "seed": st.integers(0, 2**31),
    "sides": st.lists(st.integers(1, 11), min_size=2, max_size=3),
    "density": st.sampled_from([0.0, 0.03, 0.4, 0.95, 1.0]),
    "spacing": st.sampled_from([(1.0, 1.0, 1.0), (0.3, 1.0, 2.5), (7.0, 0.2, 1.1)]),
}


def field(seed, sides, density):
    return np.random.default_rng(seed).random((2, 2, *sides)) < density


def each(masks, function):
    return np.stack([[function(mask) for mask in image] for image in masks])


@settings(max_examples=60, deadline=None)
@given(**FIELDS)
def test_equals_scipy_on_both_sides_and_is_zero_without_a_boundary(seed, sides, density, spacing):
    steps, masks = spacing[: len(sides)], field(seed, sides, density)

    def expected(mask):
        if mask.all() or not mask.any():
            return np.zeros(mask.shape)
        edt = ndimage.distance_transform_edt
        return edt(~mask, sampling=steps) - edt(mask, sampling=steps)

    actual = signed_distance_transform(torch.from_numpy(masks), steps)
    np.testing.assert_allclose(actual.numpy(), each(masks, expected), rtol=1e-5, atol=1e-6)
    assert actual.dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(**FIELDS)
def test_the_maps_of_both_losses_are_those_of_their_sources(seed, sides, density, spacing):
    steps, masks = spacing[: len(sides)], field(seed, sides, density)
    inside = torch.from_numpy(masks)
    kervadec = each(masks, lambda mask: boundary_losses.kervadec_map(mask, steps))
    np.testing.assert_allclose(kervadec_map(inside, steps).numpy(), kervadec, rtol=1e-5, atol=1e-5)
    surface = each(masks, lambda mask: boundary_losses.surface_map(mask, steps))
    np.testing.assert_allclose(squared_surface_map(inside, steps).sqrt().numpy(), surface, rtol=1e-5, atol=1e-6)


@pytest.mark.peers
@pytest.mark.parametrize("sides", [(12, 13), (7, 8, 9)])
@pytest.mark.parametrize("density", [0.05, 0.6, 0.97])
def test_the_surface_map_is_that_of_itks_signed_maurer_filter(sides, density):
    itk = pytest.importorskip("SimpleITK")
    steps = (0.7, 1.5, 2.0)[: len(sides)]
    mask = np.random.default_rng(3).random(sides) < density
    image = itk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing(steps[::-1])
    found = itk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True)
    actual = squared_surface_map(torch.from_numpy(mask)[None, None], steps).sqrt()[0, 0]
    np.testing.assert_allclose(actual.numpy(), np.abs(itk.GetArrayFromImage(found)), rtol=1e-5, atol=1e-6)


def test_arrays_and_a_spacing_for_each_image():
    masks = field(5, (6, 7), 0.5)
    steps = [(1.0, 2.0), (0.5, 3.0)]
    actual = signed_distance_transform(masks, steps)
    assert isinstance(actual, np.ndarray)
    for image, own in enumerate(steps):
        expected = signed_distance_transform(torch.from_numpy(masks[image : image + 1]), own)
        np.testing.assert_array_equal(actual[image : image + 1], expected.numpy())


def test_is_one_graph():
    masks = torch.rand(2, 1, 6, 7) > 0.4
    compiled = torch.compile(signed_distance_transform, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(masks, (1.0, 2.0)), signed_distance_transform(masks, (1.0, 2.0)))


@pytest.mark.parametrize(
    ("arguments", "kind", "pattern"),
    [
        ((torch.ones(4, 4),), ValueError, r"got \(4, 4\)"),
        ((torch.ones(1, 1, 0, 4),), ValueError, "sides >= 1"),
        (([[1]],), TypeError, "got list"),
        ((torch.ones(1, 1, 4, 4), (1.0,)), ValueError, "spatial axis"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        signed_distance_transform(*arguments)
    one_line(error)
