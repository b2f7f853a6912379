"""Ask autograd: does backward run, is the gradient right, and does recomputing the forward pass change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from detpost.purity.frames import failure, first_line
from detpost.purity.isolation import Subject, isolated
from detpost.purity.report import Finding
from detpost.purity.structure import map_tensors, tensors

_SMALL = 2000  # elements up to which gradcheck compares each one

Gradients = dict[str, Tensor | None]  # by the name of the input or parameter
Outcome = tuple[list[Finding], str]  # findings of a stage, and one line that sums them up


def _differentiable(value: Any) -> list[Tensor]:
    return [tensor for _, tensor in tensors(value) if tensor.requires_grad and tensor.is_floating_point()]


def _gradients(subject: Subject, recompute: bool = False) -> Gradients:
    """Run forward and backward on copies, perhaps under gradient checkpointing; no ``.grad`` of the caller changes.

    If the caller asks for no gradient, the gradient of every floating input is taken.
    """
    with isolated(subject) as state, torch.enable_grad():
        inputs = subject.copies(require_grad=None if subject.asks_for_gradients else True)
        leaves = {name: tensor for name, tensor in tensors(inputs) if tensor.requires_grad}
        leaves.update({item.name: item.tensor for item in state.held if item.tensor.requires_grad})
        outputs = checkpoint(subject.run, inputs, use_reentrant=False) if recompute else subject.run(inputs)
        ends = _differentiable(outputs)
        if not ends or not leaves:
            return {}
        total = torch.stack([end.to(torch.float64).sum() for end in ends]).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return dict(zip(leaves, found, strict=True))


def backward(subject: Subject) -> tuple[list[Finding], str, Gradients | None]:
    """Run backward, and give the gradients as well.

    If the caller asked for no gradient, a failure is a warning, unless an in-place write is the reason, which is what
    the checker exists to say.
    """
    try:
        found = _gradients(subject)
    except Exception as error:
        fatal = subject.asks_for_gradients or "modified by an inplace operation" in first_line(error)
        return [failure("DP050", error, "error" if fatal else "warning")], f"fails: {first_line(error)}", None
    if not found:
        return [], "nothing differentiable", None
    broken = [name for name, gradient in found.items() if gradient is not None and not _finite(gradient)]
    if not broken:
        return [], "ok", found
    message = f"the gradient of {', '.join(broken)} is not finite"
    return [Finding("DP053", "warning", message)], message, found


def _finite(gradient: Tensor) -> bool:
    return gradient.layout != torch.strided or bool(gradient.isfinite().all())


def checkpointing(subject: Subject, plain: Gradients | None) -> Outcome:
    """Compare the gradient under gradient checkpointing with that of the plain pass."""
    if plain is None:
        return [], "not checked: no gradient to compare with"
    try:
        recomputed = _gradients(subject, recompute=True)
    except Exception as error:
        return [failure("DP052", error)], f"fails: {first_line(error)}"
    different = _differences(plain, recomputed)
    if not different:
        return [], "same gradient"
    if _differences(plain, _gradients(subject)):
        return [], "not checked: two plain passes differ from each other already"
    message = f"the gradient of {', '.join(different)} differs under gradient checkpointing"
    return [Finding("DP052", "error", message)], message


def _differences(left: Gradients, right: Gradients) -> list[str]:
    names = []
    for name, gradient in left.items():
        other = right.get(name)
        if gradient is None or other is None:
            names += [] if gradient is other else [name]
        elif gradient.layout == torch.strided:
            scale = float(gradient.abs().max()) if gradient.numel() else 0.0
            close = torch.allclose(gradient, other, rtol=1e-5, atol=1e-6 * max(scale, 1e-30), equal_nan=True)
            names += [] if close else [name]
    return names


def finite_differences(subject: Subject) -> Outcome:
    """Run ``torch.autograd.gradcheck`` on float64 copies of inputs, parameters and buffers."""
    inputs = subject.copies(require_grad=True, dtype=torch.float64)
    leaves = [tensor for _, tensor in tensors(inputs) if tensor.requires_grad]
    if not leaves:
        return [], "not checked: no floating input"

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        with isolated(subject, dtype=torch.float64):
            torch.manual_seed(0)  # the same dropout for each of the many calls
            return tuple(_differentiable(subject.run(_replaced(inputs, leaves, values))))

    try:
        if not function(*leaves):
            return [], "nothing differentiable"
        fast = sum(leaf.numel() for leaf in leaves) > _SMALL
        torch.autograd.gradcheck(function, tuple(leaves), fast_mode=fast, nondet_tol=1e-9)
        return [], "ok"
    except Exception as error:
        mismatch = type(error).__name__ == "GradcheckError"
        finding = Finding("DP051", "error" if mismatch else "warning", first_line(error))
        return [finding], f"fails: {first_line(error)}"


def _replaced(inputs: Any, leaves: Sequence[Tensor], values: Sequence[Tensor]) -> Any:
    swap = {id(leaf): value for leaf, value in zip(leaves, values, strict=True)}
    return map_tensors(inputs, lambda tensor: swap.get(id(tensor), tensor))
