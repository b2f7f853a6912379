"""Detection in a folder of images that need not fit in memory, and that may be interrupted at any moment."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import stat
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from detpost.images import read_image
from detpost.integrations.model_names import look_up, spelled_alike
from detpost.runs.coco import match_images, read_annotations
from detpost.runs.journal import Journal
from detpost.runs.listing import MARKER, Listing, find_images
from detpost.runs.results import FORMATS, Report, Skipped

if TYPE_CHECKING:
    from detpost.detector import Detector

__all__ = ["MAX_PIXELS", "Summary", "detect"]

JOURNAL = "detpost-journal.jsonl"
PICTURES = "pictures"
# Where Pillow itself refuses: 537 MB as RGB.
MAX_PIXELS = 178_956_970
# A batch ends early once its images have this many bytes; decoding ahead pauses at twice as many.
_BATCH_BYTES = 512 * 1024**2

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
    """

    images: int
    finished: int
    resumed: int
    detections: int
    uncategorised: int
    skipped: tuple[Skipped, ...]
    files: tuple[Path, ...]
    changed: bool


def detect(
    images: Iterable[str | Path] | Listing,
    out: str | Path,
    *,
    model: str | Path = "tiny",
    backend: str = "eager",
    device: str | None = None,
    batch_size: int = 8,
    threshold: float = 0.5,
    formats: Sequence[str] = ("coco",),
    draw: bool = False,
    annotations: str | Path | None = None,
    categories: str = "auto",
    fresh: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Detect in images and write the results; go on where an earlier run into the same folder stopped.

    Every finished batch is on the disk before the next one starts. A run that is killed at any moment loses at most
    the batch that it was in; run again, it gives the files that an uninterrupted run gives, to the bit. Batch size,
    device and workers may differ between runs, though floating-point sums may then differ in the last place.

    Args:
        images: folders (searched through, hidden entries left out), files and glob patterns, or a :class:`Listing`.
        out: folder for the results; made where missing. It may lie within a folder of images.
        model: as :meth:`detpost.Detector.load` takes it.
        backend: as :meth:`detpost.Detector.load` takes it.
        device: as :meth:`detpost.Detector.load` takes it.
        batch_size: most images that go through the network at once.
        threshold: detections with ``score > threshold`` are kept.
        formats: ``"coco"`` (``detections.json``, COCO results, and ``images.json``, the images and categories they
            refer to), ``"jsonl"`` (``detections.jsonl``, one image per line) and ``"csv"`` (``detections.csv``, one
            detection per line).
        draw: whether to write annotated pictures.
        annotations: a COCO annotation file that gives image and category ids; without it images are numbered from 1 in
            sorted order, once and for all, and the category id is the label.
        categories: how classes find their category there: ``"auto"``, ``"name"``, ``"order"`` or ``"label"``.
        fresh: drop what an earlier run left, and start over.
        max_pixels: images with more are skipped.
        workers: threads that decode; ``None`` takes one for each core, at most 4.
        trust_remote_code: as :meth:`detpost.Detector.load` takes it.
        progress: called with how many images are done and how many there are, at the start and after each batch.

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
    root, names, unread = images if isinstance(images, Listing) else find_images(images)
    truth = None if annotations is None else read_annotations(annotations)
    given_ids = None if truth is None else match_images(truth["images"], names, str(annotations))
    folder = Path(out)
    settings = _settings(model, backend, threshold, trust_remote_code)
    folder.mkdir(parents=True, exist_ok=True)
    tell = progress or (lambda done, total: None)
    with Journal(folder / JOURNAL) as journal, _pillow_without_limit():
        if not fresh:
            _check_settings(journal, settings, folder)
        pending = [name for name in names if fresh or not _is_finished(journal, root, name)]
        resumed = len(names) - len(pending)
        if pending:
            detector = _load(model, backend, device, threshold, trust_remote_code)
            _begin(journal, settings, detector, folder, fresh)
            shelf = _Shelf.make(folder, names) if draw else None
            tell(resumed, len(names))
            work = _Work(root, batch_size, max_pixels, workers or min(4, os.cpu_count() or 1))
            _run(detector, journal, work, names, pending, shelf, lambda done: tell(resumed + done, len(names)))
        drawn = _draw_missing(journal, root, names, _Shelf.make(folder, names), max_pixels) if draw else 0
        report = Report(journal, names, given_ids, truth, categories, unread)
        files, written = report.write(folder, formats)
        return Summary(
            images=len(names),
            finished=len(pending),
            resumed=resumed,
            detections=report.detections,
            uncategorised=report.uncategorised,
            skipped=tuple(report.skipped),
            files=files,
            changed=bool(pending or drawn or written),
        )


def _check_arguments(
    batch_size: int, threshold: float, formats: Sequence[str], max_pixels: int, workers: int | None
) -> None:
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"unknown format {unknown[0] if unknown else ''!r}: take one of {', '.join(FORMATS)}")
    for name, value in (("batch_size", batch_size), ("max_pixels", max_pixels), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie within [0, 1]; got {threshold}")


# --- settings ---------------------------------------------------------------------------------------------------------


def _settings(model: str | Path, backend: str, threshold: float, trust_remote_code: bool = False) -> dict[str, Any]:
    """Give what decides the results, without loading the model."""
    found = look_up(model)
    identity = (
        f"commit {_hub_commit(found.name)}"
        if found.path is None
        else _digest(_model_files(found.path, trust_remote_code))
    )
    return {
        "model": found.name,
        "model_identity": identity,
        # A file's format decides for itself.
        "backend": found.path.suffix[1:] if found.kind == "file" and found.path else backend,
        "threshold": threshold,
    }


def _model_files(path: Path, trust_remote_code: bool) -> list[Path]:
    """List the files that make a model what it is."""
    if path.is_file():
        # Weights beside the graph: OpenVINO's .bin, and ONNX's external data in the usual spellings.
        beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else []
        beside = [*beside, *(path.with_name(path.name + ending) for ending in (".data", "_data"))]
        return [path, *(file for file in beside if file.is_file())]
    endings = ["*.json", "*.safetensors", *(["*.py"] if trust_remote_code else [])]
    return sorted(file for ending in endings for file in path.glob(ending))


def _hub_commit(name: str) -> str:
    """Find which commit of a hub id this machine has or is given."""
    try:
        from transformers.utils import cached_file
    except ImportError:
        raise ImportError("transformers detectors need transformers: pip install 'detpost[hf]'") from None
    try:
        found = Path(cached_file(name, "config.json") or "")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"no detector at {name!r}, neither a file, a transformers directory nor a hub id: {reason}"
            f"{spelled_alike(name)}"
        ) from error
    return found.parent.name if found.parent.parent.name == "snapshots" else "unknown"


