"""Detections as Parquet: one row an image, in row groups that depend on the rows alone."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from detpost.runs.batches import names_beside

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "TableWriter",
    "about",
    "import_pyarrow",
    "name_of",
    "rows_of",
    "schema",
    "sort_key",
    "table_of",
    "tables_of",
]

# A row group ends once its rows have about so many bytes: what a reader of one group holds.
_GROUP_BYTES = 4 * 1024**2
_ROW_BYTES, _DETECTION_BYTES = 128, 48
# A reader takes about so many bytes of rows at once.
_READ_BYTES = 1024**2
_METADATA = b"detpost"
_LIKE_A_BYTE = re.compile(r"\\(?=x[0-9a-f]{2})")
_BYTE = re.compile(rb"\\x([0-9a-f]{2})")
# What some columns are called in the journal.
_IN_ROWS = {"label_names": "names"}


def import_pyarrow() -> Any:
    """Import pyarrow; where it is missing, say which extra brings it."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.fs
        import pyarrow.parquet
    except ImportError:
        raise ImportError("Parquet needs pyarrow: pip install 'detpost[parquet]'") from None
    return pyarrow


def schema(known: Mapping[str, Any] | None = None) -> pyarrow.Schema:
    """Give the columns: plain types and lists of them, which every reader of Parquet takes.

    Args:
        known: what the file says of itself (``version``, ``class_names``, ``settings``), as its metadata has it.

    Returns:
        ``file_name``; ``image_id``; ``width`` and ``height``, pixels; ``boxes`` (D of 4, xyxy in pixels), ``scores``,
        ``labels``, ``label_names``, of D each; ``masks``, null or D of COCO's ``size`` and ``counts``; ``error``, null
        or why there is nothing: the columns before it are null then.
    """
    pa = import_pyarrow()
    mask = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
    fields = [
        pa.field("file_name", pa.string(), nullable=False),
        pa.field("image_id", pa.int64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("boxes", pa.list_(pa.list_(pa.float32()))),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("labels", pa.list_(pa.int64())),
        pa.field("label_names", pa.list_(pa.string())),
        pa.field("masks", pa.list_(mask)),
        pa.field("error", pa.string()),
    ]
    return pa.schema(fields, None if known is None else {_METADATA: json.dumps(known, sort_keys=True)})


def about(found: pyarrow.Schema) -> dict[str, Any] | None:
    """Give what a file says of itself; ``None`` for one that is not detpost's."""
    written = (found.metadata or {}).get(_METADATA)
    return None if written is None else json.loads(written)


def sort_key(name: str) -> bytes:
    r"""Give a file name's bytes as Parquet has and orders them.

    A byte that is not UTF-8 is written as ``\xff``, and the backslash of a name that reads so as ``\x5c``: no two names
    are written alike, and :func:`rows_of` gives back what each was.
    """
    return _utf8(_LIKE_A_BYTE.sub(r"\\x5c", name)).encode()


def name_of(written: str) -> str:
    """Give the file name of which :func:`sort_key` gives these bytes."""
    if "\\x" not in written:
        return written
    return _BYTE.sub(lambda found: bytes([int(found[1], 16)]), written.encode()).decode("utf-8", "surrogateescape")


def table_of(rows: Iterable[Mapping[str, Any]], columns: pyarrow.Schema | None = None) -> pyarrow.Table:
    """Make a table.

    Args:
        rows: as the journal has them, with ``names`` for the names of the labels.
        columns: of :func:`schema`, and more if the rows have more.

    Returns:
        The table, in the rows' order.

    Warns:
        UserWarning: rows have something beside the boxes that there is no column for.
    """
    pa = import_pyarrow()
    wanted = columns or schema()
    rows = list(rows)
    left_out = sorted({name for row in rows for name in names_beside(row)} - {*wanted.names})
    if left_out:
        warnings.warn(f"Parquet has no column for {', '.join(left_out)}: coco and jsonl hold them", stacklevel=2)
    plain = [
        {**row, **_renamed(row), "file_name": sort_key(row["file_name"]).decode(), "error": _error(row)} for row in rows
    ]
    return pa.table([pa.array([row.get(field.name) for row in plain], field.type) for field in wanted], wanted)


def rows_of(table: pyarrow.Table) -> Iterator[dict[str, Any]]:
    """Give a table's rows as the journal has them."""
    for row in table.to_pylist():
        kept = {name: value for name, value in row.items() if value is not None}
        kept["file_name"] = name_of(kept["file_name"])
        yield {_IN_ROWS.get(name, name): value for name, value in kept.items()}


def tables_of(file: Any, columns: list[str] | None = None) -> Iterator[pyarrow.Table]:
    """Read a file in tables of about a mebibyte, whatever its row groups.

    Args:
        file: an open ``pyarrow.parquet.ParquetFile``.
        columns: which; ``None`` for all.

    Yields:
        Tables in the file's order, none of them empty.
    """
    pa = import_pyarrow()
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    widest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1.0)
    for batch in file.iter_batches(max(1, min(65536, int(_READ_BYTES / max(1.0, widest)))), columns=columns):
        if batch.num_rows:
            yield pa.Table.from_batches([batch])


