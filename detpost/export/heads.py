"""What a file gives beside boxes, as one table: a row for masks, for keypoints, for oriented boxes.

A new head is a class of its options and a row of ``HEADS``. Writing, attaching, opening, ``verify``, ``detect`` and the
command read the table.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from torch import Tensor

from detpost.export.graph import Graph, Value
from detpost.export.slots import RawHead, Slots
from detpost.heads.masks import MaskStyle

if TYPE_CHECKING:
    from detpost.detections import Detections

__all__ = [
    "HEADS",
    "Head",
    "HeadRow",
    "KeypointHead",
    "MaskHead",
    "OrientedHead",
    "Output",
    "argument_of",
    "bare_heads",
    "columns_of",
    "free_sides",
    "head_named",
    "heads_of",
    "heads_to_dict",
    "in_pytorch",
    "name_in_results",
    "output_names",
    "outputs_of",
    "raw_name",
    "raw_names",
    "recorded_heads",
    "row_of",
    "value_of_head",
    "write_head",
]

MaskSize = Literal["network", "image"]
# x and y: in the unit of the boxes; score: of 0..1; angle: radians, of something that half a turn leaves as it is.
Column = Literal["x", "y", "score", "angle"]
# Without the batch: a number for each dimension, or a name where it is free.
Shape = tuple[int | str, ...]
_FLOAT, _BOOL = 1, 9  # ONNX's numbers of dtypes


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

            given: Any = self.per_class
            if not isinstance(given, (tuple, list)):
                raise ValueError(f"per_class must hold a whole number for each class, as 0,17; got {given!r}")
            if not isinstance(self.trace_alpha, (int, float)):
                raise ValueError(f"trace_alpha must be a number, at least 0; got {self.trace_alpha!r}")
            object.__setattr__(self, "per_class", tuple(given))
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
        scale: Any = self.angle_scale
        if not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale == 0:
            raise ValueError(f"angle_scale must be a number other than 0; got {scale!r}")


Head = MaskHead | KeypointHead | OrientedHead


class Output(NamedTuple):
    """What a file gives of each detection beside its box.

    Args:
        shape: behind (B, K).
        dtype: ONNX's number of its dtype.
    """

    shape: Shape
    dtype: int = _FLOAT


@dataclass(frozen=True)
class HeadRow:
    """A kind of head.

    Args:
        kind: the class of its options.
        argument: of :func:`detpost.export.to_onnx` and ``attach``, where it has one of its own; it is in the names of
            the graph's nodes too.
        columns: of each output that it may give, what each number along the last dimension is, or one name for an
            output (B, K) of plain numbers; nothing for masks, which are compared by their overlap. The first one's name
            is the head's.
        outputs: of a head and the shape of its raw value (Q, ...), what it gives by name.
        raw_name: what its raw value is called in graphs of detpost's.
        other_names: what other libraries call it.
        words: that are in names of it in files of others.
        fits: whether a value (Q, ...) has a shape that may be of it.
        writer: ``"module:function"`` that takes the graph, the head with what it reads, the name of that and the
            :class:`detpost.export.slots.Slots`, and gives the outputs by name.
        bare: the raw value's shape behind (B, Q), names for free sides, where the head alone says it; ``None`` where
            its network does, and it is exported with that alone.
        in_pytorch: of a bare head, detections, the raw value (B, Q, ...) and the image sizes, makes the outputs by
            name: what ``verify`` holds a bare decode to. ``None`` of masks, and of a head that is never bare.
        in_results: what results of ``detect`` call an output, where that is not its own name.
        given: of a head, which of the outputs there are; ``None``: all.
    """

    kind: type[Head]
    argument: str
    columns: Mapping[str, tuple[Column, ...]]
    outputs: Callable[[Any, Shape], Mapping[str, Output]]
    raw_name: str
    other_names: tuple[str, ...]
    words: tuple[str, ...]
    fits: Callable[[Shape], bool]
    writer: str
    bare: Shape | None = None
    in_pytorch: Callable[[Any, Detections, Tensor, Tensor], Mapping[str, Tensor]] | None = None
    in_results: Mapping[str, str] = field(default_factory=dict)
    given: Callable[[Any], Sequence[str]] | None = None

    @property
    def name(self) -> str:
        """That of its first output, which files record."""
        return next(iter(self.columns))


def _of_masks(head: MaskHead, shape: Shape) -> Mapping[str, Output]:
    if head.size == "image":
        return {"masks": Output(("image_height", "image_width"), _BOOL)}
    return {"masks": Output(shape[1:])}


def _of_keypoints(head: KeypointHead, shape: Shape) -> Mapping[str, Output]:
    if head.per_class is not None:
        return {"keypoints": Output((max(head.per_class), 3)), "keypoint_scores": Output(())}
    return {"keypoints": Output((int(shape[1]) // (2 if len(shape) == 2 else 1), 3))}


def _oriented_in_pytorch(head: OrientedHead, found: Detections, raw: Tensor, sizes: Tensor) -> Mapping[str, Tensor]:
    from detpost.heads.oriented import OrientedBoxes

    return {"oriented_boxes": OrientedBoxes(head.angle_scale)(found, raw, sizes).boxes}


HEADS = (
    HeadRow(
        MaskHead,
        argument="masks",
        columns={"masks": ()},
        outputs=_of_masks,
        raw_name="pred_masks",
        other_names=("mask_logits", "masks"),
        words=("mask", "seg"),
        fits=lambda shape: len(shape) == 3,
        writer="detpost.export.heads_graph:write_masks",
        bare=("mask_height", "mask_width"),
        in_results={"masks": "segmentation"},
    ),
    HeadRow(
        KeypointHead,
        argument="keypoints",
        columns={"keypoints": ("x", "y", "score"), "keypoint_scores": ("score",)},
        outputs=_of_keypoints,
        raw_name="pred_keypoints",
        other_names=("keypoints", "pred_poses"),
        words=("keypoint", "kpt", "pose", "joint"),
        fits=lambda shape: len(shape) in (2, 3),
        writer="detpost.export.heads_graph:write_keypoints",
        given=lambda head: ("keypoints", "keypoint_scores") if head.per_class else ("keypoints",),
    ),
    HeadRow(
        OrientedHead,
        argument="oriented",
        columns={"oriented_boxes": ("x", "y", "x", "y", "angle")},
        outputs=lambda head, shape: {"oriented_boxes": Output((5,))},
        raw_name="pred_oriented_boxes",
        other_names=("oriented_boxes", "pred_rboxes"),
        words=("orient", "rbox", "rotat", "obb"),
        fits=lambda shape: len(shape) == 2 and shape[1] == 5,
        writer="detpost.export.heads_graph:write_oriented",
        bare=(5,),
        in_pytorch=_oriented_in_pytorch,
        in_results={"oriented_boxes": "oriented_box"},
    ),
)


def row_of(head: Head) -> HeadRow:
    """Find the row of a head.

    Args:
        head: which one.

    Returns:
        Its row.

    Raises:
        ValueError: something that is no head.
    """
    found = next((row for row in HEADS if isinstance(head, row.kind)), None)
    if found is None:
        raise ValueError(f"unknown head {type(head).__name__}: take one of {', '.join(row.name for row in HEADS)}")
    return found


def heads_of(
    masks: MaskSize | MaskHead | None = None,
    keypoints: KeypointHead | None = None,
    oriented: OrientedHead | None = None,
    heads: Sequence[Head] = (),
) -> tuple[Head, ...]:
    """Give the heads that a caller asks for.

    Args:
        masks: a size stands for the rest as it is by default.
        keypoints: how they come.
        oriented: how they come.
        heads: these and any others.

    Returns:
        Those that are there.

    Raises:
        ValueError: an unknown size of masks, something that is no head, or two of one kind.
    """
    asked = MaskHead(masks) if isinstance(masks, str) else masks
    found = (*(head for head in (asked, keypoints, oriented) if head is not None), *heads)
    names = [row_of(head).name for head in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]} can be given once: two such heads came")
    return found


def head_named(text: str) -> Head:
    """Make a head of a name and its options.

    Args:
        text: ``NAME``, or ``NAME:FIELD=VALUE:...`` as ``keypoints:per_class=0,17``; a value that is not written as
            Python writes numbers and tuples of them is a string.

    Returns:
        The head.

    Raises:
        ValueError: an unknown head or field, or a value that the head refuses.

    Example:
        >>> head_named("oriented_boxes:angle_scale=3.5")
        OrientedHead(angle_scale=3.5, source=None)
    """
    name, *options = re.split(r":(?=\w+=)", text)
    kind = _kind_named(name, "")
    known = [each.name for each in fields(kind)]
    given = dict(option.split("=", 1) for option in options)
    unknown = [option for option in given if option not in known]
    if unknown:
        raise ValueError(f"{name} has no field {unknown[0]!r}: it has {', '.join(known)}")
    return kind(**{option: _literal(value) for option, value in given.items()})


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _kind_named(name: str, place: str) -> type[Head]:
    found = next((row.kind for row in HEADS if row.name == name), None)
    if found is None:
        raise ValueError(f"unknown head {name!r}{place}: known are {', '.join(row.name for row in HEADS)}")
    return found


def raw_name(head: Head) -> str:
    """Give the name of the head's raw value in graphs of detpost's."""
    return row_of(head).raw_name


def raw_names() -> frozenset[str]:
    """Give the names of all heads' raw values in graphs of detpost's."""
    return frozenset(row.raw_name for row in HEADS)


def output_names(head: Head) -> tuple[str, ...]:
    """Give the names of the head's outputs."""
    row = row_of(head)
    return tuple(row.given(head)) if row.given else tuple(row.columns)


