"""What is written for speed, behind one dispatch that always answers; :mod:`detpost.kernels.dispatch` says how."""

from detpost.kernels.direct import BOX_SCORE_LABEL, LABEL_SCORE_BOX, DirectDecode, selected_rows
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
    surface_distances,
    weighted_error,
    writes_graph,
)

__all__ = [
    "BOX_SCORE_LABEL",
    "KERNELS",
    "LABEL_SCORE_BOX",
    "DirectDecode",
    "boundary_distance",
    "decode",
    "erosion",
    "fuse",
    "id_range",
    "kernel_for",
    "merge",
    "nms",
    "select",
    "selected_rows",
    "squared_distance",
    "suppress",
    "surface_distances",
    "weighted_error",
    "writes_graph",
]
