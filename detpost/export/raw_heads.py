"""The raw value of a head in someone else's detector: masks, keypoints or oriented boxes of every query."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detpost.export.graph import import_onnx
from detpost.export.heads import Head, Shape, output_names, row_of
from detpost.export.raw_values import RawValues
from detpost.export.runtime import onnx_values
from detpost.export.slots import RawHead
from detpost.export.surgery import value_names

if TYPE_CHECKING:
    import onnx

__all__ = ["find_raw_heads"]


def find_raw_heads(
    model: onnx.ModelProto, heads: Sequence[Head], raw: RawValues, folder: Path | None = None
) -> dict[str, RawHead]:
    """Find what heads read.

    Args:
        model: the detector, uncut.
        heads: which ones; a ``source`` is taken as it is, an output or a value inside.
        raw: the detector's logits and boxes, whose queries these are of.
        folder: where external weights lie.

    Returns:
        Each head with the shape and dtype of what it reads, by the name of that value, in order.

    Raises:
        ValueError: none or several outputs that it could be; the message lists them. Or a name that is not there.
    """
    return dict(_find(model, head, raw, folder) for head in heads)


def _find(model: onnx.ModelProto, head: Head, raw: RawValues, folder: Path | None) -> tuple[str, RawHead]:
    row, what, queries = row_of(head), output_names(head)[0], raw.num_queries
    if head.source is not None and head.source not in value_names(model.graph):
        raise ValueError(f"no value {head.source!r} for {what}: {_listing(model)}")
    outputs = [value.name for value in model.graph.output]
    if head.source is None and not {raw.logits, raw.boxes} & {*outputs}:
        raise ValueError(
            f"the detector has post-processing of its own, and its outputs may be sorted by it: name the value "
            f"(B, {queries}, ...) inside that {what} are made of"
        )
    kinds = _kinds(model, [head.source] if head.source else outputs, folder)
    if head.source is not None:
        return head.source, RawHead(head, *kinds[head.source])
    named = {name: kind for name, kind in kinds.items() if name not in (raw.logits, raw.boxes)}
    fitting = [name for name, (shape, _) in named.items() if shape and shape[0] == queries and row.fits(shape)]
    told = [name for name in fitting if any(word in name.lower() for word in row.words)]
    fitting = told if len(told) == 1 else fitting
    if len(fitting) != 1:
        problem = "several outputs could be" if fitting else f"no output of {queries} queries has a shape for"
        raise ValueError(f"{problem} the {what}: name their source; {_listing(model)}")
    return fitting[0], RawHead(head, *named[fitting[0]])


def _kinds(model: onnx.ModelProto, names: list[str], folder: Path | None) -> dict[str, tuple[Shape, int]]:
    """Give shape without the batch and dtype of floating values: what inference leaves open, a run tells."""
    onnx = import_onnx()
    floating = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found: dict[str, tuple[Shape, int]] = {}
    for value in (*inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        if value.name in names and kind.elem_type in floating and kind.HasField("shape"):
            dims = kind.shape.dim[1:]
            shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims)
            found |= {value.name: (shape, kind.elem_type)}
    open_ones = [name for name in names if name not in found or "?" in found[name][0] or _is_open(found[name][0])]
    if not open_ones:
        return found
    free = _free_sides(model)
    for name, array in onnx_values(model, open_ones, folder).items():
        if array.dtype.kind == "f":
            shape = tuple(array.shape[1:])
            # Height and width of masks follow those of the images, where these are free.
            kept = (shape[0], "mask_height", "mask_width") if free and len(shape) == 3 else shape
            found |= {name: (kept, onnx.helper.np_dtype_to_tensor_dtype(array.dtype))}
    return {name: found[name] for name in names if name in found}


def _is_open(shape: Shape) -> bool:
    return any(isinstance(size, str) for size in shape)


def _free_sides(model: onnx.ModelProto) -> bool:
    """Tell whether height or width of the images is free."""
    return any(
        not dim.HasField("dim_value")
        for value in model.graph.input
        for dim in value.type.tensor_type.shape.dim[2:]
        if len(value.type.tensor_type.shape.dim) == 4
    )


def _listing(model: onnx.ModelProto) -> str:
    return f"the file has outputs: {', '.join(value.name for value in model.graph.output)}"
