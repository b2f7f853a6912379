"""Raw logits and boxes of someone else's detector: its outputs, or values inside it before its own post-processing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from detpost.export.graph import import_onnx
from detpost.export.inside import are_normalised, find_inner_values, values_in_tail
from detpost.export.runtime import onnx_values
from detpost.export.source import first_line
from detpost.export.surgery import held_values, true_inputs, value_names
from detpost.export.tail import Tail
from detpost.export.weights import read_onnx, weights_size
from detpost.spec import DecodeSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["Candidate", "RawValues", "find_raw_values", "list_candidates"]

Shape = tuple[int | str, ...]

_MOST_LISTED = 30
# Of weights, for a model that is run once; larger ones are streamed from file to file, and nothing is run.
_MOST_BYTES_RUN = 512 * 2**20
_BOX_WORDS = ("box", "dets", "coord", "loc")
_LOGIT_WORDS = ("logit", "cls", "class", "label", "score", "prob", "conf")


@dataclass(frozen=True)
class RawValues:
    """The two values of a detector that post-processing starts from."""

    logits: str
    boxes: str
    logits_shape: Shape
    boxes_shape: Shape
    dtypes: tuple[torch.dtype, torch.dtype]

    @property
    def batch(self) -> int | str:
        """The batch size, or the name of a free one."""
        return self.logits_shape[0]

    @property
    def num_queries(self) -> int:
        """Q."""
        return int(self.logits_shape[1])

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.logits_shape[2])


@dataclass(frozen=True)
class Candidate:
    """A value that ``logits`` or ``boxes`` may name.

    Args:
        name: of the value.
        shape: a number or a name for each dimension.
        dtype: NumPy's name of it.
        place: ``"output"``, or the operator that makes it.
        guess: ``"logits"``, ``"boxes"`` or nothing.
    """

    name: str
    shape: Shape
    dtype: str
    place: str
    guess: str


def find_raw_values(
    model: onnx.ModelProto,
    spec: DecodeSpec,
    logits: str | None = None,
    boxes: str | None = None,
    *,
    folder: Path | None = None,
    recorded: Mapping[str, str] | None = None,
) -> tuple[RawValues, list[str]]:
    """Find the values that post-processing starts from.

    Names that are given are taken as they are. Else outputs of fitting shapes are taken, unless logits come out of an
    activation or boxes of an image of noise are in pixels. Else the model has post-processing of its own: the values
    that it starts from are looked for by running the model, and those are taken whose decode gives the model's own
    detections.

    Args:
        model: the detector.
        spec: how its raw values are decoded.
        logits: name of the logits (B, Q, C), an output or not.
        boxes: name of the boxes (B, Q, 4), an output or not.
        folder: where external weights lie.
        recorded: names that detpost recorded in a file of its own.

    Returns:
        The values, and what the caller should know.

    Raises:
        ValueError: values that are missing or ambiguous; the message lists the outputs.
    """
    names = {what: name for what, name in (("logits", logits), ("boxes", boxes)) if name is not None}
    if not names and recorded and set(recorded.values()) <= value_names(model.graph):
        names = dict(recorded)
    known = _output_kinds(model, folder)
    known |= _inner_kinds(model, {what: name for what, name in names.items() if name not in known}, known, folder)
    tail = Tail.of(model.graph)
    try:
        found = _by_shape(known, names.get("logits"), names.get("boxes"))
    except ValueError as error:
        if len(names) == 2:
            raise
        return _inside(model, spec, tail, names, folder, known, error)
    activation = tail.activation_of(found.logits)
    if activation is None:
        if "boxes" in names or not _are_in_pixels(model, found.boxes, folder):
            return found, _said(found)
        reason = ValueError(
            f"{found.boxes} looks like boxes in pixels, and they must be of an image of size 1: name the value before "
            f"their scaling with --boxes (--list shows what there is), or {found.boxes} to take it all the same"
        )
        return _inside(model, spec, tail, names, folder, known, reason)
    if "logits" in names:
        warning = f"{found.logits} comes out of {activation}: logits must be what goes into it"
        return found, [*_said(found), warning]
    reason = ValueError(
        f"{found.logits} comes out of {activation} and is no logits: name what goes into it with --logits"
    )
    return _inside(model, spec, tail, names, folder, known, reason)


def list_candidates(source: str | Path) -> list[Candidate]:
    """List what ``logits`` and ``boxes`` may name: outputs, and values near them that have a shape for it.

    Args:
        source: the ONNX file.

    Returns:
        The outputs first, then inner values, those nearest to the outputs first.

    Raises:
        ImportError: onnx or onnxruntime is missing; the message names the extra.
        OSError: a source that is missing or not an ONNX file.
        ValueError: a model that ONNX Runtime cannot run.
    """
    read = read_onnx(Path(source))
    graph = read.model.graph
    tail = Tail.of(graph)
    values = values_in_tail(read.model, tail, read.folder)
    queries = {value.shape[1] for value in values.values() if value.ndim == 3 and value.shape[2] == 4}
    guesses = {name: _guess(tail, name, value.shape) for name, value in values.items() if value.dtype.kind == "f"}
    inner = [
        name for name in guesses if name not in tail.outputs and guesses[name] and values[name].shape[1] in queries
    ]
    return [
        Candidate(
            name,
            (_batch(read.model), *values[name].shape[1:]),
            str(values[name].dtype),
            "output" if name in tail.outputs else tail.maker(name),
            guesses.get(name, ""),
        )
        for name in (*(output for output in tail.outputs if output in values), *inner[:_MOST_LISTED])
    ]


def _guess(tail: Tail, name: str, shape: tuple[int, ...]) -> str:
    """Say what a value may be by its shape and what is made of it; nothing where it is neither."""
    if len(shape) != 3:
        return ""
    scored = tail.activation_behind(name) is not None or (name in tail.outputs and shape[2] != 4)
    logits = scored and tail.activation_of(name) is None
    return " or ".join([*(["boxes"] if shape[2] == 4 else []), *(["logits"] if logits else [])])


def _said(found: RawValues) -> list[str]:
    return [f"logits: {found.logits} {list(found.logits_shape)}", f"boxes: {found.boxes} {list(found.boxes_shape)}"]


def _inside(
    model: onnx.ModelProto,
    spec: DecodeSpec,
    tail: Tail,
    names: Mapping[str, str],
    folder: Path | None,
    known: Mapping[str, tuple[Shape, torch.dtype]],
    reason: ValueError,
) -> tuple[RawValues, list[str]]:
    """Look before the model's own post-processing; ``reason`` is why its outputs do not serve."""
    found = find_inner_values(model, tail, spec, names, folder)
    if isinstance(found, str):
        raise ValueError(f"{reason}" + (f"; {found}" if found else "")) from None
    batch = _batch(model)
    logits, boxes = ((batch, *value.shape[1:]) for value in (found.logits, found.boxes))
    dtypes = tuple(_TORCH[str(value.dtype)] for value in (found.logits, found.boxes))
    raw = RawValues(found.logits_name, found.boxes_name, logits, boxes, (dtypes[0], dtypes[1]))
    return raw, [*_said(raw), *found.notes]


