import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detpost.losses import distance_transform_edt
from tests.mixin import OperatorTests

ndimage = pytest.importorskip("scipy.ndimage")


def scipy_distance(mask, spacing=None):
    fields = [ndimage.distance_transform_edt(field.numpy(), sampling=spacing) for field in mask.flatten(0, 1)]
    return torch.from_numpy(np.stack(fields)).reshape(mask.shape)


@pytest.mark.peers
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sides=st.lists(st.integers(1, 20), min_size=2, max_size=3),
    density=st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]),
    spacing=st.sampled_from([None, 0.7, (0.3, 1.0, 2.5), (4.0, 1.0, 1.0)]),
)
def test_equals_scipy_on_every_mask(seed, sides, density, spacing):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 2, *sides, generator=generator) < density
    steps = spacing[: len(sides)] if isinstance(spacing, tuple) else spacing
    actual = distance_transform_edt(mask, steps)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), scipy_distance(mask, steps), rtol=1e-6, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("sides", [(512, 300), (64, 64, 64)], ids=str)
@pytest.mark.parametrize("spacing", [None, (2.0, 0.7, 1.3)], ids=str)
def test_a_single_zero_in_a_large_mask(sides, spacing):
    mask = torch.ones(1, 1, *sides, dtype=torch.bool)
    mask[0, 0].view(-1)[7] = False
    steps = spacing and spacing[: len(sides)]
    actual = distance_transform_edt(mask, steps).double()
    torch.testing.assert_close(actual, scipy_distance(mask, steps), rtol=1e-6, atol=0)


def test_empty_and_full_masks_give_what_the_docstring_states():
    assert distance_transform_edt(torch.zeros(1, 2, 3, 4)).eq(0).all()
    rows = torch.arange(1, 4)[:, None] * 2.0
    columns = torch.arange(4) * 5.0
    full = distance_transform_edt(torch.ones(1, 1, 3, 4), spacing=(2.0, 5.0))
    torch.testing.assert_close(full[0, 0], torch.hypot(rows, columns))
    mixed = torch.stack([torch.ones(3, 3), torch.zeros(3, 3)])[None]
    torch.testing.assert_close(distance_transform_edt(mixed).double(), scipy_distance(mixed))


def test_extreme_spacing_keeps_its_digits():
    mask = torch.ones(1, 1, 4, 5)
    mask[..., 0, 0] = 0
    unit = distance_transform_edt(mask)
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(distance_transform_edt(mask, scale), unit * scale, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_memory_stays_linear():
    """Peak of the allocator over a 256 x 256 transform, in inputs of float32: far from the 256 of an O(N L) method."""
    mask = torch.rand(1, 1, 256, 256) > 0.5
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        distance_transform_edt(mask)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak < 16 * mask.numel() * 4


def test_runs_where_the_mask_is():
    assert distance_transform_edt(torch.ones(1, 1, 4, 4, device="meta")).device.type == "meta"


class TestDistanceTransform(OperatorTests):
    operator = staticmethod(distance_transform_edt)

    def arguments(self, dtype):
        return ((torch.rand(1, 2, 9, 10) < 0.8).to(dtype), (1.0, 2.0))

    def output_dtype(self, dtype):
        return torch.float32

    def cardinalities(self):
        return [((torch.ones(2, 3, 1, 1),), (2, 3, 1, 1)), ((torch.zeros(1, 1, 2, 3, 4),), (1, 1, 2, 3, 4))]

    def features(self):
        mask = torch.tensor([[[[1, 1, 0], [1, 1, 1]]]])
        return [((mask,), torch.tensor([[[[2.0, 1.0, 0.0], [5.0**0.5, 2.0**0.5, 1.0]]]]))]

    def exceptions(self):
        mask = torch.ones(1, 1, 4, 4)
        return [
            ((mask[0],), ValueError, r"mask must be .* got \(1, 4, 4\)"),
            ((mask[..., :0],), ValueError, "sides >= 1"),
            ((mask.tolist(),), TypeError, "got list: use torch.as_tensor"),
            ((mask, (1.0, 1.0, 1.0)), ValueError, r"one per spatial axis \(2\); got 3"),
            ((mask, (1.0, -1.0)), ValueError, "positive and finite"),
            ((mask, [(1.0, 1.0)] * 2), ValueError, r"one sequence for each image \(1\); got 2"),
            ((mask, [(1.0, 1.0, 1.0)]), ValueError, r"one per spatial axis \(2\); got 3"),
        ]

    def test_gradcheck(self):
        mask = torch.ones(1, 1, 4, 4, requires_grad=True)
        assert not distance_transform_edt(mask).requires_grad


@pytest.mark.parametrize("form", [list, np.array, torch.tensor], ids=["lists", "array", "tensor"])
def test_each_image_has_its_own_spacing_where_it_is_given(form):
    mask = torch.rand(3, 2, 6, 7) < 0.8
    mask[0, 0] = True  # to the virtual zero
    each = [(0.5, 2.0), (1.0, 1.0), (30.0, 4.0)]
    expected = torch.cat([distance_transform_edt(mask[i : i + 1], steps) for i, steps in enumerate(each)])
    assert torch.equal(distance_transform_edt(mask, form(each)), expected)
    same = distance_transform_edt(mask, [(0.5, 2.0)] * 3)
    assert torch.equal(same, distance_transform_edt(mask, (0.5, 2.0)))
    assert torch.equal(same, distance_transform_edt(mask, form((0.5, 2.0))))


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float64, np.int16])
def test_an_array_gives_an_array(dtype):
    mask = (np.random.default_rng(0).random((2, 1, 9, 8)) < 0.7).astype(dtype)[..., ::-1]
    found = distance_transform_edt(mask, 2.0)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, distance_transform_edt(torch.from_numpy(mask.copy()), 2.0).numpy())
