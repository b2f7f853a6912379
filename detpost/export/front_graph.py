"""What is done to pixels inside a file, before its network: whatever the layout's runner does not do."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from detpost.export.graph import Graph, Value
from detpost.export.layouts import Layout
from detpost.export.surgery import free_name, rename_values, value_names
from detpost.images import Preprocessing

if TYPE_CHECKING:
    import onnx

__all__ = ["done_by_runner", "put_affine_in_front"]


def done_by_runner(layout: Layout, wanted: Preprocessing) -> Preprocessing:
    """Give what the layout's runner does of a preprocessing.

    Args:
        layout: of the file.
        wanted: what the network was trained on.

    Returns:
        All of it where the runner is free; :func:`put_affine_in_front` does the rest in the file.
    """
    if layout.pixels is None:
        return wanted
    if layout.pixels == "one scale":
        return replace(wanted, std=(wanted.std[0],) * 3)
    mean, std = layout.pixels
    return replace(wanted, scale=1 / 255, mean=mean, std=std)


def put_affine_in_front(model: onnx.ModelProto, images: str, before: Preprocessing, after: Preprocessing) -> None:
    """Make a model that takes images of one preprocessing take those of another.

    Args:
        model: changed; its input keeps its name.
        images: name of the image input (B, 3, H, W), floating.
        before: what was done to its images.
        after: what is done to them now.
    """
    ratio = before.scale / after.scale
    channels = list(zip(before.mean, before.std, after.mean, after.std, strict=True))
    factors = tuple(new_std * ratio / std for _, std, _, new_std in channels)
    offsets = tuple((new_mean * ratio - mean) / std for mean, std, new_mean, _ in channels)
    graph = model.graph
    dtype = next(v.type.tensor_type.elem_type for v in graph.input if v.name == images)
    inner = free_name(f"detpost_{images}", value_names(graph))
    rename_values(graph, {images: inner})
    next(value for value in graph.input if value.name == inner).name = images
    g = Graph(next(e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), f"{inner}/")
    value: Value = images
    if not np.allclose(factors, 1, rtol=1e-7, atol=0):
        value = g.node("Mul", value, _of_channels(factors, dtype))
    if not np.allclose(offsets, 0, rtol=0, atol=1e-9):
        value = g.node("Add", value, _of_channels(offsets, dtype))
    nodes = [*g.nodes, g.identity(value, inner)]
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
    graph.initializer.extend(g.constants)


def _of_channels(values: tuple[float, ...], dtype: int) -> NDArray[Any]:
    from onnx.helper import tensor_dtype_to_np_dtype

    return np.array(values, tensor_dtype_to_np_dtype(dtype))[None, :, None, None]