def outputs_of(raw: RawHead) -> Mapping[str, Output]:
    """Give what a head gives, by name.

    Args:
        raw: the head and what it reads.

    Returns:
        Shape and dtype of each output.
    """
    return row_of(raw.head).outputs(raw.head, raw.shape)


def argument_of(head: Head) -> str:
    """Give the name of the argument that asks for the head."""
    return row_of(head).argument


def free_sides(head: Head) -> dict[int, str]:
    """Give the axes of the raw value (B, Q, ...) that follow the image's size, by a name each."""
    return {axis: side for axis, side in enumerate(row_of(head).bare or (), start=2) if isinstance(side, str)}


def bare_heads(heads: tuple[Head, ...], queries: int) -> tuple[RawHead, ...]:
    """Give the raw values that a post-processor alone takes.

    Args:
        heads: which ones.
        queries: Q.

    Returns:
        Heads with the shapes of their inputs.

    Raises:
        ValueError: a head whose raw value has a shape that the network alone says, as keypoints.
    """
    found = []
    for head in heads:
        row = row_of(head)
        if row.bare is None:
            raise ValueError(f"{row.name} are exported with their network, which says how they come")
        found.append(RawHead(head, (queries, *row.bare), _FLOAT))
    return tuple(found)


def write_head(g: Graph, raw: RawHead, value: Value, slots: Slots) -> dict[str, Value]:
    """Write a head.

    Args:
        g: where to write.
        raw: which head, and what it reads.
        value: that.
        slots: the detections.

    Returns:
        Its outputs by name.

    Raises:
        ValueError: a shape that is none of such a head, or masks in the size of an image whose size is not known.
    """
    row = row_of(raw.head)
    module, name = row.writer.split(":")
    write = getattr(import_module(module), name)
    with g.part(row.argument):
        found: dict[str, Value] = write(g, raw, value, slots)
        return found


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
    names = (head.source,) if head.source else (raw_name(head), *row_of(head).other_names)
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
    return tuple(_kind_named(name, " in the file")(**values) for name, values in recorded.items())


