"""The generalized surface loss (Celaya, Riviere and Fuentes 2023), 2-D and 3-D."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from detpost.losses._arguments import ShapeMismatchError, Spacing, by_image, spacings
from detpost.losses._probabilities import activate, check_input, check_options, pair
from detpost.losses.signed_distance import squared_surface_map

_SMOOTH = 1e-6  # the authors' constant, added to each class's denominator


def generalized_surface_loss(
    input: Tensor,
    target: Tensor,
    include_background: bool = False,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    reduction: str = "mean",
    class_weights: Sequence[float] | Tensor | None = None,
    spacing: Spacing | None = None,
    distances: Tensor | None = None,
) -> Tensor:
    """Give one minus the share of the squared distances to the target's surface that a prediction keeps.

    Celaya, Riviere and Fuentes, "A generalized surface loss for reducing the Hausdorff distance in medical imaging
    segmentation" (arXiv 2302.03868). For each image
    ``1 - sum_k w_k sum (d_k (1 - t_k - p_k))**2 / sum_k w_k sum d_k**2``, 0 for the target itself and 1 for its
    complement. ``d_k`` is the distance to the surface of class k, its elements with an element outside the class
    among all neighbours (0 there), made from the target where it is. Weights, distances, the 1e-6 in each class's
    denominator and the values are those of the authors' ``GenSurfLoss`` without its regional part: add that one
    yourself, with a weight (:class:`HausdorffSchedule`).

    Args:
        input: (B, C, H, W) or (B, C, D, H, W), any floating dtype; half precision is computed in float32.
            Probabilities, or logits together with one of the activations.
        target: as ``input``, one-hot of any real dtype; or (B, 1, ...) class ids in [0, C) with ``to_onehot_y``.
        include_background: keep channel 0, as the paper's code does. A single channel is always kept.
        to_onehot_y: turn class ids into one-hot. Ignored for a single channel.
        sigmoid: apply a sigmoid to ``input``.
        softmax: apply a softmax over channels to ``input``. Ignored for a single channel.
        other_act: apply this to ``input``.
        reduction: ``"mean"`` or ``"sum"`` over images, or ``"none"``.
        class_weights: one for each class that is kept; ``None`` takes ``1 / (n**2 + 1)`` of each image, n the number of
            the target's elements.
        spacing: side lengths of an element, one number or one per spatial axis, or a sequence of these for each image.
        distances: distances to use in place of those of the target's surface, of ``input``'s shape; signs do not count.

    Returns:
        A scalar, or (B,) for ``"none"``; float64 for float64, else float32.

    Raises:
        TypeError: an argument is not a tensor, or ``other_act`` is not callable.
        ShapeMismatchError: shapes that do not belong together: a ``ValueError``, and an ``AssertionError`` as in MONAI.
        ValueError: rank, a class id, or an argument is not as above.

    Example:
        >>> target = torch.nn.functional.pad(torch.ones(1, 1, 4, 4), (2, 2, 2, 2))
        >>> round(float(generalized_surface_loss(target, target, include_background=True)), 5)
        0.0
        >>> float(generalized_surface_loss(1 - target, target, include_background=True))
        1.0
    """
    check_options(sigmoid, softmax, other_act, reduction)
    check_input(input)
    each = spacings(spacing, input.shape[0], input.dim() - 2)
    whole = input.shape
    values = activate(input, sigmoid, softmax, other_act)
    values, truth = pair(values, target, to_onehot_y, include_background)
    with torch.no_grad():
        if distances is None:
            squared = by_image(squared_surface_map, each, truth > 0.5).to(values.dtype)
        else:
            squared = _given(distances, whole, values).square()
        weights = _weights(class_weights, truth)  # (B, C) or (C,)
        axes = tuple(range(2, values.dim()))
        whole_sum = (weights * (squared * (1 - 2 * truth).square()).sum(axes) + _SMOOTH).sum(1)  # (B,)
    kept = (weights * (squared * (1 - truth - values).square()).sum(axes)).sum(1)
    loss = 1 - kept / whole_sum
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


class GeneralizedSurfaceLoss(nn.Module):
    """The generalized surface loss; the module form of :func:`generalized_surface_loss`.

    Args:
        include_background: keep channel 0, as the paper's code does.
        to_onehot_y: turn class ids (B, 1, ...) into one-hot.
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax over channels to the input.
        other_act: apply this to the input.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        class_weights: one for each class that is kept, or ``None`` for ``1 / (n**2 + 1)`` of each image.
        spacing: side lengths of an element, one number or one per spatial axis, or a sequence of these for each image.

    Raises:
        TypeError: ``other_act`` is not callable.
        ValueError: more than one activation, or an unknown reduction.

    Example:
        >>> loss = GeneralizedSurfaceLoss(softmax=True, to_onehot_y=True, include_background=True)
        >>> logits = torch.randn(2, 3, 16, 16, requires_grad=True)
        >>> loss(logits, torch.randint(3, (2, 1, 16, 16))).backward()
        >>> bool(logits.grad.isfinite().all())
        True
    """

    def __init__(
        self,
        include_background: bool = False,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: str = "mean",
        class_weights: Sequence[float] | Tensor | None = None,
        spacing: Spacing | None = None,
    ) -> None:
        super().__init__()
        check_options(sigmoid, softmax, other_act, reduction)
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act
        self.reduction = reduction
        self.class_weights = class_weights
        self.spacing = spacing

    def forward(self, input: Tensor, target: Tensor, distances: Tensor | None = None) -> Tensor:
        """Compare input with target; see :func:`generalized_surface_loss`.

        Args:
            input: (B, C, H, W) or (B, C, D, H, W), any floating dtype.
            target: as ``input``, or (B, 1, ...) class ids with ``to_onehot_y``.
            distances: distances to use in place of those of the target's surface, of ``input``'s shape.

        Returns:
            A scalar, or (B,) for ``"none"``; float64 for float64, else float32.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: ranks or shapes that do not fit, or a class id out of range.
        """
        return generalized_surface_loss(
            input,
            target,
            self.include_background,
            self.to_onehot_y,
            self.sigmoid,
            self.softmax,
            self.other_act,
            self.reduction,
            self.class_weights,
            self.spacing,
            distances,
        )


def _weights(class_weights: Sequence[float] | Tensor | None, truth: Tensor) -> Tensor:
    """Weight of each class, (C,), or of each image and class, (B, C)."""
    if class_weights is None:
        elements = truth.flatten(2).sum(2)
        return 1 / (elements.square() + 1)
    weights = torch.as_tensor(class_weights, dtype=truth.dtype, device=truth.device)
    if weights.shape != truth.shape[1:2]:
        expected = truth.shape[1]
        raise ValueError(f"class_weights must hold one for each class kept ({expected}); got {tuple(weights.shape)}")
    return weights


def _given(distances: Tensor, whole: torch.Size, values: Tensor) -> Tensor:
    """Take the given distances of the channels that are kept."""
    if not isinstance(distances, Tensor):
        raise TypeError(f"distances must be a torch.Tensor; got {type(distances).__name__}: use torch.as_tensor")
    if distances.shape != whole:
        raise ShapeMismatchError(f"distances must have input's shape {tuple(whole)}; got {tuple(distances.shape)}")
    return distances[:, whole[1] - values.shape[1] :].to(values.dtype)
