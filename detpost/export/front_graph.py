"""What is done to pixels inside a file, before its network: whatever the layout's runner does not do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detpost.export.graph import Graph, Value
from detpost.export.layouts import Layout
from detpost.export.surgery import free_name, rename_values, value_names
from detpost.images import Preprocessing

if TYPE_CHECKING:
    import onnx

__all__ = [
    "PLACEMENT",
    "RESIZE_OPSET",
    "Placement",
    "Resize",
    "done_by_runner",
    "put_affine_in_front",
    "put_resize_in_front",
    "stretched",
    "without_sizes",
]

RESIZE_OPSET = 18  # Resize has its antialiasing from here on

_PADDING = 114.0  # the grey that Ultralytics pads with


@dataclass(frozen=True)
class Resize:
    """How images of any size become the network's input inside a file.

    Args:
        letterbox: whether the image keeps its proportions and grey stands around it; else it is stretched.
        antialias: whether all pixels have a part where an image shrinks, as PIL's and torchvision's resize has it;
            OpenCV's has not.
    """

    letterbox: bool = False
    antialias: bool = True


class Placement(NamedTuple):
    """Names of what turns boxes of 0..1 of the network's input into pixels of the image: float32, (4, 1, 1) each."""

    factor: Value
    shift: Value  # is taken away then
    bound: Value  # width, height, width, height of the image


PLACEMENT = Placement("detpost_front/factor", "detpost_front/shift", "detpost_front/bound")


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


def without_sizes(layout: Layout) -> Layout:
    """Give the layout of a file that is given images as they are: their own shape says their size.

    Args:
        layout: of the file.

    Returns:
        The same without an input of sizes.

    Raises:
        ValueError: a layout whose runner resizes images itself.
    """
    if layout.pixels is not None or layout.normalised:
        raise ValueError(f"the runner of io {layout.name!r} resizes images itself: take another io with full")
    return replace(layout, sizes=None)


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


def put_resize_in_front(model: onnx.ModelProto, images: str, preprocessing: Preprocessing, resize: Resize) -> None:
    """Make a model take uint8 images (B, 3, H, W) of any size, all of a batch of the same; writes :data:`PLACEMENT`.

    Args:
        model: changed; its input keeps its name.
        images: name of the image input, floating.
        preprocessing: what the network was trained on, its input's size included.
        resize: how images become that size.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    place = next(i for i, value in enumerate(graph.input) if value.name == images)
    dtype = graph.input[place].type.tensor_type.elem_type
    batch = graph.input[place].type.tensor_type.shape.dim[0]
    inner = free_name(f"detpost_{images}", value_names(graph))
    rename_values(graph, {images: inner})
    free = helper.make_tensor_value_info(images, TensorProto.UINT8, [None, 3, "height", "width"])
    free.type.tensor_type.shape.dim[0].CopyFrom(batch)
    graph.input[place].CopyFrom(free)
    g = Graph(next(e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), "detpost_front/")
    size = preprocessing.height, preprocessing.width
    bound = _of_sides(g, g.node("Shape", images), 2)
    if resize.letterbox:
        pixels, factor, shift = _letterboxed(g, images, size, bound, resize.antialias)
    else:
        pixels, factor, shift = stretched(g, images, size, resize.antialias), bound, g.node("Mul", bound, 0.0)
    channels = list(zip(preprocessing.mean, preprocessing.std, strict=True))
    factors = tuple(preprocessing.scale / std for _, std in channels)
    pixels = g.node("Mul", pixels, _of_channels(factors, TensorProto.FLOAT))
    pixels = g.node("Add", pixels, _of_channels(tuple(-mean / std for mean, std in channels), TensorProto.FLOAT))
    if dtype != TensorProto.FLOAT:
        pixels = g.node("Cast", pixels, to=dtype)
    names = dict(zip((pixels, factor, shift, bound), (inner, *PLACEMENT), strict=True))
    nodes = [*g.nodes, *(helper.make_node("Identity", [v], [n], name=f"{n}/Identity") for v, n in names.items())]
    if factor == bound:  # one value under two names
        nodes.append(helper.make_node("Identity", [bound], [PLACEMENT.factor], name=f"{PLACEMENT.factor}/Identity"))
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
    graph.initializer.extend(g.constants)


def stretched(g: Graph, images: Value, size: tuple[int, int], antialias: bool) -> Value:
    """Write images (B, 3, H, W) resized to ``size``, rounded to whole numbers, as float32."""
    return _resized(g, images, g.node("Shape", images), g.constant([*size]), antialias)


def _resized(g: Graph, images: Value, shape: Value, size: Value, antialias: bool) -> Value:
    """Write a bilinear resize, along the rows first and rounded in between, as PIL and torchvision do for bytes."""
    leading = g.node("Gather", shape, g.constant([0, 1, 2]), axis=0)
    narrow = g.node("Concat", leading, g.node("Gather", size, g.constant([1]), axis=0), axis=0)
    whole = g.node("Concat", g.node("Gather", shape, g.constant([0, 1]), axis=0), size, axis=0)
    pixels = g.cast(images, "FLOAT")
    for sizes in (narrow, whole):
        pixels = g.node(
            "Resize",
            pixels,
            "",
            "",
            sizes,
            mode="linear",
            coordinate_transformation_mode="half_pixel",
            antialias=int(antialias),
            # At the borders they weigh what is there alone; without this, pixels there differ by up to 9.
            exclude_outside=int(antialias),
        )
        pixels = g.node("Floor", g.node("Add", pixels, 0.5))  # halves up, as they do
    return pixels


def _letterboxed(
    g: Graph, images: Value, size: tuple[int, int], bound: Value, antialias: bool
) -> tuple[Value, Value, Value]:
    """Write padded images, and factor and shift of boxes, by the rule of Ultralytics' LetterBox."""
    shape = g.node("Shape", images)
    own = g.cast(g.node("Gather", shape, g.constant([2, 3]), axis=0), "FLOAT")
    scale = g.least(g.node("Div", np.array(size, np.float32), own), 0, keep=True)
    inside = g.cast(g.node("Max", g.node("Round", g.node("Mul", own, scale)), 1.0), "INT64")
    pixels = _resized(g, images, shape, inside, antialias)
    padding = g.node("Sub", g.constant([*size]), inside)
    before = g.node("Div", padding, g.constant([2]))
    none = g.constant([0, 0])
    pads = g.node("Concat", none, before, none, g.node("Sub", padding, before), axis=0)
    pixels = g.node("Pad", pixels, pads, _PADDING)
    ratio = g.node("Div", bound, _of_sides(g, inside, 0))  # of image to what it became
    height, width = size
    factor = g.node("Mul", ratio, np.array([width, height, width, height], np.float32)[:, None, None])
    return pixels, factor, g.node("Mul", ratio, _of_sides(g, before, 0))


def _of_sides(g: Graph, sizes: Value, height: int) -> Value:
    """Write width, height, width, height (4, 1, 1), float32, of int64 sizes whose height stands at a place."""
    sides = g.node("Gather", sizes, g.constant([height + 1, height] * 2), axis=0)
    return g.reshape(g.cast(sides, "FLOAT"), [4, 1, 1])


def _of_channels(values: tuple[float, ...], dtype: int) -> NDArray[Any]:
    from onnx.helper import tensor_dtype_to_np_dtype

    return np.array(values, tensor_dtype_to_np_dtype(dtype))[None, :, None, None]
