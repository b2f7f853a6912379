"""Detectors and post-processors to one ``.pt2`` file that PyTorch runs without detpost."""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from detpost.export.artifact import describe
from detpost.export.choices import check_choices
from detpost.export.files import replace_when_whole
from detpost.export.layouts import layout_of
from detpost.export.onnx import Progress
from detpost.export.source import ExportSource, evaluating, first_line
from detpost.export.torch_exporters import quiet_exporter
from detpost.export.written import WrittenFile
from detpost.images import Preprocessing
from detpost.postprocess import DetectionPostProcessor, DetectorModule
from detpost.spec import DecodeSpec

__all__ = ["OpenPackage", "open_package", "package", "read_package_metadata"]

Kind = Literal["aot", "export"]

_METADATA = "detpost"
_DETECTOR_INPUTS = ("images", "image_sizes")
_POST_INPUTS = ("pred_logits", "pred_boxes", "image_sizes")
_OUTPUTS = ("labels", "boxes", "scores", "valid", "queries")


def package(
    model: str | Path | nn.Module,
    example: Sequence[Tensor] | None,
    path: str | Path,
    spec: DecodeSpec | None = None,
    *,
    kind: Kind = "aot",
    num_queries: int | None = None,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: Mapping[int, str] | None = None,
    progress: Progress | None = None,
) -> WrittenFile:
    """Export a detector with its post-processing, or a post-processor alone, to one ``.pt2`` file.

    The file takes ``images`` (B, 3, H, W) float32 and ``image_sizes`` (B, 2) int64, (height, width) in pixels; a
    post-processor alone takes ``pred_logits`` (B, Q, C), ``pred_boxes`` (B, Q, 4) and ``image_sizes``. It gives a plain
    dict with ``labels`` (B, K) int64, ``boxes`` (B, K, 4) float32 xyxy in pixels, ``scores`` (B, K) float32, ``valid``
    (B, K) bool and ``queries`` (B, K) int64. The batch size is free; everything else is as in ``example``. Before the
    file is written, the graph is run against PyTorch at two batch sizes.

    A process without detpost runs it with ``torch._inductor.aoti_load_package(path)(images, image_sizes)``, or, where
    ``kind`` is ``"export"``, with ``torch.export.load(path).module()(images, image_sizes)``. Load only files that you
    trust: the first runs the machine code inside, the second evaluates text and may unpickle.

    Args:
        model: ``"tiny"``, a transformers directory or hub id, any module that :func:`detpost.postprocess.raw_outputs`
            can read, or a :class:`DetectionPostProcessor`.
        example: one batch of the inputs, of any batch size, on the device that the file is for: (images,) or (images,
            image_sizes), or (logits, boxes) or (logits, boxes, image_sizes). ``None`` makes images up, and raw outputs
            of ``num_queries`` and ``num_classes``.
        path: where to write, ending in ``.pt2``. The file appears whole or not at all.
        spec: how the outputs are decoded; ``None`` takes the family's preset (a plain module needs one).
        kind: ``"aot"`` compiles to machine code (AOTInductor), for this kind of device and processor; ``"export"``
            writes the graph alone (``torch.export.save``), which any machine runs, uncompiled.
        num_queries: Q, for a post-processor alone without an example.
        num_classes: C, likewise.
        image_size: (height, width) of the network input; ``None`` takes that of ``example``, else the model's own.
        preprocessing: for a plain module, how images become its input; recorded in the file.
        class_names: the name of each label, recorded in the file; ``None`` takes the model's own.
        progress: called with one line before each long step.

    Returns:
        What was written.

    Raises:
        ValueError: arguments that do not fit, or a model that cannot be exported; the message says why.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> post = DetectionPostProcessor.from_preset("rtdetr", top_k=3)
        >>> with TemporaryDirectory() as folder:
        ...     made = package(post, (torch.zeros(1, 5, 2), torch.zeros(1, 5, 4)), f"{folder}/post.pt2", kind="export")
        >>> made.inputs
        ('pred_logits', 'pred_boxes', 'image_sizes')
    """
    path = Path(path)
    check_choices({"kind": (kind, get_args(Kind))})
    if path.suffix != ".pt2":
        raise ValueError(f"path must end in .pt2; got {path.name!r}")
    say = progress or (lambda _: None)
    if isinstance(model, DetectionPostProcessor):
        if example is None and num_queries and num_classes:
            example = (torch.zeros(2, num_queries, num_classes), torch.zeros(2, num_queries, 4))
        module, inputs, metadata = _post_alone(model, spec, example, class_names)
    else:
        if image_size is None and example:
            image_size = (int(example[0].shape[-2]), int(example[0].shape[-1]))
        source = ExportSource.of(model, spec, image_size, preprocessing, class_names)
        module, inputs, metadata = _whole_detector(source, example)
    names = _POST_INPUTS if isinstance(module, _PostInputs) else _DETECTOR_INPUTS
    with evaluating(module):
        say("exporting the graph")
        program = _export(module, inputs)
    device = inputs[0].device.type
    recorded = {**metadata, "kind": kind, "device": device, "inputs": names, "outputs": _OUTPUTS}
    with replace_when_whole(path) as temporary:
        say("compiling (AOTInductor)" if kind == "aot" else "saving the graph")
        _write(program, temporary, kind, recorded)
        say("comparing with PyTorch")
        with evaluating(module):
            _compare_with_eager(module, open_package(temporary), inputs)
    return WrittenFile(path, "package", names, _OUTPUTS, kind=kind, device=device)


