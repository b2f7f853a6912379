import json

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from scripts.train_hausdorff import SPLIT, crops, load_coins, main


def test_the_split_cuts_no_coin():
    _, mask = load_coins()
    assert mask[SPLIT - 1 : SPLIT + 1].sum() == 0
    assert 0.2 < mask.float().mean() < 0.6


def test_crops_are_the_same_for_the_same_seed_and_keep_image_and_mask_together():
    image = torch.arange(303 * 384).reshape(303, 384)
    first, mask = crops(image.float(), image, 3, torch.Generator().manual_seed(4))
    assert torch.equal(first, mask.float())
    assert torch.equal(mask, crops(image.float(), image, 3, torch.Generator().manual_seed(4))[1])
    assert int(mask.max()) < SPLIT * 384


@pytest.mark.slow
def test_a_short_run_writes_scores_and_plot(tmp_path, capsys):
    main(["--steps", "2", "--quick", "--out", str(tmp_path)])
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert set(scores) == {"Dice", "Dice + Hausdorff ER", "Dice + Hausdorff DT"}
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert "held-out coins" in capsys.readouterr().out
