"""Post-processing behind an ONNX detector that someone else exported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from detpost.export.artifact import OnnxExport, describe, finish, recorded_metadata
from detpost.export.beside import class_names_of
from detpost.export.decode_graph import (
    OLDEST_OPSET,
    IoNames,
    Ties,
    decode_graph,
    import_onnx,
    io_inputs,
    io_outputs,
)
from detpost.export.feed import preprocessing_said, record_feed
from detpost.export.source import first_line
from detpost.export.weights import inner_graphs, read_onnx
from detpost.images import Preprocessing
from detpost.spec import DecodeSpec, name_of_preset

if TYPE_CHECKING:
    import onnx

__all__ = ["attach", "attach_graph"]

_BOX_WORDS = ("box", "dets", "coord", "loc")
_LOGIT_WORDS = ("logit", "cls", "class", "label", "score", "prob", "conf")
_RAW_OUTPUTS = ("pred_logits", "pred_boxes")


def attach(
    src: str | Path,
    dst: str | Path,
    spec: DecodeSpec | None = None,
    *,
    logits: str | None = None,
    boxes: str | None = None,
    io: IoNames = "detpost",
    ties: Ties = "exact",
    queries: bool = False,
    keep_raw: bool = False,
    preset: str | None = None,
    image_size: tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: Mapping[int, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> OnnxExport:
    """Put post-processing behind an ONNX detector; no PyTorch model is needed.

    The source keeps its own input names, operator set, IR version, metadata and batch dimension; ``image_sizes`` (B, 2)
    int64, (height, width) in pixels, is added, and its outputs are replaced by ``labels``, ``boxes``, ``scores`` and
    ``valid``. Values of the source whose names the new ones need are renamed.

    Args:
        src: the detector, with its external data if it has any.
        dst: where to write; may be ``src``. The file appears whole or not at all.
        spec: how the outputs are decoded; ``None`` is the preset.
        logits: name of the logits output (B, Q, C), before any activation; ``None`` finds it by its shape.
        boxes: name of the boxes output (B, Q, 4); ``None`` finds it by its shape.
        io: names and order of inputs and outputs, as in :func:`to_onnx`.
        ties: as in :func:`to_onnx`.
        queries: whether ``queries`` is an output too.
        keep_raw: whether the raw outputs stay, as ``pred_logits`` and ``pred_boxes``.
        preset: the detector's family; ``None`` takes the first whose spec this is, or ``"rtdetr"``.
        image_size: (height, width) of the network input where the source leaves it free; ``None`` is 640 x 640.
        preprocessing: how images become the source's input, recorded for ``Detector.load`` and ``verify``; ``None``
            takes what the source or a ``preprocessor_config.json`` beside it says, else assumes what the preset's
            detectors were trained on, and says so in the notes.
        class_names: the name of each label, recorded in the file; ``None`` takes what the source or a
            ``config.json`` beside it says.
        progress: called with one line before each long step.

    Returns:
        What was written; its notes say which outputs were taken and what was renamed.

    Raises:
        ImportError: onnx is missing; the message names the extra.
        OSError: a source that is missing or not an ONNX file.
        ValueError: outputs that are missing or ambiguous; the message lists what the file has.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from onnx import TensorProto, helper, save
        >>> values = [
        ...     helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 20, last])
        ...     for name, last in [("features", 5), ("points", 4), ("logits", 5), ("boxes", 4)]
        ... ]
        >>> nodes = [helper.make_node("Relu", [a], [b]) for a, b in [("features", "logits"), ("points", "boxes")]]
        >>> graph = helper.make_graph(nodes, "someone else's", values[:2], values[2:])
        >>> model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        >>> with TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/theirs.onnx")
        ...     made = attach(f"{folder}/theirs.onnx", f"{folder}/ours.onnx", DecodeSpec.preset("rtdetr"))
        >>> made.inputs, made.outputs
        (('features', 'points', 'image_sizes'), ('labels', 'boxes', 'scores', 'valid'))
    """
    say = progress or (lambda _: None)
    say("reading the source")
    source = read_onnx(Path(src))
    spec = spec or DecodeSpec.preset(preset or "rtdetr")
    preset = preset or name_of_preset(spec) or "rtdetr"
    say("attaching the post-processing")
    model, notes = attach_graph(
        source.model,
        spec,
        logits=logits,
        boxes=boxes,
        io=io,
        ties=ties,
        queries=queries,
        keep_raw=keep_raw,
        folder=source.folder,
    )
    properties = {entry.key: entry.value for entry in source.model.metadata_props}
    before = recorded_metadata(properties)
    names = class_names or before.get("class_names") or class_names_of(Path(src), properties)
    said = (preprocessing, "the caller") if preprocessing else preprocessing_said(Path(src), before)
    feed, images = record_feed(list(model.graph.input), said, preset, image_size)
    metadata = {**describe(spec, names, io, ties, keep_raw), **feed, "exporter": "attach"}
    say("checking and writing the file")
    return finish(model, Path(dst), metadata, exporter="none", notes=(*notes, *images), folder=source.folder)


def attach_graph(
    source: onnx.ModelProto,
    spec: DecodeSpec,
    *,
    logits: str | None = None,
    boxes: str | None = None,
    io: IoNames = "detpost",
    ties: Ties = "exact",
    queries: bool = False,
    keep_raw: bool = False,
    folder: Path | None = None,
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Attach in memory: as :func:`attach`, from a model to a model and notes. ``source`` is not changed.

    Its weights that lie in other files stay there, and are found in ``folder`` where the model must be run.
    """
    onnx = import_onnx()
    model, notes = _at_least_opset(onnx, source)
    raw = _find_outputs(onnx, model, logits, boxes, folder)
    notes = [*notes, f"logits: {raw.logits} {list(raw.logits_shape)}", f"boxes: {raw.boxes} {list(raw.boxes_shape)}"]

    sizes = io_inputs(io)
    outputs = io_outputs(io, queries)
    input_names = {value.name for value in model.graph.input}
    if sizes in input_names:
        sizes = _free_name(sizes, _value_names(model.graph))
        notes.append(f"the source has an input {io_inputs(io)} already: the image sizes are {sizes}")
    reserved = {*outputs, sizes, *(_RAW_OUTPUTS if keep_raw else ())}
    clash = sorted(reserved & input_names)
    if clash:
        raise ValueError(f"the source has an input named {clash[0]!r}, which detpost needs for an output: rename it")
    model, renamed = _rename_values(onnx, model, reserved)
    notes = [*notes, *(f"renamed the source's value {old} to {new}" for old, new in renamed.items())]
    raw_names = (renamed.get(raw.logits, raw.logits), renamed.get(raw.boxes, raw.boxes))

    decode = decode_graph(
        spec,
        raw.num_queries,
        raw.num_classes,
        opset=_opset(model),
        io=io,
        ties=ties,
        queries=queries,
        dtypes=raw.dtypes,
    )
    merged = _merge(onnx, model, decode, raw_names, io_inputs(io), sizes, raw.batch, keep_raw)
    return merged, tuple(notes)


