"""The boundary loss and the generalized surface loss as their papers define them, in NumPy and scipy."""

import numpy as np
from scipy import ndimage


def kervadec_map(mask, spacing):
    """Signed map of Kervadec et al. (2019): distance outside, one minus the distance inside; zero without the class."""
    if not mask.any():
        return np.zeros(mask.shape)
    outside = ndimage.distance_transform_edt(~mask, sampling=spacing)
    inside = ndimage.distance_transform_edt(mask, sampling=spacing)
    return np.where(mask, 1 - inside, outside)


def boundary_loss(probabilities, one_hot, spacing, channels):
    """Mean over images, the given channels and elements of probability times map."""
    products = [
        probabilities[image, channel] * kervadec_map(one_hot[image, channel] > 0.5, spacing)
        for image in range(len(one_hot))
        for channel in channels
    ]
    return np.mean(products)


def surface_map(mask, spacing):
    """Distance to the elements of the mask that touch something outside it, corners included; else the diagonal."""
    everywhere = ndimage.generate_binary_structure(mask.ndim, mask.ndim)
    surface = mask & ~ndimage.binary_erosion(mask, everywhere, border_value=1)
    if not surface.any():
        return np.full(mask.shape, np.linalg.norm(np.multiply(mask.shape, spacing)))
    return ndimage.distance_transform_edt(~surface, sampling=spacing)


def generalized_surface_loss(probabilities, one_hot, spacing, channels, weights=None, distances=None):
    """One minus the weighted share of squared distances that is kept, averaged over images (arXiv 2302.03868)."""
    losses = []
    for image in range(len(one_hot)):
        kept = whole = 0.0
        for order, channel in enumerate(channels):
            truth, predicted = one_hot[image, channel], probabilities[image, channel]
            distance = surface_map(truth > 0.5, spacing) if distances is None else distances[image, channel]
            weight = 1 / (truth.sum() ** 2 + 1) if weights is None else weights[order]
            worst = 1 - truth
            kept += weight * ((distance * (worst - predicted)) ** 2).sum()
            whole += weight * ((distance * (worst - truth)) ** 2).sum() + 1e-6
        losses.append(1 - kept / whole)
    return np.mean(losses)
