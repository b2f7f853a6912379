"""Detections of the same image made one list: of an ensemble's models, or of the tiles that it was cut into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from detpost import kernels
from detpost.detections import Detections, clear_invalid
from detpost.selection import select_top_k

__all__ = ["merge", "weighted_boxes"]

Confidence = Literal["avg", "max", "box_and_model_avg", "absent_model_aware_avg"]
Method = Literal["nms", "nmm", "wbf"]
Metric = Literal["iou", "ios"]
_CONFIDENCES = ("avg", "max", "box_and_model_avg", "absent_model_aware_avg")


def weighted_boxes(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    labels: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    iou_threshold: float = 0.55,
    skip_threshold: float = 0.0,
    *,
    confidence: Confidence = "avg",
    allow_overflow: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fuse what several models found in one image: weighted box fusion.

    Equal to ``ensemble_boxes.weighted_boxes_fusion``: boxes are swapped upright and clipped to [0, 1]; those without
    area and those whose score is below ``skip_threshold`` are left out. By score times weight, best first, each box
    joins the cluster of its label whose mean box it overlaps most, if by more than ``iou_threshold``, or begins one. A
    mean is weighed by these scores. Of equal ones the later box goes first, as it does there in short lists (in longer
    ones the order there is that of an unstable sort).

    It differs where that package gives no answer: NaN is an error, and where all scores of a cluster are 0 its first
    box stands for it, not NaN.

    Args:
        boxes: for each model (D, 4), floating, xyxy divided by the image's width and height.
        scores: for each model (D,), floating.
        labels: for each model (D,), integer.
        weights: for each model, at least 0 and one of them above; ``None``: 1 each.
        iou_threshold: in [0, 1].
        skip_threshold: boxes with a score below are left out.
        confidence: what a cluster scores, from its n boxes' weighted scores s. ``"avg"``: mean of s, times n (or the
            number of models, if that is less), divided by the sum of the weights. ``"max"``: greatest s, divided by
            the greatest weight. ``"box_and_model_avg"``: sum of s divided by the boxes' weights, times the share that
            the cluster's models have of all weights. ``"absent_model_aware_avg"``: sum of s divided by the boxes'
            weights and those of the models that are not in the cluster.
        allow_overflow: with ``"avg"``, multiply by n even where it is more than the number of models: scores may
            exceed 1.

    Returns:
        Boxes (M, 4), scores (M,) and labels (M,), best first; the floating dtype that came, float32 at least, and
        int64.

    Raises:
        TypeError: something that is not a list of tensors of these dtypes, or a threshold that is no number.
        ValueError: shapes or list lengths that do not fit, NaN, weights, a threshold or a ``confidence`` that cannot
            be.

    Source:
        Solovyev, Wang and Gabruseva, "Weighted boxes fusion: ensembling boxes from different object detection models",
        Image and Vision Computing 107, 2021.

    Example:
        >>> one, other = torch.tensor([[0.1, 0.1, 0.5, 0.5]]), torch.tensor([[0.1, 0.1, 0.5, 0.6]])
        >>> scores, labels = [torch.tensor([0.9]), torch.tensor([0.3])], [torch.tensor([7]), torch.tensor([7])]
        >>> weighted_boxes([one, other], scores, labels)
        (tensor([[0.1000, 0.1000, 0.5000, 0.5250]]), tensor([0.6000]), tensor([7]))
    """
    _check_models(boxes, scores, labels)
    shares = _checked_weights(weights, len(boxes))
    limit = _checked_number("iou_threshold", iou_threshold, 0.0, 1.0)
    skip = _checked_number("skip_threshold", skip_threshold, -math.inf, math.inf)
    _check_confidence(confidence)
    corners, raw, number = torch.cat(tuple(boxes)), torch.cat(tuple(scores)), torch.cat(tuple(labels)).to(torch.int64)
    _check_numbers(boxes, scores, corners, raw)
    inside = _in_unit_square(corners.to(torch.float64))  # (N, 4)
    area = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1])
    wide = raw.to(torch.float64)
    laid = _LaidOut(inside, wide, number, (raw >= skip) & (area != 0), _numbered(boxes))
    # Of equal scores the later first: the walk takes the lower index, so it is given the boxes backwards.
    laid = _LaidOut(*(values.flip(0).unsqueeze(0) for values in laid))
    begins, fused, found = _fused(laid, shares, limit, confidence, allow_overflow)
    chosen = _as_ensemble_boxes(laid, shares, begins, found.detach())
    return (
        fused[0, chosen].to(torch.promote_types(corners.dtype, torch.float32)),
        found[0, chosen].to(torch.promote_types(raw.dtype, torch.float32)),
        laid.labels[0, chosen],
    )


