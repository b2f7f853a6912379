"""Keypoints of the kept queries, in pixels of the original image, as COCO's rows (x, y, v).

The third number is what the network gives: a probability for RF-DETR, whatever came for a head with visibility, and 1
for DETRPose, which predicts none. COCO's results take ``points.flatten(-2)`` as their ``keypoints``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from detpost.detections import Detections
from detpost.heads._gather import by_query, check, check_sizes, lookup_table

__all__ = ["DETRPoseKeypoints", "Keypoints", "RFDETRKeypoints"]

# Stands for log 0: its exponential is 0 beside any number, and no runtime makes NaN of it as of -inf minus -inf.
_LOG_ZERO = -1e30


class Keypoints(NamedTuple):
    """Keypoints of B images in K slots, beside the Detections that they belong to.

    Attributes:
        points: (B, K, N, 3), x and y in pixels (normalised without image sizes), and the probability that the keypoint
            can be found.
        scores: (B, K), the detections' scores, fused with how certain the keypoints are where that was asked for. The
            slots are not sorted again.
        precision: (B, K, N, 3), the Cholesky factor (log l11, l21, log l22) of each keypoint's precision matrix, in
            normalised coordinates; NaN for a keypoint that the class does not have, or that came without.
    """

    points: Tensor
    scores: Tensor
    precision: Tensor


_register_namedtuple(Keypoints, serialized_type_name="detpost.heads.Keypoints")


class DETRPoseKeypoints(nn.Module):
    """Gather and scale keypoints that every query predicts for one skeleton, as DETRPose does.

    Example:
        >>> from detpost import DetectionPostProcessor
        >>> post, decode = DetectionPostProcessor.from_preset("rtdetr", top_k=1), DETRPoseKeypoints()
        >>> sizes = torch.tensor([[100, 200]])
        >>> found = post(torch.tensor([[[0.0], [3.0]]]), torch.full((1, 2, 4), 0.5), sizes)
        >>> decode(found, torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 1.0, 0.25]]]), sizes)  # (B, Q, 2 N)
        tensor([[[[100.,  50.,   1.],
                  [200.,  25.,   1.]]]])
    """

    def forward(self, detections: Detections, keypoints: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """Decode.

        Args:
            detections: of B images in K slots.
            keypoints: floating, in units of the image: (B, Q, 2 N) with x and y in turn, (B, Q, N, 2), or (B, Q, N, 3)
                with a visibility that is handed on.
            image_sizes: (B, 2), (height, width) in pixels (DETRPose itself takes (width, height)); ``None`` leaves the
                keypoints normalised.

        Returns:
            (B, K, N, 3), rows x, y, v, float32 (float64 from float64); 0 in slots that are not valid. Differentiable.

        Raises:
            ValueError: shapes that do not fit, or tensors on different devices.
            TypeError: no Detections, or tensors of a wrong dtype.
        """
        check(detections, keypoints, "keypoints", {3: "(B, Q, 2 N)", 4: "(B, Q, N, 2 or 3)"})
        if keypoints.ndim == 3:
            if keypoints.shape[2] % 2:
                raise ValueError(
                    f"keypoints must have an even last dimension, x and y in turn; got {tuple(keypoints.shape)}"
                )
            keypoints = keypoints.reshape(*keypoints.shape[:2], keypoints.shape[2] // 2, 2)
        elif keypoints.shape[3] not in (2, 3):
            raise ValueError(f"keypoints must have shape (B, Q, N, 2 or 3); got {tuple(keypoints.shape)}")
        rows = _rows(detections, keypoints, detections.queries, detections.valid)  # (B, K, N, 2 or 3)
        if rows.shape[3] == 3:
            visible = rows[..., 2]
        else:
            visible = detections.valid.unsqueeze(-1).to(rows.dtype).expand(rows.shape[:3])
        return torch.stack((*_scaled(detections, rows, image_sizes), visible), dim=-1)


class RFDETRKeypoints(nn.Module):
    """Pick, scale and score keypoints as RF-DETR does (``PostProcess`` of rfdetr 1.11).

    Each query predicts the keypoints of every class; those of the detection's class are taken.

    Args:
        num_keypoints_per_class: how many keypoints each class has, in the order of the labels; 0 for one without.
        trace_alpha: how much uncertain keypoints lower the score; 0 leaves the scores as they are. With it, the score
            of every detection whose label is in the list becomes sigmoid(log score - alpha * log trace), trace being
            the expected squared error of its keypoints, weighted by the probability that each can be found.

    Raises:
        ValueError: no keypoints at all, a negative number of them, or a negative alpha.

    Example:
        >>> from detpost import DetectionPostProcessor
        >>> post, decode = DetectionPostProcessor.from_preset("rfdetr", top_k=1), RFDETRKeypoints([0, 2])
        >>> sizes = torch.tensor([[100, 200]])
        >>> found = post(torch.tensor([[[-9.0, 3.0]]]), torch.full((1, 1, 4), 0.5), sizes)
        >>> keypoints = torch.zeros(1, 1, 4, 3)  # (B, Q, 2 classes * 2 keypoints, x y findable)
        >>> keypoints[0, 0, 2:] = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.25, 0.0]])
        >>> decode(found, keypoints, sizes).points
        tensor([[[[100.0000,  50.0000,   0.5000],
                  [200.0000,  25.0000,   0.5000]]]])
    """

    counts: Tensor

    def __init__(self, num_keypoints_per_class: Sequence[int], trace_alpha: float = 0.2) -> None:
        super().__init__()
        counts = list(num_keypoints_per_class)
        if not counts or any(not isinstance(count, int) or count < 0 for count in counts) or not any(counts):
            raise ValueError(f"num_keypoints_per_class must hold whole numbers, one of them above 0; got {counts}")
        if not trace_alpha >= 0:
            raise ValueError(f"trace_alpha must be at least 0; got {trace_alpha}")
        self.num_keypoints_per_class = counts
        self.trace_alpha = trace_alpha
        self.register_buffer("counts", lookup_table(counts), persistent=False)

    def forward(self, detections: Detections, keypoints: Tensor, image_sizes: Tensor | None = None) -> Keypoints:
        """Decode.

        Args:
            detections: of B images in K slots.
            keypoints: (B, Q, classes * N, D), floating, N the greatest number of keypoints of a class, D at least 3:
                x, y in units of the image, the logit that it can be found, and with D at least 7 in places 4 to 6 the
                Cholesky factor of its precision (log l11, l21, log l22).
            image_sizes: (B, 2), (height, width) in pixels; ``None`` leaves the keypoints normalised.

        Returns:
            Keypoints, float32 (float64 from float64); 0 in slots that are not valid and for keypoints that the class
            does not have (their precision is NaN). Differentiable.

        Raises:
            ValueError: shapes that do not fit, or tensors on different devices.
            TypeError: no Detections, or tensors of a wrong dtype.
        """
        classes, most = len(self.num_keypoints_per_class), max(self.num_keypoints_per_class)
        check(detections, keypoints, "keypoints", {4: "(B, Q, classes * N, D)"})
        if keypoints.shape[2] != classes * most or keypoints.shape[3] < 3:
            raise ValueError(
                f"keypoints must have shape (B, Q, {classes} classes * {most}, 3 or more); got {tuple(keypoints.shape)}"
            )
        # Not `labels < classes` alone: slots that are not valid have label -1.
        has_class = detections.valid & (detections.labels < classes)  # (B, K)
        label = torch.where(has_class, detections.labels, 0)
        by_class = keypoints.reshape(keypoints.shape[0], -1, most, keypoints.shape[3])  # (B, Q * classes, N, D)
        rows = _rows(detections, by_class, detections.queries.clamp(min=0) * classes + label, has_class)
        count = torch.where(has_class, self.counts[label], 0)
        active = torch.arange(most, device=rows.device) < count.unsqueeze(-1)  # (B, K, N)
        x, y = _scaled(detections, rows, image_sizes)
        points = torch.where(active.unsqueeze(-1), torch.stack((x, y, rows[..., 2].sigmoid()), dim=-1), 0.0)
        missing = torch.where(detections.valid, torch.nan, 0.0).to(rows.dtype)[..., None, None]
        if keypoints.shape[3] < 7:
            return Keypoints(points, detections.scores.clone(), missing.expand(points.shape).clone())
        precision = torch.where(active.unsqueeze(-1), rows[..., 4:7], missing)
        if self.trace_alpha == 0:
            return Keypoints(points, detections.scores.clone(), precision)
        fused = self._fused(detections.scores, rows, active)
        return Keypoints(points, torch.where(has_class, fused, detections.scores), precision)

    def _fused(self, scores: Tensor, rows: Tensor, active: Tensor) -> Tensor:
        """Lower the scores (B, K) by the expected squared error of the active keypoints; in logarithms throughout."""
        log_l11, cross, log_l22 = rows[..., 4:7].unbind(-1)  # (B, K, N) each
        # trace((L L^T)^-1) = l11^-2 + l22^-2 + l21^2 l11^-2 l22^-2
        skew = 2 * (cross.abs().clamp(min=1e-12).log() - log_l11 - log_l22)
        log_trace = torch.stack((-2 * log_l11, -2 * log_l22, skew), dim=-1).logsumexp(dim=-1)
        log_weight = rows[..., 2].sigmoid().clamp(min=1e-12).log()
        weighted = torch.where(active, log_trace + log_weight, _LOG_ZERO).logsumexp(dim=-1)
        mean = weighted - torch.where(active, log_weight, _LOG_ZERO).logsumexp(dim=-1)  # 0 without active ones
        # Neither 0 nor 1 comes out: the gradient of log 0 is not finite, and a score of 1 would mean certainty.
        info = torch.finfo(scores.dtype)
        fused = (scores.clamp(min=info.tiny).log() - self.trace_alpha * mean.to(scores.dtype)).sigmoid()
        return fused.clamp(max=1 - info.eps / 2)

    def extra_repr(self) -> str:
        """Show the arguments in ``repr``."""
        return f"{self.num_keypoints_per_class}, trace_alpha={self.trace_alpha}"


def _rows(detections: Detections, values: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
    """Gather (B, Q, N, D) by row (B, K), in float32 at least, 0 where not valid."""
    gathered = by_query(values, rows).to(torch.promote_types(values.dtype, torch.float32))
    return torch.where(valid[..., None, None], gathered, 0.0)


def _scaled(detections: Detections, rows: Tensor, image_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale x and y of (B, K, N, D) to pixels: (B, K, N) each."""
    if image_sizes is None:
        return rows[..., 0], rows[..., 1]
    check_sizes(detections, image_sizes)
    height, width = image_sizes.to(rows.dtype)[..., None, None].unbind(1)  # (B, 1, 1) each
    return rows[..., 0] * width, rows[..., 1] * height