def _are_in_pixels(model: onnx.ModelProto, boxes: str, folder: Path | None) -> bool:
    """Tell whether boxes of an image of noise are far out of an image of size 1; not so where no runtime says it."""
    if weights_size(model, folder) > _MOST_BYTES_RUN:
        return False
    try:
        value = onnx_values(model, [boxes], folder)[boxes]
    except (ImportError, ValueError):
        return False
    return value.size > 0 and not are_normalised(value.reshape(-1, 4))


def _by_shape(known: Mapping[str, tuple[Shape, torch.dtype]], logits: str | None, boxes: str | None) -> RawValues:
    listing = "; ".join(f"{name} {list(shape)}" for name, (shape, _) in known.items()) or "none"
    found_boxes = boxes or _pick(
        "boxes", _BOX_WORDS, _LOGIT_WORDS, [n for n, (s, _) in known.items() if n != logits and _is_boxes(s)], listing
    )
    box_shape = known[found_boxes][0]
    fitting = [n for n, (s, _) in known.items() if n != found_boxes and _is_logits(s, box_shape)]
    found_logits = logits or _pick("logits", _LOGIT_WORDS, _BOX_WORDS, fitting, listing)
    logit_shape = known[found_logits][0]
    _check_pair(found_logits, logit_shape, found_boxes, box_shape, listing)
    return RawValues(found_logits, found_boxes, logit_shape, box_shape, (known[found_logits][1], known[found_boxes][1]))


