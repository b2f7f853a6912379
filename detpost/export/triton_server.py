"""A detector as a model repository of Triton Inference Server: configuration, file and client.

Sources: Triton's ``model_config.proto``, ``docs/user_guide/model_configuration.md`` and ``model_repository.md``; of the
OpenVINO backend, its tutorial on ONNX files.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detpost.export.artifact import read_metadata
from detpost.export.choices import check_choices
from detpost.export.files import replace_when_whole
from detpost.export.front_graph import RESIZE_OPSET, Resize, put_resize_in_front
from detpost.export.graph import import_onnx
from detpost.export.layouts import recorded_layout
from detpost.export.onnx import to_onnx
from detpost.export.targets import folder_name
from detpost.export.tensorrt import check_options, parsed, write_build_files
from detpost.export.written import WrittenFile
from detpost.images import Preprocessing
from detpost.spec import DecodeSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["BACKENDS", "model_config", "to_triton"]


@dataclass(frozen=True)
class _Backend:
    """What Triton calls a backend, and the file that it opens where that is not ``model.onnx`` by itself."""

    name: str
    file: str | None = None


BACKENDS: Mapping[str, _Backend] = {
    "onnx": _Backend("onnxruntime"),
    "tensorrt": _Backend("tensorrt", "model.plan"),
    "openvino": _Backend("openvino", "model.onnx"),
}

# Of numpy's dtypes, as ONNX calls them.
_TYPES = {"FLOAT": "FP32", "FLOAT16": "FP16", "DOUBLE": "FP64", "UINT8": "UINT8", "INT32": "INT32", "INT64": "INT64"}
_TYPES |= {"BOOL": "BOOL"}
_READABLE = ("detpost", "rtdetr", "efficientnms")  # layouts that the client reads
_QUEUE_DELAY = 1000  # microseconds that a request waits for others at the most
_IMAGES, _RESIZED = "images", "resized"


def to_triton(
    model: Any,
    out: str | Path,
    spec: DecodeSpec | None = None,
    *,
    name: str | None = None,
    backend: str = "onnx",
    max_batch: int = 8,
    ensemble: bool = False,
    resize: Resize | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> WrittenFile:
    """Write ``OUT/NAME/config.pbtxt``, ``OUT/NAME/1/model.onnx`` and a client.

    Args:
        model: as :func:`detpost.export.to_onnx` takes it.
        out: the repository; other models in it are left alone.
        spec: as :func:`detpost.export.to_onnx` takes it.
        name: of the model, a letter or digit and then these, ``_``, ``-`` and ``.``; made of what ``model`` is called
            otherwise.
        backend: what runs the file: ``"onnx"``; ``"openvino"``, which reads the same file; or ``"tensorrt"``, whose
            plan is built from it on the server's own GPU by the script that is written beside.
        max_batch: most images that the server puts into one batch.
        ensemble: write two more models: ``NAME_resize``, which makes the network's input of uint8 images of any size,
            and ``NAME_ensemble``, which is both.
        resize: how images are resized in an ensemble or with ``preprocess_inside="full"``.
        progress: called with one line before each long step.
        options: of :func:`detpost.export.to_onnx`.

    Returns:
        What was written: the ONNX file, and beside it all else.

    Raises:
        ImportError: onnx is missing.
        ValueError: options that do not fit.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from detpost.postprocess import DetectionPostProcessor
        >>> post = DetectionPostProcessor.from_preset("rtdetr", top_k=10)
        >>> with TemporaryDirectory() as folder:
        ...     written = to_triton(post, folder, name="decode", num_queries=20, num_classes=5)
        ...     [path.name for path in written.beside]
        ['config.pbtxt']
    """
    check_choices({"backend": (backend, tuple(BACKENDS))})
    named = folder_name(model) if name is None else name
    # It is a folder in the repository, and a string in configurations.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", named):
        raise ValueError(f"name must be a letter or digit, then letters, digits, _, - and .; got {named!r}")
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1; got {max_batch}")
    inside = options.get("preprocess_inside")
    if ensemble and (inside or options.get("dynamic_size") or (resize is not None and resize.letterbox)):
        raise ValueError(
            "an ensemble resizes in a model of its own, by stretching to one size: leave preprocess_inside, "
            "dynamic_size and letterbox out"
        )
    if backend == "tensorrt":
        check_options({**options, "resize": resize})
    if backend == "openvino" and options.get("ties", "exact") != "exact":
        raise ValueError("OpenVINO's TopK of an .onnx file is not stable: take ties='exact'")
    folder = Path(out) / named
    front: dict[str, Any] = {"resize": resize} if resize is not None and not ensemble else {}
    path = folder / "1" / "model.onnx"
    written = to_onnx(model, path, spec, progress=progress, **front, **options)
    proto = parsed(path) if backend == "tensorrt" else import_onnx().load(path, load_external_data=False)
    metadata = read_metadata({entry.key: entry.value for entry in proto.metadata_props}, path)
    files = {folder / "config.pbtxt": model_config(proto, named, backend, max_batch)}
    if ensemble:
        files |= _ensemble(proto, metadata, Path(out), named, max_batch, resize or Resize())
    settings = _client_settings(proto, metadata, f"{named}_ensemble" if ensemble else named, ensemble, max_batch)
    beside = list(files)
    for place, text in files.items():
        _write(place, text)
    if settings is not None:
        _write(folder / "client.json", json.dumps(settings, indent=1) + "\n")
        shutil.copyfile(Path(__file__).parent / "shipped" / "triton_client.py", folder / "client.py")
        beside += [folder / "client.py", folder / "client.json"]
    if backend == "tensorrt":
        beside += write_build_files(proto, path, folder, max_batch, folder / "1" / "model.plan")
    return replace(written, beside=(*beside, *written.beside))


def model_config(model: onnx.ModelProto, name: str, backend: str, max_batch: int) -> str:
    """Write the configuration of a model from what its file takes and gives.

    Args:
        model: the file.
        name: of the model.
        backend: of ``BACKENDS``.
        max_batch: as :func:`to_triton` takes it; a file whose batch size is fixed gets no batching.

    Returns:
        A text of ``model_config.proto``'s ``ModelConfig``.
    """
    taken = BACKENDS[backend]
    batched = _is_batched(model)
    lines = [f'name: "{name}"', f'backend: "{taken.name}"', f"max_batch_size: {max_batch if batched else 0}"]
    lines += [f'default_model_filename: "{taken.file}"'] if taken.file else []
    for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
        lines += [_tensor(kind, value.name, _type(value), _dims(value)[batched:]) for value in values]
    if batched:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {_QUEUE_DELAY} }}")
    return "\n".join(lines) + "\n"


def _is_batched(model: onnx.ModelProto) -> bool:
    """Tell whether every input and output begins with a free batch size."""
    return all(_dims(value)[:1] == [-1] for value in (*model.graph.input, *model.graph.output))


def _tensor(kind: str, name: str, dtype: str, dims: list[int]) -> str:
    return f'{kind} {{ name: "{name}" data_type: TYPE_{dtype} dims: [ {", ".join(map(str, dims))} ] }}'


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]


def _type(value: onnx.ValueInfoProto) -> str:
    kinds = import_onnx().TensorProto.DataType
    return _TYPES[kinds.Name(value.type.tensor_type.elem_type)]


def _ensemble(
    network: onnx.ModelProto, metadata: Mapping[str, Any], out: Path, name: str, max_batch: int, resize: Resize
) -> dict[Path, str]:
    """Write the model that resizes, and give the configurations of it and of both together."""
    onnx = import_onnx()
    layout = recorded_layout(metadata)
    if layout.name not in _READABLE or not _is_batched(network):
        raise ValueError(f"an ensemble takes a free batch size and io {', '.join(_READABLE)}; got io {layout.name!r}")
    front = _resizer(metadata, str(layout.sizes), layout.sizes_order, resize)
    path = out / f"{name}_resize" / "1" / "model.onnx"
    with replace_when_whole(path) as temporary:
        onnx.save_model(front, temporary)
    whole = out / f"{name}_ensemble"
    (whole / "1").mkdir(parents=True, exist_ok=True)  # an ensemble has a version too, and no file in it
    outputs = [_tensor("output", v.name, _type(v), _dims(v)[1:]) for v in network.graph.output]
    lines = [
        f'name: "{name}_ensemble"',
        'platform: "ensemble"',
        f"max_batch_size: {max_batch}",
        _tensor("input", _IMAGES, "UINT8", [3, -1, -1]),
        *outputs,
        "ensemble_scheduling {",
        _step(f"{name}_resize", {_IMAGES: _IMAGES}, {v.name: v.name for v in front.graph.output}),
        _step(
            name,
            {_IMAGES: _RESIZED, str(layout.sizes): str(layout.sizes)},
            {v.name: v.name for v in network.graph.output},
        ),
        "}",
    ]
    return {
        path.parents[1] / "config.pbtxt": model_config(front, f"{name}_resize", "onnx", max_batch),
        whole / "config.pbtxt": "\n".join(lines) + "\n",
    }


def _step(name: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> str:
    """Say which values of the ensemble a model takes and gives."""
    maps = [f'input_map {{ key: "{key}" value: "{value}" }}' for key, value in inputs.items()]
    maps += [f'output_map {{ key: "{key}" value: "{value}" }}' for key, value in outputs.items()]
    return f'  step {{ model_name: "{name}" model_version: -1 {" ".join(maps)} }}'


def _resizer(metadata: Mapping[str, Any], sizes: str, order: str, resize: Resize) -> onnx.ModelProto:
    """Write the graph from uint8 images (B, 3, H, W) to the network's input and the sizes (B, 2)."""
    from onnx import TensorProto, helper

    checker = import_onnx().checker

    preprocessing = Preprocessing(**{k: _plain(v) for k, v in metadata["preprocessing"].items()})
    shape = ["batch", 3, preprocessing.height, preprocessing.width]
    graph = helper.make_graph(
        [helper.make_node("Identity", [_IMAGES], [_RESIZED], name="resized")],
        "resize",
        [helper.make_tensor_value_info(_IMAGES, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(_RESIZED, TensorProto.FLOAT, shape)],
    )
    opsets = [helper.make_opsetid("", RESIZE_OPSET)]
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets), producer_name="detpost"
    )
    put_resize_in_front(model, _IMAGES, preprocessing, resize)
    sides = [2, 3] if order == "hw" else [3, 2]
    constants = {"sides": sides, "first": [0], "two": [2]}
    model.graph.initializer.extend(
        helper.make_tensor(f"sizes/{key}", TensorProto.INT64, [len(value)], value) for key, value in constants.items()
    )
    model.graph.node.extend(
        [
            helper.make_node("Shape", [_IMAGES], ["sizes/shape"], name="sizes/Shape"),
            helper.make_node("Gather", ["sizes/shape", "sizes/sides"], ["sizes/one"], name="sizes/one", axis=0),
            helper.make_node("Gather", ["sizes/shape", "sizes/first"], ["sizes/batch"], name="sizes/batch", axis=0),
            helper.make_node("Concat", ["sizes/batch", "sizes/two"], ["sizes/all"], name="sizes/all", axis=0),
            helper.make_node("Expand", ["sizes/one", "sizes/all"], [sizes], name="sizes"),
        ]
    )
    model.graph.output.append(helper.make_tensor_value_info(sizes, TensorProto.INT64, ["batch", 2]))
    checker.check_model(model, full_check=True)
    return model


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _client_settings(
    model: onnx.ModelProto, metadata: Mapping[str, Any], name: str, ensemble: bool, max_batch: int
) -> dict[str, Any] | None:
    """Give what the client needs to know; ``None`` for a decode alone and for layouts that it does not read."""
    layout = recorded_layout(metadata)
    if "preprocessing" not in metadata or layout.name not in _READABLE:
        return None
    inside = "full" if ensemble else metadata["preprocess_inside"]
    parts = {held: output for output, held in layout.outputs.items()}
    return {
        "model": name,
        "sizes": None if inside == "full" else layout.sizes,
        "sizes_order": layout.sizes_order,
        "pixels": inside if inside == "full" else "scale" if inside else "normalised",
        "preprocessing": metadata["preprocessing"],
        "outputs": {part: parts[part] for part in ("labels", "boxes", "scores", "valid", "count") if part in parts},
        "class_names": metadata["class_names"],
    }


def _write(path: Path, text: str) -> None:
    with replace_when_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
