"""Metrics of segmentations, on the exact distance transform of the losses."""

from detpost.metrics.accumulators import AverageSurfaceDistance, HausdorffDistance, Metric, SurfaceDice
from detpost.metrics.hausdorff import hausdorff_distance
from detpost.metrics.surface_dice import surface_dice
from detpost.metrics.surface_distance import average_surface_distance

__all__ = [
    "AverageSurfaceDistance",
    "HausdorffDistance",
    "Metric",
    "SurfaceDice",
    "average_surface_distance",
    "hausdorff_distance",
    "surface_dice",
]
