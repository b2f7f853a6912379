"""Hausdorff losses by morphological erosion (Karimi and Salcudean 2019), 2-D and 3-D."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detpost import kernels
from detpost.losses._arguments import check_floating, check_reduction, class_numbers


def hausdorff_er_loss(pred: Tensor, target: Tensor, alpha: float = 2.0, k: int = 10, reduction: str = "mean") -> Tensor:
    """Hausdorff loss of 2-D segmentations by repeated soft erosion of the squared error.

    The error ``b_0 = (p - t)**2`` of each image and class is eroded k times, ``e_i = max(mean(b_(i-1)) - 0.5, 0)`` with
    the mean over an element and its direct neighbours. Each erosion is stretched to [0, 1] as ``b_i``, and the loss
    sums ``i**alpha * b_i``: thick errors survive more erosions and weigh more (Karimi and Salcudean, "Reducing the
    Hausdorff distance in medical image segmentation with convolutional neural networks", 2019, equations 9 and 10).
    Values are those of ``kornia.losses.HausdorffERLoss``, and so are gradients wherever these do not hang on rounding.

    Elements that tie for a field's minimum, maximum or threshold up to rounding share its gradient equally, whatever
    the processor. That is within 8 rounding steps (``eps``; 10 in 3-D) of the dilation, by which the sums of two
    elements can be off, and half the error of the erosion before over its range, which a mean of neighbours leaves of
    it when it is stretched.

    Args:
        pred: (B, C, H, W) probabilities of any floating dtype, after softmax. Half precision is computed in float32.
        target: (B, 1, H, W) class ids in [0, C) of any integer dtype. Channel c is compared with ``target == c``.
        alpha: exponent of the weight of an erosion.
        k: number of erosions, at least 1.
        reduction: ``"mean"`` over all elements, ``"sum"``, or ``"none"`` for the field itself.

    Returns:
        A scalar, or (C, B, 1, H, W) for ``"none"`` (classes first, as kornia has it); float64 for float64, else
        float32. Finite, with finite gradients, for every finite ``pred``: differences beyond 1e12 count as 1e12.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: rank, shape, dtype, an id out of range, or an argument is not as above. On an accelerator an id out
            of range is an asynchronous device-side assertion instead, so that nothing waits for the device; an exported
            graph does not look.

    Example:
        >>> target = torch.nn.functional.pad(torch.ones(1, 1, 4, 4, dtype=torch.long), (2, 2, 2, 2))
        >>> perfect = torch.cat([1 - target, target], 1).float()
        >>> float(hausdorff_er_loss(perfect, target))
        0.0
        >>> missed = torch.cat([torch.ones_like(target), torch.zeros_like(target)], 1).float()
        >>> round(float(hausdorff_er_loss(missed, target, k=2)), 4)
        0.4
    """
    return _hausdorff_er(pred, target, alpha, k, reduction, axes=2)


def hausdorff_er_loss_3d(
    pred: Tensor, target: Tensor, alpha: float = 2.0, k: int = 10, reduction: str = "mean"
) -> Tensor:
    """Hausdorff loss of 3-D segmentations by erosion: :func:`hausdorff_er_loss` with one axis more.

    The stencil is a voxel and its six face neighbours. Values and gradients are those of
    ``kornia.losses.HausdorffERLoss3D``.

    Args:
        pred: (B, C, D, H, W) probabilities of any floating dtype.
        target: (B, 1, D, H, W) class ids in [0, C) of any integer dtype.
        alpha: exponent of the weight of an erosion.
        k: number of erosions, at least 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or (C, B, 1, D, H, W) for ``"none"``.

    Raises:
        TypeError: as :func:`hausdorff_er_loss`.
        ValueError: as :func:`hausdorff_er_loss`.

    Example:
        >>> pred = torch.full((1, 2, 4, 4, 4), 0.5)
        >>> target = torch.zeros(1, 1, 4, 4, 4, dtype=torch.long)
        >>> hausdorff_er_loss_3d(pred, target, reduction="none").shape
        torch.Size([2, 1, 1, 4, 4, 4])
    """
    return _hausdorff_er(pred, target, alpha, k, reduction, axes=3)


class _HausdorffER(nn.Module):
    """What the 2-D and the 3-D module share: the arguments."""

    def __init__(self, alpha: float = 2.0, k: int = 10, reduction: str = "mean") -> None:
        super().__init__()
        _check_erosions(alpha, k)
        check_reduction(reduction)
        self.alpha = alpha
        self.k = k
        self.reduction = reduction

    def extra_repr(self) -> str:
        """Show the arguments in the module's repr."""
        return f"alpha={self.alpha}, k={self.k}, reduction={self.reduction!r}"


class HausdorffERLoss(_HausdorffER):
    """Hausdorff loss of 2-D segmentations by erosion; the module form of :func:`hausdorff_er_loss`.

    Args:
        alpha: exponent of the weight of an erosion.
        k: number of erosions, at least 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: ``k`` below 1, or an unknown reduction.

    Example:
        >>> loss = HausdorffERLoss(k=5)
        >>> pred = torch.rand(2, 3, 16, 16, requires_grad=True)
        >>> loss(pred.softmax(1), torch.randint(3, (2, 1, 16, 16))).backward()
        >>> bool(pred.grad.isfinite().all())
        True
    """

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compare a prediction with class ids; see :func:`hausdorff_er_loss`.

        Args:
            pred: (B, C, H, W) probabilities of any floating dtype, after softmax.
            target: (B, 1, H, W) class ids in [0, C) of any integer dtype.

        Returns:
            A scalar, or (C, B, 1, H, W) for ``"none"``; float64 for float64, else float32.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: rank, shape, dtype or a class id is not as above.
        """
        return hausdorff_er_loss(pred, target, self.alpha, self.k, self.reduction)


class HausdorffERLoss3D(_HausdorffER):
    """Hausdorff loss of 3-D segmentations by erosion; the module form of :func:`hausdorff_er_loss_3d`.

    Args:
        alpha: exponent of the weight of an erosion.
        k: number of erosions, at least 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: ``k`` below 1, or an unknown reduction.

    Example:
        >>> loss = HausdorffERLoss3D(reduction="sum")
        >>> float(loss(torch.zeros(1, 1, 5, 5, 5), torch.zeros(1, 1, 5, 5, 5, dtype=torch.long))) > 0
        True
    """

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compare a prediction with class ids; see :func:`hausdorff_er_loss_3d`.

        Args:
            pred: (B, C, D, H, W) probabilities of any floating dtype, after softmax.
            target: (B, 1, D, H, W) class ids in [0, C) of any integer dtype.

        Returns:
            A scalar, or (C, B, 1, D, H, W) for ``"none"``; float64 for float64, else float32.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: rank, shape, dtype or a class id is not as above.
        """
        return hausdorff_er_loss_3d(pred, target, self.alpha, self.k, self.reduction)


def _hausdorff_er(pred: Tensor, target: Tensor, alpha: float, k: int, reduction: str, axes: int) -> Tensor:
    """Check the arguments, erode every image and class at once, reduce."""
    _check_erosions(alpha, k)
    check_reduction(reduction)
    _check_pair(pred, target, axes)
    values = pred if pred.dtype in (torch.float32, torch.float64) else pred.float()
    weights = [float(i + 1) ** alpha for i in range(k)]
    keep_field = reduction == "none"
    classes = class_numbers(target, pred.shape[1])
    total = kernels.erosion(values, target, classes, weights, axes, keep_field)  # (B, C, *spatial) or (B, C, 1, ...)
    if keep_field:
        return total.transpose(0, 1).unsqueeze(2)
    return total.sum() if reduction == "sum" else total.sum() / values.numel()


def _check_erosions(alpha: float, k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, the number of erosions; got {k!r}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite; got {alpha!r}")


def _check_pair(pred: Tensor, target: Tensor, axes: int) -> None:
    """Refuse predictions and targets that do not belong together."""
    wanted = "(B, C, H, W)" if axes == 2 else "(B, C, D, H, W)"
    if isinstance(pred, Tensor) and pred.dim() != axes + 2:
        other = "HausdorffERLoss3D" if axes == 2 else "HausdorffERLoss"
        raise ValueError(f"pred must be {wanted}; got shape {tuple(pred.shape)}: add the axes, or use {other}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor; got {type(target).__name__}: convert it with torch.as_tensor")
    expected = (pred.shape[0], 1, *pred.shape[2:])
    if tuple(target.shape) != expected:
        one_hot = target.dim() == pred.dim() and target.shape[1] > 1
        fix = "it looks one-hot, pass target.argmax(1, keepdim=True)" if one_hot else "bring both to one size"
        raise ValueError(f"target must be class ids of shape {expected}; got {tuple(target.shape)}: {fix}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target must hold integer class ids; got {target.dtype}: pass target.long()")
    check_floating("pred", pred)
    if pred.device != target.device:
        raise ValueError(f"pred and target must share a device; got {pred.device} and {target.device}: move one")
