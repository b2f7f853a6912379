"""The one container that everything flows through, and its conversions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from detpost import tensors
from detpost.boxes import convert

__all__ = ["INVALID", "Detections", "clear_invalid", "split_by_image"]

_T = TypeVar("_T")


class Detections(NamedTuple):
    """Detections of B images in K slots each, best first.

    Slots that are not valid read score 0, label -1, query -1 and box 0 0 0 0. A NamedTuple, so it passes through
    ``torch.compile``, ``torch.export`` and CUDA graphs. The conversions below copy to the host and drop what is not
    valid; nothing else here does.

    Attributes:
        scores: (B, K), float32 (float64 from float64 logits), within [0, 1].
        labels: (B, K), int64, class channel of the logits.
        boxes: (B, K, 4), float32 (float64 from float64 boxes), xyxy, in pixels of the original image where image sizes
            were given, else normalised.
        queries: (B, K), int64, index of the query that made the detection.
        valid: (B, K), bool.

    Example:
        >>> from detpost import DetectionPostProcessor
        >>> post = DetectionPostProcessor.from_preset("rtdetr", top_k=2, score_threshold=0.5)
        >>> found = post(torch.tensor([[[2.0, -2.0]]]), torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]))
        >>> found.labels, found.valid
        (tensor([[ 0, -1]]), tensor([[ True, False]]))
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    queries: Tensor
    valid: Tensor

    def to_list(self) -> list[dict[str, Tensor]]:
        """Give one dict per image, as torchvision and transformers do.

        Returns:
            For each image ``scores`` (D,), ``labels`` (D,), ``boxes`` (D, 4) and ``queries`` (D,), its D valid
            detections, best first, on the same device and still differentiable.

        Example:
            >>> from detpost import DetectionPostProcessor
            >>> post = DetectionPostProcessor.from_preset("rtdetr", top_k=2, score_threshold=0.5)
            >>> logits, boxes = torch.tensor([[[2.0, -2.0]]]), torch.tensor([[[0.5, 0.5, 1.0, 1.0]]])
            >>> post(logits, boxes, torch.tensor([[10, 20]])).to_list()[0]["boxes"]
            tensor([[ 0.,  0., 20., 10.]])
        """
        names = ("scores", "labels", "boxes", "queries")
        values = self.scores, self.labels, self.boxes, self.queries
        return tensors.split(names, self.valid, *values)

    def to_coco(
        self, image_ids: Sequence[int | str], category_ids: Sequence[int] | Mapping[int, int] | None = None
    ) -> list[dict[str, Any]]:
        """Give COCO results: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score``.

        Args:
            image_ids: the id of each of the B images.
            category_ids: the category id of each label, a sequence or a mapping; ``None`` takes the label itself.

        Returns:
            One dict per valid detection, image by image, best first; plain numbers, ready for ``json.dump``.

        Raises:
            ValueError: another number of ids than images, or a label without a category id.

        Example:
            >>> from detpost import DetectionPostProcessor
            >>> post = DetectionPostProcessor.from_preset("rtdetr", top_k=1)
            >>> boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0]]])
            >>> found = post(torch.tensor([[[0.0, -2.0]]]), boxes, torch.tensor([[10, 20]]))
            >>> found.to_coco([7], category_ids=[18, 44])
            [{'image_id': 7, 'category_id': 18, 'bbox': [0.0, 0.0, 20.0, 10.0], 'score': 0.5}]
        """
        if len(image_ids) != len(self.scores):
            raise ValueError(f"image_ids must have one id for each of {len(self.scores)} images; got {len(image_ids)}")
        ids = [_plain(image_id) for image_id in image_ids]
        corners = convert(self.boxes.detach(), "xyxy", "xywh")
        host = (values.tolist() for values in (self.valid, self.scores, self.labels, corners))  # detpost: allow DP010
        categories = _Categories(category_ids)
        return [
            {"image_id": image_id, "category_id": categories[label], "bbox": box, "score": score}
            for image_id, *image in zip(ids, *host, strict=True)
            for valid, score, label, box in zip(*image, strict=True)
            if valid
        ]

    def to_supervision(self, index: int, class_names: Sequence[str] | Mapping[int, str] | None = None) -> Any:
        """Give the detections of one image as ``supervision.Detections``.

        Args:
            index: which image.
            class_names: the name of each label; ``None`` takes the label itself as its name.

        Returns:
            ``supervision.Detections`` with ``xyxy``, ``confidence``, ``class_id``, ``data["class_name"]``, which
            supervision's annotators write, and ``data["query"]``.

        Raises:
            ImportError: supervision is not installed.
            ValueError: a label without a name.

        Example:
            >>> from detpost import DetectionPostProcessor
            >>> post = DetectionPostProcessor.from_preset("rtdetr", top_k=1)
            >>> found = post(torch.tensor([[[2.0, -2.0]]]), torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]))
            >>> found.to_supervision(0, ["cat", "dog"]).data["class_name"].tolist()
            ['cat']
        """
        import numpy as np

        supervision = import_supervision("to_supervision")
        image = {name: value.detach().cpu().numpy() for name, value in self.to_list()[index].items()}
        labels = image["labels"].tolist()
        names = [str(n) if class_names is None else _of_label(class_names, n, "class_names") for n in labels]
        data: dict[str, Any] = {"class_name": np.array(names, str), "query": image["queries"]}
        return supervision.Detections(
            xyxy=image["boxes"].reshape(-1, 4), confidence=image["scores"], class_id=image["labels"], data=data
        )

    def to_kornia(self) -> list[Tensor]:
        """Give kornia's rows: class, score, x, y, width, height.

        Returns:
            For each image (D, 6), the dtype of the scores, its D valid detections, best first.

        Example:
            >>> from detpost import DetectionPostProcessor
            >>> post = DetectionPostProcessor.from_preset("rtdetr", top_k=1)
            >>> boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0]]])
            >>> post(torch.tensor([[[0.0, -2.0]]]), boxes, torch.tensor([[10, 20]])).to_kornia()
            [tensor([[ 0.0000,  0.5000,  0.0000,  0.0000, 20.0000, 10.0000]])]
        """
        kind = self.scores.dtype
        columns = self.labels.to(kind).unsqueeze(-1), self.scores.unsqueeze(-1)
        rows = torch.cat((*columns, convert(self.boxes, "xyxy", "xywh").to(kind)), dim=-1)  # (B, K, 6)
        return [image for (image,) in split_by_image(self.valid, rows)]


