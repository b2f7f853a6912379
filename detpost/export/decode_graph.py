"""The post-processor as an ONNX graph of its own, which every ONNX export ends in: one function for each choice.

It is written node by node and not traced, from operators that every runner has (:mod:`detpost.export.operators`), in
float32 and int32; int64 only where ONNX demands it: shapes, the indices of TopK, labels and queries as they come out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from detpost.boxes import BoxFormat
from detpost.detections import INVALID
from detpost.export.front_graph import Placement
from detpost.export.graph import Graph, Value, import_onnx
from detpost.export.heads import output_names, outputs_of, raw_name, write_head
from detpost.export.layouts import LEAST_LOGIT, NO_LOGIT, Layout, layout_of
from detpost.export.selection_graph import Chosen, Rows, finite_keys, select, select_by_runner
from detpost.export.slots import HEADS_OPSET, Place, RawHead, Slots
from detpost.export.softmax_graph import shares
from detpost.spec import DecodeSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["OLDEST_OPSET", "Ties", "decode_graph"]

Ties = Literal["exact", "onnx"]

OLDEST_OPSET = 11  # CumSum came with it


def decode_graph(
    spec: DecodeSpec,
    num_queries: int,
    num_classes: int,
    *,
    opset: int,
    io: str | Layout = "detpost",
    ties: Ties = "exact",
    queries: bool = False,
    input_size: tuple[int, int] | str | Placement | None = None,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    dynamic_batch: bool = True,
    heads: Sequence[RawHead] = (),
    prefix: str = "detpost/",
) -> onnx.ModelProto:
    """Write the graph ``pred_logits`` (B, Q, C), ``pred_boxes`` (B, Q, 4), perhaps sizes (B, 2) -> detections.

    Args:
        spec: what the decode does.
        num_queries: Q.
        num_classes: C.
        opset: version of the default operator set, 11 or later.
        io: names of inputs and outputs, and what they hold.
        ties: whether the graph resolves equal scores itself, or leaves them to ONNX's promise of the lower index.
        queries: whether ``queries`` is an output.
        input_size: (height, width) of the network's input, or the name of the images (B, 3, H, W), which are an input
            of this graph then; for layouts whose boxes are in its pixels. A placement, whose values are inputs of this
            graph, puts boxes in the image that was resized to it.
        dtypes: of logits and boxes as they come.
        dynamic_batch: whether B is free; else 1.
        heads: what is given beside boxes; the raw value of each is an input, after the boxes.
        prefix: begins the name of every node and inner value.

    Returns:
        The checked model.

    Raises:
        ValueError: a layout that needs ``input_size``, which is ``None``, or has names that the rest needs; heads that
            do not fit, or opset 11 with them.
    """
    layout = layout_of(io)
    if heads and opset < HEADS_OPSET:
        raise ValueError(f"heads beside boxes need opset {HEADS_OPSET} or later; got {opset}")
    if layout.sizes is None and not layout.normalised and input_size is None:
        raise ValueError(
            f"io {layout.name!r} gives boxes in pixels of the network's input, whose size is not known: say image_size"
        )
    _check_names(layout, queries, heads)
    decode = _Decode(Graph(opset, prefix), spec, num_queries, num_classes, ties, layout, input_size)
    g = decode.g
    found = decode.found(_widened(g, "pred_logits", dtypes[0], (num_queries, num_classes)))
    valid = decode.valid(found)
    corners = decode.corners(found, _widened(g, "pred_boxes", dtypes[1], (num_queries, 4)))
    boxes = decode.boxes(corners, valid)
    outputs = {**layout.outputs, **({"queries": "queries"} if queries else {})}
    values = {decode.output(held, found, valid, boxes): name for name, held in outputs.items()}
    values |= decode.heads(heads, found, valid, corners)
    g.rename(values)
    g.drop_unused([*outputs, *(name for raw in heads for name in output_names(raw.head))])
    return _model(decode, outputs, dtypes, "batch" if dynamic_batch else 1, heads)


def _check_names(layout: Layout, queries: bool, heads: Sequence[RawHead]) -> None:
    """Refuse a layout that gives its own outputs or sizes a name of what is asked for beside it."""
    needed = {name for raw in heads for name in (raw_name(raw.head), *output_names(raw.head))}
    if queries and layout.outputs.get("queries") != "queries":
        needed |= {"queries"}
    twice = sorted(needed & {*layout.outputs, layout.sizes})
    if twice:
        raise ValueError(
            f"io {layout.name!r} has the name {twice[0]!r}, which is asked for beside it: name its own otherwise"
        )


class _Found(NamedTuple):
    """The kept pairs, best first: (B, K) each."""

    scores: Value  # float32; of softmax heads, negative where there is none
    labels: Value  # int32
    queries: Value  # int32
    is_number: Value | None  # bool; of sigmoid heads
    logits: Value  # float32; of sigmoid heads


class _Decode:
    """What every part of the graph is written from."""

    def __init__(
        self,
        g: Graph,
        spec: DecodeSpec,
        queries: int,
        classes: int,
        ties: Ties,
        layout: Layout,
        input_size: tuple[int, int] | str | Placement | None,
    ) -> None:
        self.g = g
        self.spec = spec
        self.queries = queries
        self.classes = classes
        self.ties = ties
        self.layout = layout
        self.input_size = input_size
        self.kept = min(spec.top_k, queries * classes if spec.selection == "flat" else queries)
        self.background = spec.background_channel(classes)  # its channel

    def found(self, logits: Value) -> _Found:
        """Write activation and selection."""
        return self._sigmoid(logits) if self.spec.activation == "sigmoid" else self._softmax(logits)

    def valid(self, found: _Found) -> Value:
        """Write which of the slots hold a detection (B, K)."""
        g, threshold = self.g, self.spec.score_threshold
        with g.part("valid"):
            if found.is_number is None:
                return g.node("Greater", found.scores, -0.5 if threshold is None else float(np.float32(threshold)))
            if threshold is None:
                return found.is_number
            logits = g.node("Where", found.is_number, found.logits, float("-inf"))
            return g.node("Greater", logits, _threshold_logit(threshold))

    def corners(self, found: _Found, boxes: Value) -> Value:
        """Write the corners (4, B, K) of the kept queries, in pixels or of an image of size 1.

        As four tables of B rows of K numbers: ONNX Runtime handles many rows of four at a tenth of the speed.
        """
        g = self.g
        with g.part("boxes"):
            places = g.node("Expand", found.queries, g.constant([4, 1, 1]))
            sides = g.node("GatherElements", g.node("Transpose", boxes, perm=[2, 0, 1]), places, axis=2)
            sides = _corners(g, sides, self.spec)
            limits = self._limits()
            if isinstance(self.input_size, Placement):
                sides = g.node("Sub", g.node("Mul", sides, self.input_size.factor), self.input_size.shift)
            elif limits is not None:
                sides = g.node("Mul", sides, limits)
            if self.spec.clip:
                sides = g.node("Min", g.node("Max", sides, 0.0), 1.0 if limits is None else limits)
            return sides

    def boxes(self, corners: Value, valid: Value) -> Value:
        """Write the boxes (B, K, 4) in the layout's format, 0 where not valid."""
        g = self.g
        with g.part("boxes"):
            sides = _from_corners(g, corners, self.layout.box_format)
            return g.node("Transpose", g.node("Where", valid, sides, INVALID.box), perm=[1, 2, 0])

    def heads(self, heads: Sequence[RawHead], found: _Found, valid: Value, corners: Value) -> dict[Value, str]:
        """Write what is given beside boxes: the name of each output by its value."""
        if not heads:
            return {}
        g = self.g
        with g.part("heads"):
            scores = g.node("Where", valid, found.scores, INVALID.score)
            bound = self._limits()
            if isinstance(self.input_size, Placement):
                place: Place | None = Place(self.input_size.factor, self.input_size.shift, self.input_size.bound)
            else:
                place = None if bound is None else Place(bound, None, bound)
        slots = Slots(found.queries, found.labels, scores, valid, corners, self.kept, place)
        return {value: name for raw in heads for name, value in write_head(g, raw, raw_name(raw.head), slots).items()}

    def _limits(self) -> Value | None:
        """Write width, height, width, height (4, B or 1, 1); ``None`` where they are 1."""
        g = self.g
        if isinstance(self.input_size, Placement):
            return self.input_size.bound
        if self.layout.sizes is not None:
            sizes = g.node("Transpose", g.cast(self.layout.sizes, "FLOAT"), perm=[1, 0])
            width, height = (0, 1) if self.layout.sizes_order == "wh" else (1, 0)
            return g.unsqueeze(g.node("Gather", sizes, g.constant([width, height, width, height]), axis=0), 2)
        if self.layout.normalised:
            return None
        if isinstance(self.input_size, str):
            sides = g.node("Gather", g.node("Shape", self.input_size), g.constant([3, 2, 3, 2]), axis=0)
            return g.reshape(g.cast(sides, "FLOAT"), [4, 1, 1])
        assert self.input_size is not None
        height, width = self.input_size
        return g.constant(np.array([width, height, width, height], np.float32)[:, None, None])

    def output(self, held: str | tuple[str, ...], found: _Found, valid: Value, boxes: Value) -> Value:
        """Write an output: one part, or several side by side in float32."""
        g = self.g
        with g.part("outputs"):
            if isinstance(held, str):
                return self._part_of(held, found, valid, boxes)
            values = []
            for part in held:
                value = self._part_of(part, found, valid, boxes, in_row=True)
                values.append(value if part == "boxes" else g.unsqueeze(value, 2))
            return g.node("Concat", *values, axis=2)

    def _part_of(self, part: str, found: _Found, valid: Value, boxes: Value, in_row: bool = False) -> Value:
        """Write a part of detections; where not valid, query -1, score 0 and the layout's label for that."""
        g = self.g
        if part == "boxes":
            return boxes
        if part == "valid":
            return g.indicator(valid) if in_row else valid
        if part == "count":
            return g.cast(g.sum(g.indicator(valid), 1, keep=True), "INT32")
        if part == "class_logits":
            return self._class_logits(found, valid)
        if part == "scores":
            if found.is_number is None and self.spec.score_threshold is None:
                return g.node("Relu", found.scores)  # what is not valid has a negative one
            return g.node("Where", valid, found.scores, INVALID.score)
        if part == "queries":
            return g.cast(g.node("Where", valid, found.queries, INVALID.query), "FLOAT" if in_row else "INT64")
        labels = g.node("Where", valid, found.labels, self.layout.empty_label)
        if in_row:
            return g.cast(labels, "FLOAT")
        return g.cast(labels, "INT64") if self.layout.label_dtype == "int64" else labels

    def _class_logits(self, found: _Found, valid: Value) -> Value:
        """Write logits (B, K, C) whose sigmoid is the score at the label, and 0 elsewhere."""
        g = self.g
        logits = found.logits
        if self.spec.activation == "softmax":
            share = g.node("Relu", found.scores)
            logits = g.node("Sub", g.node("Log", share), g.node("Log", g.node("Sub", 1.0, share)))
        logits = g.node("Max", logits, LEAST_LOGIT)
        labels = g.cast(g.node("Where", valid, found.labels, -1), "FLOAT")
        chosen = g.node("Equal", g.unsqueeze(labels, 2), np.arange(self.classes, dtype=np.float32)[None, None])
        return g.node("Where", chosen, g.unsqueeze(logits, 2), NO_LOGIT)

    def _sigmoid(self, logits: Value) -> _Found:
        g = self.g
        if self.background >= 0:
            # NaN is never ahead of a number and never valid: just what the channel that means "no object" should be.
            with g.part("background"):
                logits = g.node("Where", self._is_object(), logits, float("nan"))
        if self.spec.selection == "flat":
            with g.part("select"):
                row = g.reshape(logits, [0, self.queries * self.classes])
                chosen = self._select(row, self.queries * self.classes, "logits")
            queries, labels = self._pairs(chosen.places)
        else:
            best, best_logits = self._best_class(logits)
            with g.part("select"):
                chosen = self._select(best_logits, self.queries, "logits")
                queries, labels = chosen.places, g.gather_rows(best, chosen.places)
        with g.part("score"):
            scores = g.node("Sigmoid", chosen.values)
        return _Found(scores, labels, queries, chosen.is_number, chosen.values)

    def _softmax(self, logits: Value) -> _Found:
        if self.spec.selection == "flat":
            with self.g.part("softmax"):
                scores = self.g.reshape(self._class_scores(logits), [0, self.queries * self.classes])
            with self.g.part("select"):
                chosen = self._select(scores, self.queries * self.classes, "scores")
            queries, labels = self._pairs(chosen.places)
        else:
            best, scores = self._best_scores(logits)
            with self.g.part("select"):
                chosen = self._select(scores, self.queries, "scores")
                queries, labels = chosen.places, self.g.gather_rows(best, chosen.places)
        return _Found(chosen.values, labels, queries, None, chosen.values)

    def _select(self, row: Value, width: int, rows: Rows) -> Chosen:
        if self.ties == "onnx":
            return select_by_runner(self.g, row, width, self.kept, rows)
        return select(self.g, row, width, self.kept, rows)

    def _pairs(self, places: Value) -> tuple[Value, Value]:
        """Take places in the flat row apart: queries and labels (B, K)."""
        g = self.g
        with g.part("select"):
            queries = g.node("Div", places, self.classes)
            return queries, g.node("Sub", places, g.node("Mul", queries, self.classes))

    def _is_object(self) -> NDArray[np.bool_]:
        """Say which channels stand for objects, (1, 1, C)."""
        return np.not_equal(np.arange(self.classes), self.background)[None, None]

    def _best_class(self, logits: Value) -> tuple[Value, Value]:
        """Write each query's best class and its logit, (B, Q) each: the first of equal ones, and NaN after numbers."""
        g = self.g
        with g.part("best_class"):
            if self.ties == "onnx":
                best = g.cast(g.node("ArgMax", finite_keys(g, logits), axis=2, keepdims=1), "INT32")
                return self._of_queries(best), self._of_queries(g.node("GatherElements", logits, best, axis=2))
            is_number = g.node("Equal", logits, logits)
            greatest = g.greatest(g.node("Where", is_number, logits, float("-inf")), 2, keep=True)
            countdown = np.arange(self.classes, 0, -1, dtype=np.float32)
            # A number that is not the greatest has a key too: where all are -inf, OpenVINO's greatest is none of them.
            keys = g.node(
                "Add",
                g.node("Mul", g.indicator(is_number), countdown),
                g.node("Mul", g.indicator(g.node("Equal", logits, greatest)), float(self.classes)),
            )
            key = g.greatest(keys, 2, keep=True)  # (B, Q, 1): up to C without the greatest, up to 2 C with it
            excess = g.node("Mul", g.indicator(g.node("Greater", key, float(self.classes))), float(self.classes))
            label = g.node("Sub", float(self.classes), g.node("Sub", key, excess))
            best = g.cast(g.node("Min", label, float(self.classes - 1)), "INT32")  # C where all are NaN
            return self._of_queries(best), self._of_queries(g.node("GatherElements", logits, best, axis=2))

    def _of_queries(self, values: Value) -> Value:
        """Take the last dimension of (B, Q, 1) away."""
        return self.g.reshape(values, [0, self.queries])

    def _class_scores(self, logits: Value) -> Value:
        """Write the score of every class (B, Q, C), negative where it must not be chosen."""
        g = self.g
        if self.ties == "onnx":
            scores = _positive(g, g.node("Softmax", logits, axis=2))
        else:
            found = shares(g, logits, self.queries, self.classes, fast=False)
            scores = g.node("Where", found.is_number, g.node("Mul", found.weights, found.share), -1.0)
        if self.background < 0:
            return scores
        return g.node("Sub", scores, np.where(self._is_object(), 0, 2).astype(np.float32))

    def _best_scores(self, logits: Value) -> tuple[Value, Value]:
        """Write each query's best class by its logits, and its score, negative where it must not be chosen: (B, Q)."""
        g = self.g
        with g.part("best_class"):
            best = self._best_object(logits)  # (B, Q, 1)
        with g.part("softmax"):
            if self.ties == "onnx":
                score = g.node("GatherElements", g.node("Softmax", logits, axis=2), best, axis=2)
                score = _positive(g, score)
            else:
                found = shares(g, logits, self.queries, self.classes, fast=True)
                score = g.node("Mul", g.node("GatherElements", found.weights, best, axis=2), found.share)
                score = g.node("Where", found.is_number, score, -1.0)
            if self.background >= 0 and self.classes == 1:  # nothing is an object
                score = g.node("Sub", score, 2.0)
            return self._of_queries(best), self._of_queries(score)

    def _best_object(self, logits: Value) -> Value:
        """Write the first of the greatest logits of objects: (B, Q, 1), int32, any class where one is NaN."""
        g = self.g
        first, count = 0, self.classes
        if self.background >= 0 and count > 1:
            first, count = int(self.background == 0), count - 1
            begin, end, axis = (g.constant([i]) for i in (first, first + count, 2))
            logits = g.node("Slice", logits, begin, end, axis)
        if self.ties == "onnx":
            best = g.cast(g.node("ArgMax", logits, axis=2, keepdims=1), "INT32")
            return g.node("Add", best, first) if first else best
        is_best = g.node("Equal", logits, g.greatest(logits, 2, keep=True))
        countdown = np.arange(count, 0, -1, dtype=np.float32)
        key = g.greatest(g.node("Mul", g.indicator(is_best), countdown), 2, keep=True)
        # No class equals the greatest where all are -inf in OpenVINO, whose greatest is finite then: the first is best.
        key = g.node("Where", g.node("Greater", key, 0.0), key, float(count))
        return g.cast(g.node("Sub", float(first + count), key), "INT32")


