"""The metrics over many batches: ``update``, ``compute``, ``reset``, and MONAI's ``aggregate``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor

from detpost.losses._arguments import Spacing
from detpost.metrics._surface import Mask
from detpost.metrics.hausdorff import check_percentile, hausdorff_distance
from detpost.metrics.surface_dice import check_tolerance, surface_dice
from detpost.metrics.surface_distance import average_surface_distance

_REDUCTIONS = ("mean", "mean_batch", "none")


class Metric:
    """A metric of masks, gathered over batches; the base of the classes here.

    Call it with a batch, as torchmetrics and MONAI have it, or ``update`` it; ``compute`` (``aggregate`` for MONAI's
    handlers) reduces what has come since ``reset``. Values that are nan (a class that neither mask has) are left out of
    every mean; a mean of nothing is nan, where MONAI gives 0. An infinite distance stays infinite.

    Args:
        include_background: measure channel 0.
        reduction: ``"mean"`` over the channels of each image and then over images, ``"mean_batch"`` over images for
            each channel, or ``"none"``.
        spacing: side lengths of an element, as the function takes them; ``update`` may give others.
        ignore_index: channel of a class that is left out.
        use_subvoxels: take the surface between the elements, as surface-distance does.

    Raises:
        ValueError: an unknown reduction.
    """

    def __init__(
        self,
        include_background: bool = True,
        reduction: str = "mean",
        spacing: Spacing | None = None,
        ignore_index: int | None = None,
        use_subvoxels: bool = False,
    ) -> None:
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of 'mean', 'mean_batch', 'none'; got {reduction!r}")
        self.include_background = include_background
        self.reduction = reduction
        self.spacing = spacing
        self.ignore_index = ignore_index
        self.use_subvoxels = use_subvoxels
        self._seen: list[Tensor] = []

    def __call__(self, y_pred: Mask, y: Mask, spacing: Spacing | None = None) -> Tensor:
        """Measure a batch, take it into the whole, and give its own values.

        Args:
            y_pred: (B, C, H, W) or (B, C, D, H, W) mask, inside where it is not zero.
            y: mask of the same shape: the reference.
            spacing: of this batch, in place of the metric's own.

        Returns:
            (B, C) float32; without channel 0 unless ``include_background``.

        Raises:
            TypeError: a mask is neither a tensor nor an array.
            ValueError: rank, shapes or spacing do not fit.
        """
        found = self._measure(y_pred, y, self.spacing if spacing is None else spacing)
        found = found if self.include_background else found[:, 1:]
        self._seen = [*self._seen, found]
        return found

    def update(self, y_pred: Mask, y: Mask, spacing: Spacing | None = None) -> None:
        """Take a batch into the whole.

        Args:
            y_pred: (B, C, H, W) or (B, C, D, H, W) mask, inside where it is not zero.
            y: mask of the same shape: the reference.
            spacing: of this batch, in place of the metric's own.

        Raises:
            TypeError: a mask is neither a tensor nor an array.
            ValueError: rank, shapes or spacing do not fit.
        """
        self(y_pred, y, spacing)

    def compute(self) -> Tensor:
        """Reduce everything since the last reset, over all processes where a process group is initialised.

        Returns:
            (), (C,) for ``"mean_batch"``, or (N, C) for ``"none"``, in the order of the processes.

        Raises:
            ValueError: no batch has come.
        """
        values = self.get_buffer()
        if values is None:
            raise ValueError("compute needs at least one batch; got none: call the metric or update first")
        if self.reduction == "none":
            return values
        return values.nanmean(0) if self.reduction == "mean_batch" else values.nanmean(1).nanmean()

    def aggregate(self) -> Tensor:
        """Reduce everything since the last reset; :meth:`compute` by MONAI's name.

        Returns:
            As :meth:`compute`.

        Raises:
            ValueError: no batch has come.
        """
        return self.compute()

    def get_buffer(self) -> Tensor | None:
        """Give every value since the last reset, unreduced: what MONAI's handlers keep as details.

        Returns:
            (N, C) float32, over all processes; ``None`` where no batch has come.
        """
        seen = _over_processes(self._seen)
        return torch.cat(seen) if seen else None

    def reset(self) -> None:
        """Forget every batch."""
        self._seen = []

    def _measure(self, y_pred: Mask, y: Mask, spacing: Spacing | None) -> Tensor:
        """Give (B, C) for a batch."""
        raise NotImplementedError


class HausdorffDistance(Metric):
    """Hausdorff distance over many batches; see :func:`hausdorff_distance` and :class:`Metric`.

    Args:
        percentile: in [0, 100]; 95 gives HD95. ``None`` takes the maximum.
        include_background: measure channel 0.
        reduction: ``"mean"``, ``"mean_batch"`` or ``"none"``.
        spacing: side lengths of an element.
        ignore_index: channel of a class that is left out.
        use_subvoxels: take the surface between the elements.

    Raises:
        ValueError: an unknown reduction, or no percentile.

    Example:
        >>> metric = HausdorffDistance(percentile=95)
        >>> mask = torch.zeros(2, 1, 8, 8)
        >>> mask[..., 2:5, 2:5] = 1
        >>> metric.update(mask, mask)
        >>> metric.update(mask, mask.roll(2, -1))
        >>> metric.compute()
        tensor(1.)
    """

    def __init__(
        self,
        percentile: float | None = None,
        include_background: bool = True,
        reduction: str = "mean",
        spacing: Spacing | None = None,
        ignore_index: int | None = None,
        use_subvoxels: bool = False,
    ) -> None:
        super().__init__(include_background, reduction, spacing, ignore_index, use_subvoxels)
        check_percentile(percentile)
        self.percentile = percentile

    def _measure(self, y_pred: Mask, y: Mask, spacing: Spacing | None) -> Tensor:
        return hausdorff_distance(y_pred, y, self.percentile, spacing, self.ignore_index, self.use_subvoxels)


class AverageSurfaceDistance(Metric):
    """Average surface distance over many batches; see :func:`average_surface_distance` and :class:`Metric`.

    Args:
        symmetric: take the mean over both boundaries; otherwise from the prediction to the reference.
        include_background: measure channel 0.
        reduction: ``"mean"``, ``"mean_batch"`` or ``"none"``.
        spacing: side lengths of an element.
        ignore_index: channel of a class that is left out.
        use_subvoxels: take the surface between the elements.

    Raises:
        ValueError: an unknown reduction.

    Example:
        >>> metric = AverageSurfaceDistance(reduction="none")
        >>> mask = torch.zeros(1, 1, 8, 8)
        >>> mask[..., 2:5, 2:5] = 1
        >>> metric(mask, mask.roll(8, -1))
        tensor([[0.]])
    """

    def __init__(
        self,
        symmetric: bool = True,
        include_background: bool = True,
        reduction: str = "mean",
        spacing: Spacing | None = None,
        ignore_index: int | None = None,
        use_subvoxels: bool = False,
    ) -> None:
        super().__init__(include_background, reduction, spacing, ignore_index, use_subvoxels)
        self.symmetric = symmetric

    def _measure(self, y_pred: Mask, y: Mask, spacing: Spacing | None) -> Tensor:
        return average_surface_distance(y_pred, y, self.symmetric, spacing, self.ignore_index, self.use_subvoxels)


class SurfaceDice(Metric):
    """Surface Dice (NSD) over many batches; see :func:`surface_dice` and :class:`Metric`.

    Args:
        tolerance: largest distance that still counts; one number, or one per channel that is measured.
        include_background: measure channel 0.
        reduction: ``"mean"``, ``"mean_batch"`` or ``"none"``.
        spacing: side lengths of an element.
        ignore_index: channel of a class that is left out.
        use_subvoxels: take the surface between the elements.

    Raises:
        ValueError: an unknown reduction, or no tolerance.

    Example:
        >>> metric = SurfaceDice(tolerance=1)
        >>> mask = torch.zeros(1, 1, 8, 8)
        >>> mask[..., 2:5, 2:5] = 1
        >>> metric.update(mask, mask.roll(1, -1))
        >>> metric.compute()
        tensor(1.)
    """

    def __init__(
        self,
        tolerance: float | Sequence[float],
        include_background: bool = True,
        reduction: str = "mean",
        spacing: Spacing | None = None,
        ignore_index: int | None = None,
        use_subvoxels: bool = False,
    ) -> None:
        super().__init__(include_background, reduction, spacing, ignore_index, use_subvoxels)
        check_tolerance(tolerance)
        self.tolerance = tolerance

    def _measure(self, y_pred: Mask, y: Mask, spacing: Spacing | None) -> Tensor:
        limits = check_tolerance(self.tolerance)
        # Every channel is measured, and the background's then left out: it takes any limit.
        limits = limits if self.include_background or len(limits) == 1 else [limits[0], *limits]
        return surface_dice(y_pred, y, limits, spacing, self.ignore_index, self.use_subvoxels)


def _over_processes(seen: list[Tensor]) -> list[Tensor]:
    """Gather what every process has seen; their batches need not be of one size."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return seen
    parts: list[list[Tensor]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, [values.cpu() for values in seen])
    device = seen[0].device if seen else torch.device("cpu")
    return [values.to(device) for part in parts for values in part]
