"""Values and gradients of a loss, as the tests of two families compare them."""

import torch


def value_and_gradients(loss, pred, *rest, **options):
    pred = pred.clone().requires_grad_()
    value = loss(pred, *rest, **options)
    weight = torch.linspace(-1, 1, value.numel()).reshape(value.shape) if value.dim() else None
    (gradient,) = torch.autograd.grad(value, pred, weight)
    return value.detach(), gradient
