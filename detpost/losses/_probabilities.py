"""What a loss on probabilities reads before it computes: its options, the activation, the one-hot target."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from detpost.losses._arguments import ShapeMismatchError, check_floating, check_reduction, class_numbers


def check_options(sigmoid: bool, softmax: bool, other_act: Callable[[Tensor], Tensor] | None, reduction: str) -> None:
    """Refuse what is no reduction, and more than one activation."""
    check_reduction(reduction)
    if other_act is not None and not callable(other_act):
        raise TypeError(f"other_act must be callable or None; got {type(other_act).__name__}")
    if sigmoid + softmax + (other_act is not None) > 1:
        raise ValueError(
            f"at most one of sigmoid, softmax, other_act may be given; got {sigmoid=}, {softmax=}, {other_act=}"
        )


def check_input(input: Tensor) -> None:
    """Refuse a prediction that is not an image or a volume of floats."""
    if isinstance(input, Tensor) and input.dim() not in (4, 5):
        raise ValueError(f"input must be (B, C, H, W) or (B, C, D, H, W); got shape {tuple(input.shape)}")
    check_floating("input", input)


def activate(input: Tensor, sigmoid: bool, softmax: bool, other_act: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Give the probabilities in float32 or float64."""
    values = input if input.dtype in (torch.float32, torch.float64) else input.float()
    if sigmoid:
        return torch.sigmoid(values)
    if softmax and values.shape[1] > 1:
        return torch.softmax(values, 1)
    if softmax:
        _warn_single_channel("softmax=True", 4)
    return values if other_act is None else other_act(values)


def pair(values: Tensor, target: Tensor, to_onehot_y: bool, include_background: bool) -> tuple[Tensor, Tensor]:
    """Give prediction and target, (B, C, ...) both, with the channels that count.

    Args:
        values: (B, C, ...), probabilities.
        target: as ``values``, or (B, 1, ...) class ids with ``to_onehot_y``.
        to_onehot_y: turn class ids into one-hot; ignored for a single channel.
        include_background: keep channel 0; a single channel is always kept.

    Returns:
        Two tensors of one shape and dtype.

    Raises:
        TypeError: ``target`` is not a tensor.
        ShapeMismatchError: shapes that do not belong together.
        ValueError: ``target`` is complex, or a class id is out of range.
    """
    truth = _one_hot(target, values) if to_onehot_y else _as_real(target, values)
    whole = tuple(values.shape)
    if not include_background and values.shape[1] == 1:
        _warn_single_channel("include_background=False", 4)
    elif not include_background:
        values, truth = values[:, 1:], truth[:, 1:]
    if truth.shape != values.shape:
        fix = "pass class ids with to_onehot_y=True, or one channel per class"
        raise ShapeMismatchError(f"target must have input's shape {whole}; got {tuple(target.shape)}: {fix}")
    return values, truth


def _one_hot(target: Tensor, values: Tensor) -> Tensor:
    """Give one channel per class from class ids (B, 1, ...)."""
    _check_target(target)
    classes = values.shape[1]
    if classes == 1:
        _warn_single_channel("to_onehot_y=True", 5)
        return _as_real(target, values)
    expected = (values.shape[0], 1, *values.shape[2:])
    if tuple(target.shape) != expected:
        fix = "leave to_onehot_y out for a target that is one-hot already, or bring both to one size"
        raise ShapeMismatchError(f"target must be class ids of shape {expected}; got {tuple(target.shape)}: {fix}")
    ids = target.long()
    numbers = class_numbers(ids, classes).reshape(1, -1, *[1] * (values.dim() - 2))
    return (ids == numbers).to(values.dtype)


def _as_real(target: Tensor, values: Tensor) -> Tensor:
    _check_target(target)
    return target.to(values.dtype)


def _check_target(target: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor; got {type(target).__name__}: convert it with torch.as_tensor")
    if target.is_complex():
        raise ValueError(f"target must be real; got {target.dtype}")


def _warn_single_channel(option: str, frames: int) -> None:
    """Warn at the caller of the loss, so many frames up."""
    # Tracers cannot carry a warning, and the eager run before them has given it.
    if not torch.compiler.is_compiling():
        warnings.warn(f"input has a single channel: {option} is ignored", stacklevel=frames)


def reduced(fields: Tensor, reduction: str, batch: bool) -> Tensor:
    """Reduce one value per image and class, (B, C, 1, ...), over the batch first if asked to."""
    fields = fields.mean(0, keepdim=True) if batch else fields
    return fields if reduction == "none" else fields.sum() if reduction == "sum" else fields.mean()
