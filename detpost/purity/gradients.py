"""Asks autograd: does backward run, is the gradient right, and does recomputing the forward pass change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from detpost.purity.compiled import first_line
from detpost.purity.frames import error_site
from detpost.purity.isolation import isolated
from detpost.purity.report import Finding
from detpost.purity.structure import clone, tensors

_SMALL = 2000  # elements up to which gradcheck compares each one


@dataclass(frozen=True)
class Gradients:
    """Gradients of the summed outputs, by the name of the input or parameter; empty if nothing is differentiable."""

    values: dict[str, Tensor | None]


def differentiable(value: Any) -> list[Tensor]:
    """Floating tensors in an output that autograd can go back from."""
    return [tensor for _, tensor in tensors(value) if tensor.requires_grad and tensor.is_floating_point()]


def gradients(
    subject: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    require_grad: bool | None,
    recompute: bool = False,
) -> Gradients:
    """One forward and backward pass on copies.

    Args:
        subject: what to differentiate.
        args: its positional inputs.
        kwargs: its keyword inputs.
        require_grad: True to ask for the gradient of every floating input, None to keep the caller's flags.
        recompute: run the forward pass under gradient checkpointing.

    Returns:
        The gradients. ``torch.autograd.grad`` is used, so no ``.grad`` of the caller changes.
    """
    with isolated(subject, args) as state, torch.enable_grad():
        inputs = clone((args, kwargs), require_grad=require_grad)
        leaves = {name: tensor for name, tensor in tensors(inputs) if tensor.requires_grad}
        leaves.update({item.name: item.tensor for item in state.held if item.tensor.requires_grad})
        if recompute:
            outputs = checkpoint(lambda: subject(*inputs[0], **inputs[1]), use_reentrant=False)
        else:
            outputs = subject(*inputs[0], **inputs[1])
        ends = differentiable(outputs)
        if not ends or not leaves:
            return Gradients({})
        total = torch.stack([end.to(torch.float64).sum() for end in ends]).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return Gradients(dict(zip(leaves, found, strict=True)))


def backward(
    subject: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Finding], str, Gradients | None]:
    """Whether backward runs.

    If the caller asked for no gradient, floating inputs are made to require one: a failure is then a warning, unless
    an in-place write is the reason, which is what the checker exists to say.

    Args:
        subject: what to differentiate.
        args: its positional inputs.
        kwargs: its keyword inputs.

    Returns:
        Findings, one line that sums them up, and the gradients if there are any.
    """
    asked = any(tensor.requires_grad for _, tensor in tensors((args, kwargs)))
    try:
        result = gradients(subject, args, kwargs, None if asked else True)
    except Exception as error:
        reason = first_line(error)
        fatal = asked or "modified by an inplace operation" in reason
        site = error_site(error)
        finding = Finding("DP050", "error" if fatal else "warning", reason, site.file, site.line, site.source)
        return [finding], f"fails: {reason}", None
    if not result.values:
        return [], "nothing differentiable", None
    broken = [name for name, grad in result.values.items() if grad is not None and not _finite(grad)]
    message = f"the gradient of {', '.join(broken)} is not finite"
    found = [Finding("DP053", "warning", message)] if broken else []
    return found, message if broken else "ok", result


def _finite(gradient: Tensor) -> bool:
    return gradient.layout != torch.strided or bool(gradient.isfinite().all())


def checkpointing(
    subject: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], plain: Gradients | None
) -> tuple[list[Finding], str]:
    """Whether gradient checkpointing gives the gradient that the plain pass gave.

    Args:
        subject: what to differentiate.
        args: its positional inputs.
        kwargs: its keyword inputs.
        plain: gradients of the plain pass; None if it has none.

    Returns:
        Findings, and one line that sums them up.
    """
    if plain is None:
        return [], "not checked: no gradient to compare with"
    asked = any(tensor.requires_grad for _, tensor in tensors((args, kwargs)))
    require_grad = None if asked else True
    try:
        recomputed = gradients(subject, args, kwargs, require_grad, recompute=True)
    except Exception as error:
        site, reason = error_site(error), first_line(error)
        return [Finding("DP052", "error", reason, site.file, site.line, site.source)], f"fails: {reason}"
    different = _differences(plain, recomputed)
    if not different:
        return [], "same gradient"
    if _differences(plain, gradients(subject, args, kwargs, require_grad)):
        return [], "not checked: two plain passes differ from each other already"
    message = f"the gradient of {', '.join(different)} differs under gradient checkpointing"
    return [Finding("DP052", "error", message)], message


def _differences(left: Gradients, right: Gradients) -> list[str]:
    names = []
    for name, gradient in left.values.items():
        other = right.values.get(name)
        if (gradient is None) != (other is None):
            names.append(name)
        elif gradient is not None and other is not None and gradient.layout == torch.strided:
            scale = float(gradient.abs().max()) if gradient.numel() else 0.0
            close = torch.allclose(gradient, other, rtol=1e-5, atol=1e-6 * max(scale, 1e-30), equal_nan=True)
            names += [] if close else [name]
    return names


def finite_differences(
    subject: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Finding], str]:
    """``torch.autograd.gradcheck`` in float64, on copies converted to it.

    Args:
        subject: what to differentiate; its parameters and buffers are converted too.
        args: its positional inputs.
        kwargs: its keyword inputs.

    Returns:
        Findings, and one line that sums them up.
    """
    inputs = clone((args, kwargs), require_grad=True, dtype=torch.float64)
    leaves = [tensor for _, tensor in tensors(inputs) if tensor.requires_grad]
    if not leaves:
        return [], "not checked: no floating input"

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        with isolated(subject, args, dtype=torch.float64):
            torch.manual_seed(0)  # the same dropout for each of the many calls
            given = _replaced(inputs, leaves, values)
            return tuple(differentiable(subject(*given[0], **given[1])))

    try:
        if not function(*leaves):
            return [], "nothing differentiable"
        fast = sum(leaf.numel() for leaf in leaves) > _SMALL
        torch.autograd.gradcheck(function, tuple(leaves), fast_mode=fast, nondet_tol=1e-9)
        return [], "ok"
    except Exception as error:
        reason = first_line(error)
        mismatch = type(error).__name__ == "GradcheckError"
        return [Finding("DP051", "error" if mismatch else "warning", reason)], f"fails: {reason}"


def _replaced(inputs: Any, leaves: Sequence[Tensor], values: Sequence[Tensor]) -> Any:
    from detpost.purity.structure import map_tensors

    swap = {id(leaf): value for leaf, value in zip(leaves, values, strict=True)}
    return map_tensors(inputs, lambda tensor: swap.get(id(tensor), tensor))
