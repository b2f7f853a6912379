"""Detection in a folder of images that need not fit in memory, and that may be interrupted at any moment."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detpost.image_files import blocks_kept
from detpost.runs.batches import detect_batch
from detpost.runs.coco import match_images, read_annotations
from detpost.runs.fetching import fetched
from detpost.runs.find_images import MARKER, FoundImages, find_images
from detpost.runs.finishing import Finisher, draw_missing
from detpost.runs.journal import Journal
from detpost.runs.memory import Memory
from detpost.runs.originals import Originals
from detpost.runs.parquet import sort_key
from detpost.runs.parts import PARTS, RUN_HEADER
from detpost.runs.pictures import PICTURES, Pictures, forget_pictures
from detpost.runs.reading import Reader, identity_of
from detpost.runs.results import Report, Rows, Skipped, check_formats
from detpost.runs.settings import check_settings, settings_of, with_spec
from detpost.runs.tiles import Tiling

if TYPE_CHECKING:
    from detpost.detector import Detector

__all__ = ["MAX_PIXELS", "Summary", "detect"]

JOURNAL = "detpost-journal.jsonl"
# Where Pillow itself refuses: 537 MB as RGB.
MAX_PIXELS = 178_956_970

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Args:
        images: how many images there are.
        finished: how many of them this run finished, skipped ones included.
        resumed: how many were finished before.
        detections: rows in the results.
        uncategorised: rows left out of the COCO file because the annotations have no category for their class.
        skipped: images without a result, of this run and of those before it, and folders that could not be looked into.
        files: what the results were written to.
        changed: whether anything was detected, drawn or written.
        seconds: that a run on one machine waited for ``"reading"``, for the ``"network"``, and for ``"writing"``, which
            includes drawing. Their sum is the time that the images took; all three go on side by side.
    """

    images: int
    finished: int
    resumed: int
    detections: int
    uncategorised: int
    skipped: tuple[Skipped, ...]
    files: tuple[Path, ...]
    changed: bool
    seconds: Mapping[str, float] = field(default_factory=dict)


