"""The written decode graph: the same answer as eager PyTorch in every runner, from operators that runners have."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from detpost import DecodeSpec, DetectionPostProcessor, boxes, presets
from detpost.export import decode_graph as module
from detpost.export import operators, selection_graph
from detpost.export.attachment import attach_graph
from detpost.export.decode_graph import decode_graph
from detpost.export.front_graph import PLACEMENT
from detpost.export.heads import KeypointHead, MaskHead, OrientedHead
from detpost.export.layouts import LAYOUTS
from detpost.export.slots import RawHead
from detpost.reference import softmax
from detpost.reference.selection import best_class, select_top_k

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
LIMITS = np.finfo(np.float32)
# Numbers on which runtimes differ: NaN, infinities, both zeros, neighbours, denormals, the ends of float32.
COMMON = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 1 + 2**-23, -1.0, 0.5, 5.0, 20.0, 21.0, -90.0, -104.0, 65504.0)
ENDS = (LIMITS.max, LIMITS.min, 3.3e38, -3.3e38, LIMITS.tiny, 1e-45, -1e-45, 3e-45, 1e-40, -1e-40, 1e30, -1e30)
POOL = torch.tensor([*COMMON, *ENDS])
HEADS = {
    "rtdetr": (DecodeSpec(top_k=30), 20, 11),
    "everything kept": (DecodeSpec(), 12, 5),
    "one kept": (DecodeSpec(top_k=1), 12, 5),
    "raised": (DecodeSpec(top_k=9), 40, 23),
    "clip and threshold": (DecodeSpec(top_k=30, clip=True, score_threshold=0.3), 20, 11),
    "sigmoid, background": (DecodeSpec(top_k=40, background="first", box_format="xywh"), 10, 5),
    "per query": (DecodeSpec(selection="per_query", top_k=20), 30, 7),
    "per query, background": (DecodeSpec(selection="per_query", top_k=30, background="last"), 30, 7),
    "detr": (DecodeSpec.preset("detr"), 25, 12),
    "detr, threshold": (DecodeSpec.preset("detr", top_k=9, score_threshold=0.2), 25, 12),
    "detr, background first": (DecodeSpec.preset("detr", background="first", box_format="xyxy"), 25, 6),
    "softmax, flat": (DecodeSpec(activation="softmax", top_k=17), 12, 6),
    "softmax, flat, background": (DecodeSpec(activation="softmax", top_k=90, background="last"), 12, 6),
    "softmax, three limbs": (DecodeSpec(activation="softmax", background="last", top_k=9), 8, 600),
    "a background alone": (DecodeSpec.preset("detr"), 7, 1),
}


def rows(batch, queries, classes, seed):
    """Logits (B, Q, C) of one of eleven kinds."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, queries, classes)

    def chance(*size):
        return torch.rand(*size, generator=generator)

    def pool(*size):
        return POOL[torch.randint(len(POOL), size, generator=generator)]

    values = {
        0: lambda: torch.randn(shape, generator=generator) * 3 - 2,
        1: lambda: (torch.randn(shape, generator=generator) * 2).round() / 2,
        2: lambda: pool(*shape),
        3: lambda: pool(2)[(chance(*shape) < chance(1) ** 3).long()],
        4: lambda: pool(3)[torch.randint(3, shape, generator=generator)],
        5: lambda: torch.where(chance(*shape) < 0.02, pool(*shape), pool(1)),
        6: lambda: torch.randn(shape, generator=generator).half().float(),
        7: lambda: torch.where(chance(*shape) < 0.3, math.nan, (torch.randn(shape, generator=generator) * 2).round()),
        8: lambda: torch.where(chance(*shape) < 0.97, math.nan, -math.inf),
        9: lambda: torch.where(chance(batch, queries, 1) < 0.6, -math.inf, torch.randn(shape, generator=generator)),
        10: lambda: torch.where(chance(*shape) < 0.9, math.nan, LIMITS.min.item()),
    }[seed % 11]()
    # Queries that are equal, so that whole detections tie.
    return torch.where(chance(batch, queries, 1) < 0.6, values[:, :1], values) if seed % 4 == 3 else values


def seeds_for(classes):
    return 44 if classes < 100 else 11