def _positive(g: Graph, scores: Value) -> Value:
    """Replace NaN by -1."""
    return g.node("Where", g.node("Equal", scores, scores), scores, -1.0)


def _widened(g: Graph, value: Value, dtype: torch.dtype, shape: tuple[int, int]) -> Value:
    """Convert an output of the network (B, *shape) to float32, after it was rounded to what it is."""
    if dtype == torch.float32:
        return value
    with g.part("inputs"):
        # ONNX Runtime computes many half-precision operators in float32 and joins their last cast with one behind it:
        # the values were not those that the network gives. A reshape that changes nothing keeps the casts apart.
        return g.cast(g.reshape(value, [0, *shape]), "FLOAT")


def _corners(g: Graph, sides: Value, spec: DecodeSpec) -> Value:
    """Write boxes (4, B, K) of any format as corners."""
    if spec.box_format == "xyxy":
        return sides
    first, size = g.halves(sides, 0, 4)
    if spec.box_format == "xywh":
        return g.node("Concat", first, g.node("Add", first, size), axis=0)
    half = g.node("Mul", size, 0.5)
    return g.node("Concat", g.node("Sub", first, half), g.node("Add", first, half), axis=0)


def _from_corners(g: Graph, sides: Value, box_format: BoxFormat) -> Value:
    """Write corners (4, B, K) as boxes of any format."""
    if box_format == "xyxy":
        return sides
    first, last = g.halves(sides, 0, 4)
    size = g.node("Sub", last, first)
    if box_format == "cxcywh":
        first = g.node("Add", first, g.node("Mul", size, 0.5))
    return g.node("Concat", first, size, axis=0)