def in_pytorch(head: Head, detections: Detections, raw: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
    """Give what a head that a post-processor alone takes makes, other than masks, in PyTorch.

    Args:
        head: which one.
        detections: of B images.
        raw: what the head reads, (B, Q, ...).
        image_sizes: (B, 2), (height, width), pixels.

    Returns:
        Its outputs by name.

    Raises:
        ValueError: a head that a post-processor alone does not take.
    """
    row = row_of(head)
    if row.in_pytorch is None:
        raise ValueError(f"{row.name} of a post-processor alone cannot be computed in PyTorch")
    return dict(row.in_pytorch(head, detections, raw, image_sizes))


def columns_of(output: str) -> tuple[Column, ...]:
    """Say what the numbers of an output of a head are, other than masks.

    Args:
        output: its name.

    Returns:
        A name for each place along the last dimension, or one for an output (B, K) of plain numbers.

    Raises:
        ValueError: an output of no head.
    """
    known = {name: columns for row in HEADS for name, columns in row.columns.items() if columns}
    if output not in known:
        raise ValueError(f"no head gives {output!r}, so its unit is not known: known are {', '.join(known)}")
    return known[output]


def name_in_results(output: str) -> str:
    """Give what results of ``detect`` call an output of a head."""
    return {name: other for row in HEADS for name, other in row.in_results.items()}.get(output, output)
