"""Which images a run is over: folders, files and glob patterns to relative paths."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["MARKER", "Listing", "find_images"]

# Stands in a folder of annotated pictures, so that no later run takes them for input.
MARKER = ".detpost-pictures"

SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        *("avif", "bmp", "dib", "gif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp"),
    )
)


class Listing(NamedTuple):
    """Images to run on.

    Args:
        root: the folder that the names are relative to.
        names: relative paths with ``/``, sorted, each once.
    """

    root: Path
    names: list[str]


def find_images(sources: Iterable[str | Path]) -> Listing:
    """List images.

    A folder is searched through for the endings of common image formats; links are followed, hidden entries and
    pictures that :func:`detpost.detect.detect` drew are left out. A file is taken whatever its ending. A glob pattern
    (``**`` goes through folders) is held to the same endings as a folder, unless it names an ending itself.

    Args:
        sources: folders, files and glob patterns.

    Returns:
        The images, relative to the folder that all sources share.

    Raises:
        OSError: a source that does not exist.
        ValueError: a pattern that matches nothing, or no images at all.

    Example:
        >>> from detpost.zoo import SAMPLES
        >>> find_images([SAMPLES]).names
        ['garden.png', 'lake.png', 'pagoda.png', 'petals.png']
    """
    given = [str(source) for source in sources]
    if not given:
        raise ValueError("no images given: name a folder, files or a glob pattern")
    bases, paths = zip(*(_expand(source) for source in given), strict=True)
    root = Path(os.path.commonpath(bases))
    names = sorted({path.relative_to(root).as_posix() for found in paths for path in found})
    if not names:
        raise ValueError(f"no images in {', '.join(given)}: looked for files ending in {' '.join(sorted(SUFFIXES))}")
    return Listing(root, names)


def _expand(source: str) -> tuple[Path, list[Path]]:
    """Find the files of one source, and the folder that it looks in."""
    path = Path(os.path.abspath(source))
    if path.is_dir():
        return path, list(_walk(path, frozenset()))
    if os.path.lexists(path):
        return path.parent, [path]
    if not glob.has_magic(source):
        raise FileNotFoundError(f"no image or folder at {source!r}")
    fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    pattern = path.relative_to(fixed)
    # pathlib's ** goes into no linked folders, where circles would have no end; as the last part it finds folders only.
    found = fixed.glob(str(pattern / "*" if pattern.name == "**" else pattern))
    hidden_too = any(part.startswith(".") for part in pattern.parts)
    matches = [
        match
        for match in found
        if not match.is_dir()
        and (hidden_too or not any(part.startswith(".") for part in match.relative_to(fixed).parts))
    ]
    if not matches:
        raise ValueError(f"no file matches {source!r}")
    any_ending = bool(path.suffix) and not glob.has_magic(path.suffix)
    return fixed, [match for match in matches if (any_ending or _has_image_ending(match)) and not _is_drawn(match)]


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above or (folder / MARKER).exists():  # a link back up would never end
        return
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in visible:
        path = folder / entry.name
        if entry.is_dir():
            yield from _walk(path, above | {real})
        elif _has_image_ending(path):
            yield path


def _has_image_ending(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _is_drawn(path: Path) -> bool:
    return any((parent / MARKER).exists() for parent in path.parents)