def split_by_image(valid: Tensor, *values: Tensor) -> list[tuple[Tensor, ...]]:
    """Split values by image and leave out what is not valid, the whole batch at once.

    Args:
        valid: (B, K), bool; read on the host.
        values: (B, K, ...) each.

    Returns:
        For each image the D rows (D, ...) of each of the values whose slot is valid: copies, still differentiable.

    Example:
        >>> split_by_image(torch.tensor([[True, False], [True, True]]), torch.tensor([[1, 2], [3, 4]]))
        [(tensor([1]),), (tensor([3, 4]),)]
    """
    return tensors.split(None, valid, *values)


class _Slot(NamedTuple):
    """What one slot reads."""

    score: float
    label: int
    box: float  # each of its sides
    query: int


# What slots that are not valid read, in every form: the C++ kernels repeat these numbers.
INVALID = _Slot(score=0.0, label=-1, box=0.0, query=-1)


def clear_invalid(scores: Tensor, labels: Tensor, boxes: Tensor, queries: Tensor, valid: Tensor) -> Detections:
    """Make Detections of which slots that are not valid read as they must.

    Args:
        scores: (B, K).
        labels: (B, K), int64.
        boxes: (B, K, 4).
        queries: (B, K), int64.
        valid: (B, K), bool.

    Returns:
        The detections.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.int64)
        >>> clear_invalid(one.float(), one, torch.ones(1, 1, 4), one, one == 0).labels
        tensor([[-1]])
    """
    return Detections(
        scores=torch.where(valid, scores, INVALID.score),
        labels=torch.where(valid, labels, INVALID.label),
        boxes=torch.where(valid.unsqueeze(-1), boxes, INVALID.box),
        queries=torch.where(valid, queries, INVALID.query),
        valid=valid,
    )


def _replaced(detections: Detections, /, **fields: Tensor) -> Detections:
    """Return a new Detections with some fields replaced."""
    return Detections(**{**detections._asdict(), **fields})


# torch.compile of PyTorch 2.11 gives an empty tuple for the _replace that a NamedTuple brings, and says nothing.
Detections._replace = _replaced  # type: ignore[method-assign,assignment]

# Under this name a saved torch.export program finds the type again.
_register_namedtuple(Detections, serialized_type_name="detpost.Detections")


class _Categories(dict[int, Any]):
    """The category id of each label that is met: looked up once."""

    def __init__(self, table: Sequence[int] | Mapping[int, int] | None) -> None:
        super().__init__()
        self._table = table

    def __missing__(self, label: int) -> Any:
        table = self._table
        self[label] = found = label if table is None else _plain(_of_label(table, label, "category_ids"))
        return found


def _of_label(table: Sequence[_T] | Mapping[int, _T], label: int, name: str) -> _T:
    try:
        return table[label]
    except (KeyError, IndexError):
        raise ValueError(f"{name} has no entry for label {label}; it has {len(table)} entries") from None


def _plain(value: Any) -> Any:
    """Make a NumPy or torch scalar a plain number: json writes no other."""
    return value.item() if hasattr(value, "item") else value  # detpost: allow DP010


def import_supervision(what: str) -> Any:
    """Import supervision; where it is missing, say what needs it and which extra brings it."""
    try:
        with warnings.catch_warnings():
            # It runs without OpenCV, and says at length that it does.
            warnings.simplefilter("ignore", UserWarning)
            import supervision
    except ImportError:
        raise ImportError(f"{what} needs supervision: pip install 'detpost[viz]'") from None
    return supervision
