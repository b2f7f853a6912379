"""What lies inside or beside someone else's ONNX file and says how it was made: preprocessing and class names."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detpost.images import Preprocessing

__all__ = ["class_names_of", "preprocessing_beside"]

_PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def preprocessing_beside(source: Path) -> tuple[Preprocessing, str] | None:
    """Read the ``preprocessor_config.json`` that transformers and optimum write beside a model.

    Args:
        source: the ONNX file.

    Returns:
        The preprocessing and the file it stands in, or ``None`` where there is none that says all of it.
    """
    path, said = _json_beside(source, "preprocessor_config.json")
    try:
        size = said["size"]
        side = size.get("shortest_edge")
        height, width = size.get("height", side), size.get("width", side)
        mean, std = (said["image_mean"], said["image_std"]) if said["do_normalize"] else _PLAIN
        scale = float(said["rescale_factor"]) if said["do_rescale"] else 1.0
        return Preprocessing(int(height), int(width), scale, _three(mean), _three(std)), str(path)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def class_names_of(source: Path, properties: Mapping[str, str]) -> dict[int, str]:
    """Read class names from the ``config.json`` beside a file, or from the file's own metadata.

    Args:
        source: the ONNX file.
        properties: its metadata; Ultralytics writes ``names`` there, as a Python dict.

    Returns:
        The name of each label; empty where nothing says them.
    """
    _, said = _json_beside(source, "config.json")
    try:
        names = said["id2label"] if "id2label" in said else ast.literal_eval(properties.get("names", "{}"))
        return {int(label): str(name) for label, name in names.items()}
    except (TypeError, ValueError, AttributeError, SyntaxError, RecursionError, MemoryError):
        return {}


def _json_beside(source: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Read a JSON object from a model's folder, or from the one above where ONNX files have a folder of their own."""
    folder = source.absolute().parent
    path = (folder.parent if folder.name == "onnx" else folder) / name
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return path, {}
    return path, said if isinstance(said, dict) else {}


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue
