"""Trains the tiny RT-DETRv2 that detpost ships, from nothing, on composed scenes of handwritten digits.

    python scripts/train_tiny.py --out first
    python scripts/train_tiny.py --out second --start first --seed 1 --steps 3600 --class-weight 2
    python scripts/train_tiny.py --family dfine --out dfine  # a small detector of another family, not shipped

The architecture and the loss are transformers' own. Each scene depends on the seed and its number alone, so the data
are the same whatever the batch size; the weights are the same on one machine and build of
PyTorch, and close to it elsewhere.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import digit_scenes

SIDE = 128
WEIGHTS = ("model.safetensors", "config.json", "preprocessor_config.json")
# The linear layers without a start of their own: sampling offsets and prediction heads have theirs, and keep it.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "value_proj", "output_proj")
PERCEPTRONS = ("fc1", "fc2", "enc_output.0", "pos_head.layers.0", "pos_head.layers.1")
# Of D-FINE, the hidden layers of prediction heads too: there they refine distributions, step upon step.
DFINE = (
    "mlp.layers.0",
    "mlp.layers.1",
    "bbox_head.layers.0",
    "bbox_head.layers.1",
    "embed.0.layers.0",
    "embed.0.layers.1",
)
# Of RF-DETR, those of its heads, and of each group of queries that is taught.
RFDETR = ("layers.0", "layers.1", "enc_output.1", "enc_output.2", "enc_output.3")
app = typer.Typer(add_completion=False)


class Scenes(torch.utils.data.Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Training scenes by number: the same number is always the same picture for the same seed."""

    def __init__(self, seed: int, numbers: list[int]) -> None:
        self.seed, self.numbers = seed, numbers
        self.digits = digit_scenes.split_digits()[0]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng = np.random.default_rng([self.seed, self.numbers[position]])
        height, width = size = digit_scenes.random_size(rng)
        scene = digit_scenes.compose(rng, self.digits, size, digit_scenes.TRAINING)
        image = Image.fromarray(scene.image)
        if size != (SIDE, SIDE):
            image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, 128, 128) uint8
        corners = torch.from_numpy(scene.boxes / np.array([width, height, width, height], dtype=np.float32))
        centres = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
        return pixels, {"class_labels": torch.from_numpy(scene.labels), "boxes": centres}