def write_package(model: Any, path: str | Path, spec: DecodeSpec | None = None, **options: Any) -> WrittenFile:
    """Write as :func:`package` does without an example, called as the writers of all formats are.

    Args:
        model: as :func:`package` takes it.
        path: where to write, ending in ``.pt2``.
        spec: how the outputs are decoded; ``None`` takes the family's preset.
        options: the other keyword arguments of :func:`package`.

    Returns:
        What was written.
    """
    return package(model, None, path, spec, **options)


class _PostInputs(nn.Module):
    """A post-processor that gives a plain dict: a process without detpost has no Detections."""

    def __init__(self, post: DetectionPostProcessor) -> None:
        super().__init__()
        self.post = post

    def forward(self, pred_logits: Tensor, pred_boxes: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
        found = self.post(pred_logits, pred_boxes, image_sizes)
        return {name: getattr(found, name) for name in _OUTPUTS}


class _DetectorInputs(nn.Module):
    """A detector that gives a plain dict."""

    def __init__(self, detector: DetectorModule) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
        found = self.detector(images, image_sizes)
        return {name: getattr(found, name) for name in _OUTPUTS}


def _post_alone(
    post: DetectionPostProcessor,
    spec: DecodeSpec | None,
    example: Sequence[Tensor] | None,
    class_names: Mapping[int, str] | None,
) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
    if example is None or len(example) not in (2, 3):
        raise ValueError(
            "a post-processor alone needs an example of (logits, boxes) or (logits, boxes, image_sizes), or "
            "num_queries and num_classes"
        )
    spec = spec or post.spec
    metadata = {
        **describe(spec, class_names, layout_of("detpost"), "exact", keep_raw=False),
        "shape": list(example[0].shape[1:]),
    }
    post = post if spec == post.spec else DetectionPostProcessor(spec)
    return _PostInputs(post), _with_sizes(example, 2), metadata


def _whole_detector(
    source: ExportSource, example: Sequence[Tensor] | None
) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
    device = next((parameter.device for parameter in source.model.parameters()), torch.device("cpu"))
    given = example or (torch.rand(2, 3, *source.image_size, generator=torch.Generator().manual_seed(0)).to(device),)
    if len(given) not in (1, 2) or given[0].ndim != 4 or tuple(given[0].shape[-2:]) != source.image_size:
        height, width = source.image_size
        shapes = ", ".join(str(tuple(value.shape)) for value in given)
        raise ValueError(f"example must be images (B, 3, {height}, {width}) and image_sizes (B, 2); got {shapes}")
    metadata = {
        **describe(source.spec, source.class_names, layout_of("detpost"), "exact", keep_raw=False),
        "input_size": list(source.image_size),
        "preprocessing": source.preprocessing.to_dict(),
        "preprocess_inside": False,
    }
    detector = DetectorModule(source.model, DetectionPostProcessor(source.spec))
    return _DetectorInputs(detector), _with_sizes(given, 1), metadata


def _with_sizes(example: Sequence[Tensor], before: int) -> tuple[Tensor, ...]:
    """Make the example whole: image sizes where none came, and two images at the least.

    A batch of one would be exported as a constant.
    """
    first = example[0]
    sizes = example[before] if len(example) > before else torch.full((len(first), 2), 640, device=first.device)
    given = (*(value.detach() for value in example[:before]), sizes)
    return tuple(value[[0, 0]] for value in given) if len(first) == 1 else given


def _export(module: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Trace as ``torch.compile`` does, and where that cannot, by running the Python code.

    In this order: run as it is, transformers' RT-DETRv2 ties the graph to the batch size of the example.
    """
    shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs)
    failures: list[str] = []
    for strict in (True, False):
        try:
            with quiet_exporter(), torch.no_grad():
                return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict)
        except Exception as error:  # the exporter may fail with anything, and the user should meet no stack trace
            failures.append(first_line(error))
    raise ValueError(f"torch.export cannot take the model with a free batch size: {'; '.join(failures)}")


def _write(program: torch.export.ExportedProgram, path: Path, kind: Kind, metadata: Mapping[str, Any]) -> None:
    import detpost

    text = json.dumps({**metadata, "version": detpost.__version__})
    if kind == "export":
        torch.export.save(program, path, extra_files={f"{_METADATA}.json": text})
        return
    try:
        with quiet_exporter():
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs={"aot_inductor.metadata": {_METADATA: text}}
            )
    except Exception as error:
        raise ValueError(f"AOTInductor cannot compile the model: {first_line(error)}") from error


@dataclass(frozen=True)
class OpenPackage:
    """A ``.pt2`` file that is ready to run.

    Args:
        run: the inputs of the file, in order, to a dict of its outputs.
        metadata: what the file says of itself.
        device: where its inputs must be.
    """

    run: Callable[..., dict[str, Tensor]]
    metadata: dict[str, Any]
    device: torch.device


def open_package(path: str | Path, device: str | torch.device | None = None) -> OpenPackage:
    """Open a file of :func:`package`. Open only files that you trust.

    An ``"aot"`` file is machine code, which runs as this process. Of an ``"export"`` file nothing is unpickled but
    plain tensors, by PyTorch's restricted unpickler: a file with any other pickle inside is refused. PyTorch still
    evaluates expressions of its graph, which is no barrier against a malicious file.

    Args:
        path: the file.
        device: where to run; ``None`` is where the file was made for. An ``"aot"`` file cannot be moved.

    Returns:
        The file, ready to run.

    Raises:
        OSError: no such file.
        ValueError: a file that detpost did not write, a damaged one, one that holds pickles, or one for another device.
    """
    path = Path(path)
    metadata = read_package_metadata(path)
    made_for = torch.device(metadata["device"])
    place = torch.device(device) if device is not None else made_for
    if metadata["kind"] == "export":
        with _damage_in_one_line(path):
            pickle = _pickle_in(path)
        if pickle is not None:
            raise ValueError(f"{path} holds a pickle ({pickle}), which no file of detpost.export.package does")
        with _quiet_loader(), _damage_in_one_line(path):
            program = torch.export.load(path)
        if place.type != made_for.type:
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, place)
        return OpenPackage(program.module(), metadata, place)
    if place.type != made_for.type:
        raise ValueError(f"{path} is compiled for {made_for.type} and cannot run on {place.type}: package it there")
    with _quiet_loader(), _damage_in_one_line(path):
        run = torch._inductor.aoti_load_package(str(path), device_index=-1 if place.index is None else place.index)
    return OpenPackage(run, metadata, place)


def read_package_metadata(path: str | Path) -> dict[str, Any]:
    """Read what a file of :func:`package` says of itself, without loading what else it holds.

    Args:
        path: the file.

    Returns:
        The metadata.

    Raises:
        OSError: no such file.
        ValueError: a file that detpost did not write.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if not zipfile.is_zipfile(path):
        found = None
    else:
        with _damage_in_one_line(path):
            found = next(map(json.loads, _metadata_texts(path)), None)
    if not isinstance(found, dict):
        raise ValueError(f"{path} was not written by detpost: package the model with detpost.export.package")
    return found


def _metadata_texts(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(f"/extra/{_METADATA}.json"):
                yield archive.read(name).decode()
            elif "/aotinductor/" in name and name.endswith("_metadata.json"):
                said = json.loads(archive.read(name))
                if _METADATA in said:
                    yield said[_METADATA]


@contextmanager
def _damage_in_one_line(path: Path) -> Iterator[None]:
    """Say in one line that a file is damaged: zip, JSON and PyTorch's loaders each raise errors of their own kinds."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} is damaged, or of another version of PyTorch: {first_line(error)}") from error


def _pickle_in(path: Path) -> str | None:
    """Name what ``torch.export.load`` would unpickle that is no tensor; ``None`` where there is nothing.

    It unpickles weights and constants of unusual types, and whatever the restricted unpickler does not take among the
    example inputs. None of these is in a file that :func:`package` wrote.
    """
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(("_weights_config.json", "_constants_config.json")):
                payloads = json.loads(archive.read(name))["config"].values()
                plain = not any(payload["use_pickle"] for payload in payloads)
            elif "/sample_inputs/" in name:
                plain = _is_tensors_alone(archive.read(name))
            else:
                plain = not name.endswith((".pkl", ".pickle"))
            if not plain:
                return name
    return None


def _is_tensors_alone(pickled: bytes) -> bool:
    try:
        torch.load(io.BytesIO(pickled), weights_only=True)
    except Exception:  # whatever it is that the restricted unpickler does not take
        return False
    return True


@contextmanager
def _quiet_loader() -> Iterator[None]:
    """Keep PyTorch's remarks on processors and on unused symbols off the terminal: they ask nothing of the user."""
    loggers = [
        logging.getLogger(f"torch.{name}") for name in ("export.pt2_archive._package", "_export.serde.serialize")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _compare_with_eager(module: nn.Module, opened: OpenPackage, inputs: tuple[Tensor, ...]) -> None:
    """Run the file where it was not exported: a size that became a constant shows there."""
    for batch in (1, len(inputs[0]) + 1):
        given = [_varied(value, batch) for value in inputs]
        with torch.no_grad():
            expected, got = module(*given), opened.run(*given)
        for name in _OUTPUTS:
            if got[name].shape != expected[name].shape:
                raise ValueError(
                    f"the package gives {name} {tuple(got[name].shape)} at batch {batch} where PyTorch gives "
                    f"{tuple(expected[name].shape)}"
                )
        if isinstance(module, _PostInputs):
            same = all(torch.equal(got[name], expected[name]) for name in ("labels", "queries", "valid"))
        else:
            # A detector may pick its own queries by rounding, so rows may change places: the scores tell enough.
            gap = (got["scores"] - expected["scores"]).abs().flatten()
            same = not gap.numel() or bool(gap.quantile(0.9) <= _MOST_SCORE_DIFFERENCE)
        if not same:
            raise ValueError(f"the package gives other detections than PyTorch at batch {batch}")


def _varied(value: Tensor, batch: int) -> Tensor:
    """Make another batch of the example's kind; few levels, so that there are ties."""
    if not value.is_floating_point():
        return value[:1].expand(batch, *value.shape[1:]).contiguous()
    generator = torch.Generator().manual_seed(batch)
    return (torch.rand(batch, *value.shape[1:], generator=generator) * 16).round().div(16).to(value)


_MOST_SCORE_DIFFERENCE = 1e-2