def feed_of(queries, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    batch = 1 + seed % 3
    corners = torch.rand(batch, queries, 4, generator=generator)
    sizes = torch.randint(10, 2000, (batch, 2), generator=generator)
    return rows(batch, queries, classes, seed), corners, sizes


def expected(spec, logits, corners, sizes):
    """The decode as DecodeSpec's text has it; of softmax heads from the scores' own definition."""
    if spec.activation == "sigmoid":
        return DetectionPostProcessor(spec)(logits, corners, sizes)._asdict()
    batch, _, classes = logits.shape
    background = {"none": -1, "first": 0, "last": classes - 1}[spec.background]
    is_object = torch.arange(classes) != background
    scores = torch.where(is_object, softmax.scores(logits), math.nan)
    if spec.selection == "flat":
        flat = scores.reshape(batch, -1)
        chosen = select_top_k(flat, spec.top_k)
        queries, labels, values = chosen // classes, chosen % classes, flat.gather(1, chosen)
    else:
        best = best_class(torch.where(is_object, logits.float(), math.nan))
        keys = scores.gather(2, best.unsqueeze(2)).squeeze(2)
        queries = select_top_k(keys, spec.top_k)
        labels, values = best.gather(1, queries), keys.gather(1, queries)
    valid = ~values.isnan() if spec.score_threshold is None else values > spec.score_threshold
    found = corners.float().gather(1, queries.unsqueeze(2).expand(-1, -1, 4))
    found = boxes.scale(boxes.convert(found, spec.box_format, "xyxy"), sizes)
    found = boxes.clip(found, sizes) if spec.clip else found
    return {
        "scores": torch.where(valid, values, 0.0),
        "labels": torch.where(valid, labels, -1),
        "queries": torch.where(valid, queries, -1),
        "valid": valid,
        "boxes": torch.where(valid.unsqueeze(2), found, 0.0),
    }


def assert_same(found, wanted, spec, case):
    for name in ("valid", "labels", "queries"):
        assert torch.equal(torch.from_numpy(found[name]), wanted[name]), (case, name)
    scores = torch.from_numpy(found["scores"])
    if spec.activation == "softmax":
        assert torch.equal(scores, wanted["scores"]), (case, "scores")
    else:
        torch.testing.assert_close(scores, wanted["scores"], rtol=0, atol=2e-6)
    torch.testing.assert_close(torch.from_numpy(found["boxes"]), wanted["boxes"], rtol=0, atol=0, equal_nan=True)


def in_onnx_runtime(model, level="ORT_ENABLE_ALL"):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, feed), strict=True))


