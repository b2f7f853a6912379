"""The losses, forward and backward, and the distance transform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import ROTATED, Case, Size, backward, blobs, is_installed, no_grad, with_kernel

__all__ = ["distances", "erosions", "hausdorff_95", "surface_dices", "trade_off", "transforms", "transforms_of_noise"]


def _class_inputs(shape: Size, device: str) -> tuple[list[Tensor], list[Tensor]]:
    inputs = [blobs(shape, seed, device) for seed in range(ROTATED)]
    return inputs, [blobs(shape, 100 + seed, device).argmax(dim=1, keepdim=True) for seed in range(ROTATED)]


def erosions(shape: Size, device: str) -> dict[str, Case]:
    """Give the erosion loss beside kornia's."""
    import detpost.losses

    name = "HausdorffERLoss" if len(shape) == 4 else "HausdorffERLoss3D"
    inputs, targets = _class_inputs(shape, device)
    own = backward(getattr(detpost.losses, name)(), inputs, targets)
    contenders = {"detpost": own, "detpost (aten)": with_kernel("aten", own)}
    if is_installed("kornia"):
        import kornia.losses

        contenders |= {"kornia": backward(getattr(kornia.losses, name)().to(device), inputs, targets)}
    return contenders


def distances(shape: Size, device: str) -> dict[str, Case]:
    """Give the distance-transform loss beside MONAI's."""
    import detpost.losses

    inputs = [blobs(shape, seed, device) for seed in range(ROTATED)]
    targets = [(blobs(shape, 100 + seed, device) > 0.5).float() for seed in range(ROTATED)]
    own = backward(detpost.losses.HausdorffDTLoss(include_background=True), inputs, targets)
    contenders = {"detpost": own, "detpost (aten)": with_kernel("aten", own)}
    if is_installed("monai", "scipy"):
        from monai.losses import HausdorffDTLoss

        contenders |= {"MONAI": backward(HausdorffDTLoss(include_background=True), inputs, targets)}
    return contenders


def transforms(shape: Size, device: str) -> dict[str, Case]:
    """Give the exact Euclidean distance transform beside scipy's."""
    from detpost.losses import distance_transform_edt

    masks = [blobs((1, 1, *shape), seed, device) > 0.4 for seed in range(ROTATED)]
    own = no_grad(lambda i: distance_transform_edt(masks[i]))
    contenders: dict[str, Case] = {"detpost": own, "detpost (aten)": with_kernel("aten", own)}
    if is_installed("scipy"):
        from scipy import ndimage

        arrays = [mask[0, 0].cpu().numpy() for mask in masks]
        contenders |= {"scipy": lambda i: ndimage.distance_transform_edt(arrays[i])}
    return contenders


def transforms_of_noise(shape: Size, device: str) -> dict[str, Case]:
    """Give the same on noise, whose nearest zeros are all at hand: what suits scipy best."""
    from detpost.losses import distance_transform_edt

    masks = [
        (torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(seed)) > 0.5).to(device)
        for seed in range(ROTATED)
    ]
    contenders: dict[str, Case] = {"detpost": no_grad(lambda i: distance_transform_edt(masks[i]))}
    if is_installed("scipy"):
        from scipy import ndimage

        arrays = [mask[0, 0].cpu().numpy() for mask in masks]
        contenders |= {"scipy": lambda i: ndimage.distance_transform_edt(arrays[i])}
    return contenders


def hausdorff_95(shape: Size, device: str) -> dict[str, Case]:
    """Give the 95th percentile of the distances between two masks' surfaces beside MONAI's."""
    from detpost.metrics import hausdorff_distance

    own = functools.partial(hausdorff_distance, percentile=95)
    return _of_two_masks(own, "compute_hausdorff_distance", {"percentile": 95}, shape, device)


def surface_dices(shape: Size, device: str) -> dict[str, Case]:
    """Give the surface Dice of two masks beside MONAI's."""
    from detpost.metrics import surface_dice

    own = functools.partial(surface_dice, tolerance=2.0)
    return _of_two_masks(own, "compute_surface_dice", {"class_thresholds": [2.0]}, shape, device)


def _of_two_masks(
    metric: Callable[..., Tensor], name: str, options: dict[str, Any], shape: Size, device: str
) -> dict[str, Case]:
    """Give a metric of two masks beside MONAI's of a name."""
    a, b = ([blobs(shape, start + seed, device) > 0.5 for seed in range(ROTATED)] for start in (0, 100))
    own = no_grad(lambda i: metric(a[i], b[i]))
    contenders = {"detpost": own, "detpost (aten)": with_kernel("aten", own)}
    if is_installed("monai", "scipy"):
        import monai.metrics

        theirs = functools.partial(getattr(monai.metrics, name), include_background=True, **options)
        contenders |= {"MONAI": no_grad(lambda i: theirs(a[i], b[i]))}
    return contenders


def trade_off(shape: Size, device: str) -> dict[str, Case]:
    """Give the erosion loss written in place, out of place, and out of place and compiled.

    The one in place is run forward alone: it writes over what its own backward needs.
    """
    from detpost.losses import HausdorffERLoss

    inputs, targets = _class_inputs(shape, device)
    loss = HausdorffERLoss()
    compiled = torch.compile(HausdorffERLoss(), fullgraph=True)
    own = no_grad(lambda i: loss(inputs[i], targets[i]))
    contenders: dict[str, Case] = {
        "detpost": own,
        "out of place": with_kernel("aten", own),
        "out of place, compiled": with_kernel("aten", no_grad(lambda i: compiled(inputs[i], targets[i]))),
    }
    if is_installed("tests.reference.hausdorff_er"):
        from tests.reference.hausdorff_er import hausdorff_er_in_place

        contenders |= {"in place": no_grad(lambda i: hausdorff_er_in_place(inputs[i], targets[i]))}
    return contenders
