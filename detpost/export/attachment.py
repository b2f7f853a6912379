"""Post-processing behind an ONNX detector that someone else exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from detpost.export.artifact import describe, finish, recorded_metadata
from detpost.export.beside import class_names_of
from detpost.export.choices import check_choices
from detpost.export.decode_graph import OLDEST_OPSET, Ties, decode_graph
from detpost.export.feed import find_image_input, record_feed, recorded_preprocessing, stated_preprocessing
from detpost.export.front_graph import (
    PLACEMENT,
    RESIZE_OPSET,
    Resize,
    done_by_runner,
    put_affine_in_front,
    put_resize_in_front,
    without_sizes,
)
from detpost.export.graph import import_onnx
from detpost.export.heads import Head, KeypointHead, MaskHead, MaskSize, OrientedHead, heads_of, output_names, raw_name
from detpost.export.layouts import Layout, layout_of
from detpost.export.raw_heads import find_raw_heads
from detpost.export.raw_values import find_raw_values
from detpost.export.slots import HEADS_OPSET
from detpost.export.source import first_line
from detpost.export.surgery import cut_behind, free_name, rename_values, take_shape_from, true_inputs, value_names
from detpost.export.weights import read_onnx
from detpost.export.written import WrittenFile
from detpost.images import Preprocessing
from detpost.spec import DecodeSpec, presets, presets_like

if TYPE_CHECKING:
    import onnx

__all__ = ["attach", "attach_graph"]

_RAW_OUTPUTS = ("pred_logits", "pred_boxes")


def attach(
    src: str | Path,
    dst: str | Path,
    spec: DecodeSpec | None = None,
    *,
    logits: str | None = None,
    boxes: str | None = None,
    io: str | Layout = "detpost",
    ties: Ties = "exact",
    queries: bool = False,
    keep_raw: bool = False,
    masks: MaskSize | MaskHead | None = None,
    keypoints: KeypointHead | None = None,
    oriented: OrientedHead | None = None,
    heads: Sequence[Head] = (),
    preset: str | None = None,
    image_size: tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    resize_inside: Resize | None = None,
    class_names: Mapping[int, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> WrittenFile:
    """Put post-processing behind an ONNX detector; no PyTorch model is needed.

    The source keeps its own input names, operator set, IR version, metadata and batch dimension; ``image_sizes`` (B, 2)
    int64, (height, width) in pixels, is added, and its outputs are replaced by ``labels``, ``boxes``, ``scores`` and
    ``valid``. Values of the source whose names the new ones need are renamed.

    A source that ends in post-processing of its own is looked into: the raw values are found by running it once on an
    image of noise, and are those whose decode gives its own detections. What lies behind them is cut off.

    Args:
        src: the detector, with its external data if it has any.
        dst: where to write; may be ``src``. The file appears whole or not at all.
        spec: how the outputs are decoded; ``None`` is the preset.
        logits: name of the logits (B, Q, C), before any activation, an output or a value inside; ``None`` finds them.
        boxes: name of the boxes (B, Q, 4), an output or a value inside; ``None`` finds them.
        io: what the file's runner takes and gives, as in :func:`to_onnx`; the images keep the source's name.
        ties: as in :func:`to_onnx`.
        queries: whether ``queries`` is an output too.
        keep_raw: whether the raw outputs stay, as ``pred_logits``, ``pred_boxes`` and those of heads.
        masks: as in :func:`to_onnx`; their raw value is named in a :class:`MaskHead` where it is not found.
        keypoints: likewise.
        oriented: likewise.
        heads: any of these and others of :mod:`detpost.export.heads`, after them.
        preset: the detector's family; ``None`` takes the first that decodes like ``spec``, and says which others do, or
            ``"rtdetr"``.
        image_size: (height, width) of the network input where the source leaves it free; ``None`` is 640 x 640.
        preprocessing: how images become the source's input, recorded for ``Detector.load`` and ``verify``; ``None``
            takes what the source or a ``preprocessor_config.json`` beside it says, else assumes what the preset's
            detectors were trained on, and says so in the notes.
        resize_inside: take images as uint8 (B, 3, H, W) of any size, all of a batch of the same, and resize, scale and
            normalise them in the file; there are no ``image_sizes`` then, and boxes are in pixels of those images.
        class_names: the name of each label, recorded in the file; ``None`` takes what the source or a
            ``config.json`` beside it says.
        progress: called with one line before each long step.

    Returns:
        What was written; its notes say which values were taken, what was cut off and what was renamed.

    Raises:
        ImportError: onnx is missing; the message names the extra.
        OSError: a source that is missing or not an ONNX file.
        ValueError: an option that is none of its choices; raw values that are missing or ambiguous, or of another kind
            than ``spec`` says; the message lists what the file has.

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
    check_choices({"ties": (ties, get_args(Ties)), "preset": (preset, (None, *presets()))})
    say = progress or (lambda _: None)
    layout = layout_of(io) if resize_inside is None else without_sizes(layout_of(io))
    say("reading the source")
    source = read_onnx(Path(src))
    preset = preset or ("rtdetr" if spec is None else None)
    spec = spec or DecodeSpec.preset(preset or "rtdetr")
    families = (preset,) if preset else presets_like(spec) or ("rtdetr",)
    properties = {entry.key: entry.value for entry in source.model.metadata_props}
    before = recorded_metadata(properties)
    asked = heads_of(masks, keypoints, oriented, heads)
    say("attaching the post-processing")
    attached = attach_graph(
        source.model,
        spec,
        logits=logits,
        boxes=boxes,
        io=layout,
        ties=ties,
        queries=queries,
        keep_raw=keep_raw,
        heads=asked,
        resized_inside=resize_inside is not None,
        folder=source.folder,
        recorded=before.get("raw_values"),
    )
    names = class_names or before.get("class_names") or class_names_of(Path(src), properties)
    said = (preprocessing, "the caller") if preprocessing else stated_preprocessing(Path(src), before)
    feed, images = record_feed(true_inputs(attached.model.graph), attached.sizes, said, families, image_size)
    if resize_inside is not None:
        feed = _resized_inside(attached.model, feed, resize_inside, images)
    elif feed and not feed["preprocess_inside"]:
        feed = _leave_to_runner(attached.model, layout, feed)
    own = {"exporter": "attach", "raw_values": attached.raw_values, "num_classes": attached.num_classes}
    metadata = {**describe(spec, names, layout, ties, keep_raw, asked, preset), **feed, **own}
    say("checking and writing the file")
    notes = (*attached.notes, *images)
    return finish(
        attached.model, Path(dst), metadata, layout=layout, exporter="none", notes=notes, folder=source.folder
    )


