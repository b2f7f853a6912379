from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from detpost.kernels.triton import distance as triton_distance
from detpost.kernels.triton.distance import squared_boundary_distance, squared_distance, takes
from detpost.losses import distance_transform as plain
from tests.kernels.triton.harness import (
    INTERPRETED,
    _plain_references,  # noqa: F401
    assert_compiles,
    assert_passes_interpreted,
    assert_plain,
    compiled_whole,
    in_the_ordinary_process,
    on_each_device,
    replayed,
    written_arguments,
)

DENSITIES = [0.0, 0.03, 0.5, 0.97, 1.0]


def hold(inside, spacing, device):
    assert takes(inside.to(device))
    expected, unit = plain.squared_distance(inside, spacing)
    both = expected + plain.squared_distance(~inside, spacing)[0]
    for function, wanted in ((squared_distance, expected), (squared_boundary_distance, both)):
        actual, counted_in = function(inside.to(device), spacing)
        assert counted_in == unit
        assert actual.dtype == torch.float32
        if len(set(spacing)) == 1 or INTERPRETED:
            assert torch.equal(actual.cpu(), wanted), (inside, spacing)
        else:  # a GPU fuses a product and a sum
            torch.testing.assert_close(actual.cpu(), wanted, rtol=3e-7, atol=0)


@on_each_device
def test_the_reference_is_no_kernel(device):
    assert_plain(plain.squared_distance, torch.rand(1, 1, 4, 5, device=device) < 0.5, (1.0, 1.0))


@in_the_ordinary_process
@pytest.mark.slow
def test_everything_under_the_interpreter():
    assert_passes_interpreted(__file__, at_least=14)


@on_each_device
@pytest.mark.parametrize("sides", [(1, 1), (5, 7), (1, 9), (9, 1), (33, 3), (4, 5, 6), (1, 5, 1)], ids=str)
def test_squared_distances_are_the_plain_ones(sides, device):
    for density in DENSITIES[:: 2 if INTERPRETED and len(sides) == 3 else 1]:
        hold(torch.rand(1, 2, *sides) < density, (1.0,) * len(sides), device)


@on_each_device
@pytest.mark.parametrize("spacing", [(0.3, 1.0), (4.0, 0.7), (1.0, 1e-30), (0.3, 1.0, 2.5), (1e-30, 1.0, 1.0)], ids=str)
def test_spacing_counts_along_its_axis(spacing, device):
    sides = (6, 5, 4) if len(spacing) == 3 else (30, 4)
    for density in DENSITIES[1::2]:
        hold(torch.rand(1, 2, *sides) < density, spacing, device)


@on_each_device
def test_one_far_zero_and_one_far_one(device, monkeypatch):
    """The walk must go to the ends of lines longer than a block, on either side, in each strip of lanes."""
    monkeypatch.setattr(triton_distance, "_TILE", 32)
    for sides, place in [((50, 2), -1), ((3, 33), 7), ((20, 2), 0)]:
        mask = torch.ones(1, 1, *sides, dtype=torch.bool)
        mask.view(-1)[place] = False
        hold(torch.cat([mask, ~mask], 1), (1.0,) * len(sides), device)


@on_each_device
def test_the_walk_does_not_stop_before_the_nearest(device, monkeypatch):
    """The end of the first row is 10 from the zero of that row, and 9 from one beyond the walk's first step."""
    monkeypatch.setattr(triton_distance, "_TILE", 16)  # each row is a block
    mask = torch.ones(1, 1, 10, 11, dtype=torch.bool)
    mask[0, 0, 0, 0] = mask[0, 0, 9, 10] = False
    assert plain.squared_distance(mask, (1.0, 1.0))[0][0, 0, 0, 10] == 81
    hold(torch.cat([mask, mask.flip(2)], 1), (1.0, 1.0), device)


@on_each_device
def test_compiles_whole_and_takes_any_strides(device):
    mask = (torch.rand(1, 2, 6, 5) < 0.7).to(device).transpose(2, 3)
    actual = compiled_whole(lambda inside: squared_distance(~~inside, (1.0, 2.0))[0] * 1)(mask)
    assert torch.equal(actual.cpu(), plain.squared_distance(mask.cpu(), (1.0, 2.0))[0])


@on_each_device
def test_what_is_not_taken_is_said(device):
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=device)
    assert takes(mask)
    assert not takes(mask.float())
    assert not takes(mask[0])
    assert not takes(mask[..., :0])
    assert not takes(mask[..., :1].expand(1, 1, 4, 4097))
    assert not takes(mask.to("meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("sides", [(512, 300), (1000, 1100), (64, 48, 56), (128, 128, 128)], ids=str)
def test_real_sizes_on_a_gpu(sides):
    for density in (0.5, 0.999, 1.0):
        mask = (torch.rand(1, 2, *sides) < density).cuda()
        expected = plain.squared_distance(mask, (1.0,) * len(sides))[0]
        assert torch.equal(squared_distance(mask, (1.0,) * len(sides))[0], expected)
        both = expected + plain.squared_distance(~mask, (1.0,) * len(sides))[0]
        assert torch.equal(squared_boundary_distance(mask, (1.0,) * len(sides))[0], both)


@pytest.mark.gpu
def test_replays_from_a_cuda_graph():
    mask = (torch.rand(2, 3, 60, 70) < 0.99).cuda()
    expected = squared_distance(mask, (1.0, 1.0))[0]
    assert torch.equal(replayed(lambda inside: squared_distance(inside, (1.0, 1.0))[0], mask), expected)


@in_the_ordinary_process
def test_one_launch_per_axis_which_a_compiler_sees_leave_the_mask_alone(monkeypatch):
    mask = torch.empty(1, 1, 8, 9, 10, dtype=torch.bool, device="meta")
    written = written_arguments(lambda inside: squared_distance(inside, (1.0,) * 3)[0], [mask], monkeypatch)
    assert written == [["out_ptr"]] * 3


@in_the_ordinary_process
@pytest.mark.parametrize("both", [False, True])
def test_compiles_for_a_gpu(both, tmp_path, monkeypatch):
    for rows, width in ((8, 256), (1, 4096)):
        constants = {"BOTH": both, "ROWS": rows, "WIDTH": width}
        types = ["*u8", "*fp32", "i32", "i32", "fp32"]
        assert_compiles(triton_distance._row_kernel, types, constants, 4, tmp_path, monkeypatch)
    for height, width in ((32, 32), (1024, 1), (1, 1024)):
        constants = {"BOTH": both, "LAST": height == 32, "HEIGHT": height, "WIDTH": width, "STRIDE": 8}
        types = ["*fp32", "*fp32", "i32", "i32", "i32", "i32", "fp32"]
        assert_compiles(triton_distance._line_kernel, types, constants, 4, tmp_path, monkeypatch)