def detect(
    images: Iterable[str | Path] | FoundImages,
    out: str | Path,
    *,
    model: str | Path = "tiny",
    backend: str = "eager",
    device: str | None = None,
    batch_size: int = 8,
    threshold: float = 0.5,
    nms: float | None = None,
    formats: Sequence[str] = ("coco",),
    draw: bool = False,
    annotations: str | Path | None = None,
    categories: str = "auto",
    fresh: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    tiling: Tiling | None = None,
    draft: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    stages: Callable[[Mapping[str, float]], object] | None = None,
) -> Summary:
    """Detect in images and write the results; go on where an earlier run into the same folder stopped.

    Threads decode and resize ahead of the network, and while a batch is in it the one before is drawn and written. A
    run that is killed at any moment loses at most these two; run again, it gives the files that an uninterrupted run
    gives, to the bit. Batch size, device and workers may differ between runs, though floating-point sums may then
    differ in the last place.

    Args:
        images: folders (searched through, hidden entries left out), files, glob patterns and addresses of images on web
            servers, or a :class:`FoundImages`.
        out: folder for the results; made where missing. It may lie within a folder of images.
        model: as :meth:`detpost.Detector.load` takes it.
        backend: as :meth:`detpost.Detector.load` takes it.
        device: as :meth:`detpost.Detector.load` takes it.
        batch_size: most images, or tiles of them, that go through the network at once.
        threshold: detections with ``score > threshold`` are kept.
        nms: as :meth:`detpost.Detector.load` takes it.
        formats: ``"coco"`` (``detections.json``, COCO results, and ``images.json``, the images and categories they
            refer to), ``"jsonl"`` (``detections.jsonl``, one image per line), ``"csv"`` (``detections.csv``, one
            detection per line), ``"parquet"`` (``detections.parquet``, one image per row) and ``"yolo"``
            (``yolo/labels``, one text file per image).
        draw: whether to write annotated pictures.
        annotations: a COCO annotation file that gives image and category ids; without it images are numbered from 1 in
            sorted order, once and for all, and the category id is the label.
        categories: how classes find their category there: ``"auto"``, ``"name"``, ``"order"`` or ``"label"``.
        fresh: drop what an earlier run left, and start over.
        max_pixels: images with more are skipped.
        workers: threads that decode, and as many that draw; ``None`` takes one for each core, at most 4.
        tiling: cuts images into tiles, which go through the network beside the whole image; ``None``: the whole alone.
        draft: decode JPEG files at a half, a quarter or an eighth of their size where that is at least twice the
            network's input in each direction. Quicker, and the network's input is not quite the same.
        trust_remote_code: as :meth:`detpost.Detector.load` takes it.
        allow_pickle: as :meth:`detpost.Detector.load` takes it.
        progress: called with how many images are done and how many there are, at the start and after each batch.
        stages: called before each call of ``progress`` with :attr:`Summary.seconds` as they are then.

    Returns:
        What was done.

    Raises:
        ImportError: an optional package is missing; the message names the extra.
        OSError: no such image, folder or model.
        ValueError: no images, an argument out of range, an image that the annotations do not know, a folder that
            another run is writing to, or one that holds a run with other settings.

    Example:
        >>> import tempfile
        >>> from detpost.zoo import SAMPLES
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     detect([SAMPLES], folder, device="cpu").images
        4
    """
    _check_arguments(batch_size, threshold, formats, max_pixels, workers)
    if draft and (draw or tiling is not None):
        raise ValueError(f"draft reads images at a reduced scale: leave out it or {'draw' if draw else 'tiles'}")
    root, names, unread = images if isinstance(images, FoundImages) else find_images(fetched(images, out))
    truth = None if annotations is None else read_annotations(annotations)
    given_ids = None if truth is None else match_images(truth["images"], names, str(annotations))
    folder = Path(out)
    settings = settings_of(model, backend, threshold, trust_remote_code, tiling, draft, nms)
    folder.mkdir(parents=True, exist_ok=True)
    threads = workers or min(4, os.cpu_count() or 1)
    _leave_to_ray(folder, fresh)
    with Journal(folder / JOURNAL) as journal:
        if not fresh:
            check_settings(journal.header, settings, folder)
        pending = [name for name in names if fresh or not _is_finished(journal, root, name)]
        memory, drawn, waited = Memory(), 0, Waited()
        originals = Originals(root, max_pixels, memory)
        if pending:
            from detpost.detector import Detector

            detector = Detector.load(
                model,
                backend,
                device,
                threshold,
                nms=nms,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
            )
            _begin(journal, settings, detector, folder, fresh)
            kept = originals if draw else None
            reader = Reader(root, detector.prepare, batch_size, max_pixels, threads, memory, kept, tiling, draft)
            pictures = _pictures(folder, names, pending, draw)

            def tell(done: int, total: int) -> None:
                if stages:
                    stages(waited.seconds)
                if progress:
                    progress(done, total)

            with blocks_kept(), Finisher(journal, kept, pictures, threads) as finisher:
                find = partial(detect_batch, detector, tiling=tiling, inputs=batch_size)
                _run(find, journal, reader, finisher, names, pending, tell, waited)
        if draw:
            drawn = draw_missing(journal, originals, Pictures(folder, names), names, threads)
        assert journal.header is not None
        report = Report(_rows(journal, names, given_ids), _known(journal.header), truth, categories, unread)
        files, written = report.write(folder, formats)
        return Summary(
            images=len(names),
            finished=len(pending),
            resumed=len(names) - len(pending),
            detections=report.detections,
            uncategorised=report.uncategorised,
            skipped=tuple(report.skipped),
            files=files,
            changed=bool(pending or drawn or written),
            seconds=waited.seconds,
        )


