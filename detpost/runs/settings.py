"""What decides the results of a run, and whether an earlier run into the same folder had the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detpost.export.formats import format_of
from detpost.integrations.model_names import ModelName, look_up, spelled_alike
from detpost.integrations.packages import package_model

if TYPE_CHECKING:
    from detpost.runs.tiles import Tiling
    from detpost.spec import DecodeSpec

__all__ = ["check_settings", "settings_of", "with_spec"]


def settings_of(
    model: str | Path,
    backend: str,
    threshold: float,
    trust_remote_code: bool = False,
    tiling: Tiling | None = None,
    draft: bool = False,
    nms: float | None = None,
) -> dict[str, Any]:
    """Give what decides the results, without loading the model.

    Args:
        model: as :meth:`detpost.Detector.load` takes it.
        backend: likewise.
        threshold: likewise.
        trust_remote_code: likewise.
        tiling: how images are cut; ``None`` where they are not.
        draft: whether JPEG files are decoded at a reduced scale.
        nms: as :meth:`detpost.Detector.load` takes it.

    Returns:
        ``model``, ``model_identity`` (of its files, or the hub's commit), ``backend``, ``threshold``, ``tiles`` where
        images are cut, ``decoding`` where it is at a reduced scale, and ``nms`` where there is one.

    Raises:
        OSError: no such model.
        ImportError: a hub id without transformers; the message names the extra.
    """
    found = look_up(model)
    if found.kind == "package":
        identity = _of_library(found)
    elif found.path is None:
        identity = f"commit {_hub_commit(found.name)}"
    else:
        identity = _digest(_model_files(found.path, trust_remote_code))
    return {
        "model": found.name,
        "model_identity": identity,
        # A file's format decides for itself.
        "backend": format_of(model).ending[1:] if found.kind == "file" else backend,
        "threshold": threshold,
        **({} if tiling is None else {"tiles": str(tiling)}),
        **({"decoding": "draft"} if draft else {}),
        **({} if nms is None else {"nms": nms}),
    }


def with_spec(settings: Mapping[str, Any], spec: DecodeSpec | None) -> dict[str, Any]:
    """Add how raw outputs are decoded, which shows once the model is loaded."""
    # Through JSON, so that a tuple in a spec equals the list that was written.
    return {**settings, "spec": json.loads(json.dumps(asdict(spec) if spec is not None else None))}


def check_settings(header: Mapping[str, Any] | None, settings: Mapping[str, Any], folder: str | Path) -> None:
    """Refuse to go on with other settings than those that the folder was begun with.

    Args:
        header: what the folder says of the run in it; ``None`` where there is none.
        settings: of :func:`settings_of`, or of :func:`with_spec`.
        folder: for the message.

    Raises:
        ValueError: they differ; the message says in what.
    """
    before = None if header is None else header["settings"]
    if before is None:
        return
    # The spec shows once the model is loaded; tiles, decoding and nms are there where they were asked for.
    for name in (
        "model_identity",
        "backend",
        "threshold",
        "tiles",
        "decoding",
        "nms",
        *(["spec"] if "spec" in settings else []),
    ):
        if before.get(name) != settings.get(name):
            shown = "model" if name == "model_identity" else name
            theirs, ours = before.get(shown, "none"), settings.get(shown, "none")
            other = "the model's file has changed" if theirs == ours else f"{shown} {theirs}, not {ours}"
            raise ValueError(f"{folder} holds a run with other settings ({other}): take another folder, or --fresh")


def _model_files(path: Path, trust_remote_code: bool) -> list[Path]:
    """List the files that make a model what it is."""
    if path.is_file():
        return [path, *format_of(path).files_beside(path)]
    endings = ["*.json", "*.safetensors", *(["*.py"] if trust_remote_code else [])]
    return sorted(file for ending in endings for file in path.glob(ending))


def _of_library(found: ModelName) -> str:
    """Give the library's version and its model's name, and what its weights are where they are a file."""
    named = package_model(found.name)
    assert named is not None
    try:
        release = version(named.package)
    except PackageNotFoundError:
        release = "not installed"
    return f"{named.package} {release} {named.name} {'' if found.path is None else _digest([found.path])}".rstrip()


def _hub_commit(name: str) -> str:
    """Find which commit of a hub id this machine has or is given."""
    try:
        from transformers.utils import cached_file
    except ImportError:
        raise ImportError("transformers detectors need transformers: pip install 'detpost[hf]'") from None
    try:
        found = Path(cached_file(name, "config.json") or "")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"no detector at {name!r}, neither a file, a transformers directory nor a hub id: {reason}"
            f"{spelled_alike(name)}"
        ) from error
    return found.parent.name if found.parent.parent.name == "snapshots" else "unknown"


def _digest(files: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            whole.update(f"{file.suffix} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
