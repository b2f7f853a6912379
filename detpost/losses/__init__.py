"""Hausdorff losses for segmentation, and the exact distance transform below them."""

from detpost.losses.distance_transform import distance_transform_edt
from detpost.losses.hausdorff_dt import (
    HausdorffDTLoss,
    LogHausdorffDTLoss,
    hausdorff_dt_loss,
    log_hausdorff_dt_loss,
)
from detpost.losses.hausdorff_er import (
    HausdorffERLoss,
    HausdorffERLoss3D,
    hausdorff_er_loss,
    hausdorff_er_loss_3d,
)

__all__ = [
    "HausdorffDTLoss",
    "HausdorffERLoss",
    "HausdorffERLoss3D",
    "LogHausdorffDTLoss",
    "distance_transform_edt",
    "hausdorff_dt_loss",
    "hausdorff_er_loss",
    "hausdorff_er_loss_3d",
    "log_hausdorff_dt_loss",
]
