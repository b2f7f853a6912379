"""Hausdorff losses by distance transform (Karimi and Salcudean 2019), 2-D and 3-D."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from detpost import kernels
from detpost.kernels.cpu import distance as native_distance
from detpost.kernels.cpu import erosion as native_erosion
from detpost.losses._arguments import (
    Spacing,
    by_image,
    spacings,
)
from detpost.losses._probabilities import activate, check_input, check_options, pair, reduced
from detpost.losses.distance_transform import boundary_distance


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
    wants_slope_of_target = torch.is_grad_enabled() and isinstance(target, Tensor) and target.requires_grad
    by_kernel = kernels.for_losses(input) == "native" and not wants_slope_of_target
    # The kernel takes the sigmoid along, so that no tensor is kept for it.
    values = activate(input, sigmoid and not by_kernel, softmax, other_act)
    by_kernel = by_kernel and values.dtype == torch.float32
    values, truth = pair(values, target, to_onehot_y, include_background)
    if by_kernel:
        apply = _NativeWeightedError.apply
        error = by_image(lambda v, t, steps: apply(v, t, steps, alpha, sigmoid)[0], each, values, truth)
    else:
        error = by_image(lambda v, t, steps: _weighted_error(v, t, steps, alpha), each, values, truth)
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


def _weighted_error(values: Tensor, truth: Tensor, spacing: tuple[float, ...], alpha: float) -> Tensor:
    """Mean over each field of the squared error, weighted with the distances to both boundaries: (B, C, 1, ...)."""
    with torch.no_grad():
        weight = _boundary_distance(values, spacing, alpha) + _boundary_distance(truth, spacing, alpha)
        weight = weight.to(values.dtype)
    limit = _largest_difference(values, spacing, alpha)
    error = (values - truth).clamp(-limit, limit).square()
    return (error * weight).mean(tuple(range(2, values.dim())), keepdim=True)


class _NativeWeightedError(torch.autograd.Function):
    """:func:`_weighted_error` in C++, with its gradient made in the same pass; of logits where ``sigmoid``.

    The gradient of the sum over a field is one number times a field, and that field is all that is saved.
    """

    @staticmethod
    def forward(
        values: Tensor, truth: Tensor, spacing: tuple[float, ...], alpha: float, sigmoid: bool
    ) -> tuple[Tensor, Tensor]:
        unit = max(spacing)
        steps = [length / unit for length in spacing]
        limit = _largest_difference(values, spacing, alpha)
        sums, slopes = native_distance.weighted_error(values, truth, steps, unit, alpha, limit, sigmoid)
        elements = math.prod(values.shape[2:])
        return (sums / elements).reshape(*values.shape[:2], *[1] * (values.dim() - 2)), slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        values, truth, ctx.spacing, ctx.alpha, ctx.sigmoid = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, truth, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        if grads[0] is None:
            return None, None, None, None, None
        values, truth, slopes = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # A gradient of the gradient is wanted: the plain form has one.
            again = _weighted_error(values.sigmoid() if ctx.sigmoid else values, truth, ctx.spacing, ctx.alpha)
            (gradient,) = torch.autograd.grad(again, values, grads[0], create_graph=True)
            return gradient, None, None, None, None
        return native_erosion.scaled(slopes, grads[0] / math.prod(values.shape[2:])), None, None, None, None


def _boundary_distance(field: Tensor, spacing: tuple[float, ...], alpha: float) -> Tensor:
    """Distance to the other side of the boundary of ``field > 0.5``, to the power alpha; 0 where there is none."""
    squared, unit = boundary_distance(field, spacing)
    power: Tensor = squared if alpha == 2 else squared.pow(alpha / 2)
    return power if unit == 1 else power * unit**alpha


def _largest_difference(values: Tensor, spacing: tuple[float, ...], alpha: float) -> float:
    """Largest difference whose weighted square, summed over every element, stays finite; never below 1000."""
    diagonal = math.hypot(*(side * step for side, step in zip(values.shape[2:], spacing, strict=True)))
    # 2**24 stands for images times classes: their real number would tie a compiled graph to one batch size.
    elements = 8.0 * 2**24 * math.prod(values.shape[2:])
    log_weight = max(0.0, alpha * math.log(max(diagonal, 1e-30))) + math.log(max(elements, 1.0))
    log_limit = (math.log(torch.finfo(values.dtype).max) - log_weight) / 2
    return math.exp(min(max(log_limit, math.log(1e3)), 300.0))
