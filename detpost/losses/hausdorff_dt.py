"""Hausdorff losses by distance transform (Karimi and Salcudean 2019), 2-D and 3-D."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from detpost import kernels
from detpost.losses._arguments import (
    Spacing,
    by_image,
    spacings,
)
from detpost.losses._probabilities import activate, check_input, check_options, pair, reduced


def hausdorff_dt_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 2.0,
    include_background: bool = False,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    reduction: str = "mean",
    batch: bool = False,
    spacing: Spacing | None = None,
) -> Tensor:
    """Hausdorff loss that weighs the squared error with the distances to both boundaries.

    Per image and class, the mean over elements of ``(p - t)**2 * (d_p**alpha + d_t**alpha)``, where ``d_p`` is the
    distance of an element to the nearest one on the other side of the boundary of ``p > 0.5``, and ``d_t`` the same
    for the target (Karimi and Salcudean 2019, equation 8). A mask without a boundary, empty or full, has d = 0. The
    distances carry no gradient. They are computed where the tensors are, exactly and in float32. Values are those of
    ``monai.losses.HausdorffDTLoss``, except that an integer one-hot target gives the same as a floating one (MONAI
    cuts its distances off to whole numbers).

    Args:
        input: (B, C, H, W) or (B, C, D, H, W), any floating dtype; half precision is computed in float32.
            Probabilities, or logits together with one of the activations.
        target: as ``input``, one-hot of any real dtype; or (B, 1, ...) class ids in [0, C) with ``to_onehot_y``.
        alpha: exponent of the distances.
        include_background: keep channel 0. A single channel is always kept.
        to_onehot_y: turn class ids into one-hot. Ignored for a single channel.
        sigmoid: apply a sigmoid to ``input``.
        softmax: apply a softmax over channels to ``input``. Ignored for a single channel.
        other_act: apply this to ``input``.
        reduction: ``"mean"`` or ``"sum"`` over images and classes, or ``"none"``.
        batch: take the mean over the batch together with the elements.
        spacing: side lengths of an element, one number or one per spatial axis, or a sequence of these for each image;
            ``None`` counts distances in elements.

    Returns:
        A scalar, or (B, C, 1, ...) for ``"none"``, (1, C, 1, ...) with ``batch``; float64 for float64, else float32.
        Finite, with finite gradients, for every finite input: differences whose weighted squares would overflow are
        clamped (beyond 1e11 or so in float32 at common sizes).

    Raises:
        TypeError: an argument is not a tensor, or ``other_act`` is not callable.
        ShapeMismatchError: shapes that do not belong together: a ``ValueError``, and an ``AssertionError`` as in MONAI.
        ValueError: rank, a class id, or an argument is not as above. On an accelerator an id out of range is an
            asynchronous device-side assertion instead; an exported graph does not look.

    Example:
        >>> target = torch.nn.functional.pad(torch.ones(1, 1, 4, 4), (1, 1, 1, 1))
        >>> float(hausdorff_dt_loss(target, target, include_background=True))
        0.0
        >>> missed = torch.zeros_like(target)
        >>> round(float(hausdorff_dt_loss(missed, target, include_background=True)), 4)
        0.7778
    """
    check_options(sigmoid, softmax, other_act, reduction)
    check_input(input)
    each = spacings(spacing, input.shape[0], input.dim() - 2)
    # The kernels take the sigmoid along: in C++ no tensor is kept for it.
    values, truth = pair(activate(input, False, softmax, other_act), target, to_onehot_y, include_background)
    error = by_image(lambda v, t, steps: kernels.weighted_error(v, t, steps, alpha, sigmoid), each, values, truth)
    return reduced(error, reduction, batch)


def log_hausdorff_dt_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 2.0,
    include_background: bool = False,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    reduction: str = "mean",
    batch: bool = False,
    spacing: Spacing | None = None,
) -> Tensor:
    """Logarithm of one plus :func:`hausdorff_dt_loss`, taken after the reduction, as ``monai.losses`` does.

    Args:
        input: (B, C, H, W) or (B, C, D, H, W), any floating dtype.
        target: as ``input``, or (B, 1, ...) class ids with ``to_onehot_y``.
        alpha: exponent of the distances.
        include_background: keep channel 0.
        to_onehot_y: turn class ids into one-hot.
        sigmoid: apply a sigmoid to ``input``.
        softmax: apply a softmax over channels to ``input``.
        other_act: apply this to ``input``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        batch: take the mean over the batch together with the elements.
        spacing: side lengths of an element, one number or one per spatial axis, or a sequence of these for each image.

    Returns:
        As :func:`hausdorff_dt_loss`.

    Raises:
        TypeError: as :func:`hausdorff_dt_loss`.
        ValueError: as :func:`hausdorff_dt_loss`.

    Example:
        >>> target = torch.nn.functional.pad(torch.ones(1, 1, 4, 4), (1, 1, 1, 1))
        >>> round(float(log_hausdorff_dt_loss(torch.zeros_like(target), target, include_background=True)), 4)
        0.5754
    """
    loss = hausdorff_dt_loss(
        input,
        target,
        alpha,
        include_background,
        to_onehot_y,
        sigmoid,
        softmax,
        other_act,
        reduction,
        batch,
        spacing,
    )
    return torch.log(loss + 1)


class HausdorffDTLoss(nn.Module):
    """Hausdorff loss by distance transform; the module form of :func:`hausdorff_dt_loss`.

    Args:
        alpha: exponent of the distances.
        include_background: keep channel 0.
        to_onehot_y: turn class ids (B, 1, ...) into one-hot.
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax over channels to the input.
        other_act: apply this to the input.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        batch: take the mean over the batch together with the elements.
        spacing: side lengths of an element, one number or one per spatial axis, or a sequence of these for each image.

    Raises:
        TypeError: ``other_act`` is not callable.
        ValueError: more than one activation, or an unknown reduction.

    Example:
        >>> loss = HausdorffDTLoss(softmax=True, to_onehot_y=True)
        >>> logits = torch.randn(2, 3, 16, 16, requires_grad=True)
        >>> loss(logits, torch.randint(3, (2, 1, 16, 16))).backward()
        >>> bool(logits.grad.isfinite().all())
        True
    """

    def __init__(
        self,
        alpha: float = 2.0,
        include_background: bool = False,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: str = "mean",
        batch: bool = False,
        spacing: Spacing | None = None,
    ) -> None:
        super().__init__()
        check_options(sigmoid, softmax, other_act, reduction)
        self.alpha = alpha
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act
        self.reduction = reduction
        self.batch = batch
        self.spacing = spacing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compare input with target; see :func:`hausdorff_dt_loss`.

        Args:
            input: (B, C, H, W) or (B, C, D, H, W), any floating dtype.
            target: as ``input``, or (B, 1, ...) class ids with ``to_onehot_y``.

        Returns:
            A scalar, or (B, C, 1, ...) for ``"none"``; float64 for float64, else float32.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: ranks or shapes that do not fit, or a class id out of range.
        """
        return hausdorff_dt_loss(
            input,
            target,
            self.alpha,
            self.include_background,
            self.to_onehot_y,
            self.sigmoid,
            self.softmax,
            self.other_act,
            self.reduction,
            self.batch,
            self.spacing,
        )


