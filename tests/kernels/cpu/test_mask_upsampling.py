"""Masks in C++: the pixels of PyTorch's own operators, whatever the width."""

import math

import pytest
import torch

from detpost.kernels.cpu import mask_upsampling
from detpost.kernels.cpu.mask_upsampling import upsample_and_compare

BUDGET = 1 << 22


@pytest.fixture
def by_operators(monkeypatch):
    if not mask_upsampling._is_native():
        pytest.skip("no kernel here that rounds as PyTorch does")

    def run(*given):
        with monkeypatch.context() as patch:
            patch.setattr(mask_upsampling, "_is_native", lambda: False)
            return upsample_and_compare(*given)

    return run


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("width", [*range(1, 36), 63, 64, 65, 127, 128, 129, 333])
def test_every_width_of_row(width, inclusive, by_operators):
    generator = torch.Generator().manual_seed(width)
    values = torch.randn(3, 7, 5, generator=generator).round(decimals=1)  # many that blend to the threshold itself
    given = (values, (29, width), 0.0, inclusive, BUDGET, None)
    assert torch.equal(upsample_and_compare(*given), by_operators(*given))


@pytest.mark.parametrize("threshold", [0.0, 0.5, -1e-3])
def test_odd_numbers(threshold, by_operators):
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3e38, -3e38, 0.5, 1 / 3])
    values = odd[torch.randint(len(odd), (4, 9, 9), generator=torch.Generator().manual_seed(0))]
    given = (values, (50, 77), threshold, False, BUDGET, None)
    found = upsample_and_compare(*given)
    assert torch.equal(found, by_operators(*given))
    assert 0 < int(found.sum()) < found.numel()


def test_a_box_cuts_what_the_kernel_made(by_operators):
    values, boxes = torch.rand(2, 6, 6) + 0.5, torch.tensor([[3.0, 2.0, 40.5, 30.0], [0.0, 0.0, 5.0, 5.0]])
    given = (values, (40, 48), 0.5, True, BUDGET, boxes)
    found = upsample_and_compare(*given)
    assert torch.equal(found, by_operators(*given))
    assert int(found[1].sum()) == 25


def test_other_threads_do_not_change_it(monkeypatch, by_operators):
    values = torch.randn(5, 24, 24)
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(upsample_and_compare(values, (211, 190), 0.0, False, BUDGET, None))
    assert torch.equal(*found)