def in_openvino(model):
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(model.SerializeToString(), b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return lambda feed: {value.get_any_name(): found.copy() for value, found in compiled(feed).items()}


def in_a_hostile_runner(model):
    # The evaluator knows an operator by the name of its class.
    hostile = [type(kind.op_type, (kind,), {}) for kind in (HostileTopK, HostileReduceMax, CarefulGatherElements)]
    evaluator = ReferenceEvaluator(model, new_ops=hostile)
    names = [output.name for output in model.graph.output]

    def run(feed):
        with np.errstate(all="ignore"):
            return dict(zip(names, evaluator.run(names, feed), strict=True))

    return run


class HostileTopK(OpRun):
    """ONNX's TopK by the letter of its values alone: equal ones in a wrong order, and WebGPU's padding among them."""

    op_domain = ""
    op_type = "TopK"

    def _run(self, values, k, axis=-1, largest=1, sorted=1):
        assert largest == sorted == 1
        assert axis in (1, values.ndim - 1)
        assert values.dtype == np.float32
        assert not np.isnan(values).any(), "a TopK of NaN means nothing"
        count = int(k[0])
        width = values.shape[axis]
        padding = 2 ** (width - 1).bit_length() - width
        padded = np.concatenate((values, np.full((*values.shape[:-1], padding), LIMITS.min, np.float32)), axis=-1)
        places = np.concatenate((np.arange(width), np.full(padding, -1)))
        # Descending; among equal ones the padding first, as on WebGPU, and then the higher index.
        order = np.lexsort((np.broadcast_to(-places - width * (places < 0), padded.shape), -padded))[..., :count]
        return np.take_along_axis(padded, order, axis=-1), places[order]


class HostileReduceMax(OpRun):
    """OpenVINO's greatest of nothing but -inf is the lowest finite number."""

    op_domain = ""
    op_type = "ReduceMax"

    def _run(self, values, axes=None, keepdims=1, noop_with_empty_axes=0):
        axes = tuple(int(axis) for axis in axes)
        return (np.fmax.reduce(values, axis=axes, keepdims=bool(keepdims), initial=LIMITS.min),)


class CarefulGatherElements(OpRun):
    """No runner has to take a place that is not there."""

    op_domain = ""
    op_type = "GatherElements"

    def _run(self, values, places, axis=0):
        assert places.size == 0 or 0 <= places.min() <= places.max() < values.shape[axis]
        others = [slice(size) for size in places.shape]
        others[axis] = slice(None)
        return (np.take_along_axis(values[tuple(others)], places.astype(np.int64), axis=axis),)


def as_feed(logits, corners, sizes):
    return {"pred_logits": logits.numpy(), "pred_boxes": corners.numpy(), "image_sizes": sizes.numpy()}


def hold(runs, spec, queries, classes, seeds):
    for seed in seeds:
        raw = feed_of(queries, classes, seed)
        wanted = expected(spec, *raw)
        for place, run in enumerate(runs):
            assert_same(run(as_feed(*raw)), wanted, spec, (seed, place))


class TestSameAnswer:
    @pytest.mark.parametrize("head", HEADS)
    def test_in_onnx_runtime_at_every_level_of_optimisation(self, head):
        spec, queries, classes = HEADS[head]
        model = decode_graph(spec, queries, classes, opset=17, queries=True)
        hold([in_onnx_runtime(model, level) for level in LEVELS], spec, queries, classes, range(seeds_for(classes)))

    @pytest.mark.parametrize("head", HEADS)
    def test_in_openvino(self, head):
        spec, queries, classes = HEADS[head]
        model = decode_graph(spec, queries, classes, opset=17, queries=True)
        hold([in_openvino(model)], spec, queries, classes, range(seeds_for(classes)))

    @pytest.mark.parametrize("head", HEADS)
    def test_in_a_runner_that_keeps_no_more_than_onnx_promises(self, head):
        spec, queries, classes = HEADS[head]
        model = decode_graph(spec, queries, classes, opset=18, queries=True)
        hold([in_a_hostile_runner(model)], spec, queries, classes, range(seeds_for(classes)))

    @pytest.mark.parametrize(
        ("spec", "queries", "classes"),
        [
            (DecodeSpec(top_k=3), 60, 20),
            (DecodeSpec(top_k=7), 43, 41),
            (DecodeSpec(top_k=5, score_threshold=0.4), 97, 61),
            (DecodeSpec(selection="per_query", top_k=4), 311, 3),
            (DecodeSpec(activation="softmax", background="first", top_k=5), 31, 29),
        ],
    )
    def test_wide_rows_are_read_in_groups(self, monkeypatch, spec, queries, classes):
        monkeypatch.setattr(selection_graph, "_WIDE", 100)
        model = decode_graph(spec, queries, classes, opset=18, queries=True)
        assert len(model.graph.node) <= 120
        assert any(node.op_type == "Neg" for node in model.graph.node)  # the groups, sorted
        hold(
            [in_onnx_runtime(model), in_openvino(model), in_a_hostile_runner(model)], spec, queries, classes, range(36)
        )

    @pytest.mark.parametrize(("spec", "queries", "classes"), [HEADS["rtdetr"], HEADS["softmax, flat"]])
    def test_places_that_do_not_fit_are_sorted_digit_by_digit(self, monkeypatch, spec, queries, classes):
        one_digit = len(decode_graph(spec, queries, classes, opset=17).graph.node)
        monkeypatch.setattr(selection_graph, "_WHOLE_NUMBERS", 2**7)
        model = decode_graph(spec, queries, classes, opset=17, queries=True)
        assert len(model.graph.node) > one_digit + 10
        hold([in_onnx_runtime(model)], spec, queries, classes, range(36))

    def test_keys_take_both_sides_of_zero(self):
        spec = DecodeSpec.preset("owlv2")
        count = spec.top_k
        assert count**2 > 2**24
        run = in_a_hostile_runner(decode_graph(spec, count, 1, opset=18, queries=True))
        # Many values, and then many equal ones with neighbouring places.
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        logits = (-torch.arange(count).clamp(max=4000) / 64)[order].reshape(1, count, 1)
        raw = (logits, torch.rand(1, count, 4), torch.tensor([[480, 640]]))
        assert_same(run(as_feed(*raw)), expected(spec, *raw), spec, "stairs")

    @pytest.mark.parametrize("head", ["rtdetr", "detr"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_other_dtypes_come_in(self, head, dtype):
        spec, queries, classes = HEADS[head]
        model = decode_graph(spec, queries, classes, opset=17, queries=True, dtypes=(dtype, torch.float32))
        run = in_onnx_runtime(model)
        for seed in range(27):
            logits, corners, sizes = feed_of(queries, classes, seed)
            logits = logits.to(torch.float16)
            found = run(as_feed(logits.to(dtype), corners, sizes))
            assert_same(found, expected(spec, logits, corners, sizes), spec, seed)

    @pytest.mark.parametrize("preset", ["rtdetr", "owlvit"])
    def test_a_half_precision_network_is_decoded_from_what_it_gives(self, preset):
        # ONNX Runtime computes these sigmoids in float32, and would compare what they were before they were rounded.
        kind = onnx.TensorProto.FLOAT16
        names = {"logits": 6, "boxes": 4}
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Sigmoid", [f"raw_{name}"], [name]) for name in names],
            "a half-precision network",
            [onnx.helper.make_tensor_value_info(f"raw_{name}", kind, ["n", 20, size]) for name, size in names.items()],
            [onnx.helper.make_tensor_value_info(name, kind, ["n", 20, size]) for name, size in names.items()],
        )
        network = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        spec = DecodeSpec.preset(preset, top_k=40)
        run = in_onnx_runtime(attach_graph(network, spec, keep_raw=True, queries=True)[0])
        for seed in range(20):
            values = np.random.default_rng(seed)
            feed = {f"raw_{name}": values.normal(size=(2, 20, size)).astype(np.float16) for name, size in names.items()}
            sizes = values.integers(10, 900, (2, 2))
            found = run({**feed, "image_sizes": sizes})
            raw = [torch.from_numpy(found[name]) for name in ("pred_logits", "pred_boxes")]
            assert_same(found, expected(spec, *raw, torch.from_numpy(sizes)), spec, seed)

    @pytest.mark.parametrize("opset", [11, 12, 13, 18, 21])
    @pytest.mark.parametrize("head", ["raised", "per query", "detr", "softmax, flat, background"])
    def test_at_every_opset(self, head, opset):
        spec, queries, classes = HEADS[head]
        model = decode_graph(spec, queries, classes, opset=opset, queries=True)
        assert model.opset_import[0].version == opset
        hold([in_onnx_runtime(model)], spec, queries, classes, range(9))

    @pytest.mark.slow
    @pytest.mark.parametrize(("preset", "queries", "classes"), [("rtdetr", 300, 80), ("rtdetr", 300, 230)])
    def test_at_full_size(self, preset, queries, classes):
        spec = DecodeSpec.preset(preset)
        model = decode_graph(spec, queries, classes, opset=17, queries=True)
        hold([in_onnx_runtime(model), in_openvino(model)], spec, queries, classes, range(18))

    def test_a_score_at_the_threshold_is_valid_nowhere_and_the_next_everywhere(self):
        for threshold in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0):
            spec = DecodeSpec(top_k=8, score_threshold=threshold)
            limit = module._threshold_logit(threshold)
            near = [limit]
            for side in (-np.inf, np.inf):
                for _ in range(4):
                    near.append(float(np.nextafter(np.float32(near[-1] if len(near) % 4 != 1 else limit), side)))
            logits = torch.tensor(near[:8]).reshape(1, 8, 1)
            raw = (logits, torch.rand(1, 8, 4), torch.tensor([[10, 20]]))
            assert_same(
                in_onnx_runtime(decode_graph(spec, 8, 1, opset=17, queries=True))(as_feed(*raw)),
                expected(spec, *raw),
                spec,
                threshold,
            )


class TestTiesLeftToOnnx:
    @pytest.mark.parametrize("head", [head for head, (spec, *_) in HEADS.items() if spec.activation == "sigmoid"])
    def test_onnx_runtime_keeps_the_promise(self, head):
        spec, queries, classes = HEADS[head]
        run = in_onnx_runtime(decode_graph(spec, queries, classes, opset=17, ties="onnx", queries=True))
        for seed in range(45):
            logits, corners, sizes = feed_of(queries, classes, seed)
            # -inf counts as the lowest finite number there.
            logits = torch.where(logits == LIMITS.min, -math.inf, logits)
            wanted = expected(spec, logits, corners, sizes)
            assert_same(run(as_feed(logits, corners, sizes)), wanted, spec, seed)

    @pytest.mark.parametrize("preset", ["detr", "rtdetr", "owlvit"])
    def test_ordinary_logits_give_the_exact_graphs_answer(self, preset):
        spec = DecodeSpec.preset(preset, top_k=40)
        exact, small = (
            in_onnx_runtime(decode_graph(spec, 50, 12, opset=17, ties=ties, queries=True)) for ties in ("exact", "onnx")
        )
        raw = as_feed(torch.randn(3, 50, 12) * 3, torch.rand(3, 50, 4), torch.randint(10, 2000, (3, 2)))
        first, second = exact(raw), small(raw)
        for name in ("labels", "queries", "valid"):
            assert (first[name] == second[name]).all(), name
        np.testing.assert_allclose(first["scores"], second["scores"], atol=2e-6)

    def test_wide_rows_are_read_in_groups(self, monkeypatch):
        monkeypatch.setattr(selection_graph, "_WIDE", 100)
        spec = DecodeSpec(top_k=7)
        model = decode_graph(spec, 43, 41, opset=17, ties="onnx", queries=True)
        run = in_onnx_runtime(model)
        for seed in range(36):
            logits, corners, sizes = feed_of(43, 41, seed)
            logits = torch.where(logits == LIMITS.min, -math.inf, logits)
            assert_same(run(as_feed(logits, corners, sizes)), expected(spec, logits, corners, sizes), spec, seed)


@functools.cache
def every_graph():
    """A graph of each preset, head, layout and size."""
    specs = [DecodeSpec.preset(name) for name in presets()]
    specs += [
        DecodeSpec(activation=a, selection=s, background=b, box_format=f, clip=True, score_threshold=0.5)
        for a, s, b, f in itertools.product(
            ("sigmoid", "softmax"), ("flat", "per_query"), ("none", "first", "last"), ("cxcywh", "xywh")
        )
    ]
    graphs = {}
    for spec, (queries, classes), ties in itertools.product(
        specs, [(20, 5), (300, 80), (300, 1203)], ("exact", "onnx")
    ):
        graphs[spec, queries, classes, ties, "detpost"] = decode_graph(
            spec, queries, classes, opset=17, ties=ties, queries=True
        )
    heads = (DecodeSpec(), DecodeSpec.preset("detr", clip=True))
    for spec, io, ties, size in itertools.product(heads, LAYOUTS, ("exact", "onnx"), ("images", (480, 640))):
        graphs[spec, 300, 80, ties, f"{io} {size}"] = decode_graph(
            spec, 300, 80, opset=17, io=io, ties=ties, input_size=size
        )
    # A prime number of queries: the last group must be filled up.
    graphs[DecodeSpec(top_k=5), 70001, 1, "exact", "detpost"] = decode_graph(DecodeSpec(top_k=5), 70001, 1, opset=17)
    return graphs


def head_graphs():
    """A graph of each kind of value beside the boxes, at fixed and open sizes, in single and half precision."""
    heads = {
        **{
            f"masks {size} {style}": (MaskHead(size, style), [(30, 8, 9), (30, "h", "w")])
            for size in ("network", "image")
            for style in ("rfdetr", "dfine_seg")
        },
        "keypoints": (KeypointHead(), [(30, 34)]),
        "keypoints of classes": (KeypointHead((0, 2, 3, 0, 1)), [(30, 15, 8)]),
        "oriented boxes": (OrientedHead(2.0), [(30, 5)]),
    }
    graphs = {}
    for (name, (head, shapes)), clip, placed in itertools.product(heads.items(), (False, True), (False, True)):
        spec = DecodeSpec.preset("rtdetr", clip=clip)
        for shape, dtype in itertools.product(shapes, (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)):
            graphs[name, clip, placed, shape, dtype] = decode_graph(
                spec, 30, 7, opset=17, heads=[RawHead(head, shape, dtype)], input_size=PLACEMENT if placed else None
            )
    return graphs


class TestOperators:
    def test_every_graph_keeps_to_the_table(self):
        used = {}
        edge = {"float16", "bfloat16", "double"}  # the network's outputs
        for case, model in {**every_graph(), **head_graphs()}.items():
            for operator, dtypes in operators.inventory(model).items():
                assert dtypes <= operators.OPERATORS[operator], (case, operator, dtypes)
                used.setdefault(operator, set()).update(dtypes - edge)
        assert used == {name: set(dtypes) - edge for name, dtypes in operators.OPERATORS.items()}

    def test_no_double_no_branch_no_loop_and_int64_for_shapes_indices_and_outputs_alone(self):
        for case, model in every_graph().items():
            inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
            makers = {name: node.op_type for node in inferred.node for name in node.output}
            outputs = {value.name for value in inferred.output}
            for value in inferred.value_info:
                kind = value.type.tensor_type.elem_type
                assert onnx.TensorProto.DataType.Name(kind) in ("FLOAT", "INT32", "INT64", "BOOL"), (case, value.name)
                if kind == onnx.TensorProto.INT64 and value.name not in outputs:
                    of_sizes = "images" in case[-1] and makers[value.name] in ("Shape", "Gather")
                    assert makers[value.name] in ("TopK", "ArgMax") or of_sizes, (case, value.name)
            for tensor in inferred.initializer:
                if tensor.data_type == onnx.TensorProto.INT64:
                    data = [node for node in inferred.node if node.input[0] == tensor.name]
                    assert not data, (case, tensor.name)
                else:
                    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
                    assert kind in ("FLOAT", "INT32", "BOOL"), (case, tensor.name)
            assert not any(attribute.HasField("g") for node in inferred.node for attribute in node.attribute)

    def test_the_exact_graph_has_at_most_120_nodes_and_the_small_one_about_30(self):
        most = {"exact": 0, "onnx": 0}
        for (spec, _, classes, ties, io), model in every_graph().items():
            most[ties] = max(most[ties], len(model.graph.node))
            if ties == "onnx" and classes < 1000 and spec == DecodeSpec() and io == "rtdetr images":
                assert len(model.graph.node) <= 30
        assert most["exact"] <= 120
        assert most["onnx"] <= 52

    def test_nodes_say_where_they_come_from_and_none_is_written_for_nothing(self):
        for case, model in every_graph().items():
            names = [node.name for node in model.graph.node]
            assert len(set(names)) == len(names)
            assert all(name.startswith("detpost/") and name.count("/") == 2 for name in names), case
            used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
            unused = [node.name for node in model.graph.node if not used & set(node.output)]
            assert not unused, (case, unused)
            constants = {tensor.name for tensor in model.graph.initializer}
            assert constants <= used, case

    def test_the_table_of_the_cpu_is_the_installed_onnx_runtimes(self):
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def

        kernels = {}
        for kernel in get_all_opkernel_def():
            if kernel.provider == "CPUExecutionProvider" and kernel.domain in ("", "ai.onnx"):
                kinds = {kind for kinds in kernel.type_constraints.values() for kind in kinds}
                kernels.setdefault(kernel.op_name, []).append((kernel.version_range, kinds))
        for (operator, dtypes), opset in itertools.product(operators.OPERATORS.items(), (11, 13, 17, 21)):
            for dtype in dtypes:
                assert any(
                    low <= opset <= high and f"tensor({dtype})" in kinds for (low, high), kinds in kernels[operator]
                ), (operator, dtype, opset)

    def test_what_a_runtime_lacks_is_said(self):
        model = decode_graph(DecodeSpec(), 20, 5, opset=17)
        assert operators.missing(model, "tensorrt-10") == []
        assert any("TopK of float: left to" in line for line in operators.missing(model, "coreml"))
        assert len(operators.missing(model, "executorch")) >= len(operators.inventory(model))
        with pytest.raises(ValueError, match="unknown runtime 'tpu': the table has onnxruntime-cpu"):
            operators.missing(model, "tpu")
        stranger = onnx.helper.make_node("IsNaN", ["pred_logits"], ["nan"], name="detpost/stranger")
        model.graph.node.append(stranger)
        assert "IsNaN of float: not in the table" in operators.missing(model, "onnxruntime-cpu")

    def test_every_runtime_gives_its_source_and_lacks_what_is_used(self):
        wanted = {"cpu", "cuda", "webgpu", "wasm"}
        assert {name.removeprefix("onnxruntime-") for name in operators.RUNTIMES} >= wanted
        assert set(operators.RUNTIMES) >= {
            "openvino",
            "tensorrt-10",
            "tensorrt-11",
            "coreml",
            "litert",
            "executorch",
            "qnn",
        }
        for runtime in operators.RUNTIMES.values():
            assert runtime.source
            assert runtime.note
            for operator, dtype in runtime.lacks:
                assert dtype == "*" or dtype in operators.OPERATORS[operator]