def _digest(files: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            whole.update(f"{file.suffix} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _check_settings(journal: Journal, settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with other settings than those that the folder was begun with."""
    before = None if journal.header is None else journal.header["settings"]
    if before is None:
        return
    for name in ("model_identity", "backend", "threshold", "spec"):
        if name in settings and before[name] != settings[name]:
            shown = "model" if name == "model_identity" else name
            theirs, ours = before[shown], settings[shown]
            other = "the model's file has changed" if theirs == ours else f"{shown} {theirs}, not {ours}"
            raise ValueError(f"{folder} holds a run with other settings ({other}): take another folder, or --fresh")


def _load(model: str | Path, backend: str, device: str | None, threshold: float, trust_remote_code: bool) -> Detector:
    from detpost.detector import Detector

    return Detector.load(
        model, backend=backend, device=device, threshold=threshold, trust_remote_code=trust_remote_code
    )


def _begin(journal: Journal, settings: dict[str, Any], detector: Detector, folder: Path, fresh: bool) -> None:
    """Write the header of a new journal, or check the spec against that of the one to go on with."""
    import detpost

    # Through JSON, so that a tuple in a spec equals the list that was written.
    spec = json.loads(json.dumps(asdict(detector.spec) if is_dataclass(detector.spec) else None))
    settings = {**settings, "spec": spec}
    if journal.header is not None and not fresh:
        _check_settings(journal, settings, folder)
        return
    if fresh and (folder / PICTURES / MARKER).exists():
        shutil.rmtree(folder / PICTURES)
    names = {str(label): name for label, name in detector.class_names.items()}
    journal.start({"version": detpost.__version__, "settings": settings, "class_names": names})


# --- the work ---------------------------------------------------------------------------------------------------------


class _Work(NamedTuple):
    root: Path
    batch_size: int
    max_pixels: int
    workers: int


class _Loaded(NamedTuple):
    """One file as it was read: its pixels, or why there are none."""

    name: str
    size: int
    mtime_ns: int
    image: Tensor | None
    error: str

    @property
    def bytes(self) -> int:
        return 0 if self.image is None else self.image.numel()


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _is_finished(journal: Journal, root: Path, name: str) -> bool:
    entry = journal.entries.get(name)
    return entry is not None and (entry.size, entry.mtime_ns) == _identity(root / name)


def _read(root: Path, name: str, max_pixels: int) -> _Loaded:
    path = root / name
    identity = _identity(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
            return _Loaded(name, *identity, None, "not a regular file")
        return _Loaded(name, *identity, read_image(path, max_pixels), "")
    except FileNotFoundError:
        reason = "a link to a file that does not exist" if path.is_symlink() else "the file is gone"
    except OSError as error:
        # The file is named beside it: what remains of the line is the reason.
        reason = (error.strerror or str(error)).removeprefix(f"cannot read image {str(path)!r}: ")
    return _Loaded(name, *identity, None, reason)


class _Budget:
    """Lets images be decoded in order, and only while fewer bytes are held than the limit.

    How large an image is shows only once it is decoded, so as many images as there are threads may go over it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._next = 0
        self._changed = threading.Condition()
        self.closed = False

    def enter(self, number: int) -> None:
        """Wait for the turn of an image, and for room."""
        with self._changed:
            # In order, or later images could fill the room that the one the batch waits for needs.
            self._changed.wait_for(lambda: self.closed or (self._next == number and self._held < self._limit))
            self._next = number + 1
            self._changed.notify_all()

    def hold(self, size: int) -> None:
        """Count the bytes of an image; negative where it is let go."""
        with self._changed:
            self._held = self._held + size
            self._changed.notify_all()

    def close(self) -> None:
        """Let everyone go."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()


def _decoded(work: _Work, names: Sequence[str]) -> Generator[list[_Loaded], None, None]:
    """Give batches in order, read ahead by threads; what is held is bounded in images and in bytes.

    Where a batch ends depends on the images from its beginning on and on nothing else, so a resumed run cuts the same
    batches as an uninterrupted one.
    """
    rest = iter(enumerate(names))
    waiting: deque[Future[_Loaded]] = deque()
    budget = _Budget(2 * _BATCH_BYTES)
    pool = ThreadPoolExecutor(work.workers, thread_name_prefix="detpost-read")

    def read(number: int, name: str) -> _Loaded:
        budget.enter(number)
        loaded = _read(work.root, name, work.max_pixels)
        budget.hold(loaded.bytes)
        return loaded

    try:
        batch: list[_Loaded] = []
        while True:
            ahead = itertools.islice(rest, 2 * work.batch_size + work.workers - len(waiting))
            waiting.extend(pool.submit(read, number, name) for number, name in ahead)
            if waiting:
                batch.append(waiting.popleft().result())
            size = sum(loaded.bytes for loaded in batch)
            if batch and (len(batch) == work.batch_size or size >= _BATCH_BYTES or not waiting):
                yield batch
                batch = []
                budget.hold(-size)
            elif not waiting:
                break
    finally:
        budget.close()
        pool.shutdown(cancel_futures=True)


def _run(
    detector: Detector,
    journal: Journal,
    work: _Work,
    names: Sequence[str],
    pending: Sequence[str],
    shelf: _Shelf | None,
    tell: Callable[[int], None],
) -> None:
    ids = _number(journal, names)
    done = 0
    if shelf is None and (journal.path.parent / PICTURES / MARKER).exists():
        _forget_pictures(_Shelf(journal.path.parent / PICTURES, frozenset(names)), pending)
    with contextlib.closing(_decoded(work, pending)) as batches:
        for batch in batches:
            rows = _detect_batch(detector, batch, ids, alone_may_fail=bool(journal.entries))
            if shelf is not None:
                for loaded, row in zip(batch, rows, strict=True):
                    shelf.put(loaded.image, row)  # before the journal: an image that is finished has its picture
            journal.append(rows)
            done = done + len(batch)
            tell(done)


def _number(journal: Journal, names: Sequence[str]) -> dict[str, int]:
    """Number images from 1 in sorted order; those numbered before keep their number, new ones follow."""
    known = {name: entry.image_id for name, entry in journal.entries.items()}
    new = [name for name in names if name not in known]
    return known | dict(zip(new, range(max(known.values(), default=0) + 1, len(known) + len(names) + 1), strict=False))


def _detect_batch(
    detector: Detector, batch: Sequence[_Loaded], ids: Mapping[str, int], alone_may_fail: bool
) -> list[dict[str, Any]]:
    read = [loaded.image for loaded in batch if loaded.image is not None]
    found = iter(_predict(detector, read, alone_may_fail))
    rows: list[dict[str, Any]] = []
    for loaded in batch:
        result = loaded.error if loaded.image is None else next(found)
        row: dict[str, Any] = {"file_name": loaded.name, "image_id": ids[loaded.name]}
        row = {**row, "size": loaded.size, "mtime_ns": loaded.mtime_ns}
        if loaded.image is None or isinstance(result, str):
            rows.append({**row, "error": result})
            continue
        height, width = loaded.image.shape[-2:]
        values = {name: result[name].tolist() for name in ("scores", "labels", "boxes")}
        rows.append({**row, "width": width, "height": height, "names": result["label_names"], **values})
    return rows


def _predict(detector: Detector, images: list[Tensor], alone_may_fail: bool) -> list[dict[str, Any] | str]:
    """Run the detector; an image that it cannot take, as one a pixel wide, must not end a run over a million others."""
    if not images:
        return []
    try:
        return [*detector.predict(images, batch_size=len(images))]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        failure = error
    found: list[dict[str, Any] | str] = []
    for image in images:
        try:
            found.append(detector.predict([image], batch_size=1)[0])
        except (RuntimeError, ValueError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            found.append(f"the detector cannot take {image.shape[-1]} x {image.shape[-2]} pixels: {reason[:200]}")
    if not alone_may_fail and all(isinstance(row, str) for row in found):
        raise failure  # nothing has gone through yet: the model fails, not the image
    return found


@contextlib.contextmanager
def _pillow_without_limit() -> Iterator[None]:
    """Lift Pillow's limit on pixels and silence its warnings: the run's own limit is checked before decoding."""
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


# --- pictures ---------------------------------------------------------------------------------------------------------


class _Shelf(NamedTuple):
    """Where annotated pictures go: the tree of the images again, PNG but for JPEG."""

    folder: Path
    names: frozenset[str]

    @classmethod
    def make(cls, out: Path, names: Sequence[str]) -> _Shelf:
        from detpost.detections import import_supervision

        import_supervision("drawing")
        folder = out / PICTURES
        folder.mkdir(exist_ok=True)
        if not (folder / MARKER).exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds files that detpost did not write: take another folder for the results")
        (folder / MARKER).touch()
        (folder / ".part").unlink(missing_ok=True)  # of a run that was killed
        return cls(folder, frozenset(names))

    def place(self, name: str) -> Path:
        """Find the place of an image's picture; no two images share one."""
        if Path(name).suffix.lower() not in (".png", ".jpg", ".jpeg"):
            name = f"{name}.png"
            while name in self.names:
                name = f"{name}.png"
        return self.folder / name

    def put(self, image: Tensor | None, row: Mapping[str, Any]) -> None:
        """Draw a picture and move it into place whole; an image without a result has none."""
        path = self.place(row["file_name"])
        if image is None or "error" in row:
            path.unlink(missing_ok=True)
            return
        from PIL import Image

        from detpost.runs.drawing import draw

        found = {
            "scores": torch.tensor(row["scores"], dtype=torch.float32, device="cpu"),
            "labels": torch.tensor(row["labels"], dtype=torch.int64, device="cpu"),
            "boxes": torch.tensor(row["boxes"], dtype=torch.float32, device="cpu").reshape(-1, 4),
            "label_names": row["names"],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = self.folder / ".part"
        with part.open("wb") as file:
            kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
            Image.fromarray(draw(image, found)).save(file, kind, quality=92)
        os.replace(part, path)


def _forget_pictures(shelf: _Shelf, names: Sequence[str]) -> None:
    """Remove pictures of what is about to be detected anew without being drawn."""
    for name in names:
        shelf.place(name).unlink(missing_ok=True)


def _draw_missing(journal: Journal, root: Path, names: Sequence[str], shelf: _Shelf, max_pixels: int) -> int:
    """Draw what earlier runs detected and did not draw, from the journal."""
    missing = [name for name in names if not shelf.place(name).exists()]
    drawn = 0
    for row in journal.rows(missing):
        if "error" not in row:
            shelf.put(read_image(root / row["file_name"], max_pixels), row)
            drawn = drawn + 1
    return drawn
