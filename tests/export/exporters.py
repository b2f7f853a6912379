"""Graphs that end as the exporters of RT-DETR, D-FINE, Ultralytics, DETR and DeepStream-Yolo end them, written afresh.

Each is :func:`tests.export.foreign.foreign` with its raw outputs turned into inner values and post-processing behind.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.export.foreign import SIDE, C, Q, foreign

LOGITS, BOXES = "/decoder/logits", "/decoder/boxes"
K = 60


class Tail:
    """A graph under construction: nodes are appended, and each call gives the name of what it makes."""

    def __init__(self, model, opset, dtype):
        self.model, self.opset, self.dtype, self.count = model, opset, dtype, 0

    def node(self, kind, *inputs, outputs=1, name=None, **attributes):
        self.count += 1
        names = [name] if name else [f"/theirs/{kind}_{self.count}_{i}" for i in range(outputs)]
        self.model.graph.node.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, values, dtype=np.int64):
        self.count += 1
        name = f"/theirs/constant_{self.count}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def real(self, values):
        return self.constant(values, self.dtype)

    def unsqueeze(self, value, *axes):
        if self.opset < 13:
            return self.node("Unsqueeze", value, axes=list(axes))
        return self.node("Unsqueeze", value, self.constant(list(axes)))

    def reduce_max(self, value, axis):
        if self.opset < 18:
            return self.node("ReduceMax", value, axes=[axis], keepdims=0)
        return self.node("ReduceMax", value, self.constant([axis]), keepdims=0)

    def softmax(self, value):
        return self.node("Softmax", value, axis=2)

    def output(self, value, name, dtype, shape):
        self.node("Identity", value, name=name)
        self.model.graph.output.append(helper.make_tensor_value_info(name, dtype, shape))

    # The pieces that post-processing is made of.

    def corners(self, boxes):
        """(cx, cy, w, h) to corners, one component after another."""
        x, y, w, h = (self.node("Gather", boxes, self.constant(i), axis=2) for i in range(4))
        half_w, half_h = (self.node("Mul", size, self.real(0.5)) for size in (w, h))
        parts = (("Sub", x, half_w), ("Sub", y, half_h), ("Add", x, half_w), ("Add", y, half_h))
        return self.stack(self.node(*part) for part in parts)

    def corners_by_matrix(self, boxes):
        rows = [[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]]
        return self.node("MatMul", boxes, self.real(rows))

    def stack(self, parts):
        return self.node("Concat", *(self.unsqueeze(part, 2) for part in parts), axis=2)

    def scaled(self, boxes, sizes):
        """Multiply by an input (B, 2) of (width, height)."""
        real = self.node("Cast", sizes, to=helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype)))
        twice = self.node("Concat", real, real, axis=1)
        return self.node("Mul", boxes, self.unsqueeze(twice, 1))

    def flat_top(self, scores, classes, count=K):
        """The best of all pairs of query and class: scores, labels, queries."""
        flat = self.node("Reshape", scores, self.constant([0, -1]))
        values, index = self.node("TopK", flat, self.constant([count]), outputs=2, axis=1)
        query = self.node("Div", index, self.constant(classes))
        return values, self.node("Sub", index, self.node("Mul", query, self.constant(classes))), query

    def gather(self, boxes, query):
        index = self.node("Expand", self.unsqueeze(query, 2), self.constant([1, 1, 4]))
        return self.node("GatherElements", boxes, index, axis=1)


def start(opset=17, dtype=np.float32, batch="N", classes=C, sizes=True, **options):
    """The network, its raw outputs inside, and the input of sizes that RT-DETR's exporter adds."""
    if opset < 13:
        options["ir_version"] = 6
    model = foreign(LOGITS, BOXES, batch=batch, opset=opset, dtype=dtype, classes=classes, **options)
    del model.graph.output[:]
    if sizes:
        model.graph.input.append(helper.make_tensor_value_info("orig_target_sizes", TensorProto.INT64, [batch, 2]))
    return model, Tail(model, opset, dtype)


def finish(model, tail, labels, boxes, scores, batch="N", count=K):
    real = helper.np_dtype_to_tensor_dtype(np.dtype(tail.dtype))
    tail.output(labels, "labels", TensorProto.INT64, [batch, count])
    tail.output(boxes, "boxes", real, [batch, count, 4])
    tail.output(scores, "scores", real, [batch, count])
    return model


def rtdetr(batch="N", boxes=BOXES, **options):
    """RT-DETR, RT-DETRv2, DEIM: labels, boxes, scores of the best pairs."""
    model, tail = start(batch=batch, **options)
    corners = tail.scaled(tail.corners(boxes(tail) if callable(boxes) else boxes), "orig_target_sizes")
    scores, labels, query = tail.flat_top(tail.node("Sigmoid", LOGITS), options.get("classes", C))
    return finish(model, tail, labels, tail.gather(corners, query), scores, batch)


