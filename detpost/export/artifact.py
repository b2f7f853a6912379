"""ONNX files that detpost writes: what they say of themselves, and the last check before they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detpost.export.files import replace_when_whole, write_onnx
from detpost.export.graph import import_onnx
from detpost.export.heads import Head, heads_to_dict
from detpost.export.layouts import Layout
from detpost.export.source import first_line
from detpost.export.surgery import true_inputs
from detpost.export.written import WrittenFile
from detpost.spec import DecodeSpec, presets_like

if TYPE_CHECKING:
    import onnx

__all__ = ["describe", "finish", "read_metadata", "recorded_metadata"]

_PREFIX = "detpost."


def describe(
    spec: DecodeSpec,
    class_names: Mapping[int, str] | None,
    layout: Layout,
    ties: str,
    keep_raw: bool,
    heads: tuple[Head, ...] = (),
    preset: str | None = None,
) -> dict[str, Any]:
    """Give the metadata that lets a file be used without knowing where it came from.

    Where no ``preset`` is given, the first that decodes like ``spec`` stands for all that do.
    """
    return {
        "spec": vars(spec),
        "preset": preset or next(iter(presets_like(spec)), None),
        "class_names": {str(label): name for label, name in (class_names or {}).items()},
        "io": layout.name,
        "layout": layout.to_dict(),
        "ties": ties,
        "raw_outputs": keep_raw,
        **({"heads": heads_to_dict(heads)} if heads else {}),
    }


def finish(
    model: onnx.ModelProto,
    path: Path,
    metadata: Mapping[str, Any],
    *,
    layout: Layout,
    exporter: str,
    notes: tuple[str, ...] = (),
    folder: Path | None = None,
) -> WrittenFile:
    """Record the metadata, check the whole graph and write it, and beside it what the layout's runner needs.

    Weights of ``model`` that lie in other files are found in ``folder``.
    """
    import detpost

    onnx = import_onnx()
    opset = next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    recorded = {**metadata, "version": detpost.__version__, "opset": opset}
    kept = [(p.key, p.value) for p in model.metadata_props if not p.key.startswith(_PREFIX)]
    own = [(_PREFIX + key, json.dumps(value)) for key, value in recorded.items()]
    of_runner = layout.properties(metadata) if layout.properties and "preprocessing" in metadata else {}
    onnx.helper.set_model_props(model, {**dict([*kept, *own]), **of_runner})
    # Operators of another domain have no shape inference that the full check could run.
    standard = all(entry.domain in ("", "ai.onnx") for entry in model.opset_import)

    def check(written: Path) -> None:
        try:
            onnx.checker.check_model(str(written), full_check=standard)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ValueError(f"the graph does not pass onnx.checker: {first_line(error)}") from error

    write_onnx(model, path, folder, check)
    texts = layout.files(path, metadata) if layout.files and "preprocessing" in metadata else {}
    for name, text in texts.items():
        with replace_when_whole(path.with_name(name)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return WrittenFile(
        path=path,
        format="onnx",
        opset=opset,
        exporter=exporter,
        inputs=tuple(value.name for value in true_inputs(model.graph)),
        outputs=tuple(value.name for value in model.graph.output),
        notes=notes,
        beside=tuple(path.with_name(name) for name in texts),
    )


def read_metadata(properties: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Read what :func:`finish` recorded.

    Args:
        properties: the file's metadata properties.
        path: the file, for the message.

    Returns:
        The metadata.

    Raises:
        ValueError: a file that detpost did not write.
    """
    found = recorded_metadata(properties)
    if "spec" not in found:
        raise ValueError(
            f"{path} was not written by detpost: put post-processing behind it with `detpost attach {path} -o OUT`"
        )
    return found


def recorded_metadata(properties: Mapping[str, str]) -> dict[str, Any]:
    """Give detpost's own metadata among a file's, empty where detpost did not write it or it cannot be read."""
    found = {key[len(_PREFIX) :]: value for key, value in properties.items() if key.startswith(_PREFIX)}
    try:
        return {key: json.loads(value) for key, value in found.items()}
    except (ValueError, RecursionError):
        return {}
