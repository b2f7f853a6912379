"""What is written for speed, behind one dispatch that always answers; :mod:`detpost.kernels.dispatch` says how."""

from detpost.kernels.dispatch import (
    KERNELS,
    boundary_distance,
    decode,
    erosion,
    fuse,
    id_range,
    kernel_for,
    merge,
    nms,
    select,
    squared_distance,
    suppress,
    weighted_error,
    writes_graph,
)

__all__ = [
    "KERNELS",
    "boundary_distance",
    "decode",
    "erosion",
    "fuse",
    "id_range",
    "kernel_for",
    "merge",
    "nms",
    "select",
    "squared_distance",
    "suppress",
    "weighted_error",
    "writes_graph",
]