def _resized_inside(
    model: onnx.ModelProto, feed: Mapping[str, Any], resize: Resize, notes: list[str]
) -> dict[str, Any]:
    """Put all preprocessing inside the model, and give the feed that is left."""
    wanted = recorded_preprocessing(feed)
    if wanted is None or feed["preprocess_inside"]:
        raise ValueError(
            "the resize cannot go inside: the source takes uint8 images already"
            if wanted
            else f"the resize cannot go inside: {notes[0]}"
        )
    put_resize_in_front(model, feed["feed"]["images"], wanted, resize)
    return {**feed, "preprocess_inside": "full", "resize": vars(resize)}


def _leave_to_runner(model: onnx.ModelProto, layout: Layout, feed: Mapping[str, Any]) -> dict[str, Any]:
    """Do inside the model what the layout's runner cannot, and give the feed that is left."""
    wanted = recorded_preprocessing(feed)
    assert wanted is not None
    left = done_by_runner(layout, wanted)
    if left != wanted:
        put_affine_in_front(model, feed["feed"]["images"], wanted, left)
    return {**feed, "preprocessing": left.to_dict()}


class Attached(NamedTuple):
    """A model with post-processing.

    Args:
        model: the model.
        notes: what the caller should know of it.
        raw_values: the names of its raw values.
        num_classes: C.
        sizes: name of the input with the image sizes; ``None`` where the layout has none.
    """

    model: onnx.ModelProto
    notes: tuple[str, ...]
    raw_values: Mapping[str, str]
    num_classes: int
    sizes: str | None