class Waited:
    """How long the thread that has the network waited for each stage; while it is in the network, the others work."""

    def __init__(self) -> None:
        self.seconds: Mapping[str, float] = dict.fromkeys(("reading", "network", "writing"), 0.0)

    def during(self, stage: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function, and count the time for a stage."""
        began = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            self.seconds = {**self.seconds, stage: self.seconds[stage] + time.perf_counter() - began}


def _check_arguments(
    batch_size: int, threshold: float, formats: Sequence[str], max_pixels: int, workers: int | None
) -> None:
    check_formats(formats)
    for name, value in (("batch_size", batch_size), ("max_pixels", max_pixels), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie within [0, 1]; got {threshold}")


def _leave_to_ray(folder: Path, fresh: bool) -> None:
    """Refuse a folder that holds a run on Ray, or drop that."""
    if not (folder / RUN_HEADER).exists():
        return
    if not fresh:
        raise ValueError(f"{folder} holds a run of --engine ray: go on with it, take another folder, or --fresh")
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    (folder / RUN_HEADER).unlink()


def _rows(journal: Journal, names: Sequence[str], given_ids: Mapping[str, int] | None) -> Rows:
    """Give what makes the result files of the journal."""
    in_order = sorted(names, key=sort_key)

    def rows() -> Iterator[dict[str, Any]]:
        for row in journal.rows(in_order):
            yield row if given_ids is None else {**row, "image_id": given_ids[row["file_name"]]}

    return rows


def _known(header: Mapping[str, Any]) -> dict[str, Any]:
    """Give what a Parquet file says of the run."""
    return {name: header[name] for name in ("version", "settings", "class_names")}


def _is_finished(journal: Journal, root: Path, name: str) -> bool:
    entry = journal.entries.get(name)
    return entry is not None and (entry.size, entry.mtime_ns) == identity_of(root / name)


def _begin(journal: Journal, settings: dict[str, Any], detector: Detector, folder: Path, fresh: bool) -> None:
    """Write the header of a new journal, or check the spec against that of the one to go on with."""
    import detpost

    settings = with_spec(settings, detector.spec)
    if journal.header is not None and not fresh:
        check_settings(journal.header, settings, folder)
        return
    if fresh and (folder / PICTURES / MARKER).exists():
        shutil.rmtree(folder / PICTURES)
    names = {str(label): name for label, name in detector.class_names.items()}
    journal.start({"version": detpost.__version__, "settings": settings, "class_names": names})


def _pictures(folder: Path, names: Sequence[str], pending: Sequence[str], draw: bool) -> Pictures | None:
    if draw:
        return Pictures(folder, names)
    forget_pictures(folder, names, pending)
    return None


def _run(
    find: Callable[..., list[dict[str, Any]]],
    journal: Journal,
    reader: Reader,
    finisher: Finisher,
    names: Sequence[str],
    pending: Sequence[str],
    tell: Progress,
    waited: Waited,
) -> None:
    """Bring what is pending through the network, batch by batch."""
    ids = _number(journal, names)
    gone_through, done = bool(journal.entries), len(names) - len(pending)
    tell(done, len(names))
    with contextlib.closing(reader.batches(pending)) as batches:
        while batch := waited.during("reading", next, batches, None):
            rows = waited.during("network", find, batch, ids, alone_may_fail=gone_through)
            gone_through = True
            finished = waited.during("writing", finisher.start, batch, rows)
            if finished:
                done = done + finished
                tell(done, len(names))
    tell(done + waited.during("writing", finisher.wait), len(names))


def _number(journal: Journal, names: Sequence[str]) -> dict[str, int]:
    """Number images from 1 in sorted order; those numbered before keep their number, new ones follow."""
    known = {name: entry.image_id for name, entry in journal.entries.items()}
    new = [name for name in names if name not in known]
    return known | dict(zip(new, range(max(known.values(), default=0) + 1, len(known) + len(names) + 1), strict=False))