def _is_boxes(shape: Shape) -> bool:
    return len(shape) == 3 and shape[2] == 4


def _is_logits(shape: Shape, box_shape: Shape) -> bool:
    return len(shape) == 3 and isinstance(shape[2], int) and shape[1] == box_shape[1]


def _pick(what: str, words: Iterable[str], others: Iterable[str], fitting: list[str], listing: str) -> str:
    """Take the one that fits; among several, the one whose name says so."""
    if len(fitting) > 1:
        named = [name for name in fitting if any(word in name.lower() for word in words)]
        not_other = [name for name in fitting if not any(word in name.lower() for word in others)]
        fitting = next((names for names in (named, not_other) if len(names) == 1), fitting)
    if len(fitting) == 1:
        return fitting[0]
    wanted = "(B, Q, 4)" if what == "boxes" else "(B, Q, C) with the boxes' Q"
    problem = f"several outputs could be the {what}" if fitting else f"no output of shape {wanted} for the {what}"
    raise ValueError(f"{problem}: name one with {what}= (--{what}); the file has outputs: {listing}")


def _check_pair(logits: str, logit_shape: Shape, boxes: str, box_shape: Shape, listing: str) -> None:
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


def _output_kinds(model: onnx.ModelProto, folder: Path | None) -> dict[str, tuple[Shape, torch.dtype]]:
    """Give the shape (a number or a name for each dimension) and dtype of every floating output of a fixed rank."""
    onnx = import_onnx()
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise ValueError(f"the source's shapes contradict each other: {first_line(error)}") from error
    found: dict[str, tuple[Shape, torch.dtype]] = {}
    for value in inferred.graph.output:
        kind = value.type.tensor_type
        dtype = _TORCH.get(_NUMPY.get(kind.elem_type, ""))
        if dtype is not None and kind.HasField("shape"):
            shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim)
            found |= {value.name: (shape, dtype)}
    open_ones = [name for name, (shape, _) in found.items() if any(isinstance(size, str) for size in shape[1:])]
    if open_ones:
        # Inference left a dimension open: what comes out of a run is Q and C.
        try:
            values = onnx_values(model, open_ones, folder)
        except (ImportError, ValueError):
            return found
        found |= {n: ((found[n][0][0], *v.shape[1:]), found[n][1]) for n, v in values.items() if v.ndim > 1}
    return found


def _inner_kinds(
    model: onnx.ModelProto,
    names: Mapping[str, str],
    known: Mapping[str, tuple[Shape, torch.dtype]],
    folder: Path | None,
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Give the kinds of named values that are no floating outputs: those of the main graph, by running it."""
    listing = "; ".join(f"{name} {list(shape)}" for name, (shape, _) in known.items()) or "none"
    made = {name for node in model.graph.node for name in node.output} | {value.name for value in model.graph.input}
    for what, name in names.items():
        if name not in made:
            holder = held_values(model.graph).get(name)
            where = f"{name!r} is inside a graph that node {holder} holds" if holder else f"no value {name!r}"
            raise ValueError(f"{where} for {what}: --list shows what can be named; the file has outputs: {listing}")
    if not names:
        return {}
    found: dict[str, tuple[Shape, torch.dtype]] = {}
    for name, value in onnx_values(model, list(names.values()), folder).items():
        if str(value.dtype) not in _TORCH:
            raise ValueError(
                f"logits and boxes must be floating; {name} is {value.dtype}; the file has outputs: {listing}"
            )
        found |= {name: ((_batch(model), *value.shape[1:]), _TORCH[str(value.dtype)])}
    return found


def _batch(model: onnx.ModelProto) -> int | str:
    """Give the batch size of the first input: inner values bear no names of dimensions that could be trusted."""
    shape = next((v.type.tensor_type.shape for v in true_inputs(model.graph) if v.type.tensor_type.shape.dim), None)
    if shape is None:
        return "?"
    return shape.dim[0].dim_value if shape.dim[0].HasField("dim_value") else shape.dim[0].dim_param or "?"


_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_NUMPY = {1: "float32", 10: "float16", 16: "bfloat16", 11: "float64"}  # onnx.TensorProto's numbers
