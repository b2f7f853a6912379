"""In place of the ``postprocess`` of Ultralytics' ``RTDETRPredictor``: the same rows x1, y1, x2, y2, conf, cls.

Its decoder head gives (B, Q, 4 + C): normalised cxcywh boxes and scores after the sigmoid (:func:`postprocess`). Since
8.4 it selects by itself and gives (B, K, 6): box, score, class (:func:`postprocess_selected`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from detpost import boxes as box_ops
from detpost import kernels
from detpost.detections import Detections, clear_invalid, split_by_image
from detpost.integrations.conventions import KindError, MisfitError, check_threshold, size_rows
from detpost.selection import best_class, select_top_k
from detpost.spec import DecodeSpec

__all__ = ["decode", "patched", "postprocess", "postprocess_selected"]

_Predictor = TypeVar("_Predictor")


def decode(
    preds: Tensor, image_sizes: Tensor, conf: float = 0.25, classes: Sequence[int] | None = None, max_det: int = 300
) -> Detections:
    """Decode a head's output with static shapes: the best class of each query, the best ``max_det`` queries.

    Args:
        preds: (B, Q, 4 + C), floating: cxcywh in units of the image, then scores within [0, 1].
        image_sizes: (B, 2), (height, width) of each original image in pixels.
        conf: keep ``score > conf``.
        classes: keep these classes alone; ``None`` keeps all.
        max_det: most detections kept per image, at least 1.

    Returns:
        Detections with K = min(max_det, Q) slots, best first, equal scores by the lower query. NaN is never valid.

    Raises:
        ValueError: a shape that does not fit, or a ``max_det`` below 1.
        TypeError: tensors that are not floating.

    Example:
        >>> preds = torch.tensor([[[0.5, 0.5, 1.0, 1.0, 0.1, 0.75]]])
        >>> found = decode(preds, torch.tensor([[10, 20]]))
        >>> found.labels, found.scores, found.boxes
        (tensor([[1]]), tensor([[0.7500]]), tensor([[[ 0.,  0., 20., 10.]]]))
    """
    _check_kind(preds)
    _check(preds, "4 + C", preds.ndim == 3 and preds.shape[2] > 4, conf)
    scores = preds[..., 4:].to(torch.promote_types(preds.dtype, torch.float32))
    best = best_class(scores)  # (B, Q)
    best_scores = scores.gather(2, best.unsqueeze(-1)).squeeze(-1)
    # A query of another class is like NaN: never ahead of a number, never valid.
    keys = torch.where(_allowed(best, classes), best_scores, math.nan)
    queries = select_top_k(keys, max_det)  # (B, K)
    kept = keys.gather(1, queries)
    boxes = preds[..., :4].gather(1, queries.unsqueeze(-1).expand(-1, -1, 4)).to(scores.dtype)
    corners = box_ops.scale(box_ops.convert(boxes, "cxcywh", "xyxy"), image_sizes)
    valid = ~kept.isnan() & (kept > conf)
    return clear_invalid(kept, best.gather(1, queries), corners, queries, valid)


def postprocess(
    preds: Tensor | Sequence[Any],
    orig_shapes: Tensor | Sequence[Any],
    conf: float = 0.25,
    classes: Sequence[int] | None = None,
    max_det: int = 300,
) -> list[Tensor]:
    """Give the rows of each image from a head's output (B, Q, 4 + C).

    Args:
        preds: the tensor, or a list or tuple that begins with it. See :func:`decode`.
        orig_shapes: (height, width) of each original image, a tensor (B, 2) or a list; ``orig_img.shape[:2]``.
        conf: keep ``score > conf``.
        classes: keep these classes alone; ``None`` keeps all.
        max_det: most detections kept per image, at least 1.

    Returns:
        For each image (D, 6): x1, y1, x2, y2 in pixels, conf, cls; best first. What ``Results(boxes=...)`` takes.

    Raises:
        ValueError: shapes that do not fit, or a ``max_det`` below 1.
        TypeError: tensors that are not floating.

    Source:
        ``ultralytics/models/rtdetr/predict.py`` of ultralytics 8.3. Where ours differs on purpose stands in
        ``docs/drop-ins.md``.

    Example:
        >>> postprocess(torch.tensor([[[0.5, 0.5, 1.0, 1.0, 0.25, 0.75]]]), [(10, 20)])
        [tensor([[ 0.0000,  0.0000, 20.0000, 10.0000,  0.7500,  1.0000]])]
    """
    first = _first(preds)

    def otherwise(*_: Any) -> list[Tensor]:
        return _checked(first, orig_shapes, conf, classes, max_det)

    if classes is None and type(max_det) is int and max_det > 0:
        return _direct(max_det).rows(first, None, orig_shapes, otherwise, kernels.BOX_SCORE_LABEL, conf)
    return otherwise()


def _checked(first: Tensor, orig_shapes: Any, conf: float, classes: Sequence[int] | None, max_det: int) -> list[Tensor]:
    """Check what is not a plain call, and decode it."""
    found = decode(first, size_rows(orig_shapes, first, "orig_shapes"), conf, classes, max_det)
    rows = torch.cat((found.boxes, found.scores.unsqueeze(-1), found.labels.unsqueeze(-1)), dim=-1)  # (B, K, 6)
    return [image for (image,) in split_by_image(found.valid, rows)]


def postprocess_selected(
    preds: Tensor | Sequence[Any],
    orig_shapes: Tensor | Sequence[Any],
    conf: float = 0.25,
    classes: Sequence[int] | None = None,
    max_det: int = 300,
) -> list[Tensor]:
    """Give the rows of each image from the output of a head that selects by itself (ultralytics 8.4).

    Args:
        preds: (B, K, 6), floating: cxcywh in units of the image, score, class; or a list or tuple that begins with it.
        orig_shapes: as in :func:`postprocess`.
        conf: keep ``score > conf``.
        classes: keep these classes alone; ``None`` keeps all.
        max_det: most rows kept per image: the first ones, for the head has put the best first.

    Returns:
        As :func:`postprocess`, in the head's order.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a tensor that is not floating.

    Source:
        ``ultralytics/models/rtdetr/predict.py`` of ultralytics 8.4.

    Example:
        >>> postprocess_selected(torch.tensor([[[0.5, 0.5, 1.0, 1.0, 0.75, 1.0]]]), [(10, 20)])
        [tensor([[ 0.0000,  0.0000, 20.0000, 10.0000,  0.7500,  1.0000]])]
    """
    first = _first(preds)

    def otherwise() -> list[Tensor]:
        return _checked_selected(first, orig_shapes, conf, classes, max_det)

    if classes is None and type(max_det) is int:
        return kernels.selected_rows(first, orig_shapes, otherwise, threshold=conf, most=max_det)
    return otherwise()


def _checked_selected(
    first: Tensor, orig_shapes: Any, conf: float, classes: Sequence[int] | None, max_det: int
) -> list[Tensor]:
    """Check what is not a plain call, and take its rows."""
    _check(first, "6", first.ndim == 3 and first.shape[2] == 6, conf)
    values = first.to(torch.promote_types(first.dtype, torch.float32))
    corners = box_ops.convert(values[..., :4], "cxcywh", "xyxy")
    corners = box_ops.scale(corners, size_rows(orig_shapes, first, "orig_shapes"))
    wanted = (values[..., 4] > conf) & _allowed(values[..., 5], classes)  # NaN is above nothing
    rows, most = torch.cat((corners, values[..., 4:]), dim=-1), min(max_det, first.shape[1])
    return [image for (image,) in split_by_image(wanted & (wanted.cumsum(dim=1) <= most), rows)]


@contextlib.contextmanager
def patched(predictor: _Predictor) -> Iterator[_Predictor]:
    """Let Ultralytics' RT-DETR predictor, ``model.predictor``, decode with detpost inside a ``with`` block.

    ``conf``, ``classes`` and ``max_det`` come from the predictor's own arguments. Blocks may be nested, and the
    predictor is as before after each of them, also after an error.

    Args:
        predictor: the predictor. ``model.predictor`` is made at the first ``predict``.

    Yields:
        The same predictor.

    Raises:
        ImportError: ultralytics is not installed.
        TypeError: something without a ``postprocess``.
    """
    target: Any = predictor
    if not callable(getattr(target, "postprocess", None)):
        raise TypeError(f"expected an RTDETRPredictor; got {type(predictor).__name__}: give model.predictor")
    results_module, head_module, ops = (
        _ultralytics(name) for name in ("engine.results", "nn.modules.head", "utils.ops")
    )
    # With two classes both layouts are six wide, so the head's own code says which it is.
    selects = hasattr(head_module.RTDETRDecoder, "postprocess")

    def stand_in(preds: Any, img: Tensor, orig_imgs: Any) -> list[Any]:
        if not isinstance(orig_imgs, list):
            orig_imgs = ops.convert_torch2numpy_batch(orig_imgs)
            orig_imgs = orig_imgs[..., ::-1] if selects else orig_imgs  # 8.4 gives its results BGR images
        arguments = target.args
        shapes = [image.shape[:2] for image in orig_imgs]
        rows = (postprocess_selected if selects else postprocess)(
            preds, shapes, arguments.conf, arguments.classes, arguments.max_det
        )
        return [
            results_module.Results(image, path=path, names=target.model.names, boxes=boxes)
            for image, path, boxes in zip(orig_imgs, target.batch[0], rows, strict=True)
        ]

    before = {name: value for name, value in vars(target).items() if name == "postprocess"}
    target.postprocess = stand_in
    try:
        yield predictor
    finally:
        del target.postprocess
        vars(target).update(before)


def _ultralytics(name: str) -> Any:
    try:
        return importlib.import_module(f"ultralytics.{name}")
    except ImportError:
        raise ImportError("patched needs ultralytics: pip install ultralytics") from None


@functools.lru_cache(maxsize=16)
def _direct(max_det: int) -> kernels.DirectDecode:
    spec = DecodeSpec(selection="per_query", top_k=max_det)
    return kernels.DirectDecode(spec, takes_scores=True, takes_pairs=True, needs_sizes=True)


def _first(preds: Tensor | Sequence[Any]) -> Tensor:
    first: Any = preds[0] if isinstance(preds, (list, tuple)) and len(preds) > 0 else preds
    _check_kind(first)
    return cast(Tensor, first)


def _check_kind(preds: Any) -> None:
    if not isinstance(preds, Tensor):
        raise KindError(f"preds must be a tensor, or a list or tuple that begins with one; got {type(preds).__name__}")
    if not preds.is_floating_point():
        raise KindError(f"preds must be floating; got {preds.dtype}")


def _allowed(labels: Tensor, classes: Sequence[int] | None) -> Tensor:
    """Tell which labels (B, K) are among ``classes``."""
    if classes is None:
        return torch.ones_like(labels, dtype=torch.bool)
    return torch.isin(labels, torch.tensor(list(classes), dtype=labels.dtype, device=labels.device))


def _check(preds: Any, last: str, fits: bool, conf: Any) -> None:
    if not fits:
        raise MisfitError(f"preds must have shape (B, Q, {last}); got {tuple(preds.shape)}")
    check_threshold(conf, "conf")