def collate(samples: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    return torch.stack([pixels for pixels, _ in samples]), [target for _, target in samples]


def build_model(family: str = "rtdetr", class_weight: float = 1.0) -> nn.Module:
    """Give a tiny detector with fresh weights.

    Args:
        family: A name of `FAMILIES`.
        class_weight: Of the classification loss.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: take one of {', '.join(FAMILIES)}")
    model, more = FAMILIES[family](class_weight)
    fresh_start(model, (*ATTENTION, *PERCEPTRONS, *more))
    return model


# What the tiny detectors have in common: a transformer of width 96 over two maps, 30 queries, ten classes.
COMMON = {
    "freeze_backbone_batch_norms": False,
    "encoder_in_channels": [64, 128],
    "feat_strides": [8, 16],
    "encode_proj_layers": [1],
    "encoder_hidden_dim": 96,
    "encoder_ffn_dim": 256,
    "encoder_attention_heads": 3,
    "hidden_expansion": 0.5,
    "d_model": 96,
    "decoder_in_channels": [96, 96],
    "num_feature_levels": 2,
    "decoder_n_points": 4,
    "decoder_layers": 2,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 256,
    "num_queries": 30,
    "num_denoising": 16,
    "label_noise_ratio": 0.4,
    "id2label": {digit: str(digit) for digit in range(10)},
    "label2id": {str(digit): digit for digit in range(10)},
}


def tiny_rtdetr(class_weight: float) -> tuple[nn.Module, tuple[str, ...]]:
    """RT-DETRv2 on a ResNet: the one that is shipped."""
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    backbone = RTDetrResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 2, 2], layer_type="basic", out_indices=[2, 3]
    )
    config = RTDetrV2Config(
        **COMMON, backbone_config=backbone, activation_function="relu", decoder_n_levels=2, weight_loss_vfl=class_weight
    )
    return RTDetrV2ForObjectDetection(config), ()


def tiny_dfine(class_weight: float) -> tuple[nn.Module, tuple[str, ...]]:
    """D-FINE on an HGNetV2: boxes as distributions of their sides, 0.8 million parameters."""
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

    backbone = HGNetV2Config(
        embedding_size=16,
        stem_channels=[3, 16, 24],
        depths=[1, 1, 1],
        hidden_sizes=[48, 64, 128],
        stage_in_channels=[24, 48, 64],
        stage_mid_channels=[16, 24, 32],
        stage_out_channels=[48, 64, 128],
        stage_num_blocks=[1, 1, 1],
        stage_numb_of_layers=[3, 3, 3],
        stage_downsample=[False, True, True],
        stage_light_block=[False, False, False],
        stage_kernel_size=[3, 3, 3],
        out_indices=[2, 3],
    )
    config = DFineConfig(
        **COMMON,
        backbone_config=backbone,
        depth_mult=0.34,
        lqe_hidden_dim=32,
        max_num_bins=16,
        weight_loss_vfl=class_weight,
    )
    return DFineForObjectDetection(config), DFINE


def tiny_rfdetr(class_weight: float) -> tuple[nn.Module, tuple[str, ...]]:
    """RF-DETR on a small DINOv2 with windows: no pyramid, and groups of queries that are taught side by side."""
    from transformers import RfDetrConfig, RfDetrDinov2Config, RfDetrForObjectDetection

    backbone = RfDetrDinov2Config(
        image_size=SIDE,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_windows=2,
        use_mask_token=False,
        out_indices=[2, 4],
    )
    config = RfDetrConfig(
        backbone_config=backbone,
        d_model=96,
        decoder_layers=2,
        decoder_ffn_dim=256,
        decoder_self_attention_heads=3,
        decoder_cross_attention_heads=3,
        c2f_num_blocks=1,
        dropout=0.0,
        group_detr=4,
        num_queries=COMMON["num_queries"],
        id2label=COMMON["id2label"],
        label2id=COMMON["label2id"],
        class_loss_coefficient=class_weight,
    )
    return RfDetrForObjectDetection(config), RFDETR


FAMILIES = {"rtdetr": tiny_rtdetr, "dfine": tiny_dfine, "rfdetr": tiny_rfdetr}


@torch.no_grad()
def fresh_start(model: nn.Module, linear: tuple[str, ...]) -> None:
    """Start the weights where training from nothing goes well.

    transformers starts batch norms and linear layers near zero (standard deviation 0.01), which suits loading a
    checkpoint over them but leaves a network that learns from nothing silent for its first thousand steps.

    Args:
        model: Any of the families.
        linear: Endings of the names of linear layers that start anew.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and name.endswith(linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decays matrices and kernels only: norms and biases have no reason to shrink."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class Average:
    """An exponential moving average of a model's weights and batch statistics."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates = copy.deepcopy(model).eval(), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average a little towards the model."""
        self.updates += 1
        # Short memory at first, so that the average does not carry the random start along.
        decay = min(self.decay, self.updates / (self.updates + 10))
        pairs = [
            (mine, theirs)
            for mine, theirs in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True)
        ]
        floats = [(mine, theirs) for mine, theirs in pairs if mine.is_floating_point()]
        torch._foreach_lerp_([mine for mine, _ in floats], [theirs for _, theirs in floats], 1 - decay)


def save(model: nn.Module, directory: Path) -> None:
    """Write the directory that `from_pretrained` reads; each file is renamed into place only when it is whole."""
    from transformers import RTDetrImageProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()  # one is enough, and it is ours
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / ".partial"
    copy.deepcopy(model).half().save_pretrained(partial)
    processor = RTDetrImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_rescale=True, rescale_factor=1 / 255, do_normalize=False, do_pad=False
    )
    processor.save_pretrained(partial)
    for name in WEIGHTS:
        os.replace(partial / name, directory / name)
    for leftover in partial.iterdir():
        leftover.unlink()
    partial.rmdir()


@dataclass(frozen=True)
class Plan:
    """One training run.

    Attributes:
        out: The directory to write.
        steps: Optimiser steps.
        batch: Scenes in a step, over all processes.
        seed: Seed of the weights, the scenes and the denoising noise.
        device: "cpu" or "cuda".
        processes: How many share a step. On a CPU, processes of one thread each beat one process of many threads by a
            fifth, and by far where other programs use the same cores.
        learning_rate: The one cycle's peak.
        weight_decay: On matrices and kernels.
        decay: Of the moving average, which is what gets written.
        save_every: Steps between checkpoints, written to `out`.
        quiet: No progress bar.
        start: A directory to go on from, instead of fresh weights.
        class_weight: Of the classification loss; boxes are learned long before digits are told apart.
        family: A name of `FAMILIES`.
    """

    out: Path
    steps: int = 2800
    batch: int = 20
    seed: int = 0
    device: str = "cpu"
    processes: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    decay: float = 0.998
    save_every: int = 100
    quiet: bool = False
    start: Path | None = None
    class_weight: float = 1.0
    family: str = "rtdetr"


