"""Metrics of segmentations, on the exact distance transform of the losses."""

from detpost.metrics.hausdorff import hausdorff_distance

__all__ = ["hausdorff_distance"]
