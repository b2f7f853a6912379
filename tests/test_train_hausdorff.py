import json
import math

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from scripts.train_hausdorff import SPLIT, Objective, _spread, crops, dice_loss, load_coins, main, objectives, strokes


def test_the_split_cuts_no_coin():
    _, mask = load_coins()
    assert mask[SPLIT - 1 : SPLIT + 1].sum() == 0
    assert 0.2 < mask.float().mean() < 0.6


def test_crops_are_the_same_for_the_same_seed_and_keep_image_and_mask_together():
    for sides in ((60, 70), (40, 42, 44)):
        image = torch.arange(torch.Size(sides).numel()).reshape(sides)
        first, mask = crops(image.float(), image, 3, 32, torch.Generator().manual_seed(4))
        assert first.shape == (3, 1, *[32] * len(sides))
        assert torch.equal(first, mask.float())
        assert torch.equal(mask, crops(image.float(), image, 3, 32, torch.Generator().manual_seed(4))[1])


def test_strokes_are_thin_and_training_shows_none_that_is_held_out():
    task = strokes()
    images, masks = task.sample(16, torch.Generator().manual_seed(1))
    assert images.shape == masks.shape == (16, 1, task.tile, task.tile)
    assert 0.02 < task.masks.float().mean() < 0.25
    assert task.masks.flatten(1).any(1).all()
    core = -torch.nn.functional.max_pool2d(-masks.float(), 5, stride=1, padding=2)
    assert core.mean() < 0.1 * masks.float().mean(), "few pixels have ink all around"


def test_every_objective_adds_its_term_to_dice_in_the_end():
    target = torch.zeros(2, 1, 12, 12, dtype=torch.int64)
    target[..., 3:9, 4:8] = 1
    foreground = torch.where(target == 1, 0.1, 0.9)  # wrong everywhere, so that erosions leave something
    probability = torch.cat([1 - foreground, foreground], 1)
    alone = dice_loss(probability, target)
    for name, make in objectives(2).items():
        objective: Objective = make()
        values = []
        for _ in range(2):
            values.append(objective(probability, target))
            objective.end_epoch()
        if name == "Dice":
            assert values == [alone, alone]
        elif name == "Dice + CE":
            assert values[0] > alone
        else:
            assert values[0] == alone, "the first epoch trains Dice"
            assert values[1] != alone


@pytest.mark.slow
def test_a_short_run_writes_scores_and_plot(tmp_path, capsys):
    main(["--steps", "2", "--quick", "--out", str(tmp_path)])
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert set(scores) == set(objectives(2))
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert "held-out strokes" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "value"), [("--seeds", "0"), ("--seeds", "-1"), ("--steps", "0")])
def test_a_count_below_one_is_refused_in_one_line(option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        main([option, value])
    assert ended.value.code == 2
    assert f"{option} must be at least 1; got {value}" in capsys.readouterr().err


def test_the_deviation_is_of_the_seeds_that_have_a_distance():
    assert _spread(torch.tensor([1.0, math.nan, 3.0])) == pytest.approx((2.0, 2**0.5))
    assert _spread(torch.tensor([5.0])) == (5.0, 0.0)
