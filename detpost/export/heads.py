"""What a file gives beside boxes, as data: masks, keypoints, oriented boxes, and where their raw values are found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from detpost.heads.masks import MaskStyle

if TYPE_CHECKING:
    from detpost.detections import Detections

__all__ = [
    "Head",
    "KeypointHead",
    "MaskHead",
    "OrientedHead",
    "columns_of",
    "heads_of",
    "in_pytorch",
    "recorded_heads",
    "value_of_head",
]

MaskSize = Literal["network", "image"]
# x and y: in the unit of the boxes; score: of 0..1; angle: radians, of something that half a turn leaves as it is.
Column = Literal["x", "y", "score", "angle"]


@dataclass(frozen=True)
class MaskHead:
    """Instance masks as an output ``masks``, gathered by the query of each detection.

    Args:
        size: ``"network"`` gives what the network gives, (B, K, h, w) float32, logits or probabilities; ``"image"``
            gives (B, K, H, W) bool in pixels of the image that boxes are in, H and W the greatest of the batch, nothing
            beyond an image's own size.
        style: how ``"image"`` reads them: ``"rfdetr"`` or ``"dfine_seg"``, as :mod:`detpost.heads.masks` says.
        source: name of the network's value (B, Q, h, w); ``None`` finds it.

    Raises:
        ValueError: an unknown size or style.
    """

    size: MaskSize = "network"
    style: MaskStyle = "rfdetr"
    source: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is not known."""
        for name, allowed in (("size", get_args(MaskSize)), ("style", get_args(MaskStyle))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"masks must have a {name} of {', '.join(allowed)}; got {getattr(self, name)!r}")


@dataclass(frozen=True)
class KeypointHead:
    """Keypoints as an output ``keypoints`` (B, K, N, 3): x, y in the unit of the boxes, and visibility or probability.

    Args:
        per_class: how many keypoints each class has, for networks that predict those of every class, as RF-DETR; there
            is an output ``keypoint_scores`` (B, K) then. ``None``: one skeleton for each query, as DETRPose.
        trace_alpha: with ``per_class``, how much uncertain keypoints lower ``keypoint_scores``.
        source: name of the network's value; ``None`` finds it.

    Raises:
        ValueError: as of :class:`detpost.heads.RFDETRKeypoints`.
    """

    per_class: tuple[int, ...] | None = None
    trace_alpha: float = 0.2
    source: str | None = None

    def __post_init__(self) -> None:
        """Refuse what the eager head refuses."""
        if self.per_class is not None:
            from detpost.heads.keypoints import RFDETRKeypoints

            object.__setattr__(self, "per_class", tuple(self.per_class))
            RFDETRKeypoints(self.per_class, self.trace_alpha)


@dataclass(frozen=True)
class OrientedHead:
    """Oriented boxes as an output ``oriented_boxes`` (B, K, 5): cx, cy, w, h in the unit of the boxes, and the angle.

    Args:
        angle_scale: what the network's angle is multiplied with to give radians.
        source: name of the network's value (B, Q, 5); ``None`` finds it.

    Raises:
        ValueError: a scale that is 0 or not finite.
    """

    angle_scale: float = 1.0
    source: str | None = None

    def __post_init__(self) -> None:
        """Refuse what the eager head refuses."""
        if not math.isfinite(self.angle_scale) or self.angle_scale == 0:
            raise ValueError(f"angle_scale must be a number other than 0; got {self.angle_scale}")


Head = MaskHead | KeypointHead | OrientedHead

RAW_NAMES: Mapping[type[Head], str] = {
    MaskHead: "pred_masks",
    KeypointHead: "pred_keypoints",
    OrientedHead: "pred_oriented_boxes",
}
"""What a head's raw value is called in graphs of detpost's; other libraries call it so or as below."""

_OTHER_NAMES: Mapping[type[Head], tuple[str, ...]] = {
    MaskHead: ("mask_logits", "masks"),
    KeypointHead: ("keypoints", "pred_poses"),
    OrientedHead: ("oriented_boxes", "pred_rboxes"),
}
# What each number of an output is, along its last dimension; one name for an output without such a dimension.
_COLUMNS: Mapping[str, tuple[Column, ...]] = {
    "keypoints": ("x", "y", "score"),
    "keypoint_scores": ("score",),
    "oriented_boxes": ("x", "y", "x", "y", "angle"),
}
_RECORDED: Mapping[str, type[Head]] = {"masks": MaskHead, "keypoints": KeypointHead, "oriented_boxes": OrientedHead}


