"""Detectors and post-processors to OpenVINO: the ONNX graph, its exact decode included, as an IR file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from detpost.export.artifact import read_metadata
from detpost.export.files import replace_when_whole
from detpost.export.graph import import_onnx
from detpost.export.onnx import Progress, to_onnx
from detpost.export.source import first_line
from detpost.export.written import WrittenFile
from detpost.spec import DecodeSpec

__all__ = ["OpenVinoModel", "open_openvino", "read_openvino", "to_openvino", "write_openvino"]

_RT_INFO = ["detpost", "metadata"]


def to_openvino(
    model: str | Path | nn.Module,
    path: str | Path,
    spec: DecodeSpec | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> WrittenFile:
    """Export a detector with its post-processing, or a post-processor alone, to an OpenVINO IR file.

    Goes through :func:`detpost.export.to_onnx`, so that inputs, outputs and the exact decode are the same. Weights stay
    float32. To have the same order of detections as PyTorch, a program of one's own must compile the model with
    ``INFERENCE_PRECISION_HINT`` f32, as ``Detector.load("x.xml")`` does.

    Args:
        model: an ``.onnx`` file that detpost wrote, or anything that :func:`detpost.export.to_onnx` takes.
        path: where to write, ending in ``.xml``; the weights lie beside it in ``.bin``.
        spec: how the outputs are decoded; as in ``to_onnx``, and not for an ``.onnx`` file, which has its own.
        progress: called with one line before each long step.
        options: keyword arguments of ``to_onnx``; none for an ``.onnx`` file.

    Returns:
        What was written.

    Raises:
        ImportError: openvino or onnx is missing; the message names the extra.
        OSError: an ``.onnx`` file that is missing.
        ValueError: arguments that do not fit, or a graph that OpenVINO does not take; the message says why.

    Example:
        >>> from detpost import DetectionPostProcessor
        >>> post = DetectionPostProcessor.from_preset("rtdetr", top_k=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to_openvino(post, f"{folder}/post.xml", num_queries=20, num_classes=5).inputs
        ('pred_logits', 'pred_boxes', 'image_sizes')
    """
    openvino = _import_openvino()
    path = Path(path)
    if path.suffix != ".xml":
        raise ValueError(f"path must end in .xml; got {path.name!r}")
    say = progress or (lambda _: None)
    if isinstance(model, (str, Path)) and Path(model).suffix == ".onnx":
        if spec is not None or options:
            raise ValueError("an .onnx file has its spec and options inside: give none")
        return _convert(openvino, Path(model), path, (), say)
    with tempfile.TemporaryDirectory(prefix="detpost-") as folder:
        exported = to_onnx(model, Path(folder) / "model.onnx", spec, progress=progress, **options)
        return _convert(openvino, exported.path, path, exported.notes, say)


def _convert(openvino: Any, source: Path, path: Path, notes: tuple[str, ...], say: Progress) -> WrittenFile:
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}")
    metadata = _onnx_metadata(source)
    say("converting to OpenVINO")
    try:
        model = openvino.convert_model(source)
    except Exception as error:
        raise ValueError(f"OpenVINO does not take the graph: {first_line(error)}") from error
    if metadata["ties"] == "onnx":
        _make_top_k_stable(openvino, model)
    say("writing the file")
    return write_openvino(model, path, metadata, notes)


def write_openvino(model: Any, path: Path, metadata: Mapping[str, Any], notes: tuple[str, ...] = ()) -> WrittenFile:
    """Write a model of OpenVINO's with what the file says of itself, weights as they are.

    Args:
        model: an ``openvino.Model``.
        path: the ``.xml`` file.
        metadata: what :func:`read_openvino` gives.
        notes: what is to be said of it.

    Returns:
        What was written.
    """
    _write_pair(_import_openvino(), model, path, metadata)
    return WrittenFile(
        path=path,
        format="openvino",
        weights=path.with_suffix(".bin"),
        inputs=tuple(value.get_any_name() for value in model.inputs),
        outputs=tuple(value.get_any_name() for value in model.outputs),
        notes=notes,
    )


def _make_top_k_stable(openvino: Any, model: Any) -> None:
    """Make the decode's TopK take the lower index first, as ONNX says: OpenVINO does so where told to alone."""
    for node in model.get_ops():
        if node.get_type_name() == "TopK" and node.get_friendly_name().startswith("detpost"):
            said = node.get_attributes()
            stable = openvino.opset11.topk(
                *(node.input_value(i) for i in (0, 1)),
                axis=said["axis"],
                mode=said["mode"],
                sort=said["sort"],
                index_element_type=said["index_element_type"],
                stable=True,
            )
            stable.set_friendly_name(node.get_friendly_name())
            for place in (0, 1):
                node.output(place).replace(stable.output(place))


def _onnx_metadata(source: Path) -> dict[str, Any]:
    onnx = import_onnx()
    try:
        model = onnx.load(source, load_external_data=False)
    except Exception as error:
        raise ValueError(f"{source} is not an ONNX file: {first_line(error)}") from error
    return read_metadata({entry.key: entry.value for entry in model.metadata_props}, source)


def _write_pair(openvino: Any, model: Any, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write ``.xml`` and ``.bin`` so that an interruption leaves the old pair, or one that says it is broken.

    Two files cannot be replaced at one stroke. The weights go first, and their old ones come back if the text then
    cannot; the text names the weights by digest, so that loading notices if the process died in between.
    """
    weights = path.with_suffix(".bin")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _restored_on_error(weights), replace_when_whole(path) as temporary:
        fresh = temporary.with_suffix(".bin")
        # Once for the digest of the weights, once with it. Halved weights would be another model.
        openvino.save_model(model, temporary, compress_to_fp16=False)
        recorded = {**metadata, "weights_sha256": _digest(fresh)}
        model.set_rt_info(json.dumps(recorded), _RT_INFO)
        openvino.save_model(model, temporary, compress_to_fp16=False)
        os.replace(fresh, weights)


@contextlib.contextmanager
def _restored_on_error(path: Path) -> Iterator[None]:
    """Bring ``path`` back as it was if the block fails; if it was not there, it is not there afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    backup = folder / path.name
    try:
        if path.exists():
            _link_or_copy(path, backup)
        try:
            yield
        except BaseException:
            if backup.exists():
                os.replace(backup, path)
            else:
                path.unlink(missing_ok=True)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class OpenVinoModel:
    """An opened IR file.

    Args:
        compiled: OpenVINO's compiled model.
        metadata: what the file says of itself.
        model: what was compiled, which says the names: compiling adds others to an input that is cast first, as in half
            files; ``None`` takes those of ``compiled``.
    """

    def __init__(self, compiled: Any, metadata: dict[str, Any], model: Any = None) -> None:
        self.compiled = compiled
        self.metadata = metadata
        named = compiled if model is None else model
        self._inputs = {value.get_any_name(): port for value, port in zip(named.inputs, compiled.inputs, strict=True)}
        self._outputs = {
            value.get_any_name(): port for value, port in zip(named.outputs, compiled.outputs, strict=True)
        }

    @property
    def inputs(self) -> dict[str, tuple[int | None, ...]]:
        """Name and shape of each input; ``None`` where a dimension is free."""
        return {
            name: tuple(None if size.is_dynamic else size.get_length() for size in port.get_partial_shape())
            for name, port in self._inputs.items()
        }

    @property
    def dtypes(self) -> dict[str, Any]:
        """Name and NumPy dtype of each input."""
        return {name: port.get_element_type().to_dtype() for name, port in self._inputs.items()}

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """Run the model.

        Args:
            feed: a NumPy array by the name of each input; shapes as in ``inputs``.

        Returns:
            A NumPy array by the name of each output.
        """
        found = self.compiled({self._inputs[name]: value for name, value in feed.items()})
        # Copies: the arrays that come back are OpenVINO's own memory, which the next run writes anew.
        return {name: found[port].copy() for name, port in self._outputs.items()}


def open_openvino(path: str | Path) -> OpenVinoModel:
    """Open a file of :func:`to_openvino` for the CPU, in float32 throughout.

    Args:
        path: the ``.xml`` file.

    Returns:
        The model.

    Raises:
        ImportError: openvino is missing; the message names the extra.
        OSError: the ``.xml`` or its ``.bin`` is missing.
        ValueError: a file that detpost did not write, or weights that are not its own.
    """
    model, metadata = read_openvino(path)
    # By default OpenVINO computes in bfloat16 where the processor can, and the order of detections would change.
    compiled = _import_openvino().Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return OpenVinoModel(compiled, metadata, model)


def read_openvino(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """Read a file of :func:`to_openvino`.

    Args:
        path: the ``.xml`` file.

    Returns:
        The ``openvino.Model``, and what the file says of itself.

    Raises:
        ImportError: openvino is missing; the message names the extra.
        OSError: the ``.xml`` or its ``.bin`` is missing.
        ValueError: a file that detpost did not write, or weights that are not its own.
    """
    openvino = _import_openvino()
    path = Path(path)
    weights = path.with_suffix(".bin")
    for file in (path, weights):
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}" + (f", which belongs to {path}" if file == weights else ""))
    core = openvino.Core()
    # Weights are read and not mapped: a file that is replaced while it is open harms nobody.
    core.set_property({"ENABLE_MMAP": False})
    try:
        model = core.read_model(path)
    except Exception as error:
        raise ValueError(f"OpenVINO does not take {path}: {first_line(error)}") from error
    if not model.has_rt_info(_RT_INFO):
        raise ValueError(f"{path} was not written by detpost: export the detector with detpost.export.to_openvino")
    metadata = json.loads(model.get_rt_info(_RT_INFO).astype(str))
    if metadata["weights_sha256"] != _digest(weights):
        raise ValueError(f"{weights} does not belong to {path}: an export was interrupted, export again")
    return model, metadata


def _import_openvino() -> Any:
    try:
        import openvino
        import openvino.opset11
    except ImportError:
        raise ImportError("OpenVINO export needs openvino: pip install 'detpost[openvino]'") from None
    return openvino
