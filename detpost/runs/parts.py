"""Parts of a result: Parquet files in any file system, each there whole or not at all, which are their own checkpoint.

A row is done once it is in a whole part, and by nothing else: there is no second record that could disagree. A task
that is run twice, because its worker or node was lost, leaves its rows twice; the merge keeps one of each name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detpost.runs.parquet import TableWriter, import_pyarrow, schema, sort_key, tables_of
from detpost.runs.results import PARQUET

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "KEY_BYTES",
    "Parts",
    "Place",
    "columns",
    "is_among",
    "key_array",
    "key_of",
    "numbered",
    "place_of",
    "settle",
    "sorted_keys",
]

KEY_BYTES = 16
PARTS, RUN_HEADER = "parts", "detpost-run.json"

Keys = np.ndarray[Any, np.dtype[np.bytes_]]


def key_of(name: str, size: int = -1, changed: int = -1) -> bytes:
    """Give what a row is known by: 16 bytes of its name and, for a file, its size and the time of its last change."""
    return hashlib.blake2b(b"%s\0%d\0%d" % (sort_key(name), size, changed), digest_size=KEY_BYTES).digest()


def key_array(keys: Sequence[bytes]) -> Keys:
    """Bring keys into an array (N,), in their order."""
    return np.frombuffer(b"".join(keys), f"S{KEY_BYTES}")


def sorted_keys(keys: Sequence[bytes]) -> Keys:
    """Bring keys into the form that is searched: (N,), sorted, 16 bytes each."""
    return np.unique(key_array(keys))


def _keys_of(table: pyarrow.Table) -> Keys:
    """Give a table's keys, (N,), in its order."""
    column = table["key"].combine_chunks()
    chunks = column.chunks if hasattr(column, "chunks") else [column]
    return np.concatenate(
        [
            np.frombuffer(chunk.buffers()[1], f"S{KEY_BYTES}", len(chunk), KEY_BYTES * chunk.offset)
            for chunk in chunks
            if len(chunk)
        ]
        or [np.zeros(0, f"S{KEY_BYTES}")]
    )


def is_among(keys: Keys, known: Keys) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Tell which keys (N,) are among sorted ones (M,)."""
    if not len(known):
        return np.zeros(len(keys), np.bool_)
    places = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return np.asarray(known[places] == keys)


class Place:
    """A folder in a file system.

    Args:
        filesystem: pyarrow's.
        path: of the folder, within it.
    """

    def __init__(self, filesystem: Any, path: str) -> None:
        self.filesystem, self.path = filesystem, path.rstrip("/") or "/"

    @property
    def is_local(self) -> bool:
        """Whether this machine's own paths lead there."""
        return bool(self.filesystem.type_name == "local")

    def below(self, name: str) -> Place:
        """Give a folder or file in it."""
        return Place(self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def files(self, recursive: bool = False) -> list[Any]:
        """List its files as pyarrow's ``FileInfo``; of a folder that is not there, none."""
        fs = import_pyarrow().fs
        found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True, recursive=recursive))
        return [info for info in found if info.type == fs.FileType.File]

    def is_there(self) -> bool:
        """Tell whether there is a file here."""
        fs = import_pyarrow().fs
        return bool(self.filesystem.get_file_info(self.path).type == fs.FileType.File)

    def read(self) -> bytes:
        """Read the file here."""
        with self.filesystem.open_input_stream(self.path) as file:
            return bytes(file.read())

    def write(self, content: bytes) -> None:
        """Write the file here, whole or not at all, and wait until the disk has it."""
        if not self.is_local:
            # What an object store has not been given to the end is not there; the folder is no more than a name.
            with self.filesystem.open_output_stream(self.path) as file:
                file.write(content)
            return
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def place_of(folder: str | Path) -> Place:
    """Find a folder: a path of this machine, or an address that pyarrow or fsspec knows.

    Args:
        folder: ``results``, ``s3://bucket/results``, ``gs://...``, ``hdfs://...``, or any other that fsspec knows.

    Returns:
        The place, there or not.

    Raises:
        ImportError: fsspec or the package of its file system is missing.
        ValueError: nobody knows the address.
    """
    fs = import_pyarrow().fs
    text = str(folder)
    if "://" not in text:
        return Place(fs.LocalFileSystem(), os.path.abspath(text))
    try:
        return Place(*fs.FileSystem.from_uri(text))
    except (ValueError, NotImplementedError):  # another scheme than pyarrow's own
        pass
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ImportError(f"{text} needs fsspec and its package for such addresses: pip install fsspec") from None
    found, path = url_to_fs(text)
    return Place(fs.PyFileSystem(fs.FSSpecHandler(found)), path)


