"""The decode of a plain call in one step, ahead of the dispatch: Python's objects go to C++, and results come back.

For one image all that stands between a call and the kernel takes longer than the kernel. So a call that is as most are
(on the CPU, contiguous, nothing to differentiate, nobody watching) is told from others in C++, and makes no object but
its results. Every other call is answered by what the caller gives for it: its checks, and then
:mod:`detpost.kernels.dispatch`, which computes the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from detpost import tensors
from detpost.detections import Detections
from detpost.kernels.cpu.decode import address, plan
from detpost.spec import DecodeSpec

__all__ = ["BOX_SCORE_LABEL", "LABEL_SCORE_BOX", "DirectDecode", "selected_rows"]

# Columns of the rows of :meth:`DirectDecode.rows`.
LABEL_SCORE_BOX: Final = 1
BOX_SCORE_LABEL: Final = 2
_DICT = 0


@functools.cache
def _extension() -> Any | None:
    """Give the extension with the decode of the kernels bound to it, or ``None``."""
    found, at = tensors.extension(), address()
    if found is None or at is None:
        return None
    found.bind_decode(at)
    return found


class DirectDecode:
    """The decode of one spec: of plain calls here, of all others by ``otherwise``, which each method is given.

    Args:
        spec: what the decode does.
        changes: of what the kernel is told, as :func:`detpost.kernels.cpu.decode.plan` takes it.

    Example:
        >>> from detpost import DetectionPostProcessor
        >>> direct = DirectDecode(DecodeSpec(top_k=1))
        >>> logits, boxes = torch.tensor([[[3.0]]]), torch.tensor([[[0.5, 0.5, 1.0, 1.0]]])
        >>> direct.decode(logits, boxes, None, DetectionPostProcessor(direct.spec)).labels
        tensor([[0]])
    """

    def __init__(self, spec: DecodeSpec, **changes: Any) -> None:
        self.spec = spec
        self._plan = plan(spec, **changes)

    def decode(self, logits: Any, boxes: Any, sizes: Any, otherwise: Callable[..., Detections]) -> Detections:
        """Decode into padded tensors, as :class:`detpost.DetectionPostProcessor` does.

        Args:
            logits: (B, Q, C).
            boxes: (B, Q, 4).
            sizes: (B, 2), or ``None``.
            otherwise: given logits, boxes and sizes, answers what is not a plain call.

        Returns:
            The detections.
        """
        found = _extension() if tensors.is_plain_call() else None
        fields = None
        if found is not None:
            fields = found.decode(self._plan, torch.get_num_threads(), logits, boxes, sizes)
        return otherwise(logits, boxes, sizes) if fields is None else Detections._make(fields)

    def dicts(
        self,
        logits: Any,
        boxes: Any,
        sizes: Any,
        otherwise: Callable[..., list[dict[str, Tensor]]],
        names: tuple[str, ...] = ("scores", "labels", "boxes", "queries"),
        *,
        threshold: Any = None,
        all_slots: bool = False,
        by_query: bool = False,
    ) -> list[dict[str, Tensor]]:
        """Decode into a dict for each image, exact in size.

        Args:
            logits: (B, Q, C).
            boxes: (B, Q, 4).
            sizes: (B, 2), or ``None``.
            otherwise: given logits, boxes and sizes, answers what is not a plain call.
            names: of ``scores``, ``labels``, ``boxes`` and ``queries`` those that are wanted, in their order.
            threshold: keep ``score > threshold``; ``None`` goes by the spec.
            all_slots: give the slots that are not valid, too.
            by_query: in the order of the queries in place of the scores.

        Returns:
            The dicts.
        """
        found = _extension() if tensors.is_plain_call() else None
        images: list[dict[str, Tensor]] | None = None
        if found is not None:
            threads = torch.get_num_threads()
            images = found.per_image(
                self._plan, threads, logits, boxes, sizes, _DICT, names, threshold, all_slots, by_query
            )
        return otherwise(logits, boxes, sizes) if images is None else images

    def rows(
        self,
        logits: Any,
        boxes: Any,
        sizes: Any,
        otherwise: Callable[..., list[Tensor]],
        layout: int,
        threshold: Any,
    ) -> list[Tensor]:
        """Decode into rows of six columns for each image, exact in size.

        Args:
            logits: (B, Q, C); (B, Q, 4 + C), boxes and then scores, where the changes say ``takes_scores``.
            boxes: (B, Q, 4); ``None`` where the logits hold them.
            sizes: (B, 2), or ``None``.
            otherwise: given logits, boxes and sizes, answers what is not a plain call.
            layout: ``LABEL_SCORE_BOX`` or ``BOX_SCORE_LABEL``.
            threshold: keep ``score > threshold``.

        Returns:
            For each image (D, 6), float32, best first.
        """
        found = _extension() if tensors.is_plain_call() else None
        images: list[Tensor] | None = None
        if found is not None:
            threads = torch.get_num_threads()
            images = found.per_image(self._plan, threads, logits, boxes, sizes, layout, None, threshold, False, False)
        return otherwise(logits, boxes, sizes) if images is None else images


def selected_rows(
    rows: Any, sizes: Any, otherwise: Callable[[], list[Tensor]], *, threshold: Any, most: int
) -> list[Tensor]:
    """Take the detections that a head has selected: those above a threshold, their boxes as corners in pixels.

    Args:
        rows: (B, K, 6): cxcywh in units of the image, score, class.
        sizes: (height, width) of each image in pixels, a tensor (B, 2) or a list of pairs.
        otherwise: answers what is not a plain call.
        threshold: keep ``score > threshold``.
        most: keep no more of an image than its first so many.

    Returns:
        For each image (D, 6), float32: x1, y1, x2, y2, score, class, in the order in which they came.
    """
    found = _extension() if tensors.is_plain_call() else None
    images: list[Tensor] | None = None if found is None else found.selected(rows, sizes, threshold, most)
    return otherwise() if images is None else images