@dataclass(frozen=True)
class _RawOutputs:
    """The two outputs of a detector that post-processing starts from."""

    logits: str
    boxes: str
    logits_shape: tuple[int | str, ...]
    boxes_shape: tuple[int | str, ...]
    dtypes: tuple[torch.dtype, torch.dtype]

    @property
    def batch(self) -> int | str:
        return self.logits_shape[0]

    @property
    def num_queries(self) -> int:
        return int(self.logits_shape[1])

    @property
    def num_classes(self) -> int:
        return int(self.logits_shape[2])


def _opset(model: onnx.ModelProto) -> int:
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _at_least_opset(onnx: Any, source: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    model = onnx.ModelProto()
    model.CopyFrom(source)
    version = _opset(model)
    if version >= OLDEST_OPSET:
        return model, []
    try:
        converted = onnx.version_converter.convert_version(model, 17)
    except Exception as error:
        raise ValueError(
            f"the source has opset {version}, older than {OLDEST_OPSET}, and cannot be converted: {first_line(error)}"
        ) from error
    return converted, [f"converted the source from opset {version} to 17: exact ties need {OLDEST_OPSET} or later"]


def _find_outputs(
    onnx: Any, model: onnx.ModelProto, logits: str | None, boxes: str | None, folder: Path | None
) -> _RawOutputs:
    shapes = _output_shapes(onnx, model, folder)
    listing = "; ".join(f"{name} {list(shape)}" for name, (shape, _) in shapes.items()) or "none"
    for option, name in (("logits", logits), ("boxes", boxes)):
        if name is not None and name not in shapes:
            raise ValueError(f"no output {name!r} for {option}; the file has outputs: {listing}")
    found_boxes = boxes or _pick(
        "boxes", _BOX_WORDS, _LOGIT_WORDS, [n for n, (s, _) in shapes.items() if n != logits and _is_boxes(s)], listing
    )
    box_shape = shapes[found_boxes][0]
    candidates = [n for n, (s, _) in shapes.items() if n != found_boxes and _is_logits(s, box_shape)]
    found_logits = logits or _pick("logits", _LOGIT_WORDS, _BOX_WORDS, candidates, listing)
    logit_shape = shapes[found_logits][0]
    _check_pair(found_logits, logit_shape, found_boxes, box_shape, listing)
    return _RawOutputs(
        found_logits, found_boxes, logit_shape, box_shape, (shapes[found_logits][1], shapes[found_boxes][1])
    )


def _is_boxes(shape: tuple[int | str, ...]) -> bool:
    return len(shape) == 3 and shape[2] == 4


def _is_logits(shape: tuple[int | str, ...], box_shape: tuple[int | str, ...]) -> bool:
    return len(shape) == 3 and isinstance(shape[2], int) and shape[1] == box_shape[1]


def _pick(what: str, words: Iterable[str], others: Iterable[str], candidates: list[str], listing: str) -> str:
    """Take the one candidate; among several, the one whose name says so."""
    if len(candidates) > 1:
        named = [name for name in candidates if any(word in name.lower() for word in words)]
        not_other = [name for name in candidates if not any(word in name.lower() for word in others)]
        candidates = next((names for names in (named, not_other) if len(names) == 1), candidates)
    if len(candidates) == 1:
        return candidates[0]
    wanted = "(B, Q, 4)" if what == "boxes" else "(B, Q, C) with the boxes' Q"
    problem = f"several outputs could be the {what}" if candidates else f"no output of shape {wanted} for the {what}"
    raise ValueError(f"{problem}: name one with {what}= (--{what}); the file has outputs: {listing}")


def _check_pair(
    logits: str, logit_shape: tuple[int | str, ...], boxes: str, box_shape: tuple[int | str, ...], listing: str
) -> None:
    fits = len(logit_shape) == 3 and len(box_shape) == 3 and box_shape[2] == 4 and logit_shape[1] == box_shape[1]
    if logits == boxes or not fits:
        raise ValueError(
            f"logits must be (B, Q, C) and boxes (B, Q, 4); {logits} is {list(logit_shape)} and {boxes} "
            f"{list(box_shape)}; the file has outputs: {listing}"
        )
    if not isinstance(logit_shape[1], int) or not isinstance(logit_shape[2], int):
        raise ValueError(
            f"the number of queries and classes must be fixed; {logits} is {list(logit_shape)}: export the detector "
            "with a static number of queries"
        )


def _output_shapes(
    onnx: Any, model: onnx.ModelProto, folder: Path | None
) -> dict[str, tuple[tuple[int | str, ...], torch.dtype]]:
    """Give the shape (a number or a name for each dimension) and dtype of every floating output of a fixed rank."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    kinds = {
        onnx.TensorProto.FLOAT: torch.float32,
        onnx.TensorProto.FLOAT16: torch.float16,
        onnx.TensorProto.BFLOAT16: torch.bfloat16,
        onnx.TensorProto.DOUBLE: torch.float64,
    }
    shapes: dict[str, tuple[tuple[int | str, ...], torch.dtype]] = {}
    for value in inferred.graph.output:
        kind = value.type.tensor_type
        if kind.elem_type in kinds and kind.HasField("shape"):
            shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim)
            shapes |= {value.name: (shape, kinds[kind.elem_type])}
    if any(isinstance(size, str) for shape, _ in shapes.values() for size in shape[1:]):
        shapes = _measured_shapes(model, shapes, folder)
    return shapes


def _measured_shapes(
    model: onnx.ModelProto, shapes: dict[str, tuple[tuple[int | str, ...], torch.dtype]], folder: Path | None
) -> dict[str, tuple[tuple[int | str, ...], torch.dtype]]:
    """Run the model once where inference left a dimension open: what then comes out is Q and C."""
    from detpost.export.runtime import onnx_example_inputs, onnx_session

    try:
        session = onnx_session(model.SerializeToString(), folder=folder)
        values = session.run(list(shapes), onnx_example_inputs(session))
    except Exception:
        return shapes
    return {
        name: ((shape[0], *value.shape[1:]) if value.ndim == len(shape) else shape, dtype)
        for (name, (shape, dtype)), value in zip(shapes.items(), values, strict=True)
    }


def _value_names(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    for node in graph.node:
        names |= {*node.input, *node.output}
        for inner in inner_graphs(node):
            names |= _value_names(inner)
    return names


def _free_name(name: str, taken: set[str]) -> str:
    return next(new for new in (f"detpost_{name}{'_' * i}" for i in range(len(taken) + 1)) if new not in taken)


def _rename_values(onnx: Any, model: onnx.ModelProto, reserved: set[str]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Rename the source's own values that bear a reserved name, in subgraphs too."""
    taken = _value_names(model.graph)
    renamed = {name: _free_name(name, taken).replace("detpost_", "source_", 1) for name in sorted(reserved & taken)}
    if renamed:
        _rename_in(model.graph, renamed)
    return model, renamed


def _rename_in(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = names.get(sparse.values.name, sparse.values.name)
    for node in graph.node:
        for values in (node.input, node.output):
            replaced = [names.get(name, name) for name in values]
            del values[:]
            values.extend(replaced)
        for inner in inner_graphs(node):
            _rename_in(inner, names)


def _merge(
    onnx: Any,
    model: onnx.ModelProto,
    decode: onnx.ModelProto,
    raw_names: tuple[str, str],
    sizes_in_decode: str,
    sizes: str,
    batch: int | str,
    keep_raw: bool,
) -> onnx.ModelProto:
    """Append the decode graph's nodes to the model's and replace its outputs."""
    taken = _value_names(model.graph)
    prefix = next(p for p in (f"detpost{'_' * i}/" for i in range(99)) if not any(n.startswith(p) for n in taken))
    outputs = [value.name for value in decode.graph.output]
    placed = onnx.compose.add_prefix(decode, prefix)
    outside = {prefix + inner: outer for inner, outer in zip(_RAW_OUTPUTS, raw_names, strict=True)}
    outside |= {prefix + sizes_in_decode: sizes} | {prefix + name: name for name in outputs}
    _rename_in(placed.graph, outside)

    graph = model.graph
    sizes_input = next(value for value in placed.graph.input if value.name == sizes)
    final = list(placed.graph.output)
    graph.input.append(sizes_input)
    graph.node.extend(placed.graph.node)
    graph.initializer.extend(placed.graph.initializer)
    if keep_raw:
        raw_values = {value.name: value for value in graph.output}
        for name, source_name in zip(_RAW_OUTPUTS, raw_names, strict=True):
            graph.node.append(onnx.helper.make_node("Identity", [source_name], [name], name=f"{prefix}{name}"))
            kept = onnx.ValueInfoProto()
            kept.CopyFrom(raw_values[source_name])
            kept.name = name
            final.append(kept)
    del graph.output[:]
    graph.output.extend(final)
    for value in (*graph.output, next(value for value in graph.input if value.name == sizes)):
        _set_batch(value, batch)
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for(model.opset_import))
    return model


def _set_batch(value: onnx.ValueInfoProto, batch: int | str) -> None:
    first = value.type.tensor_type.shape.dim[0]
    if isinstance(batch, int):
        first.dim_value = batch
    else:
        first.dim_param = batch if batch != "?" else "batch"
