"""The post-processor as an ONNX graph of its own, which every ONNX export ends in: one function for each choice.

It is written node by node and not traced, from operators that every runner has (:mod:`detpost.export.operators`), in
float32 and int32; int64 only where ONNX demands it: shapes, the indices of TopK, labels and queries as they come out.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from detpost.export.graph import Graph, Value, import_onnx
from detpost.export.selection_graph import Chosen, Rows, finite_keys, select, select_by_runner
from detpost.export.softmax_graph import shares
from detpost.spec import DecodeSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["IoNames", "Ties", "decode_graph", "io_inputs", "io_outputs"]

IoNames = Literal["detpost", "rtdetr", "efficientnms"]
Ties = Literal["exact", "onnx"]

OLDEST_OPSET = 11  # CumSum came with it

_SIZES_INPUT = {"detpost": "image_sizes", "rtdetr": "orig_target_sizes", "efficientnms": "image_sizes"}
_OUTPUTS = {
    "detpost": ("labels", "boxes", "scores", "valid"),
    "rtdetr": ("labels", "boxes", "scores"),
    "efficientnms": ("num_dets", "det_boxes", "det_scores", "det_classes"),
}


def io_inputs(io: IoNames) -> str:
    """Give the name of the image-size input."""
    return _SIZES_INPUT[io]


def io_outputs(io: IoNames, queries: bool) -> tuple[str, ...]:
    """Give the names of the outputs, in order."""
    return (*_OUTPUTS[io], *(("queries",) if queries else ()))


def decode_graph(
    spec: DecodeSpec,
    num_queries: int,
    num_classes: int,
    *,
    opset: int,
    io: IoNames = "detpost",
    ties: Ties = "exact",
    queries: bool = False,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    dynamic_batch: bool = True,
    prefix: str = "detpost/",
) -> onnx.ModelProto:
    """Write the graph ``pred_logits`` (B, Q, C), ``pred_boxes`` (B, Q, 4), sizes (B, 2) -> detections.

    Args:
        spec: what the decode does.
        num_queries: Q.
        num_classes: C.
        opset: version of the default operator set, 11 or later.
        io: names of inputs and outputs.
        ties: whether the graph resolves equal scores itself, or leaves them to ONNX's promise of the lower index.
        queries: whether ``queries`` is an output.
        dtypes: of logits and boxes as they come.
        dynamic_batch: whether B is free; else 1.
        prefix: begins the name of every node and inner value.

    Returns:
        The checked model.
    """
    decode = _Decode(Graph(opset, prefix), spec, num_queries, num_classes, ties)
    g = decode.g
    found = decode.found(_widened(g, "pred_logits", dtypes[0], (num_queries, num_classes)))
    valid = decode.valid(found)
    boxes = decode.boxes(found, valid, _widened(g, "pred_boxes", dtypes[1], (num_queries, 4)), io)
    names = io_outputs(io, queries)
    values = [decode.output(name, found, valid, boxes) for name in names]
    g.rename(dict(zip(values, names, strict=True)))
    return _model(decode, names, io, dtypes, "batch" if dynamic_batch else 1)


class _Found(NamedTuple):
    """The kept pairs, best first: (B, K) each."""

    scores: Value  # float32; of softmax heads, negative where there is none
    labels: Value  # int32
    queries: Value  # int32
    is_number: Value | None  # bool; of sigmoid heads
    logits: Value  # float32; of sigmoid heads


class _Decode:
    """What every part of the graph is written from."""

    def __init__(self, g: Graph, spec: DecodeSpec, queries: int, classes: int, ties: Ties) -> None:
        self.g = g
        self.spec = spec
        self.queries = queries
        self.classes = classes
        self.ties = ties
        self.kept = min(spec.top_k, queries * classes if spec.selection == "flat" else queries)
        self.background = {"none": -1, "first": 0, "last": classes - 1}[spec.background]  # its channel

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

    def boxes(self, found: _Found, valid: Value, boxes: Value, io: IoNames) -> Value:
        """Write the boxes (B, K, 4) of the kept queries, in pixels, 0 where not valid.

        As four tables of B rows of K numbers: ONNX Runtime handles many rows of four at a tenth of the speed.
        """
        g = self.g
        with g.part("boxes"):
            places = g.node("Expand", found.queries, g.constant([4, 1, 1]))
            sides = g.node("GatherElements", g.node("Transpose", boxes, perm=[2, 0, 1]), places, axis=2)
            sides = _corners(g, sides, self.spec)
            sizes = g.node("Transpose", g.cast(io_inputs(io), "FLOAT"), perm=[1, 0])
            width, height = (0, 1) if io == "rtdetr" else (1, 0)  # RT-DETR's runners give (width, height)
            limits = g.unsqueeze(g.node("Gather", sizes, g.constant([width, height, width, height]), axis=0), 2)
            sides = g.node("Mul", sides, limits)
            if self.spec.clip:
                sides = g.node("Min", g.node("Max", sides, 0.0), limits)
            return g.node("Transpose", g.node("Where", valid, sides, 0.0), perm=[1, 2, 0])

    def output(self, name: str, found: _Found, valid: Value, boxes: Value) -> Value:
        """Write what an output of that name holds; slots that are not valid read label and query -1, score 0."""
        g = self.g
        with g.part("outputs"):
            if name in ("boxes", "det_boxes"):
                return boxes
            if name == "valid":
                return valid
            if name == "num_dets":
                return g.cast(g.sum(g.indicator(valid), 1, keep=True), "INT32")
            if name in ("scores", "det_scores"):
                if found.is_number is None and self.spec.score_threshold is None:
                    return g.node("Relu", found.scores)  # what is not valid has a negative one
                return g.node("Where", valid, found.scores, 0.0)
            whole = g.node("Where", valid, found.queries if name == "queries" else found.labels, -1)
            return whole if name == "det_classes" else g.cast(whole, "INT64")

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
    decode: _Decode, names: tuple[str, ...], io: IoNames, dtypes: tuple[torch.dtype, torch.dtype], batch: str | int
) -> onnx.ModelProto:
    onnx = import_onnx()
    helper, kinds = onnx.helper, onnx.TensorProto
    g, queries, kept = decode.g, decode.queries, decode.kept
    inputs = [
        helper.make_tensor_value_info("pred_logits", _element_type(onnx, dtypes[0]), [batch, queries, decode.classes]),
        helper.make_tensor_value_info("pred_boxes", _element_type(onnx, dtypes[1]), [batch, queries, 4]),
        helper.make_tensor_value_info(io_inputs(io), kinds.INT64, [batch, 2]),
    ]
    described = {
        "boxes": (kinds.FLOAT, [batch, kept, 4]),
        "det_boxes": (kinds.FLOAT, [batch, kept, 4]),
        "scores": (kinds.FLOAT, [batch, kept]),
        "det_scores": (kinds.FLOAT, [batch, kept]),
        "valid": (kinds.BOOL, [batch, kept]),
        "num_dets": (kinds.INT32, [batch, 1]),
        "det_classes": (kinds.INT32, [batch, kept]),
        "labels": (kinds.INT64, [batch, kept]),
        "queries": (kinds.INT64, [batch, kept]),
    }
    outputs = [helper.make_tensor_value_info(name, *described[name]) for name in names]
    graph = helper.make_graph(g.nodes, "detpost", inputs, outputs, g.constants)
    opsets = [helper.make_opsetid("", g.opset)]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets), producer_name="detpost"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _element_type(onnx: Any, dtype: torch.dtype) -> int:
    names = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float64: "DOUBLE"}
    return int(onnx.TensorProto.DataType.Value(names[dtype]))
