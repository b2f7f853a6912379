"""The Triton kernels behind functions that import Triton when they are called: most machines have none.

For each family: whether its kernels take what came, what of them is tried before they serve (the name of a trial in
:mod:`detpost.kernels.triton.trial` and its arguments), and the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from detpost.detections import Detections
from detpost.reference.derivatives import wants_derivative
from detpost.spec import DecodeSpec

__all__ = ["BoundaryDistance", "Decode", "Erosion", "Selection", "SquaredDistance"]


class Selection:
    """The k best of each row."""

    @staticmethod
    def takes(scores: Tensor, k: int) -> bool:
        """Tell whether its kernels take what came."""
        from detpost.kernels.triton import select

        return select.takes(scores, k)

    @staticmethod
    def trial(scores: Tensor, k: int) -> tuple[Any, ...]:
        """Name what is tried before they serve."""
        return "selection", scores.dtype, min(k, scores.shape[1])

    @staticmethod
    def run(scores: Tensor, k: int) -> Tensor:
        """Run them."""
        from detpost.kernels.triton import select

        return select.select(scores, k)


class Decode:
    """The whole decode."""

    @staticmethod
    def takes(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> bool:
        """Tell whether its kernels take what came."""
        if wants_derivative(logits, boxes, image_sizes):
            return False
        from detpost.kernels.triton import decode

        return decode.takes(logits, boxes, image_sizes, spec)

    @staticmethod
    def trial(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> tuple[Any, ...]:
        """Name what is tried before they serve."""
        sizes = None if image_sizes is None else image_sizes.dtype
        candidates = logits.shape[1] * (logits.shape[2] if spec.selection == "flat" else 1)
        tried = (logits.dtype, boxes.dtype, sizes, min(spec.top_k, candidates))
        return "decode", *tried, spec.activation, spec.selection, spec.background, spec.box_format, spec.clip

    @staticmethod
    def run(logits: Tensor, boxes: Tensor, image_sizes: Tensor | None, spec: DecodeSpec) -> Detections:
        """Run them."""
        from detpost.kernels.triton import decode

        return decode.decode(logits, boxes, image_sizes, spec)


class Erosion:
    """The erosions of the Hausdorff ER loss, differentiable."""

    @staticmethod
    def takes(
        pred: Tensor, target: Tensor, classes: Tensor, weights: Sequence[float], axes: int, keep_field: bool
    ) -> bool:
        """Tell whether its kernels take what came."""
        from detpost.kernels.triton import erosion

        return erosion.takes(pred, target)

    @staticmethod
    def trial(*arguments: Any) -> tuple[Any, ...]:
        """Name what is tried before they serve."""
        return ("losses",)

    @staticmethod
    def run(
        pred: Tensor, target: Tensor, classes: Tensor, weights: Sequence[float], axes: int, keep_field: bool
    ) -> Tensor:
        """Run them."""
        from detpost.kernels.triton import losses

        return losses.erosion(pred, target, classes, weights, axes, keep_field)


class SquaredDistance:
    """The distance transform."""

    @staticmethod
    def takes(inside: Tensor, spacing: tuple[float, ...]) -> bool:
        """Tell whether its kernels take what came."""
        from detpost.kernels.triton import distance

        return distance.takes(inside)

    trial = Erosion.trial

    @staticmethod
    def run(inside: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, float]:
        """Run them."""
        from detpost.kernels.triton import distance

        return distance.squared_distance(inside, spacing)


class BoundaryDistance:
    """The distance to the other side of 0.5."""

    @staticmethod
    def takes(field: Tensor, spacing: tuple[float, ...]) -> bool:
        """Tell whether its kernels take what came."""
        from detpost.kernels.triton import distance

        return distance.takes(field > 0.5)

    trial = Erosion.trial

    @staticmethod
    def run(field: Tensor, spacing: tuple[float, ...]) -> tuple[Tensor, float]:
        """Run them."""
        from detpost.kernels.triton import losses

        return losses.boundary_distance(field, spacing)
