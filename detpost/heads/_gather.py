"""What every head does first: look at its inputs, and gather by query."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detpost.detections import Detections


def check(detections: Detections, values: Tensor, name: str, shapes: dict[int, str]) -> None:
    """Look at types, ranks, batch and device of a head's inputs; ``shapes`` names the shape for each rank allowed."""
    expected = " or ".join(shapes.values())
    if not isinstance(detections, Detections):
        raise TypeError(f"detections must be Detections; got {type(detections).__name__}: see DetectionPostProcessor")
    if not isinstance(values, Tensor) or not values.is_floating_point():
        what = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating tensor of shape {expected}; got {what}")
    if values.ndim not in shapes:
        raise ValueError(f"{name} must have shape {expected}; got {tuple(values.shape)}")
    if values.shape[0] != detections.queries.shape[0]:
        raise ValueError(
            f"{name} and detections must be of the same images; "
            f"got {values.shape[0]} and {detections.queries.shape[0]} of them"
        )
    if values.shape[1] == 0:
        raise ValueError(f"{name} must have at least one query; got shape {tuple(values.shape)}")
    if values.device != detections.queries.device:
        raise ValueError(
            f"{name} is on {values.device}, detections on {detections.queries.device}: move one with .to()"
        )


def check_sizes(detections: Detections, image_sizes: Tensor) -> None:
    """Look at type, shape and device of the image sizes (B, 2)."""
    if not isinstance(image_sizes, Tensor) or image_sizes.dtype == torch.bool or image_sizes.is_complex():
        what = image_sizes.dtype if isinstance(image_sizes, Tensor) else type(image_sizes).__name__
        raise TypeError(
            f"image_sizes must be an integer or floating tensor of shape (B, 2), (height, width); got {what}"
        )
    if image_sizes.ndim != 2 or image_sizes.shape[1] != 2 or image_sizes.shape[0] != detections.queries.shape[0]:
        raise ValueError(
            f"image_sizes must have shape (B, 2), one (height, width) per image; got {tuple(image_sizes.shape)}"
        )
    if image_sizes.device != detections.queries.device:
        raise ValueError(
            f"image_sizes are on {image_sizes.device}, detections on {detections.queries.device}: move one with .to()"
        )


def by_query(values: Tensor, queries: Tensor) -> Tensor:
    """Gather rows: values (B, Q, ...), queries (B, K), -1 reading row 0 -> (B, K, ...)."""
    batch, count = values.shape[:2]
    # Rows of one flat list and not gather: ONNX's would hold an int64 index for every number.
    first = torch.arange(batch, device=values.device).unsqueeze(1) * count
    rows = (queries.clamp(min=0) + first).flatten()
    return values.flatten(0, 1).index_select(0, rows).view(batch, queries.shape[1], *values.shape[2:])


def lookup_table(values: Sequence[int]) -> Tensor:
    """Make a module's buffer, int64, on the default device; on the CPU where that is meta, which holds no numbers."""
    device = torch.get_default_device()
    return torch.tensor(values, dtype=torch.int64, device="cpu" if device.type == "meta" else device)