def my_scenes(plan: Plan, rank: int) -> list[int]:
    """Give the numbers of the scenes that one process sees: its part of each step's batch, step after step."""
    numbers = np.arange(plan.steps * plan.batch).reshape(plan.steps, plan.processes, -1)
    return numbers[:, rank].flatten().tolist()


def average_gradients(model: nn.Module, processes: int) -> None:
    """Make every process's gradients their mean, in one exchange."""
    # A batch without a digit leaves the denoising embedding without a gradient; the exchange needs all of them.
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = (flat / processes).split([gradient.numel() for gradient in gradients])
    for parameter, part in zip(model.parameters(), parts, strict=True):
        parameter.grad = part.view_as(parameter)


def work(rank: int, plan: Plan, meeting_point: str) -> None:
    """Trains as one of the plan's processes; the first one averages, saves and reports."""
    if plan.processes > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=plan.processes
        )
    torch.set_flush_denormal(True)  # denormal numbers cost a CPU many times a normal one's time
    torch.manual_seed(plan.seed)
    model = build_model(plan.family, plan.class_weight)
    if plan.start is not None:
        model.load_state_dict(type(model).from_pretrained(plan.start, dtype=torch.float32).state_dict())
    model = model.to(device=plan.device, memory_format=torch.channels_last).train()
    torch.manual_seed(plan.seed + rank)  # the same weights, but each process its own denoising noise
    average = Average(model, plan.decay)
    optimiser = torch.optim.AdamW(parameter_groups(model, plan.weight_decay), lr=plan.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, plan.learning_rate, max(plan.steps, 2), pct_start=0.1, div_factor=20, final_div_factor=500
    )
    loader = torch.utils.data.DataLoader(
        Scenes(plan.seed, my_scenes(plan, rank)), plan.batch // plan.processes, collate_fn=collate
    )
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    started, smooth = time.perf_counter(), math.nan
    with Progress(*columns, disable=plan.quiet or rank > 0) as progress:
        task = progress.add_task("training", total=plan.steps, loss=math.nan)
        for step, (pixels, targets) in enumerate(loader, start=1):
            images = pixels.to(plan.device, memory_format=torch.channels_last).float() / 255
            labels = [{name: value.to(plan.device) for name, value in target.items()} for target in targets]
            loss = model(pixel_values=images, labels=labels).loss
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if plan.processes > 1:
                average_gradients(model, plan.processes)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            value = loss.item()
            if not math.isfinite(value):
                raise RuntimeError(f"the loss is {value} at step {step}: try a lower --learning-rate")
            smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
            if rank > 0:
                continue
            average.update(model)
            progress.update(task, advance=1, loss=smooth)
            if step % plan.save_every == 0 or step == plan.steps:
                save(average.model, plan.out)
                progress.console.print(f"step {step}: loss {smooth:.3f}, {time.perf_counter() - started:.0f} s")
    if rank == 0:
        parameters = sum(p.numel() for p in model.parameters())
        report = {"loss": smooth, "parameters": parameters, "seconds": round(time.perf_counter() - started)}
        print(json.dumps({**report, "scenes": plan.steps * plan.batch}))
    if plan.processes > 1:
        torch.distributed.destroy_process_group()


def train(plan: Plan) -> None:
    """Trains and writes the model."""
    if plan.batch % plan.processes:
        raise ValueError(f"batch must be a multiple of the {plan.processes} processes; got {plan.batch}")
    with tempfile.TemporaryDirectory() as scratch:
        meeting_point = str(Path(scratch) / "meeting")
        if plan.processes == 1:
            work(0, plan, meeting_point)
        else:
            torch.multiprocessing.spawn(work, args=(plan, meeting_point), nprocs=plan.processes)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    steps: Annotated[int, typer.Option(min=1)] = Plan.steps,
    batch: Annotated[int, typer.Option(min=1)] = Plan.batch,
    seed: Annotated[int, typer.Option()] = Plan.seed,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    processes: Annotated[int, typer.Option(min=1, help="Processes that share a step, on a CPU.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Peak of the one cycle.")] = Plan.learning_rate,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = Plan.save_every,
    start: Annotated[Path | None, typer.Option(help="A directory to go on from.")] = None,
    class_weight: Annotated[float, typer.Option(help="Weight of the classification loss.")] = Plan.class_weight,
    family: Annotated[str, typer.Option(help=f"What to train: {', '.join(FAMILIES)}.")] = Plan.family,
) -> None:
    """Trains the tiny detector and writes it as a transformers directory, weights in half precision."""
    processes = 1 if device.startswith("cuda") else processes
    plan = Plan(out, steps, batch, seed, device, processes, learning_rate, save_every=save_every)
    train(replace(plan, start=start, class_weight=class_weight, family=family))


if __name__ == "__main__":
    app()
