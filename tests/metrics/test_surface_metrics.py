"""Average surface distance, surface Dice and the metrics between elements, against MONAI and surface-distance."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detpost.metrics import average_surface_distance, hausdorff_distance, surface_dice
from tests.mixin import one_line

MASKS = {
    "seed": st.integers(0, 2**31),
    "sides": st.lists(st.integers(1, 10), min_size=2, max_size=3),
    "densities": st.tuples(*[st.sampled_from([0.0, 0.05, 0.4, 0.9, 1.0])] * 2),
    "spacing": st.sampled_from([None, (0.3, 1.0, 2.5)]),
}


def masks(seed, sides, densities, fields=(2, 2)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(*fields, *sides, generator=generator) < density for density in densities]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=60, deadline=None)
@given(symmetric=st.booleans(), **MASKS)
def test_average_surface_distance_equals_monai(seed, sides, densities, spacing, symmetric):
    monai = pytest.importorskip("monai.metrics")
    (a, b), steps = masks(seed, sides, densities), spacing and list(spacing[: len(sides)])
    options = {"include_background": True, "symmetric": symmetric, "spacing": steps}
    expected = monai.compute_average_surface_distance(a.float(), b.float(), **options)
    actual = average_surface_distance(a, b, symmetric, steps)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=60, deadline=None)
@given(use_subvoxels=st.booleans(), tolerance=st.sampled_from([0, 0.6, 1, 2.5]), **MASKS)
def test_surface_dice_equals_monai(seed, sides, densities, spacing, use_subvoxels, tolerance):
    monai = pytest.importorskip("monai.metrics")
    (a, b), steps = masks(seed, sides, densities), spacing and list(spacing[: len(sides)])
    limits = [tolerance, 2 * tolerance]
    options = {"include_background": True, "spacing": steps, "use_subvoxels": use_subvoxels}
    expected = monai.compute_surface_dice(a.float(), b.float(), limits, **options)
    actual = surface_dice(a, b, limits, steps, use_subvoxels=use_subvoxels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.fixture(scope="module")
def peer():
    """Give surface-distance, whose code of 2018 needs names that NumPy and scipy have dropped."""
    pytest.importorskip("surface_distance")
    from scipy import ndimage
    from surface_distance import metrics

    patch = pytest.MonkeyPatch()
    old = types.SimpleNamespace(
        filters=types.SimpleNamespace(correlate=ndimage.correlate),
        morphology=types.SimpleNamespace(distance_transform_edt=ndimage.distance_transform_edt),
    )
    patch.setattr(metrics, "ndimage", old)
    for name, value in (("Inf", np.inf), ("NaN", np.nan), ("bool", np.bool_)):
        patch.setattr(np, name, value, raising=False)
    yield metrics
    patch.undo()


@pytest.mark.peers
@settings(max_examples=150, deadline=None)
@given(**MASKS)
def test_between_the_elements_every_metric_is_surface_distances(peer, seed, sides, densities, spacing):
    (a, b), steps = masks(seed, sides, densities, (1, 1)), spacing and spacing[: len(sides)]
    found = peer.compute_surface_distances(a[0, 0].numpy(), b[0, 0].numpy(), steps or (1,) * len(sides))
    with np.errstate(all="ignore"):
        expected = [
            *peer.compute_average_surface_distance(found),
            *(peer.compute_surface_dice_at_tolerance(found, limit) for limit in (0, 0.6, 1, 2.5)),
            # Not 50 or the like, which small masks reach exactly, but for rounding.
            *(peer.compute_robust_hausdorff(found, percent) for percent in (0, 31.7, 94.3, 100)),
        ]
    options = {"spacing": steps, "use_subvoxels": True}
    actual = [
        average_surface_distance(a, b, False, **options),
        average_surface_distance(b, a, False, **options),
        *(surface_dice(a, b, limit, **options) for limit in (0, 0.6, 1, 2.5)),
        *(hausdorff_distance(a, b, percent, **options) for percent in (0, 31.7, 94.3, 100)),
    ]
    np.testing.assert_allclose([float(value) for value in actual], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_between_the_elements_means_and_percentiles_weigh_by_size():
    """Against MONAI's surface elements, which come with the default installation: shapes that bend every way."""
    utils = pytest.importorskip("monai.metrics.utils")
    a, b = masks(7, (9, 8, 7), (0.5, 0.3), (1, 1))
    steps = (0.5, 1.0, 2.0)
    (edges, _), (to_b, to_a), (sizes_a, sizes_b) = utils.get_edge_surface_distance(
        a[0, 0].float(), b[0, 0].float(), spacing=steps, use_subvoxels=True, symmetric=True
    )
    size_a, size_b = sizes_a[edges], sizes_b[_]
    options = {"spacing": steps, "use_subvoxels": True}
    directed = (to_b * size_a).sum() / size_a.sum()
    torch.testing.assert_close(average_surface_distance(a, b, False, **options)[0, 0], directed)
    both = ((to_b * size_a).sum() + (to_a * size_b).sum()) / (size_a.sum() + size_b.sum())
    torch.testing.assert_close(average_surface_distance(a, b, **options)[0, 0], both)
    torch.testing.assert_close(hausdorff_distance(a, b, **options)[0, 0], torch.cat([to_a, to_b]).max())
    ordered = [(distances.sort(), sizes) for distances, sizes in ((to_b, size_a), (to_a, size_b))]
    expected = max(
        values[int((sizes[order].double().cumsum(0) / sizes.sum() >= 0.7).nonzero()[0])]
        for (values, order), sizes in ordered
    )
    torch.testing.assert_close(hausdorff_distance(a, b, 70, **options)[0, 0], expected)


