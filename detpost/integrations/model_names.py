"""What a detector is named by, looked up before anything slow is imported."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from detpost.export.formats import ENDINGS, has_ending
from detpost.integrations.packages import PACKAGES, package_model

__all__ = ["ModelName", "check_file", "look_up", "spelled_alike"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class ModelName(NamedTuple):
    """A detector that is there, or may be on the hub.

    Args:
        kind: ``"file"`` (of detpost's), ``"folder"`` (of transformers), ``"hub"``, or ``"package"`` for
            ``LIBRARY:MODEL``.
        name: as it was given.
        path: of the file or folder, or of a package's weights; ``None`` where there is none yet.
    """

    kind: Literal["file", "folder", "hub", "package"]
    name: str
    path: Path | None


def look_up(source: str | Path) -> ModelName:
    """Tell what a detector's name stands for, from the disk alone.

    Args:
        source: ``"tiny"``, a path, a hub id, or ``LIBRARY:MODEL``.

    Returns:
        What it is.

    Raises:
        FileNotFoundError: nothing is there and it cannot be a hub id; the message names what is spelled alike.
        OSError: something is there that is no detector.

    Example:
        >>> look_up("tiny").kind, look_up("owner/name").kind
        ('folder', 'hub')
    """
    name, path = str(source), Path(source)
    if name == "tiny":
        from detpost.zoo import TINY

        return ModelName("folder", name, TINY)
    package = package_model(source)
    if package is not None:
        if package.weights is not None:
            check_file(package.weights)
        return ModelName("package", name, package.weights)
    if has_ending(path) and not path.is_dir():
        check_file(path)
        return ModelName("file", name, path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise OSError(f"no detector at {name!r}: a transformers directory has a config.json, this folder has none")
        return ModelName("folder", name, path)
    if path.exists():
        beside = (path.parent / "config.json").is_file()
        advice = f"take its folder, {path.parent}" if beside else f"a file ends in {', '.join(ENDINGS)}"
        raise OSError(f"no detector at {name!r}: {advice}, or name tiny, a transformers directory or a hub id")
    if not _HUB_ID.fullmatch(name) or path.suffix == ".safetensors":
        raise FileNotFoundError(
            f"no detector at {name!r}: it is no file and no folder, a hub id is owner/name and a detector of a library "
            f"{', '.join(f'{known}:MODEL' for known in PACKAGES)}{spelled_alike(name)}"
        )
    return ModelName("hub", name, None)


def check_file(path: str | Path) -> None:
    """Refuse a file that is not there.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: it is not there; the message names what is spelled alike beside it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}{spelled_alike(str(path))}")


def spelled_alike(name: str) -> str:
    """Name the detectors nearby that differ in a letter or two.

    Args:
        name: what was not found.

    Returns:
        The end of a message; empty where there are none.
    """
    found = difflib.get_close_matches(name, ["tiny", *_detectors_in(Path(name).parent)], n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _detectors_in(folder: Path) -> Iterator[str]:
    try:
        entries = sorted(folder.iterdir())
    except (OSError, ValueError):
        return
    yield from (str(entry) for entry in entries if has_ending(entry) or (entry / "config.json").is_file())