def attach_graph(
    source: onnx.ModelProto,
    spec: DecodeSpec,
    *,
    logits: str | None = None,
    boxes: str | None = None,
    io: str | Layout = "detpost",
    ties: Ties = "exact",
    queries: bool = False,
    keep_raw: bool = False,
    heads: Sequence[Head] = (),
    resized_inside: bool = False,
    folder: Path | None = None,
    recorded: Mapping[str, str] | None = None,
) -> Attached:
    """Attach in memory: as :func:`attach`, from a model to a model. ``source`` is not changed.

    Its weights that lie in other files stay there, and are found in ``folder`` where the model must be run; in a file
    of detpost's own, ``recorded`` names the raw values. Where images are ``resized_inside``, boxes are put by the
    values of ``PLACEMENT``, which the caller has still to write.
    """
    onnx = import_onnx()
    least = RESIZE_OPSET if resized_inside else HEADS_OPSET if heads else OLDEST_OPSET
    model, notes = _at_least_opset(onnx, source, least)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    raw, said = find_raw_values(model, spec, logits, boxes, folder=folder, recorded=recorded)
    own = find_raw_heads(model, heads, raw, folder)
    said = [*said, *(f"{raw_name(found.head)[5:]}: {name} {['B', *found.shape]}" for name, found in own.items())]
    cut = cut_behind(model, (raw.logits, raw.boxes, *own))
    notes = [*notes, *said, *([f"cut off: {cut}"] if str(cut) else [])]

    layout = layout_of(io)
    sizes = layout.sizes
    input_names = {value.name for value in model.graph.input}
    if sizes is not None and sizes in input_names:
        sizes = free_name(sizes, value_names(model.graph))
        notes.append(f"the source has an input {layout.sizes} already: the image sizes are {sizes}")
    of_heads = [name for head in heads for name in output_names(head)]
    named = (*layout.outputs, *([] if sizes is None else [sizes]), *(["queries"] if queries else []), *of_heads)
    kept_names = (*_RAW_OUTPUTS, *(raw_name(head) for head in heads))
    reserved = {*named, *(kept_names if keep_raw else ())}
    clash = sorted(reserved & input_names)
    if clash:
        raise ValueError(f"the source has an input named {clash[0]!r}, which detpost needs for an output: rename it")
    taken = value_names(model.graph)
    renamed = {name: free_name(name, taken, "source_") for name in sorted(reserved & taken)}
    rename_values(model.graph, renamed)
    notes = [*notes, *(f"renamed the source's value {old} to {new}" for old, new in renamed.items())]
    raw_names = tuple(renamed.get(name, name) for name in (raw.logits, raw.boxes, *own))

    prefix = _free_prefix(model.graph)
    decode = decode_graph(
        spec,
        raw.num_queries,
        raw.num_classes,
        opset=_opset(model),
        io=layout,
        ties=ties,
        queries=queries,
        input_size=PLACEMENT if resized_inside else _input_size(model),
        dtypes=raw.dtypes,
        heads=tuple(own.values()),
        prefix=prefix,
    )
    of_sizes = {} if sizes is None or layout.sizes is None else {layout.sizes: sizes}
    raw_values = [*decode.graph.input[: len(raw_names)]]
    rename_values(decode.graph, {**dict(zip(kept_names, raw_names, strict=True)), **of_sizes})
    kept = dict(zip(kept_names, raw_values, strict=True)) if keep_raw else {}
    merged = _merge(onnx, model, decode, raw.batch, len(raw_names), kept, prefix)
    if sizes is not None:
        notes = [*notes, *_without_old_sizes(merged.graph, sizes)]
    found_names = {"logits": raw_names[0], "boxes": raw_names[1]}
    found_names |= {raw_name(head): name for head, name in zip(heads, raw_names[2:], strict=True)}
    return Attached(merged, tuple(notes), found_names, raw.num_classes, sizes)