def dfine(**options):
    """D-FINE: raw boxes are themselves put together from corners, just before they are taken apart again."""

    def boxes(tail):
        x1, y1, x2, y2 = (tail.node("Gather", tail.corners(BOXES), tail.constant(i), axis=2) for i in range(4))
        middles = [tail.node("Mul", tail.node("Add", *pair), tail.real(0.5)) for pair in ((x1, x2), (y1, y2))]
        lengths = [tail.node("Sub", *pair) for pair in ((x2, x1), (y2, y1))]
        return tail.stack((*middles, *lengths))

    return rtdetr(boxes=boxes, **options)


def clipped(**options):
    """A fork that clips to the image and puts the corners together once more, behind the selection."""
    model, tail = start(**options)
    corners = tail.corners(BOXES)
    scores, labels, query = tail.flat_top(tail.node("Sigmoid", LOGITS), C)
    kept = tail.gather(tail.node("Clip", corners, tail.real(0), tail.real(1)), query)
    parts = [tail.node("Gather", kept, tail.constant(i), axis=2) for i in range(4)]
    return finish(model, tail, labels, tail.scaled(tail.stack(parts), "orig_target_sizes"), scores)


def with_category_ids(**options):
    """RT-DETR's option that turns labels into COCO's category ids, with gaps."""
    model, tail = start(**options)
    corners = tail.scaled(tail.corners(BOXES), "orig_target_sizes")
    scores, labels, query = tail.flat_top(tail.node("Sigmoid", LOGITS), C)
    ids = tail.node("Gather", tail.constant([1, 2, 3, 5, 8, 13, 21]), labels)
    return finish(model, tail, ids, tail.gather(corners, query), scores)


def ultralytics(**options):
    """Rows of cx, cy, w, h of an image of size 1, score, class."""
    model, tail = start(sizes=False, **options)
    scores, labels, query = tail.flat_top(tail.node("Sigmoid", LOGITS), C)
    parts = (tail.unsqueeze(scores, 2), tail.node("Cast", tail.unsqueeze(labels, 2), to=TensorProto.FLOAT))
    rows = tail.node("Concat", tail.gather(BOXES, query), *parts, axis=2)
    tail.output(rows, "output0", TensorProto.FLOAT, ["N", K, 6])
    return model


def ultralytics_dense(**options):
    """Older ones: every query's box and scores of all classes, in one array."""
    model, tail = start(sizes=False, **options)
    tail.output(tail.node("Concat", BOXES, tail.node("Sigmoid", LOGITS), axis=2), "output0", TensorProto.FLOAT, None)
    return model


def probabilities(**options):
    """Boxes, and scores of all classes: an activation in the file and nothing else."""
    model, tail = start(sizes=False, **options)
    tail.output(tail.node("Sigmoid", LOGITS), "scores", TensorProto.FLOAT, ["N", Q, C])
    tail.output(BOXES, "boxes", TensorProto.FLOAT, ["N", Q, 4])
    return model


def deepstream(**options):
    """Rows of corners in pixels of the network's input, score and class of each query's best class."""
    model, tail = start(sizes=False, **options)
    corners = tail.node("Mul", tail.corners_by_matrix(BOXES), tail.real([SIDE] * 4))
    scores = tail.node("Sigmoid", LOGITS)
    best = tail.unsqueeze(tail.reduce_max(scores, 2), 2)
    labels = tail.node("Cast", tail.node("ArgMax", scores, axis=2, keepdims=1), to=TensorProto.FLOAT)
    tail.output(tail.node("Concat", corners, best, labels, axis=2), "output", TensorProto.FLOAT, ["N", Q, 6])
    return model


def deepstream_logits(**options):
    """The same without an activation, in three arrays."""
    model, tail = start(sizes=False, **options)
    tail.output(tail.node("Mul", tail.corners(BOXES), tail.real([SIDE] * 4)), "boxes", TensorProto.FLOAT, ["N", Q, 4])
    tail.output(tail.unsqueeze(tail.reduce_max(LOGITS, 2), 2), "scores", TensorProto.FLOAT, ["N", Q, 1])
    labels = tail.node("Cast", tail.node("ArgMax", LOGITS, axis=2, keepdims=1), to=TensorProto.FLOAT)
    tail.output(labels, "best_classes", TensorProto.FLOAT, ["N", Q, 1])
    return model


def detr(**options):
    """DETR, and RT-DETR without focal loss: softmax, the background dropped, each query's best class."""
    model, tail = start(**options)
    ends = [tail.constant([0]), tail.constant([C - 1]), tail.constant([2])]
    scores = tail.node("Slice", tail.softmax(LOGITS), *ends)
    labels = tail.node("ArgMax", scores, axis=2, keepdims=0)
    corners = tail.scaled(tail.corners(BOXES), "orig_target_sizes")
    return finish(model, tail, labels, corners, tail.reduce_max(scores, 2), count=Q)
