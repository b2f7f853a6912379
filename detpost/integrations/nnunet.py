"""A trainer class for nnU-Net v2 whose loss has a Hausdorff term beside Dice and cross entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from detpost.losses import HausdorffDTLoss, HausdorffSchedule

try:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
except ImportError:
    nnUNetTrainer = None  # noqa: N816 the name it has there

__all__ = ["HausdorffTerm", "nnUNetTrainerHausdorff"]


class HausdorffTerm(nn.Module):
    """Add the distance-transform loss of the full resolution to a loss of nnU-Net's.

    Args:
        base: nnU-Net's own loss, of outputs and targets, lists under deep supervision.
        regions: whether channels are regions, which may overlap, and not classes.
        ignore_label: class whose elements count nowhere, or ``None``; with regions, whether a last channel marks them.
        spacing: side lengths of an element, in the order of the axes.

    Source:
        nnU-Net 2.8's ``nnUNetTrainer._build_loss``, ``DC_and_CE_loss`` and ``DC_and_BCE_loss``.
    """

    def __init__(self, base: nn.Module, regions: bool, ignore_label: int | None, spacing: tuple[float, ...]) -> None:
        super().__init__()
        self.base, self.regions, self.ignore_label = base, regions, ignore_label
        self.schedule = HausdorffSchedule()
        self.hausdorff = HausdorffDTLoss(include_background=regions, spacing=spacing)

    def forward(self, output: Any, target: Any) -> Tensor:
        """Give the base loss and the weighted term.

        Args:
            output: logits (B, C, ...), or a list of them from the full resolution down.
            target: class ids (B, 1, ...) or regions (B, C, ...), likewise.

        Returns:
            A scalar.
        """
        base = self.base(output, target)
        logits, truth = (value[0] if isinstance(value, list | tuple) else value for value in (output, target))
        with torch.autocast(logits.device.type, enabled=False):
            probability, one_hot = self._aligned(logits.float(), truth)
            term = self.hausdorff(probability, one_hot)
            # nnU-Net's Dice loss is minus Dice: one more makes it a distance from the best, which the ratio is of.
            total: Tensor = self.schedule(base.float() + 1, term) - 1
        return total

    def _aligned(self, logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Give the probabilities and target of one shape, both 0 where elements are ignored: there is no error then."""
        if self.regions:
            counted = 1 - truth[:, -1:].float() if self.ignore_label is not None else torch.ones_like(logits[:, :1])
            regions = truth[:, :-1] if self.ignore_label is not None else truth
            return logits.sigmoid() * counted, regions.float() * counted
        ids = truth.long()
        counted = torch.ones_like(logits[:, :1]) if self.ignore_label is None else (ids != self.ignore_label).float()
        classes = torch.arange(logits.shape[1], device=logits.device).reshape(1, -1, *[1] * (logits.dim() - 2))
        return logits.softmax(1) * counted, (ids == classes).float() * counted


class nnUNetTrainerHausdorff(nnUNetTrainer or object):  # type: ignore[misc]  # noqa: N801 nnU-Net's name for it
    """nnU-Net's trainer with the Hausdorff loss by distance transform (Karimi and Salcudean 2019) in its loss.

    The term is that of the full resolution, in the plan's spacing; its weight follows :class:`HausdorffSchedule`'s
    ratio rule, once an epoch, over all processes, and is in the checkpoint. nnU-Net looks for trainers by name in the
    folder ``nnUNet_extTrainer``: a file there that imports this class makes ``-tr nnUNetTrainerHausdorff`` work.

    Raises:
        ImportError: nnU-Net v2 is not installed.
    """

    def __new__(cls, *_arguments: Any, **_options: Any) -> nnUNetTrainerHausdorff:
        """Refuse where there is no nnU-Net to train with."""
        if nnUNetTrainer is None:
            raise ImportError("nnUNetTrainerHausdorff needs nnU-Net v2: pip install nnunetv2")
        made: nnUNetTrainerHausdorff = super().__new__(cls)
        return made

    def _build_loss(self) -> nn.Module:
        labels = self.label_manager
        ignored = labels.ignore_label if labels.has_ignore_label else None
        spacing = tuple(float(step) for step in self.configuration_manager.spacing)
        return HausdorffTerm(super()._build_loss(), labels.has_regions, ignored, spacing)

    def on_train_epoch_start(self) -> None:
        """Begin an epoch; what the loss sees from here on counts for its weight."""
        super().on_train_epoch_start()
        self.loss.train()

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """End an epoch and set the term's next weight.

        Args:
            train_outputs: what nnU-Net's steps gave.
        """
        super().on_train_epoch_end(train_outputs)
        self.loss.schedule.step()
        self.print_to_log_file("hausdorff_weight", self.loss.schedule.weight.cpu().numpy())

    def on_validation_epoch_start(self) -> None:
        """Begin validation, which counts for no weight."""
        super().on_validation_epoch_start()
        self.loss.eval()

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint, the schedule in it.

        Args:
            filename: where to.
        """
        super().save_checkpoint(filename)
        if self.local_rank == 0 and not self.disable_checkpointing:
            checkpoint = torch.load(filename, map_location="cpu", weights_only=False)  # written the line before
            torch.save({**checkpoint, "hausdorff_schedule": self.loss.schedule.state_dict()}, filename)

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Read a checkpoint; one of another trainer leaves the schedule at its start.

        Args:
            filename_or_checkpoint: a file of nnU-Net's, or what it holds.
        """
        super().load_checkpoint(filename_or_checkpoint)
        checkpoint = filename_or_checkpoint
        if isinstance(checkpoint, str):
            checkpoint = torch.load(checkpoint, map_location=self.device, weights_only=False)  # as nnU-Net reads it
        if isinstance(checkpoint, dict) and "hausdorff_schedule" in checkpoint:
            self.loss.schedule.load_state_dict(checkpoint["hausdorff_schedule"])