def _without_old_sizes(graph: onnx.GraphProto, sizes: str) -> list[str]:
    """Drop inputs (B, 2) that served what was cut off: an exporter may take the batch from their shape alone."""
    old = [value.name for value in true_inputs(graph) if value.name != sizes and _is_of_pairs(value)]
    return [f"no longer an input: {name}" for name in old if take_shape_from(graph, name, sizes)]


def _is_of_pairs(value: onnx.ValueInfoProto) -> bool:
    dims = value.type.tensor_type.shape.dim
    return len(dims) == 2 and dims[1].dim_value == 2


def _input_size(model: onnx.ModelProto) -> tuple[int, int] | str | None:
    """Give (height, width) of the images, their input's name where those are free; ``None`` where there is none."""
    image = find_image_input(true_inputs(model.graph))
    if image is None:
        return None
    return (image.height, image.width) if image.height and image.width else image.name


def _opset(model: onnx.ModelProto) -> int:
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _at_least_opset(onnx: Any, source: onnx.ModelProto, least: int) -> tuple[onnx.ModelProto, list[str]]:
    model = onnx.ModelProto()
    model.CopyFrom(source)
    version = _opset(model)
    if version >= least:
        return model, []
    target = max(17, least)
    try:
        converted = onnx.version_converter.convert_version(model, target)
    except Exception as error:
        raise ValueError(
            f"the source has opset {version}, older than {least}, and cannot be converted: {first_line(error)}"
        ) from error
    need = "exact ties need" if least == OLDEST_OPSET else "a resize like the trained one needs"
    return converted, [f"converted the source from opset {version} to {target}: {need} {least} or later"]


def _free_prefix(graph: onnx.GraphProto) -> str:
    """Give a beginning of names that no node and no value of the source has."""
    taken = value_names(graph) | {node.name for node in graph.node}
    return next(p for p in (f"detpost{'_' * i}/" for i in range(99)) if not any(name.startswith(p) for name in taken))


def _merge(
    onnx: Any,
    model: onnx.ModelProto,
    decode: onnx.ModelProto,
    batch: int | str,
    raw_count: int,
    kept: Mapping[str, onnx.ValueInfoProto],
    prefix: str,
) -> onnx.ModelProto:
    """Append the decode graph's nodes to the model's and replace its outputs.

    Of the decode's inputs the first ``raw_count`` are values of the model; ``kept`` are those that stay as outputs, by
    their new names.
    """
    graph = model.graph
    final = list(decode.graph.output)
    taken = {value.name for value in graph.input} | {*PLACEMENT}
    graph.input.extend(value for value in decode.graph.input[raw_count:] if value.name not in taken)  # the image sizes
    graph.node.extend(decode.graph.node)
    graph.initializer.extend(decode.graph.initializer)
    for name, value in kept.items():
        graph.node.append(onnx.helper.make_node("Identity", [value.name], [name], name=f"{prefix}{name}"))
        output = onnx.ValueInfoProto()
        output.CopyFrom(value)
        output.name = name
        final.append(output)
    del graph.output[:]
    graph.output.extend(final)
    added = [value for value in graph.input if value.name not in taken]
    for value in (*graph.output, *added):
        _set_batch(value, batch)
    own = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]  # others, onnx knows nothing of
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for(own))
    return model


def _set_batch(value: onnx.ValueInfoProto, batch: int | str) -> None:
    first = value.type.tensor_type.shape.dim[0]
    if isinstance(batch, int):
        first.dim_value = batch
    else:
        first.dim_param = batch if batch != "?" else "batch"