class Parts:
    """The parts of one run.

    Args:
        out: the folder of the results; the parts get one of their own in it.
    """

    def __init__(self, out: Place) -> None:
        self.out = out
        self._header, self._parts = out.below(RUN_HEADER), out.below(PARTS)

    def header(self) -> dict[str, Any] | None:
        """Give what the run says of itself, or ``None`` where there is no run."""
        try:
            header: dict[str, Any] = json.loads(self._header.read())
        except FileNotFoundError:
            return None
        return header

    def start(self, header: Mapping[str, Any]) -> None:
        """Begin anew: drop every part and the result, and write the header."""
        for info in (*self._parts.files(), *(info for info in self.out.files() if info.base_name == PARQUET)):
            self.out.filesystem.delete_file(info.path)
        self._header.write(json.dumps(header).encode())

    def write(self, table: pyarrow.Table) -> str:
        """Write one part.

        Args:
            table: rows with a ``key``, in any order.

        Returns:
            Its name.
        """
        content = io.BytesIO()
        writer = TableWriter(content, columns())
        writer.add(_first_of_each(table.sort_by("file_name")))
        writer.close()
        name = f"{uuid.uuid4().hex}.parquet"
        self._parts.below(name).write(content.getvalue())
        return name

    def check(self, names: Sequence[str]) -> None:
        """Refuse parts that workers wrote and nobody finds here: their disk is another one."""
        there = {info.base_name for info in self._parts.files()}
        lost = len([name for name in names if name not in there])
        if lost:
            raise OSError(
                f"{lost} of {len(names)} parts are not in {self._parts.path}: give an --out that all nodes share"
            )

    @contextlib.contextmanager
    def result_folder(self) -> Iterator[Path]:
        """Give a folder of this machine with the last result; the new one goes from there to where it belongs."""
        if self.out.is_local:
            yield Path(self.out.path)
            return
        place = self.out.below(PARQUET)
        with tempfile.TemporaryDirectory(prefix="detpost-") as folder:
            here = Path(folder) / PARQUET
            if place.is_there():
                with place.filesystem.open_input_stream(place.path) as file, here.open("wb") as copy:
                    shutil.copyfileobj(file, copy)
            yield Path(folder)
            with here.open("rb") as copy, place.filesystem.open_output_stream(place.path) as file:
                shutil.copyfileobj(copy, file)

    def opened(self) -> list[Any]:
        """Give, for each whole part, what opens it."""
        found = sorted(info.path for info in self._parts.files() if info.path.endswith(".parquet"))
        return [partial(self._parts.filesystem.open_input_file, path) for path in found if self._is_whole(path)]

    def keys(self) -> Keys:
        """Give the keys of all rows in whole parts: (N,), sorted."""
        parquet = import_pyarrow().parquet
        found = [_keys_of(parquet.read_table(opened(), columns=["key"])) for opened in self.opened()]
        return np.unique(np.concatenate([sorted_keys([]), *found]))

    def _is_whole(self, path: str) -> bool:
        pa = import_pyarrow()
        try:
            with self._parts.filesystem.open_input_file(path) as file:
                pa.parquet.read_metadata(file)
        except pa.ArrowInvalid:  # a file system that shows what is written half
            return False
        return True


def columns() -> pyarrow.Schema:
    """Give the columns of a part."""
    pa = import_pyarrow()
    return schema().append(pa.field("key", pa.binary(KEY_BYTES)))


def settle(wanted: Keys | None) -> Any:
    """Give what chooses among the rows of one name.

    Args:
        wanted: the sorted keys of the images that are there now; ``None`` takes every row.

    Returns:
        A function of a table that gives another: of rows that are wanted, one of each name.
    """

    def settled(table: pyarrow.Table) -> pyarrow.Table:
        if wanted is not None:
            table = table.filter(import_pyarrow().array(is_among(_keys_of(table), wanted)))
        return _first_of_each(table)

    return settled


def numbered(
    tables: Iterator[pyarrow.Table], before: Path | None, given: Mapping[str, int] | None = None
) -> Iterator[pyarrow.Table]:
    """Number images from 1 in sorted order; those numbered before keep their number, new ones follow.

    Args:
        tables: of parts, merged.
        before: the result of an earlier merge, sorted; ``None`` where there is none.
        given: the id of each image by its name, where an annotation file says it.

    Yields:
        The same rows, numbered.
    """
    pa = import_pyarrow()
    known = _Known(before)
    following = known.greatest + 1
    for table in tables:
        names = table["file_name"].to_pylist()
        ids = known.of(names) if given is None else given
        new = [name for name in names if name not in ids]
        ids = {**ids, **dict(zip(new, range(following, following + len(new)), strict=True))}
        following = following + len(new)
        column = pa.array([ids[name] for name in names], pa.int64())
        yield table.drop_columns(["key"]).set_column(1, "image_id", column)


class _Known:
    """The ids of an earlier result, read along with names that come sorted."""

    def __init__(self, path: Path | None) -> None:
        self.greatest = 0
        self._tables: Iterator[pyarrow.Table] = iter(())
        self._head: dict[str, int] = {}
        if path is not None:
            compute = import_pyarrow().compute
            for table in _named(path):
                self.greatest = max(self.greatest, compute.max(table["image_id"]).as_py())
            self._tables = _named(path)

    def of(self, names: Sequence[str]) -> dict[str, int]:
        """Give the ids of those names that have one; the next names must be greater."""
        last = names[-1].encode()  # as Parquet orders them
        while not self._head or next(reversed(self._head)).encode() <= last:
            table = next(self._tables, None)
            if table is None:
                break
            found = dict(zip(table["file_name"].to_pylist(), table["image_id"].to_pylist(), strict=True))
            self._head = {**self._head, **found}
        ids = {name: self._head[name] for name in names if name in self._head}
        self._head = {name: number for name, number in self._head.items() if name.encode() > last}
        return ids


def _named(path: Path) -> Iterator[pyarrow.Table]:
    with import_pyarrow().parquet.ParquetFile(path) as file:
        yield from tables_of(file, ["file_name", "image_id"])


def _first_of_each(table: pyarrow.Table) -> pyarrow.Table:
    """Keep the first row of each name of a sorted table."""
    if table.num_rows < 2:
        return table
    pa = import_pyarrow()
    names = table["file_name"].combine_chunks()
    return table.filter(pa.chunked_array([pa.array([True]), pa.compute.not_equal(names[1:], names[:-1])]))
