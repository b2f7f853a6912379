"""What does the exact decode cost in ONNX Runtime, beside the graph that a person writes by hand?

The hand-written graph is Sigmoid, TopK, Gather and boxes for sigmoid heads; Softmax, max, TopK, Gather and boxes for
softmax heads. It takes ties, NaN and thresholds as they come. Contenders run in turns on inputs that change from run to
run (a branch predictor learns a TopK of one input by heart); on a machine with other work, the lower decile says more
than the median.

    python scripts/onnx_decode_cost.py              # the table
    python scripts/onnx_decode_cost.py --json FILE --threads 1
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from detpost import DecodeSpec
from detpost.export.decode_graph import decode_graph
from detpost.export.graph import Graph

CASES = (
    ("rtdetr", 1, 300, 80),
    ("rtdetr", 8, 300, 80),
    ("rtdetr", 1, 300, 1203),
    ("detr", 1, 100, 92),
    ("detr", 1, 300, 1204),
)
TARGETS = {"exact": (1.7, 1.7, 1.0, 3.0, 3.0), "onnx": (1.1,) * 5}


def by_hand(preset: str, queries: int, classes: int) -> onnx.ModelProto:
    """Write the graph as people do, from the operators that PyTorch's exporter gives them."""
    g = Graph(17, "")
    spec = DecodeSpec.preset(preset)
    if spec.activation == "sigmoid":
        row = g.reshape(g.node("Sigmoid", "pred_logits"), [0, queries * classes])
        scores, places = g.top_k(row, min(spec.top_k, queries * classes))
        width = np.array(classes, np.int64)
        chosen = g.node("Div", places, width)
        labels = g.node("Sub", places, g.node("Mul", chosen, width))
    else:
        begin, end, axis = (g.constant([i]) for i in (0, classes - 1, 2))
        objects = g.node("Slice", g.node("Softmax", "pred_logits", axis=2), begin, end, axis)
        scores, chosen = g.top_k(g.greatest(objects, 2), min(spec.top_k, queries))
        labels = g.gather_rows(g.node("ArgMax", objects, axis=2, keepdims=0), chosen)
    found = g.node(
        "GatherElements", "pred_boxes", g.node("Expand", g.unsqueeze(chosen, 2), g.constant([1, 1, 4])), axis=1
    )
    centre, size = g.nodes_of("Split", found, g.constant([2, 2]), outputs=2, axis=2)
    half = g.node("Mul", size, 0.5)
    corners = g.node("Concat", g.node("Sub", centre, half), g.node("Add", centre, half), axis=2)
    sizes = g.node("Gather", g.cast("image_sizes", "FLOAT"), g.constant([1, 0, 1, 0]), axis=1)
    corners = g.node("Mul", corners, g.unsqueeze(sizes, 1))
    g.rename({labels: "labels", corners: "boxes", scores: "scores"})
    inputs = [
        helper.make_tensor_value_info("pred_logits", TensorProto.FLOAT, ["batch", queries, classes]),
        helper.make_tensor_value_info("pred_boxes", TensorProto.FLOAT, ["batch", queries, 4]),
        helper.make_tensor_value_info("image_sizes", TensorProto.INT64, ["batch", 2]),
    ]
    kinds = {"labels": TensorProto.INT64, "boxes": TensorProto.FLOAT, "scores": TensorProto.FLOAT}
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    graph = helper.make_graph(g.nodes, "by hand", inputs, outputs, g.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def session_of(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    """Open a model on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def raw_outputs(batch: int, queries: int, classes: int, count: int) -> list[dict[str, Any]]:
    """Make raw outputs as detectors give them."""
    values = np.random.default_rng(0)
    return [
        {
            "pred_logits": (values.standard_normal((batch, queries, classes)) * 2 - 4).astype(np.float32),
            "pred_boxes": values.random((batch, queries, 4), np.float32),
            "image_sizes": values.integers(100, 2000, (batch, 2)),
        }
        for _ in range(count)
    ]


def race(sessions: dict[str, Any], feeds: list[dict[str, Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Run every contender on every input in turns: median and lower decile of its times, in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        for feed in feeds[:5]:
            session.run(None, feed)
    names = list(sessions)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for feed in feeds:
                begin = time.perf_counter()
                sessions[name].run(None, feed)
                times[name].append((time.perf_counter() - begin) * 1e6)
    return {
        name: {"median": float(np.median(spent)), "decile": float(np.percentile(spent, 10))}
        for name, spent in times.items()
    }


def measure(rounds: int, threads: int) -> list[dict[str, Any]]:
    """Measure every case."""
    rows = []
    for place, (preset, batch, queries, classes) in enumerate(CASES):
        models = {"hand": by_hand(preset, queries, classes)}
        for ties in ("exact", "onnx"):
            models[ties] = decode_graph(DecodeSpec.preset(preset), queries, classes, opset=17, ties=ties)
        feeds = raw_outputs(batch, queries, classes, 32 if batch * queries * classes > 100_000 else 64)
        spent = race({name: session_of(model, threads) for name, model in models.items()}, feeds, rounds)
        row: dict[str, Any] = {"preset": preset, "shape": f"{batch}x{queries}x{classes}", "times": spent}
        row["nodes"] = {name: len(model.graph.node) for name, model in models.items()}
        row["ratios"] = {
            ties: {kind: spent[ties][kind] / spent["hand"][kind] for kind in ("median", "decile")}
            for ties in ("exact", "onnx")
        }
        row["targets"] = {ties: TARGETS[ties][place] for ties in ("exact", "onnx")}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0 leaves it to it")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments.rounds, arguments.threads)
    table = Table(
        "preset",
        "shape",
        "by hand",
        "exact",
        "ties onnx",
        title="ONNX Runtime, microseconds; ratio of medians (of lower deciles)",
    )
    for row in rows:
        cells = [f"{row['times']['hand']['median']:.0f} us, {row['nodes']['hand']} nodes"]
        for ties in ("exact", "onnx"):
            ratio, lower = row["ratios"][ties]["median"], row["ratios"][ties]["decile"]
            cells.append(f"{ratio:.2f} ({lower:.2f}), wanted {row['targets'][ties]}, {row['nodes'][ties]} nodes")
        table.add_row(row["preset"], row["shape"], *cells)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
