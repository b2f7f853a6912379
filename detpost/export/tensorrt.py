"""A detector for TensorRT: the graph that its parser takes, and what builds an engine of it.

TensorRT is not asked here: it builds for the GPU that it finds. The graph is held to tables of what its parser takes.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detpost.export.files import replace_when_whole
from detpost.export.graph import import_onnx
from detpost.export.onnx import to_onnx
from detpost.export.operators import inventory, missing
from detpost.export.written import WrittenFile
from detpost.spec import DecodeSpec

if TYPE_CHECKING:
    import onnx

__all__ = [
    "NOT_PARSED",
    "check_options",
    "check_parser",
    "parsed",
    "shape_profiles",
    "to_tensorrt",
    "write_build_files",
]

NOT_PARSED = frozenset(
    {"BitShift", "ConcatFromSequence", "ConvInteger", "Det", "DynamicQuantizeLinear", "MatMulInteger", "MaxRoiPool"}
    | {"MaxUnpool", "Multinomial", "NegativeLogLikelihoodLoss", "QLinearConv", "QLinearMatMul", "SequenceAt"}
    | {"SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"}
    | {"SoftmaxCrossEntropyLoss", "SplitToSequence", "StringNormalizer", "TfIdfVectorizer", "Unique"}
)
"""What the parser does not take of the network's operators, by onnx-tensorrt's ``docs/operators.md``."""

_DECODE = "detpost/"
_HALVES = {"float16", "bfloat16"}
_K_LIMIT = 3840  # of TopK, by onnx-tensorrt's docs/operators.md
_FREE_SIDE = 640  # of images whose size is free, in the profiles


def to_tensorrt(
    model: Any,
    out: str | Path,
    spec: DecodeSpec | None = None,
    *,
    max_batch: int = 8,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> WrittenFile:
    """Write ``OUT/model.onnx``, ``OUT/build.sh`` (trtexec) and ``OUT/build_engine.py`` (TensorRT's Python API).

    Args:
        model: as :func:`detpost.export.to_onnx` takes it.
        out: the folder.
        spec: as :func:`detpost.export.to_onnx` takes it.
        max_batch: the largest batch that the engine is built for.
        progress: called with one line before each long step.
        options: of :func:`detpost.export.to_onnx`.

    Returns:
        What was written: the ONNX file, and beside it the scripts.

    Raises:
        ImportError: onnx is missing.
        ValueError: options that do not fit, or an operator that the parser does not take.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from detpost.postprocess import DetectionPostProcessor
        >>> post = DetectionPostProcessor.from_preset("rtdetr", top_k=10)
        >>> with TemporaryDirectory() as folder:
        ...     [path.name for path in to_tensorrt(post, folder, num_queries=20, num_classes=5).beside]
        ['build.sh', 'build_engine.py']
    """
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1; got {max_batch}")
    check_options(options)
    folder = Path(out)
    path = folder / "model.onnx"
    written = to_onnx(model, path, spec, progress=progress, **options)
    proto = parsed(path)
    files = write_build_files(proto, path, folder, max_batch, folder / "model.plan")
    return replace(written, beside=(*files, *written.beside))


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of an export that TensorRT has no equal for, before anything is written.

    Args:
        options: of :func:`detpost.export.to_onnx`.

    Raises:
        ValueError: one of them; the message says what to take.
    """
    if options.get("ties", "exact") != "exact":
        raise ValueError("TensorRT's TopK says nothing of equal scores: take ties='exact'")
    resize = options.get("resize")
    if options.get("preprocess_inside") == "full" and (resize is None or resize.antialias):
        raise ValueError("TensorRT's parser takes no antialiased Resize: take --no-antialias, or resize before it")


def parsed(path: Path) -> onnx.ModelProto:
    """Read a file that was just written, as :func:`check_parser` holds it; one that is refused does not stay.

    Args:
        path: the file.

    Returns:
        The graph, without weights that lie beside it.

    Raises:
        ValueError: as :func:`check_parser`.
    """
    model: onnx.ModelProto = import_onnx().load(path, load_external_data=False)
    try:
        check_parser(model)
    except ValueError:
        path.unlink()
        raise
    return model


def check_parser(model: onnx.ModelProto) -> None:
    """Hold a graph to what TensorRT's parser takes, and its decode to float32.

    Args:
        model: the graph.

    Raises:
        ValueError: an operator or a TopK's k that it does not take, or a decode in half precision.
    """
    foreign = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"})
    if foreign:
        raise ValueError(f"TensorRT's parser takes operators of {', '.join(foreign)} with a plugin alone")
    # What comes in half precision is put in form before it is widened; the parser takes that of every type.
    formed = [f"Reshape of {half}: not in the table" for half in _HALVES]
    lines = [line for line in missing(model, "tensorrt-11", _DECODE) if line not in formed]
    network = {node.op_type for node in model.graph.node if not node.name.startswith(_DECODE)}
    lines += [f"{operator}: not parsed" for operator in sorted(network & NOT_PARSED)]
    # Strongly typed, an engine computes in the types that the graph says: what is float32 here stays float32.
    halves = {operator for operator, dtypes in inventory(model, _DECODE).items() if dtypes & _HALVES}
    lines += [f"{operator} of the decode is in half precision" for operator in sorted(halves - {"Cast", "Reshape"})]
    lines += _wide_top_k(model)
    if lines:
        raise ValueError(f"TensorRT's parser does not take the graph: {'; '.join(lines)}")


def _wide_top_k(model: onnx.ModelProto) -> list[str]:
    """Say which TopK has a k that is known and too great: of several in the decode, one line for each k."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants |= {name: entry.t for name in node.output for entry in node.attribute if entry.name == "value"}
    lines = []
    for node in model.graph.node:
        # A number that lies in another file is none of an exporter's that would name it k.
        if node.op_type != "TopK" or node.input[1] not in constants or constants[node.input[1]].external_data:
            continue
        k = int(import_onnx().numpy_helper.to_array(constants[node.input[1]]).item())
        if k >= _K_LIMIT:
            decode = node.name.startswith(_DECODE)
            fix = f"take top_k below {_K_LIMIT}" if decode else f"{node.name or 'the network'} needs k below {_K_LIMIT}"
            lines.append(f"TopK of k {k}: {fix}")
    return list(dict.fromkeys(lines))


def shape_profiles(model: onnx.ModelProto, max_batch: int) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Give the least, the usual and the greatest shape of each input that has a free dimension.

    Args:
        model: the graph.
        max_batch: the largest batch.

    Returns:
        By the name of the input; batches of 1, 1 and ``max_batch``. A free side of images is 640 in all of them.
    """
    found = {}
    for value in model.graph.input:
        dims = [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]
        if None in dims:
            shapes = [
                [(batch if place == 0 else _FREE_SIDE) if dim is None else dim for place, dim in enumerate(dims)]
                for batch in (1, 1, max_batch)
            ]
            found[value.name] = (shapes[0], shapes[1], shapes[2])
    return found


def write_build_files(
    model: onnx.ModelProto, source: Path, folder: Path, max_batch: int, plan: Path
) -> tuple[Path, Path]:
    """Write what builds an engine.

    Args:
        model: the graph.
        source: its file, in ``folder`` or below it.
        folder: where the scripts are written.
        max_batch: the largest batch.
        plan: the engine's file, in ``folder`` or below it.

    Returns:
        The shell script and the Python script.
    """
    shell, script = folder / "build.sh", folder / "build_engine.py"
    names = [str(path.relative_to(folder)) for path in (source, plan)]
    with replace_when_whole(shell) as temporary:
        temporary.write_text(_shell(names[0], names[1], shape_profiles(model, max_batch)), encoding="utf-8")
        temporary.chmod(0o755)
    with replace_when_whole(script) as temporary:
        shutil.copyfile(Path(__file__).parent / "shipped" / "build_engine.py", temporary)
    return shell, script


def _shell(source: str, plan: str, profiles: Mapping[str, tuple[list[int], ...]]) -> str:
    options = [f"--onnx={source}", f"--saveEngine={plan}", "--stronglyTyped"]
    if profiles:
        for place, name in enumerate(("minShapes", "optShapes", "maxShapes")):
            shapes = (f"{value}:{'x'.join(map(str, shapes[place]))}" for value, shapes in profiles.items())
            options.append(f"--{name}={','.join(shapes)}")
    lines = [
        "#!/bin/sh",
        "# Run it on the machine and with the TensorRT that it is for. Strongly typed: what is float32 stays float32.",
        "set -e",
        'cd "$(dirname "$0")"',
        " \\\n  ".join(["trtexec", *map(shlex.quote, options), '"$@"']),
    ]
    return "\n".join(lines) + "\n"