METRICS = {
    "hausdorff": hausdorff_distance,
    "hd95": lambda a, b, **options: hausdorff_distance(a, b, 95, **options),
    "average": average_surface_distance,
    "directed": lambda a, b, **options: average_surface_distance(a, b, False, **options),
    "dice": lambda a, b, **options: surface_dice(a, b, [0.5, 1.5], **options),
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("use_subvoxels", [False, True])
def test_in_one_graph_of_static_shapes_it_is_what_it_is_eagerly(metric, use_subvoxels):
    """Eagerly on a CPU only the surface's elements are looked at, compiled the whole field."""
    options = {"use_subvoxels": use_subvoxels, "spacing": (1.0, 2.0)}
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: metric(a, b, **options), fullgraph=True, backend="eager")
    for densities in ((0.4, 0.5), (0.0, 0.4), (0.4, 0.0), (0.0, 0.0), (1.0, 1.0)):
        a, b = masks(3, (6, 7), densities)
        torch.testing.assert_close(compiled(a, b), metric(a, b, **options), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_arrays_an_ignored_channel_and_a_spacing_for_each_image(metric):
    a, b = masks(5, (6, 7), (0.4, 0.5))
    steps = [(1.0, 2.0), (0.5, 0.7)]
    together = metric(a.numpy(), b.numpy(), spacing=steps)
    apart = [metric(a[i : i + 1], b[i : i + 1], spacing=steps[i]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(apart))
    ignored = metric(a, b, ignore_index=1)
    counted = ~b[:, 1:]
    assert ignored[:, 1].isnan().all()
    torch.testing.assert_close(ignored[:, 0], metric(a & counted, b & counted)[:, 0], equal_nan=True)


def test_a_tolerance_that_is_a_distance_counts_it_whatever_the_rounding():
    a = torch.zeros(1, 1, 1, 12)
    a[..., 2] = 1
    for step in (0.1, 0.3, 0.7, 1.1):
        for apart in range(1, 8):
            assert surface_dice(a, a.roll(apart, -1), apart * step, step) == 1, (step, apart)


@pytest.mark.parametrize(
    ("call", "kind", "pattern"),
    [
        (lambda a: surface_dice(a, a, -1), ValueError, "at least 0; got -1"),
        (lambda a: surface_dice(a, a, [1, 2, 3]), ValueError, r"one per channel \(2\); got 3"),
        (lambda a: surface_dice(a, a, float("inf")), ValueError, "finite"),
        (lambda a: average_surface_distance(a, a[:, :1]), ValueError, "one shape"),
        (lambda a: average_surface_distance(a.tolist(), a), TypeError, "got list"),
        (lambda a: surface_dice(a.tolist(), a, 1), TypeError, "got list"),
    ],
)
def test_bad_input_is_one_clear_line(call, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        call(torch.ones(1, 2, 4, 4))
    one_line(error)
