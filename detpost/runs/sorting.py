"""Sorted Parquet files merged into one sorted stream, in memory that their number and size do not change."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detpost.runs.parquet import TableWriter, import_pyarrow, tables_of

if TYPE_CHECKING:
    import pyarrow

__all__ = ["KEY", "Opened", "merged"]

KEY = "file_name"
# Files that are read at once; of more, so many at a time become one first.
FAN_IN = 32

# Opens a file to read: a path or what pyarrow reads.
Opened = Callable[[], Any]
# Takes a sorted table in which all rows of a name stand together, and gives one row of each name.
Settle = Callable[["pyarrow.Table"], "pyarrow.Table"]


def merged(
    files: Sequence[Opened], columns: pyarrow.Schema, settle: Settle, scratch: Path
) -> Generator[pyarrow.Table, None, None]:
    """Merge files.

    Args:
        files: opened one after another, at most 32 at once; the rows of each must be sorted by name.
        columns: which to read.
        settle: chooses among the rows of one name.
        scratch: folder for what is merged of more than 32 files.

    Yields:
        Tables, sorted within and among themselves, none of them empty.

    Raises:
        ValueError: a file that is not sorted by name, or no Parquet.
    """
    folder = scratch / ".merging"
    shutil.rmtree(folder, ignore_errors=True)  # of a merge that was killed
    folder.mkdir()
    try:
        numbers = itertools.count()
        waiting = list(files)
        while len(waiting) > FAN_IN:
            # The oldest first: each row is written again once for each factor of 32 of the number of files.
            group, waiting = waiting[:FAN_IN], waiting[FAN_IN:]
            path = folder / f"{next(numbers)}.parquet"
            writer = TableWriter(path, columns)
            with closing(_once(group, columns, settle)) as tables:
                for table in tables:
                    writer.add(table)
            writer.close()
            waiting = [*waiting, partial(Path, path)]
        yield from _once(waiting, columns, settle)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _once(files: Sequence[Opened], columns: pyarrow.Schema, settle: Settle) -> Generator[pyarrow.Table, None, None]:
    with ExitStack() as stack:
        streams = [_Stream(opened(), columns, stack) for opened in files]
        for table in _in_order([stream for stream in streams if stream.more()]):
            settled = settle(table)
            if settled.num_rows:
                yield settled


def _in_order(streams: list[_Stream]) -> Iterator[pyarrow.Table]:
    """Give what is settled: rows up to the least of the names that the streams have read to."""
    pa = import_pyarrow()
    while streams:
        bound = min(stream.last for stream in streams)
        ready = [table for stream in streams for table in stream.take(bound)]
        streams = [stream for stream in streams if stream.more()]
        # A stable sort: of one name, the row of the file that was named first comes first.
        yield pa.concat_tables(ready).combine_chunks().sort_by(KEY) if len(ready) > 1 else ready[0]


class _Stream:
    """The rows of one file that are not taken yet."""

    def __init__(self, source: Any, columns: pyarrow.Schema, stack: ExitStack) -> None:
        self._arrow = import_pyarrow()
        self._name = str(source) if isinstance(source, (str, Path)) else "a part"
        try:
            file = self._arrow.parquet.ParquetFile(source)
        except self._arrow.ArrowInvalid as error:
            raise ValueError(f"{self._name} is not a whole Parquet file: {str(error).splitlines()[0]}") from None
        stack.enter_context(file)
        lacking = [name for name in columns.names if name not in file.schema_arrow.names]
        if lacking:
            raise ValueError(f"{self._name} has no column {lacking[0]}: detections are merged, as detpost writes them")
        self._columns = columns
        self._tables = tables_of(file, columns.names)
        self._head: pyarrow.Table | None = None
        self.last = ""

    def more(self) -> bool:
        """Read on where all is taken, and tell whether there is anything."""
        if self._head is None:
            self._head = next(self._tables, None)
            if self._head is not None:
                self._head = self._head.select(self._columns.names).cast(self._columns)
                self._check(self._head[KEY])
        return self._head is not None

    def take(self, bound: str) -> list[pyarrow.Table]:
        """Take the rows up to a name, that one included."""
        assert self._head is not None
        if self.last <= bound:
            taken, self._head = self._head, None
            return [taken]
        compute = self._arrow.compute
        count = compute.sum(compute.less_equal(self._head[KEY], bound)).as_py()
        taken, self._head = self._head.slice(0, count), self._head.slice(count)
        return [taken] if count else []

    def _check(self, names: pyarrow.ChunkedArray) -> None:
        compute = self._arrow.compute
        values = names.combine_chunks()
        first, last = values[0].as_py(), values[-1].as_py()
        risen = len(values) < 2 or compute.all(compute.less(values[:-1], values[1:])).as_py()
        if not risen or (self.last and first <= self.last):
            raise ValueError(f"{self._name} is not sorted by {KEY} with each name once: sort it first")
        self.last = last
