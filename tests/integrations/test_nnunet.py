"""The nnU-Net trainer on a toy dataset, through nnU-Net's own planning, preprocessing and training."""

import importlib
import json

import numpy as np
import pytest
import torch

from detpost.integrations.nnunet import HausdorffTerm, nnUNetTrainer, nnUNetTrainerHausdorff
from tests.mixin import one_line

installed = pytest.mark.skipif(nnUNetTrainer is None, reason="nnU-Net v2 is not installed")


def write_dataset(raw):
    """Write discs and bars in noise, six slices."""
    from PIL import Image

    folder = raw / "Dataset901_Toy"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :64]
    for number in range(6):
        y, x = generator.integers(20, 44, 2)
        label = ((rows - y) ** 2 + (columns - x) ** 2 < 100).astype(np.uint8)
        label[5:9, 4 : 30 + number] = 2
        image = np.clip(label * 80 + generator.normal(60, 15, label.shape), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / "imagesTr" / f"toy_{number:03d}_0000.png")
        Image.fromarray(label).save(folder / "labelsTr" / f"toy_{number:03d}.png")
    labels = {"background": 0, "disc": 1, "bar": 2}
    about = {"channel_names": {"0": "grey"}, "labels": labels, "numTraining": 6, "file_ending": ".png"}
    (folder / "dataset.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("nnunet")
    patch = pytest.MonkeyPatch()
    for name in ("raw", "preprocessed", "results"):
        (root / name).mkdir()
        patch.setenv(f"nnUNet_{name}", str(root / name))
    for name, value in (("nnUNet_n_proc_DA", "1"), ("nnUNet_compile", "f"), ("nnUNet_def_n_proc", "1")):
        patch.setenv(name, value)
    write_dataset(root / "raw")
    api = importlib.import_module("nnunetv2.experiment_planning.plan_and_preprocess_api")
    api.extract_fingerprints([901], num_processes=1, check_dataset_integrity=False, show_progress_bar=False)
    api.plan_experiments([901])
    api.preprocess([901], configurations=["2d"], num_processes=[1], show_progress_bar=False)
    patch.setenv("nnUNet_n_proc_DA", "0")  # augments in this process
    yield root / "preprocessed" / "Dataset901_Toy"
    patch.undo()


def trainer_of(prepared):
    plans = json.loads((prepared / "nnUNetPlans.json").read_text())
    plans["configurations"]["2d"]["batch_size"] = 2
    plans["continue_training"] = False  # as nnU-Net's command adds it
    about = json.loads((prepared / "dataset.json").read_text())
    trainer = nnUNetTrainerHausdorff(plans, "2d", "all", about, device=torch.device("cpu"))
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch, trainer.num_epochs = 2, 1, 2
    return trainer


@installed
@pytest.mark.peers
@pytest.mark.slow
def test_two_epochs_set_a_weight_that_a_new_trainer_reads_from_the_checkpoint(prepared):
    trainer = trainer_of(prepared)
    trainer.run_training()
    schedule = trainer.loss.schedule
    assert int(schedule.epoch) == 2
    assert schedule.weight > 0
    losses = trainer.logger.get_value("train_losses", step=None)
    assert np.isfinite(losses).all()
    other = trainer_of(prepared)
    other.load_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    assert torch.equal(other.loss.schedule.weight, schedule.weight)
    assert int(other.loss.schedule.epoch) == 2


def test_ignored_elements_and_regions_change_nothing_where_they_are_not_counted():
    def base(output, target):
        return output[0].sum() * 0

    logits, ids = torch.randn(2, 3, 9, 8), torch.randint(3, (2, 1, 9, 8))
    ids[..., :2] = 7
    for regions in (False, True):
        term = HausdorffTerm(base, regions, 7, (1.0, 2.0))
        term.schedule.weight = torch.tensor(1.0)
        target = torch.cat([ids == number for number in (0, 1, 2, 7)], 1) if regions else ids
        values = []
        for noise in (0.0, 5.0):
            moved = logits.clone()
            moved[..., :2] += noise
            values.append(term([moved, None], [target, None]))
        assert torch.equal(*values)
        assert values[0] > 0


@pytest.mark.skipif(nnUNetTrainer is not None, reason="nnU-Net v2 is installed")
def test_without_nnunet_the_trainer_says_what_to_install():
    with pytest.raises(ImportError, match="pip install nnunetv2") as error:
        nnUNetTrainerHausdorff({}, "2d", 0, {})
    one_line(error)
