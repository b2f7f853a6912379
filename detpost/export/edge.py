"""Detectors for phones and boards: ExecuTorch, LiteRT and Core ML, whole or as a network with its decode in C++.

All three take a program of ``torch.export``, whose decode is the definition in ``detpost.reference``, with a sigmoid in
float32: small runtimes have no float64.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detpost.export.artifact import describe
from detpost.export.files import replace_when_whole
from detpost.export.layouts import layout_of
from detpost.export.selection_source import write_decode_source
from detpost.export.source import ExportSource, evaluating, first_line
from detpost.export.written import WrittenFile
from detpost.images import Preprocessing
from detpost.kernels.aten.selection import select_by_top_k
from detpost.postprocess import DetectionPostProcessor, raw_outputs
from detpost.reference import decode as reference
from detpost.spec import DecodeSpec

__all__ = ["to_coreml", "to_executorch", "to_litert"]

OUTPUTS = ("labels", "boxes", "scores", "valid")
RAW_OUTPUTS = ("pred_logits", "pred_boxes")

Arguments = tuple[Tensor, ...]
Convert = Callable[[nn.Module, Arguments, Path], None]


def to_executorch(model: Any, out: str | Path, spec: DecodeSpec | None = None, **options: Any) -> WrittenFile:
    """Write ``OUT/model.pte``, lowered to XNNPACK where that can compute it.

    Args:
        model: as :func:`detpost.export.to_onnx` takes it, or a post-processor alone.
        out: the folder.
        spec: how the outputs are decoded; ``None`` takes the family's preset.
        options: ``split``, whether to write the network as ``OUT/network.pte`` and its decode as C++ into
            ``OUT/decode``; ``image_size``, ``preprocessing`` and ``class_names`` as of :func:`detpost.export.to_onnx`;
            ``num_queries`` and ``num_classes`` for a post-processor alone; ``progress``.

    Returns:
        What was written. A program takes a batch of one: ``images`` (1, 3, H, W) float32 and ``image_sizes`` (1, 2)
        int64; it gives ``labels``, ``boxes``, ``scores`` and ``valid``. ``OUT/model.json`` says how it takes images.

    Raises:
        ImportError: executorch is missing.
        ValueError: a model that it cannot take.
    """
    return _write(model, Path(out), spec, _executorch, "pte", **options)


def to_litert(model: Any, out: str | Path, spec: DecodeSpec | None = None, **options: Any) -> WrittenFile:
    """Write ``OUT/model.tflite``.

    Args:
        model: as :func:`to_executorch` takes it.
        out: the folder.
        spec: as :func:`to_executorch` takes it.
        options: as :func:`to_executorch` takes them.

    Returns:
        What was written, as of :func:`to_executorch`, but for the sizes, which LiteRT takes as int32.

    Raises:
        ImportError: litert-torch is missing.
        ValueError: a model that it cannot take.
    """
    return _write(model, Path(out), spec, _litert, "tflite", **options)


def to_coreml(model: Any, out: str | Path, spec: DecodeSpec | None = None, **options: Any) -> WrittenFile:
    """Write ``OUT/model.mlpackage``, for iOS 18, macOS 15 and later.

    Args:
        model: as :func:`to_executorch` takes it.
        out: the folder.
        spec: as :func:`to_executorch` takes it.
        options: as :func:`to_executorch` takes them.

    Returns:
        What was written, as of :func:`to_executorch`, but for whole numbers, which are int32 in Core ML.

    Raises:
        ImportError: coremltools is missing.
        ValueError: a model that it cannot take.
    """
    return _write(model, Path(out), spec, _coreml, "mlpackage", **options)


class _Whole(nn.Module):
    """Images and their sizes to a plain tuple of ``OUTPUTS``."""

    def __init__(self, model: nn.Module, spec: DecodeSpec) -> None:
        super().__init__()
        self.model = model
        self.decode = _Decode(spec)

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        logits, boxes = raw_outputs(self.model(images))
        return self.decode(logits, boxes, image_sizes)  # type: ignore[no-any-return]


class _Decode(nn.Module):
    """Raw outputs and sizes to a plain tuple of ``OUTPUTS``."""

    def __init__(self, spec: DecodeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, pred_logits: Tensor, pred_boxes: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        steps = reference.Steps(select_by_top_k, sigmoid=torch.sigmoid)
        found = reference.decode(pred_logits, pred_boxes, image_sizes, self.spec, steps)
        return found.labels, found.boxes, found.scores, found.valid


class _Network(nn.Module):
    """Images to (logits, boxes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return raw_outputs(self.model(images))


def _write(
    model: Any,
    out: Path,
    spec: DecodeSpec | None,
    convert: Convert,
    ending: str,
    *,
    split: bool = False,
    image_size: tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: Mapping[int, str] | None = None,
    num_queries: int | None = None,
    num_classes: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> WrittenFile:
    say = progress or (lambda _: None)
    sizes = torch.tensor([[480, 640]])
    if isinstance(model, DetectionPostProcessor):
        if split:
            raise ValueError("a post-processor alone has no network to split it from: name a detector")
        if num_queries is None or num_classes is None:
            raise ValueError("a post-processor alone needs num_queries and num_classes")
        chosen, known = spec or model.spec, {}
        module: nn.Module = _Decode(chosen)
        given = {"pred_logits": torch.zeros(1, num_queries, num_classes), "pred_boxes": torch.zeros(1, num_queries, 4)}
        example = {**given, "image_sizes": sizes}
    else:
        source = ExportSource.of(model, spec, image_size, preprocessing, class_names)
        chosen, class_names = source.spec, source.class_names
        known = {"input_size": list(source.image_size), "preprocessing": source.preprocessing.to_dict()}
        images = torch.rand(1, 3, *source.image_size, generator=torch.Generator().manual_seed(0))
        module = _Network(source.model) if split else _Whole(source.model, chosen)
        example = {"images": images} if split else {"images": images, "image_sizes": sizes}
    path = out / f"{'network' if split else 'model'}.{ending}"
    say(f"converting to .{ending}")
    with evaluating(module), torch.no_grad(), _quiet(), tempfile.TemporaryDirectory(prefix="detpost-") as folder:
        made = Path(folder) / path.name
        try:
            convert(module.eval(), tuple(example.values()), made)
        except ImportError:
            raise
        except Exception as error:  # a converter may fail with anything, and the user should meet no stack trace
            raise ValueError(f"the converter to .{ending} failed: {first_line(error)}") from error
        _place(made, path)
    outputs = RAW_OUTPUTS if split else OUTPUTS
    said = describe(chosen, class_names, layout_of("detpost"), "exact", keep_raw=split)
    beside = [out / "model.json"]
    with replace_when_whole(beside[0]) as temporary:
        said = {**said, **known, "file": path.name, "inputs": list(example), "outputs": list(outputs)}
        temporary.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    if split:
        say("writing the decode as C++")
        beside += write_decode_source(out / "decode", chosen)
    return WrittenFile(
        path, ending, tuple(example), outputs, kind="network alone" if split else None, beside=(*beside,)
    )


def _place(made: Path, path: Path) -> None:
    """Put what a converter wrote, a file or a folder, in its place."""
    if made.is_file():
        with replace_when_whole(path) as temporary:
            shutil.copyfile(made, temporary)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(made, path)


def _executorch(module: nn.Module, example: Arguments, path: Path) -> None:
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ImportError:
        raise _missing("executorch") from None
    exported = _exported(module, example)
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    path.write_bytes(program.buffer)


def _litert(module: nn.Module, example: Arguments, path: Path) -> None:
    try:
        import litert_torch
    except ImportError:
        raise _missing("litert-torch") from None
    litert_torch.convert(_exported(module, example).module(), example).export(str(path))


def _exported(module: nn.Module, example: Arguments) -> torch.export.ExportedProgram:
    """Trace a module, and leave out what checks shapes while it runs: they are fixed, and no runner has that."""
    exported = torch.export.export(module, example, strict=False)
    graph = exported.graph_module.graph
    for node in reversed(graph.nodes):
        if str(node.target).startswith("aten._assert"):
            graph.erase_node(node)
        elif node.target is torch.ops.aten._is_all_true.default:
            node.target = torch.ops.aten.all.default  # the same, and known to converters
    graph.eliminate_dead_code()
    exported.graph_module.recompile()
    return exported


def _for_coreml(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Take out what only gives its input, unknown to the converter, and say of whole quotients that they are."""
    graph = exported.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is torch.ops.aten.div.Tensor_mode and not node.meta["val"].is_floating_point():
            with graph.inserting_after(node):
                whole = graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": torch.int32})
            whole.meta = dict(node.meta)
            node.replace_all_uses_with(whole, delete_user_cb=lambda user, whole=whole: user is not whole)
    exported.graph_module.recompile()
    return exported


def _coreml(module: nn.Module, example: Arguments, path: Path) -> None:
    try:
        import coremltools
    except ImportError:
        raise _missing("coremltools") from None
    table = torch.export.default_decompositions()
    table.pop(torch.ops.aten.grid_sampler.default)  # type: ignore[no-untyped-call]  # the converter knows it, not its parts
    exported = _for_coreml(_exported(module, example).run_decompositions(table))
    made = coremltools.convert(
        exported,
        convert_to="mlprogram",
        minimum_deployment_target=coremltools.target.iOS18,
        compute_precision=coremltools.precision.FLOAT32,  # by itself it rounds everything to half precision
        skip_model_load=True,
    )
    made.save(str(path))


def _missing(package: str) -> ImportError:
    return ImportError(f"this needs {package}, in an environment of its own: pip install {package}, or make test-edge")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converters' warnings and log lines off the terminal."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
