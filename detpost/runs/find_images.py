"""Which images a run is over: folders, files and glob patterns to relative paths."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["MARKER", "FoundImages", "find_images"]

# Stands in a folder of annotated pictures, so that no later run takes them for input.
MARKER = ".detpost-pictures"

SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        *("avif", "bmp", "dib", "gif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp"),
    )
)


class FoundImages(NamedTuple):
    """Images to run on.

    Args:
        root: the folder that the names are relative to.
        names: relative paths with ``/``, sorted, each once.
        unread: folders that could not be looked into, relative to the root with a ``/`` at the end, and why.
    """

    root: Path
    names: list[str]
    unread: tuple[tuple[str, str], ...] = ()


def find_images(sources: Iterable[str | Path]) -> FoundImages:
    """List images.

    A folder is searched through for the endings of common image formats; links are followed, hidden entries and
    pictures that :func:`detpost.runs.detect.detect` drew are left out. A link to a folder that it lies in leads
    nowhere, and within a linked folder every folder is taken once, so that links among folders cannot multiply. A file
    is taken whatever its ending. A glob pattern (``**`` goes through folders, but into no linked ones) is held to the
    same endings as a folder, unless it names an ending itself.

    Args:
        sources: folders, files and glob patterns.

    Returns:
        The images, relative to the folder that all sources share.

    Raises:
        OSError: a source that does not exist, or a folder among them that cannot be looked into.
        ValueError: a pattern that matches nothing, or no images at all.

    Example:
        >>> from detpost.zoo import SAMPLES
        >>> find_images([SAMPLES]).names
        ['garden.png', 'lake.png', 'pagoda.png', 'petals.png']
    """
    given = [str(source) for source in sources]
    if not given:
        raise ValueError("no images given: name a folder, files or a glob pattern")
    bases, paths, unread = zip(*(_expand(source) for source in given), strict=True)
    root = Path(os.path.commonpath(bases))
    names = sorted({path.relative_to(root).as_posix() for found in paths for path in found})
    if not names:
        raise ValueError(f"no images in {', '.join(given)}: looked for files ending in {' '.join(sorted(SUFFIXES))}")
    reasons = {f"{path.relative_to(root).as_posix()}/": reason for each in unread for path, reason in each.items()}
    return FoundImages(root, names, tuple(sorted(reasons.items())))


def _expand(source: str) -> tuple[Path, list[Path], dict[Path, str]]:
    """Find the files of one source, the folder that it looks in, and those that it cannot look into."""
    path = Path(os.path.abspath(source))
    unread: dict[Path, str] = {}
    if path.is_dir():
        files = list(_walk(path, unread))
        if path in unread:
            raise OSError(f"cannot look into {source!r}: {unread[path]}")
        return path, files, unread
    if os.path.lexists(path):
        return path.parent, [path], unread
    if not glob.has_magic(source):
        raise FileNotFoundError(f"no image or folder at {source!r}")
    fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    matches = list(_match(fixed, path.relative_to(fixed).parts, unread))
    if not matches:
        raise ValueError(f"no file matches {source!r}")
    any_ending = bool(path.suffix) and not glob.has_magic(path.suffix)
    files = [match for match in matches if (any_ending or _has_image_ending(match)) and not _is_drawn(match)]
    return fixed, files, unread


def _walk(folder: Path, unread: dict[Path, str]) -> Iterator[Path]:
    """Go through a folder and all below it."""
    # Each with the folders that it lies in, and, within a link, those that were taken there already.
    pending: list[tuple[Path, frozenset[str], set[str] | None]] = [(folder, frozenset(), None)]
    while pending:
        folder, above, linked = pending.pop()
        real = os.path.realpath(folder)
        if real in above or (linked is not None and real in linked):
            continue
        if linked is not None:
            linked.add(real)
        entries = _entries(folder, unread)
        if any(entry.name == MARKER for entry in entries):
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                first_link = linked is None and entry.is_symlink()
                pending.append((folder / entry.name, above | {real}, set() if first_link else linked))
            elif _has_image_ending(folder / entry.name):
                yield folder / entry.name


def _match(folder: Path, parts: tuple[str, ...], unread: dict[Path, str]) -> Iterator[Path]:
    """Go through what a pattern matches; ``**`` goes into no linked folders, where circles would have no end."""
    hidden_too = any(part.startswith(".") for part in parts)
    pending = [(folder, (*parts, "*") if parts[-1] == "**" else parts)]
    while pending:
        folder, (part, *rest) = pending.pop()
        if part == "**":
            pending.append((folder, tuple(rest)))
        matches = re.compile(fnmatch.translate(os.path.normcase(part))).match
        for entry in _entries(folder, unread):
            if entry.name.startswith(".") and not hidden_too:
                continue
            inside = _is_folder(entry)
            if part == "**":
                if inside and not entry.is_symlink():
                    pending.append((folder / entry.name, ("**", *rest)))
            elif matches(os.path.normcase(entry.name)):
                if rest and inside:
                    pending.append((folder / entry.name, tuple(rest)))
                elif not rest and not inside:
                    yield folder / entry.name


def _entries(folder: Path, unread: dict[Path, str]) -> list[os.DirEntry[str]]:
    """List a folder; one that cannot be looked into is noted, not passed over in silence."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        unread.update({folder: error.strerror or str(error)})
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or what may not be asked: a file then, skipped later with the reason
        return False


def _has_image_ending(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _is_drawn(path: Path) -> bool:
    return any((parent / MARKER).exists() for parent in path.parents)
