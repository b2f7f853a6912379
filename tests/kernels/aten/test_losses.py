"""Distances by PyTorch's operators on a processor: the bits of the definition, looking no farther than needed."""

import pytest
import torch

from detpost.kernels.aten import losses
from detpost.kernels.dispatch import FORMS, squared_distance
from detpost.reference import distance


def masks(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    noise = torch.rand(shape, generator=generator)
    lonely = torch.ones(shape, dtype=torch.bool).flatten(2)
    lonely = torch.where(torch.arange(lonely.shape[2]) == 1, False, lonely).reshape(shape)
    return {
        "noise": noise > 0.5,
        "dense": noise > 0.02,
        "one zero in a corner": lonely,
        "empty": noise < 0,
        "full": noise >= 0,
        "full beside noise": torch.cat(((noise > 0.5)[:, :1], (noise >= 0)[:, 1:]), dim=1),
    }


@pytest.mark.parametrize("spacing", [1.0, 0.3])
@pytest.mark.parametrize("shape", [(2, 2, 9, 13), (1, 2, 70, 40), (1, 2, 1, 5), (1, 2, 6, 17, 11), (1, 3, 5, 1, 1)])
def test_from_near_to_far_is_the_definition_to_the_bit(shape, spacing):
    spacings = (1.0, spacing, 2.0)[: len(shape) - 2]
    for name, inside in masks(shape).items():
        expected, unit = distance.squared_distance(inside, spacings)
        found, same_unit = losses.squared_distance_nearby(inside, spacings)
        assert unit == same_unit
        assert torch.equal(found, expected), name


def test_it_looks_no_farther_than_the_farthest_boundary(monkeypatch):
    looked = []
    minimum = torch.minimum
    monkeypatch.setattr(torch, "minimum", lambda *given: looked.append(given) or minimum(*given))
    rows = torch.zeros(1, 400, 30)
    losses._envelope_from_near_to_far(rows, 1.0, None)
    assert not looked
    near = torch.where(torch.arange(400)[:, None] % 5 == 0, 0.0, torch.inf).expand(1, 400, 30)
    losses._envelope_from_near_to_far(near, 1.0, None)
    assert 0 < len(looked) <= 2 * 2 * losses._ROWS_PER_LOOK


def test_a_transform_takes_what_reads_nothing(monkeypatch):
    monkeypatch.setenv("DETPOST_KERNEL", "aten")
    assert any(form.run is losses.squared_distance_nearby for form in FORMS["squared_distance"])
    inside = masks((3, 2, 8, 9))["noise"]
    mapped = torch.func.vmap(lambda one: squared_distance(one.unsqueeze(0), (1.0, 1.0))[0].squeeze(0))(inside)
    assert torch.equal(mapped, distance.squared_distance(inside, (1.0, 1.0))[0])
