"""Which operators the decode graph is written from, and which runtimes have them: every graph is held to it.

A runtime that lacks one of them is not out: ONNX Runtime's providers leave such a node to its CPU provider. What is
said here is what their own documents and sources say (read in November 2026), but for OpenVINO and ONNX Runtime on the
CPU, where the tests run the graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from detpost.export.graph import import_onnx

if TYPE_CHECKING:
    import onnx

__all__ = ["OPERATORS", "RUNTIMES", "Runtime", "inventory", "missing"]


@dataclass(frozen=True)
class Runtime:
    """Something that runs ONNX graphs, or what they are converted to.

    Args:
        name: as people call it.
        source: where it says what it has.
        note: what holds there for all operators.
        lacks: (operator, dtype) to what becomes of it; a dtype of ``"*"`` is any.
    """

    name: str
    source: str
    note: str
    lacks: Mapping[tuple[str, str], str]


# By the dtype of the first input (of Where, the second).
OPERATORS: Mapping[str, frozenset[str]] = {
    "Abs": frozenset({"float"}),  # masks and keypoints alone, as what is marked so below
    "Add": frozenset({"float", "int32"}),
    "And": frozenset({"bool"}),  # masks of dfine_seg, keypoints
    "ArgMax": frozenset({"float"}),  # ties="onnx" alone
    # int64: image sizes, and TopK's indices. Half precision and double: the network's outputs, where they are that.
    "Cast": frozenset({"bool", "float", "int32", "int64", "float16", "bfloat16", "double"}),
    "Clip": frozenset({"float"}),
    "Concat": frozenset({"float", "bool"}),  # bool: masks
    "CumSum": frozenset({"float"}),
    "Div": frozenset({"float", "int32"}),
    "Equal": frozenset({"float"}),
    "Exp": frozenset({"float"}),  # keypoints
    "Expand": frozenset({"int32"}),
    "Floor": frozenset({"float"}),
    "Gather": frozenset({"float", "int64"}),  # int64: of the sizes of images whose size is free
    "GatherElements": frozenset({"float", "int32"}),
    # Masks, keypoints and oriented boxes, in the dtype that the network gives.
    "GatherND": frozenset({"float", "float16", "bfloat16", "double"}),
    "Greater": frozenset({"float"}),
    "Less": frozenset({"float"}),
    "Log": frozenset({"float"}),  # the layout with a logit for every class, of softmax heads; keypoints
    "MatMul": frozenset({"float"}),  # masks in the size of the image
    "Max": frozenset({"float"}),
    "Min": frozenset({"float"}),
    "Mul": frozenset({"float", "int32"}),
    "Neg": frozenset({"float"}),
    "Not": frozenset({"bool"}),  # masks of dfine_seg
    "Pad": frozenset({"float"}),
    "Range": frozenset({"float"}),  # masks in the size of the image
    "ReduceMax": frozenset({"float"}),
    "ReduceMin": frozenset({"float"}),
    "ReduceSum": frozenset({"float"}),
    "Relu": frozenset({"float"}),
    "Reshape": frozenset({"float", "int32", "float16", "bfloat16", "double"}),  # halves: keypoints of the network
    # Of images whose size is free, and of masks as the network gives them; a shape is one whatever the dtype.
    "Shape": frozenset({"float", "float16", "bfloat16", "double"}),
    "Sigmoid": frozenset({"float"}),
    "Slice": frozenset({"float", "int32", "bool"}),  # int32 and bool: masks, a few slots at a time
    "Softmax": frozenset({"float"}),  # ties="onnx" alone
    "Split": frozenset({"float"}),
    "Sub": frozenset({"float", "int32"}),
    "TopK": frozenset({"float"}),
    "Transpose": frozenset({"float"}),
    "Unsqueeze": frozenset({"float", "int32", "int64", "bool"}),  # int64 and bool: of what GatherND takes and gives
    "Where": frozenset({"float", "int32"}),
}

_ON_CPU = "left to ONNX Runtime's CPU provider"
_NO_ONNX = "reads no ONNX: package the module itself with torch.export"

RUNTIMES: Mapping[str, Runtime] = {
    "onnxruntime-cpu": Runtime(
        "ONNX Runtime, CPU",
        "onnxruntime: docs/OperatorKernels.md, and its kernel registry, which a test reads",
        "the reference of the tests, at every level of graph optimisation",
        {},
    ),
    "onnxruntime-cuda": Runtime(
        "ONNX Runtime, CUDA",
        "onnxruntime: docs/OperatorKernels.md, CUDAExecutionProvider",
        "all of them as kernels for float and int32",
        {},
    ),
    "onnxruntime-webgpu": Runtime(
        "ONNX Runtime, WebGPU",
        "onnxruntime: core/providers/webgpu (math/, tensor/, reduction/); pull request 29833 for Max and Min",
        "TopK and CumSum for floats alone; TopK pads with the lowest finite number at place -1, which the graph allows "
        "for. Shader compilers may assume that there is no NaN inside one kernel; here two inputs are compared",
        {
            ("Max", "*"): f"before pull request 29833 of 2026-07 {_ON_CPU}",
            ("Min", "*"): f"before pull request 29833 of 2026-07 {_ON_CPU}",
            ("Cast", "int64"): f"without its enableInt64 {_ON_CPU}: the image sizes, indices of TopK, labels, queries",
        },
    ),
    "onnxruntime-wasm": Runtime(
        "ONNX Runtime, WebAssembly",
        "onnxruntime-web: README (the CPU engine compiled, full operator coverage)",
        "the CPU provider's kernels",
        {},
    ),
    "openvino": Runtime(
        "OpenVINO",
        "openvino: docs/articles_en, supported-operations-framework-frontend.rst; the tests run every graph there",
        "its TopK is stable where told so alone: ties='onnx' needs that, and to_openvino tells it; its ReduceMax of "
        "nothing but -inf is the lowest finite number, which the exact graph allows for",
        {},
    ),
    "tensorrt-10": Runtime(
        "TensorRT 10",
        "onnx-tensorrt: docs/operators.md of 10.15",
        "TopK: k below 3840, sorted; axes, k and the axis of CumSum are constants, as they are here. TopK says nothing "
        "of ties: take ties='exact'. Build in FP32: an engine built with --fp16 or --bf16 rounds the logits",
        {},
    ),
    "tensorrt-11": Runtime(
        "TensorRT 11",
        "NVIDIA: ONNX Opset Guide and release notes 11.0 to 11.5, which add to the list of 10.15 and take nothing away",
        "as 10; strongly typed, so float32 stays float32",
        {},
    ),
    "coreml": Runtime(
        "Core ML, by ONNX Runtime",
        "onnxruntime: tools/ci_build/github/apple/coreml_supported_mlprogram_ops.md and coreml/builders/impl",
        "takes the network; most of the decode runs on the CPU beside it",
        {
            (operator, "*"): _ON_CPU
            for operator in (
                *("CumSum", "Floor", "GatherElements", "Greater", "Less", "Min", "ReduceMin", "TopK"),
                *("Abs", "And", "GatherND", "Not"),  # it takes GatherND with batch_dims of 0 alone
            )
        },
    ),
    "litert": Runtime(
        "LiteRT, by onnx2tf",
        "onnx2tf: README, list of supported layers",
        "all of them; TensorFlow says of its top_k that the lower index comes first",
        {},
    ),
    "executorch": Runtime(
        "ExecuTorch",
        "executorch: it takes programs of torch.export",
        _NO_ONNX,
        {(operator, "*"): _NO_ONNX for operator in OPERATORS},
    ),
    "qnn": Runtime(
        "Qualcomm QNN, by ONNX Runtime",
        "onnxruntime-qnn: docs/execution_providers/QNN-ExecutionProvider.md, opbuilder/topk.cc",
        "all of them, for fixed shapes (dynamic_batch=False); its HTP computes in half precision or quantised, so the "
        "decode is the same answer on its CPU backend alone",
        {},
    ),
}


def inventory(model: onnx.ModelProto, prefix: str = "") -> dict[str, set[str]]:
    """List the operators of a model and the dtypes of their first inputs (of Where, the second).

    Args:
        model: the model.
        prefix: count the nodes whose names begin so alone.

    Returns:
        dtypes, as ONNX calls them in lower case, by operator.
    """
    onnx = import_onnx()
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    found: dict[str, set[str]] = {}
    for node in graph.node:
        if node.name.startswith(prefix):
            kind = kinds[node.input[1 if node.op_type == "Where" else 0]]
            found.setdefault(node.op_type, set()).add(onnx.TensorProto.DataType.Name(kind).lower())
    return found


def missing(model: onnx.ModelProto, runtime: str, prefix: str = "") -> list[str]:
    """Say what a runtime lacks for a model.

    Args:
        model: the model.
        runtime: one of ``RUNTIMES``.
        prefix: as for :func:`inventory`.

    Returns:
        One line for each operator and dtype that it lacks, with what becomes of it.

    Raises:
        ValueError: an unknown runtime.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"unknown runtime {runtime!r}: the table has {', '.join(RUNTIMES)}")
    lacks = RUNTIMES[runtime].lacks
    lines = []
    for operator, dtypes in sorted(inventory(model, prefix).items()):
        for dtype in sorted(dtypes):
            if dtype not in OPERATORS.get(operator, frozenset()):
                lines.append(f"{operator} of {dtype}: not in the table")
            elif fate := lacks.get((operator, dtype)) or lacks.get((operator, "*")):
                lines.append(f"{operator} of {dtype}: {fate}")
    return lines