@overload
def merge(
    found: Detections | Sequence[Detections],
    offsets: Tensor | Sequence[Sequence[float]] | None = None,
    method: Method = "nms",
    threshold: float = 0.5,
    *,
    metric: Metric = "iou",
    class_agnostic: bool = False,
    weights: Sequence[float] | None = None,
    confidence: Confidence = "max",
) -> Detections: ...


@overload
def merge(
    found: Sequence[Mapping[str, Tensor]],
    offsets: Tensor | Sequence[Sequence[float]] | None = None,
    method: Method = "nms",
    threshold: float = 0.5,
    *,
    metric: Metric = "iou",
    class_agnostic: bool = False,
    weights: Sequence[float] | None = None,
    confidence: Confidence = "max",
) -> dict[str, Tensor]: ...


def merge(
    found: Detections | Sequence[Detections] | Sequence[Mapping[str, Tensor]],
    offsets: Tensor | Sequence[Sequence[float]] | None = None,
    method: Method = "nms",
    threshold: float = 0.5,
    *,
    metric: Metric = "iou",
    class_agnostic: bool = False,
    weights: Sequence[float] | None = None,
    confidence: Confidence = "max",
) -> Detections | dict[str, Tensor]:
    """Merge lists of detections that overlap: those of the tiles of an image, or of several models.

    On Detections, shapes depend on shapes alone and nothing is read on the host, so this compiles, goes through
    ``torch.export`` and can be captured. Off the CPU the merging methods take a few dozen operators for each slot:
    copy Detections of thousands of slots to the CPU first.

    Args:
        found: the lists, T of them. ``Detections`` of T rows: the tiles of one image. A sequence of T ``Detections``
            of B rows
            each: B images, each cut into T tiles or seen by T models. A sequence of T dicts with ``scores`` (D,),
                ``labels``
            (D,) and ``boxes`` (D, 4), as :meth:`Detections.to_list` and ``Detector.predict`` give them: one image.
        offsets: (T, 2), (x, y) of each tile's corner in the image, added to its boxes. ``None``: boxes are in one
            system.
        method: ``"nms"`` keeps the best of those that overlap, exactly as :func:`detpost.nms.nms`. ``"nmm"``, greedy
            non-maximum merging, lets it grow to hold the others: for objects that tiles cut in two. ``"wbf"`` takes
            the mean box, weighed by the scores, as :func:`weighted_boxes`.
        threshold: the overlap from which on boxes are one object: above it for ``"nms"`` and ``"wbf"``, at least it for
            ``"nmm"``, as the peers have it. In [0, 1]; for ``"nmm"`` above 0.
        metric: ``"iou"``: an overlap is a part of the union; ``"ios"``: of the smaller box. Not for ``"wbf"``.
        class_agnostic: whether detections of different labels are merged, too. The best one's label is kept.
        weights: for ``"wbf"``, of each list; ``None``: 1 each.
        confidence: for ``"wbf"``, as in :func:`weighted_boxes`, each list standing for a model. Tiles see different
            parts of an image: with ``"max"`` an object that one tile saw keeps its score.

    Returns:
        Detections, best first, of as many slots as there were altogether, for one image (a dict with those that are
        there, for dicts). ``queries`` says where each came from: its place among all slots, the lists one after
        another.

    Raises:
        TypeError: ``found`` is something else, or a number is none.
        ValueError: no list, shapes that do not fit, a method, metric or ``confidence`` that there is not, or a
            threshold outside its range.

    Source:
        Akyon, Altinuc and Temizel, "Slicing aided hyper inference", ICIP 2022; and those of :func:`detpost.nms.nms` and
        :func:`weighted_boxes`.

    Example:
        >>> left, right = torch.tensor([[4.0, 2.0, 8.0, 6.0]]), torch.tensor([[0.0, 2.0, 3.0, 6.0]])
        >>> of_tile = {"scores": torch.tensor([0.9]), "labels": torch.tensor([1])}
        >>> tiles = [{"boxes": left, **of_tile}, {"boxes": right, **of_tile}]
        >>> merge(tiles, offsets=[(0, 0), (6, 0)], method="nmm", metric="ios")["boxes"]
        tensor([[4., 2., 9., 6.]])
    """
    limit = _checked_merge(method, threshold, metric, weights, confidence)
    lists, as_dict = _lists_of(found)
    laid = _laid_out(lists, offsets)
    classes = None if class_agnostic else laid.labels
    boxes, scores = laid.boxes, laid.scores  # (B, N, 4), (B, N)
    if method == "nms":
        keep = kernels.nms(boxes, scores, classes, laid.valid, limit, metric == "ios")
    elif method == "nmm":
        keep, boxes = kernels.merge(boxes, scores, classes, laid.valid, limit, metric == "ios")
    else:
        wide = laid._replace(boxes=boxes.to(torch.float64), scores=scores.to(torch.float64), labels=classes)
        shares = _checked_weights(weights, len(lists))
        keep, fused, confidences = _fused(wide, shares, limit, confidence, allow_overflow=False)
        boxes, scores = fused.to(boxes.dtype), confidences.to(scores.dtype)
    merged = _best_first(boxes, scores, laid.labels, keep)
    if not as_dict:
        return merged
    names = ("scores", "labels", "boxes", "queries")
    return {name: values[0, merged.valid[0]] for name, values in zip(names, merged, strict=False)}