class TableWriter:
    """Writes tables into a Parquet file whose bytes depend on the rows and their order, not on how they are cut.

    Args:
        file: a binary file to write to, or a path.
        columns: of :func:`schema`.

    Raises:
        ImportError: pyarrow is missing; the message names the extra.
    """

    def __init__(self, file: Any, columns: pyarrow.Schema) -> None:
        self._arrow = import_pyarrow()
        self._columns = columns
        self._file = self._arrow.parquet.ParquetWriter(file, columns, compression="zstd")
        self._waiting: list[pyarrow.Table] = []
        self._bytes = 0

    def add(self, table: pyarrow.Table) -> None:
        """Write rows; the last of them may wait for the next ones."""
        rest = table.select(self._columns.names).cast(self._columns)
        while rest.num_rows:
            ends = self._bytes + np.cumsum(_row_bytes(rest))
            count = int(np.searchsorted(ends, _GROUP_BYTES)) + 1
            self._waiting.append(rest.slice(0, count))
            if count > rest.num_rows:
                self._bytes = int(ends[-1])
                return
            self._write_group()
            rest = rest.slice(count)

    def close(self) -> None:
        """Write what waits, and the file's end."""
        if self._waiting:
            self._write_group()
        self._file.close()

    def abandon(self) -> None:
        """Let go of a file that stays incomplete."""
        with contextlib.suppress(OSError):  # a full disk takes no end of file either
            self._file.close()

    def _write_group(self) -> None:
        group = self._arrow.concat_tables(self._waiting).combine_chunks()
        self._file.write_table(group, row_group_size=group.num_rows)
        self._waiting, self._bytes = [], 0


def _row_bytes(table: pyarrow.Table) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Estimate the bytes of each row."""
    compute = import_pyarrow().compute
    counts = compute.fill_null(compute.list_value_length(table["scores"]), 0).to_numpy()
    sizes: np.ndarray[Any, np.dtype[np.int64]] = _ROW_BYTES + _DETECTION_BYTES * counts.astype(np.int64)
    masks = table["masks"]
    if masks.null_count == len(masks):
        return sizes
    lengths = compute.binary_length(compute.struct_field(compute.list_flatten(masks), "counts")).to_numpy()
    rows = compute.list_parent_indices(masks).to_numpy()
    return sizes + np.bincount(rows, lengths, len(sizes)).astype(np.int64)


def _utf8(text: str) -> str:
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a pair, which no file system gave
        return text.encode("utf-8", "backslashreplace").decode()


def _renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {column: row[name] for column, name in _IN_ROWS.items() if name in row}


def _error(row: Mapping[str, Any]) -> str | None:
    return _utf8(row["error"]) if "error" in row else None
