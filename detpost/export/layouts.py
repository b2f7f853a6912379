"""The layouts as data: what a file takes beside its images, and how detections lie in its outputs, for each runner.

Sources, read in November 2026: RT-DETR and D-FINE, ``tools/export_onnx.py``; TensorRT, ``efficientNMSPlugin``;
DeepStream-Yolo, ``nvdsparsebbox_Yolo.cpp``; Ultralytics, ``utils/nms.py`` and ``nn/autobackend.py``; Frigate,
``detectors/plugins/onnx.py`` and ``util/model.py``; roboflow/inference, ``models/rfdetr/rfdetr.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from detpost import boxes as box_arithmetic
from detpost.boxes import BoxFormat
from detpost.detections import INVALID, Detections
from detpost.export.choices import check_choices
from detpost.export.runner_files import deepstream_files, frigate_files, ultralytics_properties

__all__ = ["LAYOUTS", "NO_QUERIES", "PARTS", "Layout", "layout_of", "recorded_layout"]

NO_QUERIES = -2  # what the queries of a file without that output read: no query and no empty slot

PARTS = {
    "labels": "(B, K)",
    "boxes": "(B, K, 4), float32",
    "scores": "(B, K), float32",
    "valid": "(B, K), bool",
    "queries": "(B, K), int64",
    "count": "(B, 1), int32: how many are valid; they come first",
    "class_logits": "(B, K, C), float32: the detection's logit at its label, no score anywhere else",
}
"""What outputs are made of, and its shape."""

# As a logit, the score 0. What is chosen with a logit of -inf stays above what is not there.
NO_LOGIT = -1e4
LEAST_LOGIT = -5e3

SizesOrder = Literal["hw", "wh"]
LabelDtype = Literal["int64", "int32"]
Channels = tuple[float, float, float]
Pixels = Literal["one scale"] | tuple[Channels, Channels] | None
Files = Callable[[Path, Mapping[str, Any]], Mapping[str, str]]
Properties = Callable[[Mapping[str, Any]], Mapping[str, str]]


@dataclass(frozen=True)
class Layout:
    """How detections leave a file.

    Args:
        name: of the layout.
        outputs: what each output holds, by its name, in order: one of ``PARTS``, or several, which then stand side by
            side in the last dimension as float32: ``("boxes", "scores", "labels")`` is (B, K, 6).
        sizes: name of an input with the size of each image, (B, 2) int64, for boxes in pixels of the image; ``None``
            for boxes in pixels of the network's input.
        sizes_order: whether that input is (height, width), ``"hw"``, or (width, height), ``"wh"``.
        box_format: of the boxes.
        normalised: whether boxes are of an image of size 1, and need no sizes.
        label_dtype: of labels that stand alone.
        empty_label: the label of slots that are not valid; their scores and boxes are 0.
        pixels: what the runner does to pixels where it is not free to do anything: ``"one scale"``, a factor for all
            channels after an offset for each; or the mean and the deviation of each channel that it always takes, of
            pixels of 0..1. The rest of what the network was trained on is done in the file then.
        files: of a file's path and metadata, makes the texts to be written beside it, by their names.
        properties: of a file's metadata, makes what the runner looks for among an ONNX file's properties.

    Raises:
        ValueError: an output that holds something unknown, none of the parts that make a detection, names that collide,
            or a field that is none of its choices.

    Example:
        >>> Layout("mine", {"rows": ("labels", "scores", "boxes")}, box_format="xywh").columns("rows")
        6
    """

    name: str
    outputs: Mapping[str, str | tuple[str, ...]]
    sizes: str | None = None
    sizes_order: SizesOrder = "hw"
    box_format: BoxFormat = "xyxy"
    normalised: bool = False
    label_dtype: LabelDtype = "int64"
    empty_label: int = INVALID.label
    pixels: Pixels = None
    files: Files | None = field(default=None, compare=False)
    properties: Properties | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Refuse what no file could be written or read by."""
        self._check_outputs()
        self._check_names()
        choices = {"sizes_order": SizesOrder, "box_format": BoxFormat, "label_dtype": LabelDtype}
        check_choices({field: (getattr(self, field), get_args(kind)) for field, kind in choices.items()}, self.name)
        check_choices({"normalised": (self.normalised, (True, False))}, self.name)
        if type(self.empty_label) is not int or not -_MOST_LABEL <= self.empty_label <= _MOST_LABEL:
            raise ValueError(f"empty_label of {self.name} must be a whole number of int32; got {self.empty_label!r}")
        if self.pixels not in (None, "one scale") and not _are_channels(self.pixels):
            raise ValueError(
                f"pixels of {self.name} must be None, 'one scale', or three means and three deviations above 0; "
                f"got {self.pixels!r}"
            )

    def _check_outputs(self) -> None:
        held = [part for parts in self.outputs.values() for part in _several(parts)]
        unknown = [part for part in held if part not in PARTS]
        wide = [p for parts in self.outputs.values() if len(_several(parts)) > 1 for p in parts if p in _ALONE]
        if unknown or wide:
            raise ValueError(
                f"an output of {self.name} cannot hold {(unknown or wide)[0]!r}{' beside others' * (not unknown)}: "
                f"take of {', '.join(PARTS)}"
            )
        if "boxes" not in held or not ({"scores", "labels"} <= {*held} or "class_logits" in held):
            raise ValueError(f"{self.name} needs outputs with boxes, and scores and labels or class_logits")

    def _check_names(self) -> None:
        names = (*self.outputs, *(() if self.sizes is None else (self.sizes,)))
        empty = [name for name in names if not isinstance(name, str) or not name]
        if empty:
            raise ValueError(f"outputs and sizes of {self.name} need names that are not empty; got {empty[0]!r}")
        if self.sizes in self.outputs:
            raise ValueError(f"sizes of {self.name} has the name of an output, {self.sizes!r}: take another")
        taken = [name for name in names if name in _TAKEN]
        if taken:
            raise ValueError(
                f"{self.name} cannot name an output or sizes {taken[0]!r}, a name of the raw values or images"
            )

    def columns(self, output: str) -> int:
        """Count the columns of an output in which several parts stand side by side.

        Args:
            output: its name.

        Returns:
            The length of its last dimension.
        """
        return sum(4 if part == "boxes" else 1 for part in _several(self.outputs[output]))

    def read(self, values: Mapping[str, Tensor], image_sizes: Tensor, input_size: tuple[int, int]) -> Detections:
        """Read detections as a file of this layout gives them.

        Args:
            values: its outputs by name.
            image_sizes: (B, 2), (height, width) of each image in pixels.
            input_size: (height, width) of the network's input; boxes are in its pixels where there are no sizes.

        Returns:
            The detections, boxes as xyxy in pixels of the image.
        """
        parts = {part: value for name in self.outputs for part, value in self._parts(name, values[name])}
        if "class_logits" in parts:
            best = parts["class_logits"].max(dim=2)
            parts |= {"scores": best.values.sigmoid(), "labels": best.indices}
        scores, boxes, labels = parts["scores"], parts["boxes"], parts["labels"].to(torch.int64)
        valid = self._valid(parts, scores, labels, boxes)
        corners = box_arithmetic.convert(boxes, self.box_format, "xyxy")
        if self.sizes is None:
            factor = self.scale(image_sizes.to(corners), input_size)
            corners = corners * factor[:, None, [1, 0, 1, 0]]
        queries = values.get("queries", torch.full_like(labels, NO_QUERIES)).to(torch.int64)
        return Detections(
            torch.where(valid, scores, INVALID.score),
            torch.where(valid, labels, INVALID.label),
            torch.where(valid[..., None], corners, INVALID.box),
            queries,
            valid,
        )

    def scale(self, image_sizes: Tensor, input_size: tuple[int, int]) -> Tensor:
        """Give what brings a layout's coordinates to pixels of each image, where it takes no sizes.

        Args:
            image_sizes: (B, 2), (height, width) of each image in pixels.
            input_size: (height, width) of the network's input.

        Returns:
            (B, 2), for y and for x.
        """
        return image_sizes if self.normalised else image_sizes / image_sizes.new_tensor(input_size)

    def to_dict(self) -> dict[str, Any]:
        """Give what reading a file needs.

        Returns:
            Plain data, which :func:`recorded_layout` reads again.
        """
        names = ("name", "sizes", "sizes_order", "box_format", "normalised", "label_dtype", "empty_label")
        plain = {name: getattr(self, name) for name in names}
        return {**plain, "outputs": {name: list(_several(parts)) for name, parts in self.outputs.items()}}

    def _parts(self, name: str, value: Tensor) -> list[tuple[str, Tensor]]:
        held = _several(self.outputs[name])
        if len(held) == 1:
            return [(held[0], value)]
        pieces = torch.split(value, [4 if part == "boxes" else 1 for part in held], dim=2)
        return [(p, piece if p == "boxes" else piece.squeeze(2)) for p, piece in zip(held, pieces, strict=True)]

    def _valid(self, parts: Mapping[str, Tensor], scores: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        if "valid" in parts:
            return parts["valid"].to(torch.bool)
        if "count" in parts:
            return torch.arange(scores.shape[1], device=scores.device) < parts["count"]
        if self.empty_label < 0 and "labels" in {p for held in self.outputs.values() for p in _several(held)}:
            return labels >= 0
        return (scores > 0) | (boxes != 0).any(dim=2)


# Neither has one number a slot, nor numbers that float32 is for.
_ALONE = ("class_logits", "count")
# Inputs of the decode and of the networks that are exported.
_TAKEN = ("pred_logits", "pred_boxes", "images")
_MOST_LABEL = torch.iinfo(torch.int32).max


def _are_channels(pixels: Any) -> bool:
    """Tell whether these are a mean and a deviation for each channel."""
    if not isinstance(pixels, (tuple, list)) or len(pixels) != 2:
        return False
    if not all(isinstance(values, (tuple, list)) and len(values) == 3 for values in pixels):
        return False
    numbers = [value for values in pixels for value in values]
    return all(isinstance(value, (int, float)) and isfinite(value) for value in numbers) and min(pixels[1]) > 0


def _several(parts: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return (parts,) if isinstance(parts, str) else tuple(parts)


_THREE = {"labels": "labels", "boxes": "boxes", "scores": "scores"}
_ROW = ("boxes", "scores", "labels")
_PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("detpost", {**_THREE, "valid": "valid"}, "image_sizes"),
        Layout("rtdetr", _THREE, "orig_target_sizes", "wh"),
        Layout(
            "efficientnms",
            {"num_dets": "count", "det_boxes": "boxes", "det_scores": "scores", "det_classes": "labels"},
            "image_sizes",
            label_dtype="int32",
        ),
        # Its parser looks the threshold up by the label before anything else: there is none at -1.
        Layout("deepstream", {"output": _ROW}, empty_label=0, pixels="one scale", files=deepstream_files),
        Layout("ultralytics", {"output0": _ROW}, empty_label=0, pixels=_PLAIN, properties=ultralytics_properties),
        # It feeds (height, width) and divides x by the height: read as (width, height), as D-FINE does, that is right.
        Layout("frigate", _THREE, "orig_target_sizes", "wh", pixels=_PLAIN, files=frigate_files),
        Layout(
            "roboflow",
            {"dets": "boxes", "labels": "class_logits"},
            box_format="cxcywh",
            normalised=True,
            pixels=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ),
    )
}
"""The entries of ``--io``."""


def layout_of(io: str | Layout) -> Layout:
    """Find a layout.

    Args:
        io: an entry of ``LAYOUTS``, or a layout of one's own.

    Returns:
        The layout.

    Raises:
        ValueError: no entry of that name.
    """
    if isinstance(io, Layout):
        return io
    if io not in LAYOUTS:
        raise ValueError(f"io must be one of {', '.join(LAYOUTS)}, or a Layout; got {io!r}")
    return LAYOUTS[io]


def recorded_layout(metadata: Mapping[str, Any]) -> Layout:
    """Read the layout that a file records; one of version 0.1 records its name alone."""
    recorded = metadata.get("layout")
    if recorded is None:
        return layout_of(metadata["io"])
    outputs = {name: held[0] if len(held) == 1 else tuple(held) for name, held in recorded["outputs"].items()}
    return Layout(**{**recorded, "outputs": outputs})
