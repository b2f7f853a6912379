"""The boundary loss (Kervadec et al. 2019): a linear term in the probabilities, 2-D and 3-D."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from detpost.losses._arguments import Spacing, by_image, spacings
from detpost.losses._probabilities import activate, check_input, check_options, pair, reduced
from detpost.losses.signed_distance import kervadec_map


def boundary_loss(
    input: Tensor,
    target: Tensor,
    include_background: bool = False,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    reduction: str = "mean",
    batch: bool = False,
    spacing: Spacing | None = None,
    idc: Sequence[int] | None = None,
) -> Tensor:
    """Give the mean of the probabilities, each weighted with its signed distance to the target's boundary.

    Kervadec, Bouchtiba, Desrosiers, Granger, Dolz and Ben Ayed, "Boundary loss for highly unbalanced segmentation"
    (2019), equation 5. The weight is the authors' map: d outside the target and 1 - d inside, d the distance to
    the other side, so that elements of the target beside its boundary weigh 0; 0 throughout where a class is absent.
    The 1 is one whatever ``spacing``, and a full mask is measured to the zero that
    :func:`distance_transform_edt` puts outside it. The map is made from the target where it is, so none has to be
    precomputed. Values are those of the authors' ``SurfaceLoss(idc)(probs, dist_maps)``.

    The loss is negative where the prediction is right, and its gradient does not depend on the prediction: use it
    beside a regional loss, with a weight that grows (:class:`HausdorffSchedule`).

    Args:
        input: (B, C, H, W) or (B, C, D, H, W), any floating dtype; half precision is computed in float32.
            Probabilities, or logits together with one of the activations.
        target: as ``input``, one-hot of any real dtype, inside where above 0.5; or (B, 1, ...) class ids in [0, C)
            with ``to_onehot_y``.
        include_background: keep channel 0. A single channel is always kept.
        to_onehot_y: turn class ids into one-hot. Ignored for a single channel.
        sigmoid: apply a sigmoid to ``input``.
        softmax: apply a softmax over channels to ``input``. Ignored for a single channel.
        other_act: apply this to ``input``.
        reduction: ``"mean"`` or ``"sum"`` over images and classes, or ``"none"``.
        batch: take the mean over the batch together with the elements.
        spacing: side lengths of an element, one number or one per spatial axis, or a sequence of these for each image;
            ``None`` counts distances in elements.
        idc: the channels that count, by the authors' name; ``include_background`` has no say then.

    Returns:
        A scalar, or (B, C, 1, ...) for ``"none"``, (1, C, 1, ...) with ``batch``; float64 for float64, else float32.

    Raises:
        TypeError: an argument is not a tensor, or ``other_act`` is not callable.
        ShapeMismatchError: shapes that do not belong together: a ``ValueError``, and an ``AssertionError`` as in MONAI.
        ValueError: rank, a class id, or an argument is not as above.

    Example:
        >>> target = torch.tensor([[[[0.0, 0.0, 1.0, 1.0, 1.0]]]])
        >>> float(boundary_loss(target, target, include_background=True))
        -0.6000000238418579
        >>> float(boundary_loss(1 - target, target, include_background=True))
        0.6000000238418579
    """
    check_options(sigmoid, softmax, other_act, reduction)
    check_input(input)
    each = spacings(spacing, input.shape[0], input.dim() - 2)
    values = activate(input, sigmoid, softmax, other_act)
    values, truth = pair(values, target, to_onehot_y, include_background or idc is not None)
    if idc is not None:
        values, truth = _chosen(values, idc), _chosen(truth, idc)
    with torch.no_grad():
        weight = by_image(kervadec_map, each, truth > 0.5).to(values.dtype)
    return reduced((values * weight).mean(tuple(range(2, values.dim())), keepdim=True), reduction, batch)


class BoundaryLoss(nn.Module):
    """The boundary loss; the module form of :func:`boundary_loss`.

    Args:
        include_background: keep channel 0.
        to_onehot_y: turn class ids (B, 1, ...) into one-hot.
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax over channels to the input.
        other_act: apply this to the input.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        batch: take the mean over the batch together with the elements.
        spacing: side lengths of an element, one number or one per spatial axis, or a sequence of these for each image.
        idc: the channels that count, in place of ``include_background``.

    Raises:
        TypeError: ``other_act`` is not callable.
        ValueError: more than one activation, or an unknown reduction.

    Example:
        >>> loss = BoundaryLoss(softmax=True, to_onehot_y=True)
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
        batch: bool = False,
        spacing: Spacing | None = None,
        idc: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_options(sigmoid, softmax, other_act, reduction)
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act
        self.reduction = reduction
        self.batch = batch
        self.spacing = spacing
        self.idc = idc

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Weigh input with the distances of target; see :func:`boundary_loss`.

        Args:
            input: (B, C, H, W) or (B, C, D, H, W), any floating dtype.
            target: as ``input``, or (B, 1, ...) class ids with ``to_onehot_y``.

        Returns:
            A scalar, or (B, C, 1, ...) for ``"none"``; float64 for float64, else float32.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: ranks or shapes that do not fit, or a class id out of range.
        """
        return boundary_loss(
            input,
            target,
            self.include_background,
            self.to_onehot_y,
            self.sigmoid,
            self.softmax,
            self.other_act,
            self.reduction,
            self.batch,
            self.spacing,
            self.idc,
        )


def _chosen(channels: Tensor, idc: Sequence[int]) -> Tensor:
    """Take channels by their numbers."""
    count = channels.shape[1]
    if not idc or not all(0 <= number < count for number in idc):
        raise ValueError(f"idc must name channels in [0, {count}); got {list(idc)}")
    return torch.stack([channels[:, number] for number in idc], 1)
