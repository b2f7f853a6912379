"""Parquet results of one run or many, brought together and made into other formats, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detpost.runs.coco import match_images, read_annotations
from detpost.runs.parquet import TableWriter, about, import_pyarrow, name_of, rows_of, schema, sort_key, tables_of
from detpost.runs.results import PARQUET, Report, Skipped, check_formats, replaced
from detpost.runs.sorting import KEY, Opened, merged

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Merged", "merge"]


@dataclass(frozen=True)
class Merged:
    """What was brought together.

    Args:
        images: rows.
        detections: in all of them.
        uncategorised: rows left out of the COCO file because the annotations have no category for their class.
        skipped: images without a result.
        files: what was written.
        changed: whether any of them is new or other than before.
    """

    images: int
    detections: int
    uncategorised: int
    skipped: tuple[Skipped, ...]
    files: tuple[Path, ...]
    changed: bool


def merge(
    sources: Iterable[str | Path],
    out: str | Path | None = None,
    *,
    formats: Sequence[str] = ("coco",),
    annotations: str | Path | None = None,
    categories: str = "auto",
) -> Merged:
    """Bring Parquet results together, sorted by file name, and write them in other formats.

    Files are read a mebibyte at a time, so memory does not grow with them. The ids of one source stay; those of
    several, each numbered from 1, give way to new ones in sorted order.

    Args:
        sources: ``detections.parquet`` files, or folders that have one.
        out: folder for the results; ``None`` takes that of the only source.
        formats: as :func:`detpost.runs.detect.detect` takes them. With several sources ``"parquet"`` is always written.
        annotations: a COCO annotation file that gives image and category ids.
        categories: as :func:`detpost.runs.detect.detect` takes it.

    Returns:
        What was written.

    Raises:
        ImportError: pyarrow is missing; the message names the extra.
        OSError: no such file.
        ValueError: a file that is not detpost's or not sorted, sources whose classes differ or that say different
            things of one image, an image that the annotations do not know.

    Example:
        >>> import tempfile
        >>> from detpost.runs.detect import detect
        >>> from detpost.zoo import SAMPLES
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = detect([SAMPLES], folder, formats=["parquet"], device="cpu")
        ...     merge([folder], formats=["csv"]).detections == found.detections
        True
    """
    check_formats(formats)
    import_pyarrow()
    paths = [_file(Path(source)) for source in sources]
    if not paths:
        raise ValueError("nothing to merge: name detections.parquet files or folders that have one")
    if out is None and len(paths) > 1:
        raise ValueError(f"{len(paths)} sources need a folder for the results: name it with --out")
    folder = paths[0].parent if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    whole, changed = paths[0], False
    if len(paths) > 1 or ("parquet" in formats and paths[0] != folder / PARQUET) or annotations is not None:
        whole = folder / PARQUET
        changed = _bring_together(paths, whole, annotations)
    return made_of(whole, folder, formats, annotations, categories, changed)


def made_of(
    whole: Path,
    folder: Path,
    formats: Sequence[str],
    annotations: str | Path | None,
    categories: str,
    changed: bool,
    unread: Sequence[tuple[str, str]] = (),
) -> Merged:
    """Make the other formats of one sorted file.

    Args:
        whole: the file.
        folder: for the results.
        formats: which; ``"parquet"`` is there already.
        annotations: as for :func:`merge`; its image ids are in the file.
        categories: as for :func:`merge`.
        changed: whether the file itself is new.
        unread: folders that could not be looked into, and why.

    Returns:
        What was written.
    """
    known = about(import_pyarrow().parquet.read_schema(whole))
    if known is None:
        raise ValueError(f"{whole} does not say which classes it knows: it is not a Parquet file of detpost's")
    truth = None if annotations is None else read_annotations(annotations)
    report = Report(lambda: _rows(whole), known, truth, categories, unread)
    files, written = report.write(folder, [name for name in formats if name != "parquet"])
    return Merged(
        images=report.images,
        detections=report.detections,
        uncategorised=report.uncategorised,
        skipped=tuple(report.skipped),
        files=(*files, *([whole] if whole.parent == folder else [])),
        changed=changed or written,
    )


def write_whole(tables: Iterable[pyarrow.Table], path: Path, known: Mapping[str, Any]) -> bool:
    """Write sorted tables as one file and move it into place, and tell whether it is new or other than before.

    Args:
        tables: of a merge.
        path: of the file.
        known: what it says of itself.

    Returns:
        Whether it changed.
    """
    with replaced(path) as (file, changed):
        writer = TableWriter(file, schema(known))
        try:
            for table in tables:
                writer.add(table)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
    return changed[0]


def _bring_together(paths: Sequence[Path], whole: Path, annotations: str | Path | None) -> bool:
    pa = import_pyarrow()
    known = _common([about(pa.parquet.read_schema(path)) for path in paths], paths)
    given = None if annotations is None else _given_ids(paths, annotations)
    files: list[Opened] = [partial(Path, path) for path in paths]
    with closing(merged(files, schema(), _settle, whole.parent)) as tables:
        return write_whole(_numbered(tables, given, len(paths) > 1), whole, known)


def _settle(table: pyarrow.Table) -> pyarrow.Table:
    """Keep one row of each name; rows that say different things of one image are not to be chosen among."""
    compute = import_pyarrow().compute
    names = table[KEY].combine_chunks()
    if len(names) < 2:
        return table
    again = compute.equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)
    for place in again.nonzero()[0].tolist():
        one, other = (
            {name: value for name, value in row.items() if name != "image_id"}
            for row in table.slice(place, 2).to_pylist()
        )
        if one != other:
            raise ValueError(
                f"two sources have different rows for {one[KEY]!r}: merge runs whose images go by different names"
            )
    pa = import_pyarrow()
    return table.filter(pa.array([True, *(~again).tolist()]))


def _numbered(tables: Iterable[pyarrow.Table], given: Mapping[str, int] | None, anew: bool) -> Iterator[pyarrow.Table]:
    """Give each row its id: the annotations', its own, or a new one where it comes from one source among several."""
    pa = import_pyarrow()
    before = 0
    for table in tables:
        ids = table["image_id"]
        if given is not None:
            ids = pa.array([given[name] for name in table[KEY].to_pylist()], pa.int64())
        elif anew:
            ids = pa.array(range(before + 1, before + table.num_rows + 1), pa.int64())
        before = before + table.num_rows
        yield table.set_column(table.schema.get_field_index("image_id"), "image_id", ids)