@functools.cache
def _threshold_logit(threshold: float) -> float:
    """Give the greatest float32 logit whose score, as eager PyTorch rounds it, is not above the threshold.

    The last bit of a sigmoid differs between runtimes, that of a logit does not: so a score at the threshold is valid
    in all of them or in none.
    """

    def is_above(code: int) -> bool:
        score = torch.tensor(_from_code(code), dtype=torch.float64).sigmoid().to(torch.float32)
        return bool(score > threshold)

    low, high = _to_code(-np.inf), _to_code(np.inf)  # scores 0 and 1
    if is_above(low):
        raise ValueError(f"threshold must be at least 0; got {threshold}")
    if not is_above(high):
        return float("inf")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return _from_code(low)


def _to_code(value: float) -> int:
    """Number the float32 values in their order."""
    bits = int(np.float32(abs(value)).view(np.int32))
    return -bits if value < 0 else bits


def _from_code(code: int) -> float:
    return float(np.copysign(np.int32(abs(code)).view(np.float32), code))


def _model(
    decode: _Decode,
    outputs: Mapping[str, str | tuple[str, ...]],
    dtypes: tuple[torch.dtype, torch.dtype],
    batch: str | int,
    heads: Sequence[RawHead],
) -> onnx.ModelProto:
    onnx = import_onnx()
    helper, kinds = onnx.helper, onnx.TensorProto
    g, queries, layout = decode.g, decode.queries, decode.layout
    inputs = [
        helper.make_tensor_value_info("pred_logits", _element_type(onnx, dtypes[0]), [batch, queries, decode.classes]),
        helper.make_tensor_value_info("pred_boxes", _element_type(onnx, dtypes[1]), [batch, queries, 4]),
    ]
    inputs += [helper.make_tensor_value_info(raw_name(raw.head), raw.dtype, [batch, *raw.shape]) for raw in heads]
    if layout.sizes is not None:
        inputs.append(helper.make_tensor_value_info(layout.sizes, kinds.INT64, [batch, 2]))
    if isinstance(decode.input_size, Placement):
        bounded = decode.spec.clip or any(decode.input_size.bound in node.input for node in g.nodes)
        named = dict.fromkeys((*decode.input_size[:2], *([decode.input_size.bound] if bounded else [])))
        inputs += [helper.make_tensor_value_info(name, kinds.FLOAT, [4, 1, 1]) for name in named]
    elif isinstance(decode.input_size, str):
        inputs.append(helper.make_tensor_value_info(decode.input_size, kinds.FLOAT, [batch, 3, "height", "width"]))
    described = [_described(decode, name, held, batch) for name, held in outputs.items()]
    described += [value for raw in heads for value in _of_head(decode, raw, batch)]
    graph = helper.make_graph(g.nodes, "detpost", inputs, described, g.constants)
    opsets = [helper.make_opsetid("", g.opset)]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets), producer_name="detpost"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _described(decode: _Decode, name: str, held: str | tuple[str, ...], batch: str | int) -> onnx.ValueInfoProto:
    """Give the dtype and shape of an output."""
    from onnx import helper

    layout, kept = decode.layout, decode.kept
    if not isinstance(held, str):
        dtype, shape = "float32", [batch, kept, layout.columns(name)]
    else:
        dtypes = {"labels": layout.label_dtype, "valid": "bool", "queries": "int64", "count": "int32"}
        lasts = {"boxes": [4], "class_logits": [decode.classes]}
        dtype = dtypes.get(held, "float32")
        shape = [batch, 1] if held == "count" else [batch, kept, *lasts.get(held, [])]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _of_head(decode: _Decode, raw: RawHead, batch: str | int) -> list[onnx.ValueInfoProto]:
    """Give dtype and shape of a head's outputs."""
    from onnx import helper

    return [
        helper.make_tensor_value_info(name, output.dtype, [batch, decode.kept, *output.shape])
        for name, output in outputs_of(raw).items()
    ]


def _element_type(onnx: Any, dtype: torch.dtype) -> int:
    names = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float64: "DOUBLE"}
    return int(onnx.TensorProto.DataType.Value(names[dtype]))