def heads_of(
    masks: MaskSize | MaskHead | None = None,
    keypoints: KeypointHead | None = None,
    oriented: OrientedHead | None = None,
) -> tuple[Head, ...]:
    """Give the heads that a caller asks for.

    Args:
        masks: a size stands for the rest as it is by default.
        keypoints: how they come.
        oriented: how they come.

    Returns:
        Those that are there.

    Raises:
        ValueError: an unknown size of masks.
    """
    asked = MaskHead(masks) if isinstance(masks, str) else masks
    return tuple(head for head in (asked, keypoints, oriented) if head is not None)


def raw_name(head: Head) -> str:
    """Give the name of the head's raw value in graphs of detpost's."""
    return RAW_NAMES[type(head)]


def output_names(head: Head) -> tuple[str, ...]:
    """Give the names of the head's outputs."""
    if isinstance(head, KeypointHead):
        return ("keypoints", *(("keypoint_scores",) if head.per_class else ()))
    found = next((name for name, kind in _RECORDED.items() if isinstance(head, kind)), None)
    if found is None:
        raise ValueError(f"unknown head {type(head).__name__}: take one of {', '.join(_RECORDED)}")
    return (found,)


def value_of_head(outputs: Any, head: Head) -> Tensor:
    """Read a head's raw value out of what a detector returns.

    Args:
        outputs: a mapping or ModelOutput.
        head: which one; its ``source`` names the value where it is called otherwise than usual.

    Returns:
        The value, (B, Q, ...).

    Raises:
        TypeError: there is none; the message names what came.
    """
    names = (head.source,) if head.source else (raw_name(head), *_OTHER_NAMES[type(head)])
    if isinstance(outputs, Mapping):
        found = next((outputs[name] for name in names if name in outputs), None)
        came = f"a mapping with {', '.join(map(str, outputs))}"
    else:
        found, came = None, type(outputs).__name__
    if not isinstance(found, Tensor):
        raise TypeError(f"a detector with {output_names(head)[0]} must return a mapping with {names[0]}; got {came}")
    return found


def heads_to_dict(heads: tuple[Head, ...]) -> dict[str, Any]:
    """Give plain data, which :func:`recorded_heads` reads again."""
    return {output_names(head)[0]: asdict(head) for head in heads}


def recorded_heads(metadata: Mapping[str, Any]) -> tuple[Head, ...]:
    """Read the heads that a file records, none where it is older than they are.

    Args:
        metadata: of the file.

    Returns:
        The heads.

    Raises:
        ValueError: a head that this version does not know.
    """
    recorded = metadata.get("heads") or {}
    for name in recorded:
        if name not in _RECORDED:
            raise ValueError(f"unknown head {name!r} in the file: known are {', '.join(_RECORDED)}")
    return tuple(_RECORDED[name](**values) for name, values in recorded.items())


def in_pytorch(head: Head, detections: Detections, raw: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
    """Give what a head that a post-processor alone takes makes, other than masks, in PyTorch.

    Args:
        head: which one.
        detections: of B images.
        raw: what the head reads, (B, Q, ...).
        image_sizes: (B, 2), (height, width), pixels.

    Returns:
        Its outputs by name.
    """
    assert isinstance(head, OrientedHead)
    from detpost.heads.oriented import OrientedBoxes

    return {"oriented_boxes": OrientedBoxes(head.angle_scale)(detections, raw, image_sizes).boxes}


def columns_of(output: str) -> tuple[Column, ...]:
    """Say what the numbers of an output of a head are, other than masks.

    Args:
        output: its name.

    Returns:
        A name for each place along the last dimension, or one for an output (B, K) of plain numbers.

    Raises:
        ValueError: an output of no head.
    """
    if output not in _COLUMNS:
        raise ValueError(f"no head gives {output!r}, so its unit is not known: known are {', '.join(_COLUMNS)}")
    return _COLUMNS[output]
