"""ONNX models whose weights lie in files beside them: read by reference, and written without being held in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detpost.export.graph import import_onnx
from detpost.export.source import first_line

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxSource", "inner_graphs", "load_weights", "move_weights_out", "read_onnx", "weights_size"]

# Shapes, axes and other small constants, which shape inference and the version converter want to see.
_MOST_BYTES_READ = 2**16
# Smaller tensors stay in the model, as onnx's own writer has it.
_LEAST_BYTES_OUTSIDE = 2**10
# ONNX's own advice on external data, so that a runtime can map a tensor.
_PAGE = 4096
_CHUNK = 2**24


@dataclass(frozen=True)
class OnnxSource:
    """A model as it was read.

    Args:
        model: the graph; large weights that lie in other files are still there.
        folder: what the names of those files are relative to.
    """

    model: onnx.ModelProto
    folder: Path


def read_onnx(path: Path) -> OnnxSource:
    """Read a model and those of its external weights that are small.

    Args:
        path: the file.

    Returns:
        The model, whose graph and operator set are there.

    Raises:
        ImportError: onnx is missing; the message names the extra.
        OSError: a file that is missing, a directory or not a whole ONNX model, or weights beside it that are missing,
            cut short or outside its folder.
    """
    onnx = import_onnx()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: name an ONNX file")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise OSError(f"{path} is not an ONNX file, or one that was cut short: {first_line(error)}") from error
    if not model.graph.node or not model.graph.output:
        raise OSError(f"{path} is not an ONNX file of a detector: it holds no graph with nodes and outputs")
    if not any(entry.domain in ("", "ai.onnx") for entry in model.opset_import):
        raise OSError(f"{path} is not an ONNX file of a detector: it names no version of ONNX's own operators")
    for tensor in _tensors(model):
        if _is_outside(tensor):
            place = _place(tensor, path.parent)
            if place.length <= _MOST_BYTES_READ:
                _bring_in(tensor, place)
    return OnnxSource(model, path.parent)


def weights_size(model: onnx.ModelProto, folder: Path | None) -> int:
    """Give the bytes of all tensors, those in other files (relative to ``folder``) included."""
    return sum(
        _place(tensor, folder or Path()).length if _is_outside(tensor) else len(tensor.raw_data)
        for tensor in _tensors(model)
    )


def load_weights(model: onnx.ModelProto, folder: Path | None) -> None:
    """Bring all weights that lie in other files into the model."""
    for tensor in _tensors(model):
        if _is_outside(tensor):
            _bring_in(tensor, _place(tensor, folder or Path()))


def move_weights_out(model: onnx.ModelProto, folder: Path | None, target: Path, stem: str) -> Path:
    """Write the model's weights to one file and let the model refer to it.

    Weights that lie in other files are copied a few megabytes at a time. The file's name is made of its content, so
    that a model and the weights of another export never meet under one name.

    Args:
        model: changed to refer to the new file.
        folder: what the names of the files it refers to now are relative to.
        target: folder of the new file.
        stem: how the new file's name begins.

    Returns:
        The new file, ``STEM.DIGEST.data``.

    Raises:
        OSError: weights that are missing or cut short.
    """
    moved: list[tuple[Any, int, int]] = []
    digest = hashlib.sha256()
    unnamed = target / f"{stem}.data"
    with unnamed.open("wb") as file:
        for tensor in _tensors(model):
            if not _is_outside(tensor) and not _is_large(tensor):
                continue
            padding = bytes(-file.tell() % _PAGE)
            digest.update(padding)
            start = file.tell() + file.write(padding)
            for chunk in _chunks(tensor, folder or Path()):
                digest.update(chunk)
                file.write(chunk)
            moved.append((tensor, start, file.tell() - start))
            tensor.ClearField("raw_data")
    named = target / f"{stem}.{digest.hexdigest()[:12]}.data"
    os.replace(unnamed, named)
    for tensor, start, length in moved:
        _refer(tensor, named.name, start, length)
    return named


def inner_graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Give the graphs that a node holds: branches of an ``If``, the body of a ``Loop``."""
    return [
        graph
        for attribute in node.attribute
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)
    ]


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Give every tensor that a model holds, in subgraphs and functions too, always in the same order."""
    yield from _tensors_of_graph(model.graph)
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)


def _tensors_of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Any) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
        for graph in inner_graphs(node):
            yield from _tensors_of_graph(graph)


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a tensor lie."""

    path: Path
    offset: int
    length: int


def _is_outside(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == import_onnx().TensorProto.EXTERNAL)


def _is_large(tensor: onnx.TensorProto) -> bool:
    # The decode's own constants stay in the file: one network under two decodes has one file of weights.
    return len(tensor.raw_data) >= _LEAST_BYTES_OUTSIDE and not tensor.name.startswith("detpost")


def _place(tensor: onnx.TensorProto, folder: Path) -> _Place:
    """Find a tensor's bytes; they must lie whole in a file inside ``folder``."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = Path(entries.get("location", ""))
    if not location.name or location.is_absolute() or ".." in location.parts:
        raise OSError(f"tensor {tensor.name!r} has its data in {str(location)!r}, which is not beside the model")
    path = folder / location
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}, which holds weights of the model: keep the two together")
    numbers = [entries.get(key, "") or default for key, default in (("offset", "0"), ("length", "0"))]
    offset, length = (int(number) if str(number).isdecimal() else -1 for number in numbers)
    length = length or _bytes_of(tensor)
    if offset < 0 or length < 0 or offset + length > path.stat().st_size:
        size = path.stat().st_size
        raise OSError(f"{path} was cut short: tensor {tensor.name!r} needs {length} bytes from {offset} of its {size}")
    return _Place(path, offset, length)


def _bytes_of(tensor: onnx.TensorProto) -> int:
    """Give the size that a tensor's shape and dtype ask for."""
    from onnx.helper import tensor_dtype_to_np_dtype

    return int(prod(tensor.dims) * tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _bring_in(tensor: onnx.TensorProto, place: _Place) -> None:
    tensor.raw_data = b"".join(_chunks_of(place))
    tensor.data_location = import_onnx().TensorProto.DEFAULT
    del tensor.external_data[:]


def _chunks(tensor: onnx.TensorProto, folder: Path) -> Iterator[bytes]:
    if _is_outside(tensor):
        yield from _chunks_of(_place(tensor, folder))
    else:
        yield tensor.raw_data


def _chunks_of(place: _Place) -> Iterator[bytes]:
    with place.path.open("rb") as file:
        file.seek(place.offset)
        left = place.length
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                raise OSError(f"{place.path} ended {left} bytes too early while it was read")
            left -= len(chunk)
            yield chunk


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    tensor.data_location = import_onnx().TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