class _LaidOut(NamedTuple):
    """Boxes of one list, or of one list for each of B images."""

    boxes: Tensor  # (B, N, 4)
    scores: Tensor  # (B, N)
    labels: Any  # (B, N), int64, or None: one class
    valid: Tensor  # (B, N), bool
    lists: Tensor  # (B, N), int64: the number of the model or tile


# ----------------------------------------------------------------------------------------------------------------------
# Weighted fusion
# ----------------------------------------------------------------------------------------------------------------------


def _fused(
    laid: _LaidOut, weights: Sequence[float], threshold: float, confidence: Confidence, allow_overflow: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Fuse in float64; give where clusters begin (B, N), and there their boxes (B, N, 4) and scores (B, N)."""
    shares = _constants(weights, torch.float64, laid.scores.device)
    weighted = laid.scores * shares[laid.lists]
    owners, fused, means = kernels.fuse(laid.boxes, weighted, laid.labels, laid.valid, threshold)
    begins = owners == torch.arange(int(owners.shape[1]), device=owners.device)
    found = _confidences(laid, owners, weighted, means, shares, confidence, allow_overflow)
    return begins, fused, found


def _confidences(
    laid: _LaidOut,
    owners: Tensor,
    weighted: Tensor,
    means: Tensor,
    shares: Tensor,
    confidence: Confidence,
    allow_overflow: bool,
) -> Tensor:
    """Score clusters (B, N), in the order of operations of ensemble-boxes, and in float32 where it is that."""
    slot = owners.clamp(min=0)  # what is not valid adds nothing to it
    nothing = torch.zeros_like(weighted)
    members = nothing.scatter_add(1, slot, laid.valid.to(torch.float64))  # (B, N)
    models, total = int(shares.shape[0]), shares.sum()
    if confidence == "max":
        greatest = torch.where(members > 1, weighted.to(torch.float32).to(torch.float64), weighted)
        return greatest / shares.max()
    if confidence == "avg":
        return means * (members if allow_overflow else members.clamp(max=models)) / total
    own = torch.where(laid.valid, shares[laid.lists], 0.0)
    weight = nothing.scatter_add(1, slot, own)  # of a cluster's boxes
    weight = torch.where(members > 1, weight.to(torch.float32).to(torch.float64), weight)
    seen = torch.zeros(*owners.shape, models, dtype=torch.float64, device=owners.device).flatten(1)
    place = torch.where(laid.valid, slot * models + laid.lists, 0)
    # Counts, and not a flag: what is not valid adds 0 to the place that it has.
    seen = seen.scatter_add(1, place, laid.valid.to(torch.float64)).view(*owners.shape, models) > 0
    share_of_seen = torch.where(seen, shares, 0.0).sum(dim=-1)
    if confidence == "box_and_model_avg":
        return means * members / _or_one(weight) * share_of_seen / total
    return means * members / _or_one(weight + (total - share_of_seen))


def _or_one(values: Tensor) -> Tensor:
    """Replace 0, of slots that are no clusters or whose boxes weigh nothing: they score 0 by what is divided."""
    return torch.where(values == 0, 1.0, values)


def _as_ensemble_boxes(laid: _LaidOut, weights: Sequence[float], begins: Tensor, found: Tensor) -> Tensor:
    """Order clusters by score, equal ones as ensemble-boxes does: (M,), indices into one list that runs backwards.

    It lists the clusters label by label, labels as they first came, in each as they began; sorts stably; turns round.
    """
    # As many boxes as there are clusters, as in the package that it equals: this is the host's edge.
    # Of equal scores the later boxes come first, as clusters of one label begin.
    chosen = begins[0].nonzero()[:, 0]  # detpost: allow DP020
    weighted = (laid.scores * _constants(weights, torch.float64, found.device)[laid.lists]).detach()
    chosen = chosen[weighted[0, chosen].argsort(descending=True, stable=True)]
    kinds, kind = laid.labels[0].unique(return_inverse=True)
    last = int(laid.labels.shape[1]) - 1
    place = torch.arange(last, -1, -1, device=found.device)  # in the order in which the boxes came
    first = torch.full_like(kinds, last + 1).scatter_reduce(
        0, kind, torch.where(laid.valid[0], place, last + 1), "amin"
    )
    chosen = chosen[first[kind[chosen]].argsort(stable=True)]
    return chosen[found[0, chosen].argsort(stable=True)].flip(0)


def _in_unit_square(boxes: Tensor) -> Tensor:
    """Turn boxes (N, 4) upright and clip them to [0, 1]."""
    first, second = boxes[:, :2], boxes[:, 2:]
    return torch.cat((torch.minimum(first, second), torch.maximum(first, second)), dim=1).clamp(0, 1)


def _numbered(lists: Sequence[Tensor]) -> Tensor:
    """Number the elements of lists (D, ...) by their list: (N,), int64."""
    counts = [int(values.shape[0]) for values in lists]
    device = lists[0].device
    return torch.cat([torch.full((n,), i, dtype=torch.int64, device=device) for i, n in enumerate(counts)])


# ----------------------------------------------------------------------------------------------------------------------
# Lists of detections
# ----------------------------------------------------------------------------------------------------------------------


def _lists_of(found: Any) -> tuple[list[Detections], bool]:
    """Give a list of Detections of as many images each, and whether they were dicts."""
    wanted = "found must be Detections, or a sequence of Detections or of dicts with scores, labels and boxes"
    if isinstance(found, Detections):
        rows = zip(*(torch.split(values, 1) for values in found), strict=True)
        found = [Detections(*row) for row in rows] if int(found.scores.shape[0]) else []
    elif isinstance(found, (str, Tensor, Mapping)) or not isinstance(found, Sequence):
        raise TypeError(f"{wanted}; got {type(found).__name__}: put what is alone into a list")
    if not found:
        raise ValueError("found must have at least one list of detections; got none")
    if all(isinstance(image, Detections) for image in found):
        if len({int(image.scores.shape[0]) for image in found}) > 1:
            sizes = ", ".join(str(int(image.scores.shape[0])) for image in found)
            raise ValueError(f"found must hold Detections of the same images; got batches of {sizes}")
        return list(found), False
    for image in found:
        if not isinstance(image, Mapping) or not {"scores", "labels", "boxes"} <= image.keys():
            got = ", ".join(map(str, image)) if isinstance(image, Mapping) else type(image).__name__
            raise TypeError(f"{wanted}; got {got}")
        _check_lists("found", image["boxes"], image["scores"], image["labels"])
    return [_one_image(image) for image in found], True


def _one_image(image: Mapping[str, Tensor]) -> Detections:
    scores, labels, boxes = (image[name].unsqueeze(0) for name in ("scores", "labels", "boxes"))
    return Detections(scores, labels, boxes, labels, torch.ones_like(scores, dtype=torch.bool))


def _laid_out(lists: Sequence[Detections], offsets: Tensor | Sequence[Sequence[float]] | None) -> _LaidOut:
    """Lay lists of Detections end to end, boxes moved by their offsets."""
    boxes = [image.boxes for image in lists]
    if offsets is not None:
        moves = offsets if isinstance(offsets, Tensor) else _pairs(offsets, boxes[0].device)
        if moves.shape != (len(lists), 2):
            got = tuple(moves.shape)
            raise ValueError(f"offsets must have shape (T, 2) = {(len(lists), 2)}, (x, y) for each list; got {got}")
        moves = moves.to(boxes[0]).repeat(1, 2)  # (T, 4)
        boxes = [box + move for box, move in zip(boxes, moves.unbind(0), strict=True)]
    scores = torch.cat([image.scores for image in lists], dim=1)  # (B, N)
    numbers = [torch.full_like(image.labels, i, dtype=torch.int64) for i, image in enumerate(lists)]
    return _LaidOut(
        boxes=torch.cat(boxes, dim=1),
        scores=scores,
        labels=torch.cat([image.labels for image in lists], dim=1).to(torch.int64),
        valid=torch.cat([image.valid for image in lists], dim=1),
        lists=torch.cat(numbers, dim=1),
    )


def _pairs(offsets: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    if isinstance(offsets, str) or not all(len(pair) == 2 for pair in offsets):
        raise ValueError(f"offsets must have shape (T, 2), (x, y) for each list; got {offsets!r}")
    return _constants([float(number) for pair in offsets for number in pair], torch.float32, device).view(-1, 2)


def _constants(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Put numbers on a device: (n,). Not by a copy, which waits for a GPU, and which no CUDA graph captures."""
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.cat([torch.full((1,), number, dtype=dtype, device=device) for number in numbers])


def _best_first(boxes: Tensor, scores: Tensor, labels: Tensor, keep: Tensor) -> Detections:
    """Order slots by score, those that are not kept last and empty."""
    places = int(scores.shape[1])
    order = select_top_k(torch.where(keep, scores, -math.inf), max(1, places))  # (B, N)
    valid = keep.gather(1, order)
    corners = boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
    return clear_invalid(scores.gather(1, order), labels.gather(1, order), corners, order, valid)


# ----------------------------------------------------------------------------------------------------------------------
# What came
# ----------------------------------------------------------------------------------------------------------------------


def _check_models(boxes: Any, scores: Any, labels: Any) -> None:
    for name, values in (("boxes", boxes), ("scores", scores), ("labels", labels)):
        if isinstance(values, (Tensor, str)) or not isinstance(values, Sequence):
            raise TypeError(
                f"{name} must be a list of one tensor for each model; got {type(values).__name__}: wrap it in []"
            )
    if not len(boxes) == len(scores) == len(labels) or not boxes:
        got = f"{len(boxes)}, {len(scores)} and {len(labels)}"
        raise ValueError(f"boxes, scores and labels must have one tensor for each of as many models; got {got}")
    for model, lists in enumerate(zip(boxes, scores, labels, strict=True)):
        _check_lists(f"model {model}", *lists)


def _check_lists(where: str, boxes: Any, scores: Any, labels: Any) -> None:
    for name, values, shape in (("boxes", boxes, "(D, 4)"), ("scores", scores, "(D,)")):
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"{where}: {name} must be a floating tensor of shape {shape}; got {got}")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{where}: labels must be an integer tensor of shape (D,); got {got}: .long() makes it one")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{where}: boxes must have shape (D, 4); got {tuple(boxes.shape)}")
    for name, values in (("scores", scores), ("labels", labels)):
        if values.shape != boxes.shape[:1]:
            raise ValueError(
                f"{where}: {name} must have shape (D,) = {tuple(boxes.shape[:1])}; got {tuple(values.shape)}"
            )