def _given_ids(paths: Sequence[Path], annotations: str | Path) -> dict[str, int]:
    pa = import_pyarrow()
    names: set[str] = set()
    for path in paths:
        with pa.parquet.ParquetFile(path) as file:
            names.update(name_of(text) for table in tables_of(file, [KEY]) for text in table[KEY].to_pylist())
    given = match_images(read_annotations(annotations)["images"], sorted(names), annotations)
    return {sort_key(name).decode(): number for name, number in given.items()}


def _common(known: Sequence[dict[str, Any] | None], paths: Sequence[Path]) -> dict[str, Any]:
    """Give what all sources say of themselves; they must say the same of their classes."""
    first = known[0]
    for each, path in zip(known, paths, strict=True):
        if each is None or first is None:
            raise ValueError(f"{path} does not say which classes it knows: it is not a Parquet file of detpost's")
        if each["class_names"] != first["class_names"]:
            raise ValueError(f"{path} has other classes than {paths[0]}: results of one model are merged")
    assert first is not None
    return {name: first[name] for name in first if all((each or {}).get(name) == first[name] for each in known)}


def _file(source: Path) -> Path:
    path = source / PARQUET if source.is_dir() else source
    if not path.is_file():
        raise FileNotFoundError(f"no {PARQUET} at {source}: `detpost detect --format parquet` writes one")
    return path


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with import_pyarrow().parquet.ParquetFile(path) as file:
        for table in tables_of(file):
            yield from rows_of(table)
