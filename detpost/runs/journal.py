"""An append-only record of finished images: what a killed run has done, to the line."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Entry", "Journal"]

_VERSION = 1


class Entry(NamedTuple):
    """Where an image's line stands, and which file it was made from.

    Args:
        offset: of the line in the journal, bytes.
        image_id: the id that the image keeps.
        size: of the file, bytes; -1 where it could not be asked.
        mtime_ns: when the file was last changed, nanoseconds; -1 where it could not be asked.
    """

    offset: int
    image_id: int
    size: int
    mtime_ns: int


class Journal:
    """One JSON line per finished image, written batch by batch.

    A batch is the unit of work: each line says how many lines of its batch are still to come (``left``), and only a
    batch that is there to its last line counts. What follows the last whole batch, half a line or half a batch, is cut
    off on opening, so a resumed run groups the remaining images as an uninterrupted one would and computes the same
    bits. Where an image has several lines, the last one holds.

    Args:
        path: the file; made where missing, and locked until :meth:`close`.

    Raises:
        ValueError: another run has it open, or it is not a journal.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "journal.jsonl") as journal:
        ...     journal.start({"threshold": 0.5})
        ...     journal.append([{"file_name": "a.png", "image_id": 1, "size": 9, "mtime_ns": 0, "scores": [0.75]}])
        ...     [row["scores"] for row in journal.rows(["a.png"])]
        [[0.75]]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] | None = None
        self.entries: dict[str, Entry] = {}
        self._file, self._locked = _open_locked(path)
        try:
            self._recover()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, header: Mapping[str, Any]) -> None:
        """Begin anew: drop every line and write the header."""
        self._file.truncate(0)
        self.entries, self.header = {}, {"journal": _VERSION, **header}
        self._write(_line(self.header))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one batch and wait until the disk has it.

        Args:
            rows: one per image, with ``file_name``, ``image_id``, ``size``, ``mtime_ns`` and whatever else JSON holds.
        """
        offset = self._file.seek(0, os.SEEK_END)
        lines: list[bytes] = []
        entries: dict[str, Entry] = {}
        for place, row in enumerate(rows, start=1):
            entries.update({row["file_name"]: _entry(row, offset)})
            lines.append(_line({**row, "left": len(rows) - place}))
            offset = offset + len(lines[-1])
        self._write(b"".join(lines))
        self.entries.update(entries)

    def rows(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Read the rows of these images, in this order, one at a time."""
        with self.path.open("rb") as file:
            for name in names:
                file.seek(self.entries[name].offset)
                yield json.loads(file.readline())

    def close(self) -> None:
        """Give the lock back; a journal that nothing was written to goes."""
        if self._file.closed:
            return
        if self.header is None and self._locked:  # once the lock is given back, it may be another run's
            self.path.unlink(missing_ok=True)
        self._file.close()
        if self.header is None and not self._locked:  # Windows removes no file that is open
            self.path.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())

    def _recover(self) -> None:
        """Read what is there up to the end of the last whole batch, and cut the file off after it."""
        offset = kept = 0
        batch: dict[str, Entry] = {}
        with self.path.open("rb") as file:
            for line in file:
                row = _parse(line)
                if row is None:
                    break
                if offset == 0:
                    if row.get("journal") != _VERSION:
                        break
                    self.header, kept = row, len(line)
                else:
                    batch.update({row["file_name"]: _entry(row, offset)})
                    if row["left"] == 0:
                        self.entries.update(batch)
                        batch, kept = {}, offset + len(line)
                offset = offset + len(line)
            whole = file.seek(0, os.SEEK_END)
            file.seek(0)
            if self.header is None and file.readline().endswith(b"\n"):
                raise ValueError(f"{self.path} is not a journal of this version: remove it or take another folder")
        if kept < whole:
            self._file.truncate(kept)
            os.fsync(self._file.fileno())


def _entry(row: Mapping[str, Any], offset: int) -> Entry:
    return Entry(offset, row["image_id"], row["size"], row["mtime_ns"])


def _line(row: Mapping[str, Any]) -> bytes:
    # ASCII, so that a file name in no valid encoding comes back as it was.
    return (json.dumps(row, separators=(",", ":")) + "\n").encode("ascii")


def _parse(line: bytes) -> dict[str, Any] | None:
    """Read a line; ``None`` for one that is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    needed = {"file_name", "image_id", "size", "mtime_ns", "left"}
    return row if isinstance(row, dict) and ("journal" in row or needed <= row.keys()) else None


def _open_locked(path: Path) -> tuple[io.FileIO, bool]:
    """Open the file and lock it, and tell whether there is a lock."""
    while True:
        # Unbuffered: a line is in the file, or at its end in part, and nowhere else.
        file = path.open("a+b", buffering=0)
        try:
            locked = _lock(file, path)
            if not locked or _is_at(file, path):
                return file, locked
        except BaseException:
            file.close()
            raise
        file.close()  # a run that ended at this moment removed the file between our opening and our locking it


def _lock(file: io.FileIO, path: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: two runs in one folder are then the user's to avoid
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing to {path.parent}: wait for it, or take another folder") from None
    except OSError:  # a file system without locks
        return False
    return True


def _is_at(file: io.FileIO, path: Path) -> bool:
    """Tell whether the open file is still the one at its place."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