def _check_numbers(boxes: Sequence[Tensor], scores: Sequence[Tensor], all_boxes: Tensor, all_scores: Tensor) -> None:
    """Refuse NaN, which ensemble-boxes lets swallow boxes, and infinite scores, which no mean can be weighed by."""
    if not bool(all_boxes.isnan().any() | ~all_scores.isfinite().all()):
        return
    for model, (box, score) in enumerate(zip(boxes, scores, strict=True)):
        bad = (box.isnan().any(dim=1) | ~score.isfinite()).nonzero()  # detpost: allow DP020
        if len(bad):
            row = int(bad[0])
            raise ValueError(
                f"boxes must not be NaN, and scores must be finite; got {box[row].tolist()} and {float(score[row])} "
                f"from model {model}, row {row}: leave such rows out"
            )


def _checked_weights(weights: Sequence[float] | None, models: int) -> list[float]:
    if weights is None:
        return [1.0] * models
    numbers = [float(weight) for weight in weights]
    if len(numbers) != models:
        raise ValueError(f"weights must be one number for each of {models} models; got {len(numbers)}")
    if not all(0 <= number < math.inf for number in numbers) or not any(numbers):
        raise ValueError(f"weights must be finite and at least 0, one of them above; got {numbers}")
    return numbers


def _checked_number(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not least <= value <= most:
        wanted = "a number" if math.isinf(most) else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{name} must be {wanted}; got {value}")
    return float(value)


def _check_confidence(confidence: str) -> None:
    if confidence not in _CONFIDENCES:
        raise ValueError(f"confidence must be one of {', '.join(_CONFIDENCES)}; got {confidence!r}")


def _checked_merge(method: str, threshold: Any, metric: str, weights: Any, confidence: str) -> float:
    for name, value, known in (("method", method, ("nms", "nmm", "wbf")), ("metric", metric, ("iou", "ios"))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    _check_confidence(confidence)
    if method == "wbf" and metric != "iou":
        raise ValueError(f"metric must be iou with method='wbf'; got {metric!r}: nms and nmm take it")
    if method != "wbf" and weights is not None:
        raise ValueError(f"weights go with method='wbf' alone; got method={method!r}")
    limit = _checked_number("threshold", threshold, 0.0, 1.0)
    if method == "nmm" and limit == 0:
        raise ValueError("threshold must be above 0 with method='nmm', where every pair would reach it; got 0")
    return limit
