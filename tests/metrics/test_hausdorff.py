import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detpost.metrics import hausdorff_distance
from tests.mixin import one_line


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sides=st.lists(st.integers(1, 12), min_size=2, max_size=3),
    densities=st.tuples(*[st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0])] * 2),
    percentile=st.sampled_from([None, 0, 33.3, 50, 95, 100]),
    spacing=st.sampled_from([None, 0.7, [0.3, 1.0, 2.5]]),
)
def test_equals_monai(seed, sides, densities, percentile, spacing):
    monai = pytest.importorskip("monai.metrics")
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(2, 2, *sides, generator=generator) < density for density in densities)
    steps = spacing[: len(sides)] if isinstance(spacing, list) else spacing
    expected = monai.compute_hausdorff_distance(
        a.float(), b.float(), include_background=True, percentile=percentile, spacing=steps
    )
    actual = hausdorff_distance(a, b, percentile, steps)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.peers
def test_percentile_of_a_large_boundary_equals_monai():
    monai = pytest.importorskip("monai.metrics")
    a = torch.zeros(1, 1, 60, 60, 60)
    a[..., 9:50, 5:40, 3:55] = 1
    b = a.roll((3, -4, 2), (2, 3, 4)) * (torch.rand_like(a) > 0.01)
    expected = monai.compute_hausdorff_distance(a, b, include_background=True, percentile=95)
    torch.testing.assert_close(hausdorff_distance(a, b, 95), expected)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", [list, np.array])
def test_a_spacing_for_each_image_is_monais(form):
    monai = pytest.importorskip("monai.metrics")
    a, b = torch.rand(3, 2, 9, 7) < 0.1, torch.rand(3, 2, 9, 7) < 0.1
    each = [[0.5, 2.0], [1.0, 1.0], [3.0, 0.2]]
    for percentile in (None, 95):
        options = {"percentile": percentile, "spacing": form(each)}
        expected = monai.compute_hausdorff_distance(a.float(), b.float(), include_background=True, **options)
        torch.testing.assert_close(hausdorff_distance(a, b, **options), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(hausdorff_distance(a.numpy(), b.numpy()), hausdorff_distance(a, b))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_ignored_class_is_left_out_as_in_monai():
    monai = pytest.importorskip("monai.metrics")
    a, b = (torch.nn.functional.one_hot(torch.randint(4, (2, 9, 8)), 4).movedim(-1, 1) for _ in range(2))
    for ignored in range(4):
        metric = monai.HausdorffDistanceMetric(include_background=True, reduction="none", ignore_index=ignored)
        expected = metric(a.float(), b.float())
        actual = hausdorff_distance(a, b, ignore_index=ignored)
        assert actual[:, ignored].isnan().all()
        torch.testing.assert_close(actual, expected, equal_nan=True)
    assert not hausdorff_distance(a, b).isnan().any()


def test_empty_masks_give_what_the_docstring_states():
    empty, full = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    assert hausdorff_distance(empty, empty).isnan()
    assert hausdorff_distance(empty, full).isposinf()
    assert hausdorff_distance(full, empty).isposinf()
    assert hausdorff_distance(empty, full, percentile=95).isnan()
    assert hausdorff_distance(full, full) == 0


def test_is_one_graph():
    a, b = torch.rand(1, 2, 6, 7) > 0.5, torch.rand(1, 2, 6, 7) > 0.5
    compiled = torch.compile(hausdorff_distance, fullgraph=True, backend="aot_eager")
    for percentile in (None, 95):
        assert torch.equal(compiled(a, b, percentile), hausdorff_distance(a, b, percentile))


@pytest.mark.parametrize(
    ("arguments", "kind", "pattern"),
    [
        ((torch.ones(4, 4), torch.ones(4, 4)), ValueError, r"got \(4, 4\)"),
        ((torch.ones(1, 1, 4, 4), torch.ones(1, 2, 4, 4)), ValueError, "one shape"),
        ((torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), 101), ValueError, "between 0 and 100"),
        ((torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), None, (1.0, 1.0, 1.0)), ValueError, "spatial axis"),
        ((torch.ones(1, 1, 4, 4).tolist(), torch.ones(1, 1, 4, 4)), TypeError, "got list"),
        ((torch.ones(1, 2, 4, 4), torch.ones(1, 2, 4, 4), None, None, 2), ValueError, r"in \[0, 2\); got 2"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, kind, pattern):
    with pytest.raises(kind, match=pattern) as error:
        hausdorff_distance(*arguments)
    one_line(error)
