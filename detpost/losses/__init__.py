"""Hausdorff and boundary losses for segmentation, their schedule, and the exact distance transform below them."""

from detpost.losses.boundary import BoundaryLoss, boundary_loss
from detpost.losses.distance_transform import distance_transform_edt
from detpost.losses.generalized_surface import GeneralizedSurfaceLoss, generalized_surface_loss
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
from detpost.losses.schedule import HausdorffSchedule
from detpost.losses.signed_distance import signed_distance_transform

__all__ = [
    "BoundaryLoss",
    "GeneralizedSurfaceLoss",
    "HausdorffDTLoss",
    "HausdorffERLoss",
    "HausdorffERLoss3D",
    "HausdorffSchedule",
    "LogHausdorffDTLoss",
    "boundary_loss",
    "distance_transform_edt",
    "generalized_surface_loss",
    "hausdorff_dt_loss",
    "hausdorff_er_loss",
    "hausdorff_er_loss_3d",
    "log_hausdorff_dt_loss",
    "signed_distance_transform",
]