class LogHausdorffDTLoss(HausdorffDTLoss):
    """Logarithm of one plus :class:`HausdorffDTLoss`; the module form of :func:`log_hausdorff_dt_loss`.

    Args:
        alpha: exponent of the distances.
        include_background: keep channel 0.
        to_onehot_y: turn class ids (B, 1, ...) into one-hot.
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax over channels to the input.
        other_act: apply this to the input.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        batch: take the mean over the batch together with the elements.
        spacing: side lengths of an element, one number or one per spatial axis, or a sequence of these for each image.

    Raises:
        TypeError: ``other_act`` is not callable.
        ValueError: more than one activation, or an unknown reduction.

    Example:
        >>> loss = LogHausdorffDTLoss(sigmoid=True, include_background=True)
        >>> loss(torch.randn(1, 2, 8, 8), torch.ones(1, 2, 8, 8)).shape
        torch.Size([])
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compare input with target; see :func:`log_hausdorff_dt_loss`.

        Args:
            input: (B, C, H, W) or (B, C, D, H, W), any floating dtype.
            target: as ``input``, or (B, 1, ...) class ids with ``to_onehot_y``.

        Returns:
            A scalar, or (B, C, 1, ...) for ``"none"``; float64 for float64, else float32.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: ranks or shapes that do not fit, or a class id out of range.
        """
        return torch.log(super().forward(input, target) + 1)
