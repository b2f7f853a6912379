"""Detection in a dataset of any size on Ray Data, on this machine's processors or on a cluster."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from detpost.images import Prepare
from detpost.runs.coco import match_images, read_annotations
from detpost.runs.detect import JOURNAL, MAX_PIXELS, Progress, Summary
from detpost.runs.find_images import FoundImages
from detpost.runs.merge import made_of, write_whole
from detpost.runs.parquet import import_pyarrow, name_of, sort_key, tables_of
from detpost.runs.parts import Keys, Parts, columns, is_among, key_array, numbered, place_of, settle, sorted_keys
from detpost.runs.results import PARQUET, check_formats
from detpost.runs.settings import check_settings, settings_of, with_spec
from detpost.runs.sorting import merged
from detpost.runs.sources import IMAGE_COLUMNS, NAME_COLUMNS, Columns, Listed, Listing, list_images, packed_files
from detpost.runs.stages import Decode, Detect, Images, Write
from detpost.runs.tiles import Tiling

if TYPE_CHECKING:
    from detpost.detector import Detector

__all__ = ["detect"]

# Embedded, Ray shares memory between processes up to this, and keeps what is more on the disk.
_SHARED_BYTES = 2 * 1024**3
_LEAST_SHARED_BYTES = 128 * 1024**2
# A part is what a killed run does again at most, for each part that was being filled; and a file for the merge.
_PARTS, _MOST_ROWS = 200, 2048
# Names of images go to a task in blocks.
_BLOCKS, _MOST_NAMES = 20_000, 32


def detect(
    dataset: Any,
    out: str | Path,
    *,
    model: str | Path | Callable[[], Detector] = "tiny",
    backend: str = "eager",
    device: str | None = None,
    batch_size: int = 8,
    threshold: float = 0.5,
    nms: float | None = None,
    formats: Sequence[str] = ("parquet",),
    annotations: str | Path | None = None,
    categories: str = "auto",
    fresh: bool = False,
    max_pixels: int = MAX_PIXELS,
    actors: int | None = None,
    address: str | None = None,
    name_column: str | None = None,
    image_column: str | None = None,
    tiling: Tiling | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Detect in a dataset on Ray Data; go on where an earlier run into the same folder stopped.

    Tasks decode and resize, actors with one detector each detect, and what they find is written in parts; in the end
    the parts are merged, sorted by name. A driver, worker or node that is killed loses no row and doubles none: an
    image is done once it is in a part, and the next run leaves those out. An image that cannot be read is a row with
    its error.

    Args:
        dataset: images as :func:`detpost.runs.detect.detect` takes them; the address of a folder, as
            ``s3://bucket/photos``; Parquet files or tar files of webdataset, or one folder of them; or a
            ``ray.data.Dataset`` with a column of unique names and one of images: encoded (bytes) or arrays (H, W, 3),
            uint8.
        out: folder or address for the results. Every node must reach it, and the images, by this name.
        model: as :meth:`detpost.Detector.load` takes it, on every node; or what makes a detector.
        backend: as :meth:`detpost.Detector.load` takes it.
        device: as :meth:`detpost.Detector.load` takes it; ``None`` takes a GPU for each actor where Ray has any.
        batch_size: images that go through a network at once.
        threshold: detections with ``score > threshold`` are kept.
        nms: as :meth:`detpost.Detector.load` takes it.
        formats: as :func:`detpost.runs.detect.detect` takes them; ``"parquet"`` is always written.
        annotations: as :func:`detpost.runs.detect.detect` takes it.
        categories: as :func:`detpost.runs.detect.detect` takes it.
        fresh: drop what an earlier run left, and start over.
        max_pixels: images with more are skipped.
        actors: detectors; ``None`` takes one for each GPU, or one for every two processors.
        address: of a Ray cluster to join, as ``auto`` or ``ray://host:10001``; ``None`` takes the one that this process
            has joined, or starts Ray on this machine.
        name_column: of the dataset; ``None`` takes ``file_name``, ``path``, ``filename``, ``__key__``, ``key``, ``id``
            or ``uid``.
        image_column: of the dataset; ``None`` takes ``image``, ``bytes``, ``img``, ``image_bytes`` or ``data``, or
            webdataset's columns that are called after an ending.
        tiling: as :func:`detpost.runs.detect.detect` takes it.
        trust_remote_code: as :meth:`detpost.Detector.load` takes it.
        allow_pickle: as :meth:`detpost.Detector.load` takes it.
        progress: called with how many images are done and how many there are, as far as is known.

    Returns:
        What was done.

    Raises:
        ImportError: Ray or another package is missing; the message names the extra.
        OSError: no such image, folder or model, or a disk that is full.
        ValueError: no images, an argument out of range, a folder that holds a run with other settings or one of one
            machine.
    """
    ray = _import_ray()
    formats = tuple(dict.fromkeys((*formats, "parquet")))
    _check(batch_size, threshold, formats, max_pixels, actors)
    parts = Parts(place_of(out))
    if not parts.out.is_local and formats != ("parquet",):
        raise ValueError(f"at {out} only Parquet is written: make other formats of it with `detpost merge`")
    settings = _settings(model, backend, threshold, nms, trust_remote_code, tiling)
    header = _earlier(parts, out, settings, fresh)
    source = _Source.of(ray, dataset)
    done = sorted_keys([]) if header is None else parts.keys()
    finished = before = 0
    if header is None or source.has_more(done):
        load = _loader(model, backend, device, threshold, nms, trust_remote_code, allow_pickle)
        with _joined(ray, address, actors), _one_line_errors():
            shares = _shares(ray, device, actors)
            prepare, known = ray.get(ray.remote(_describe).options(**shares.of_an_actor).remote(load))
            header = _begin(parts, header, known, settings, out)
            dataset, images = source.dataset(ray, done, name_column, image_column, max_pixels, tiling)
            counts = _through(dataset, images, prepare, load, parts, shares, batch_size, source.total, tiling)
            before = source.before(done)
            finished, names = _consume(counts, before, source.total, progress or (lambda done, total: None))
        parts.check(names)
    assert header is not None
    summary = _finish(parts, header, source.listing, formats, annotations, categories, finished)
    again = 0 if source.listing is not None else before + finished - summary.images
    if again > 0:
        warnings.warn(f"{again} rows have a name that another row has: they count once", stacklevel=2)
    return summary


class _Source:
    """What a run is over: listed images, files that hold many, or a dataset of the caller's."""

    def __init__(self, listing: Listing | None, packed: tuple[str, list[str], Any] | None, dataset: Any) -> None:
        self.listing, self._packed, self._dataset = listing, packed, dataset
        self._keys = None if listing is None else key_array(listing.keys)

    @classmethod
    def of(cls, ray: Any, dataset: Any) -> _Source:
        """Find out which."""
        if isinstance(dataset, ray.data.Dataset):
            return cls(None, None, dataset)
        if isinstance(dataset, FoundImages):
            return cls(list_images(dataset), None, None)
        sources = [dataset] if isinstance(dataset, (str, Path)) else [*dataset]
        packed = packed_files(sources)
        return cls(None, packed, None) if packed else cls(list_images(sources), None, None)

    @property
    def total(self) -> int | None:
        """How many images there are, where that is known."""
        return None if self.listing is None else len(self.listing.names)

    def before(self, done: Keys) -> int:
        """Tell how many of them are done."""
        return len(done) if self._keys is None else int(is_among(self._keys, done).sum())

    def has_more(self, done: Keys) -> bool:
        """Tell whether some may not be done."""
        return self._keys is None or self.before(done) < len(self._keys)

    def dataset(
        self, ray: Any, done: Keys, name: str | None, image: str | None, max_pixels: int, tiling: Tiling | None
    ) -> tuple[Any, Images]:
        """Give Ray's dataset of what is not done, and what gets at the images of a block."""
        if self.listing is not None:
            return _names(ray, self.listing, done), Listed(self.listing.place, max_pixels, tiling)
        finished = ray.put(done)
        return self._rows(ray, name, image), Columns(name, image, partial(_fetched, finished), max_pixels, tiling)

    def _rows(self, ray: Any, name: str | None, image: str | None) -> Any:
        if self._packed is None:
            return self._dataset
        kind, paths, filesystem = self._packed
        if kind == "webdataset":
            return ray.data.read_webdataset(paths, filesystem=filesystem, decoder=None)
        present = import_pyarrow().parquet.read_schema(filesystem.open_input_file(paths[0])).names
        wanted = {name, image} | (set() if name else {*NAME_COLUMNS}) | (set() if image else {*IMAGE_COLUMNS})
        chosen = [column for column in present if column in wanted]
        return ray.data.read_parquet(paths, filesystem=filesystem, columns=chosen or None)


def _names(ray: Any, listing: Listing, done: Keys) -> Any:
    """Give blocks of names and keys."""
    pa = import_pyarrow()
    places = np.flatnonzero(~is_among(key_array(listing.keys), done)).tolist()
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    size = max(1, min(_MOST_NAMES, len(places) // (4 * cpus)), len(places) // _BLOCKS)
    blocks = [
        pa.table(
            {
                "name": pa.array([listing.names[place].encode("utf-8", "surrogatepass") for place in block]),
                "key": pa.array([listing.keys[place] for place in block]),
            }
        )
        for block in (places[start : start + size] for start in range(0, len(places), size))
    ]
    return ray.data.from_arrow(
        blocks or [pa.table({"name": pa.array([], pa.binary()), "key": pa.array([], pa.binary())})]
    )


def _through(
    dataset: Any,
    images: Images,
    prepare: Prepare,
    load: Callable[[], Detector],
    parts: Parts,
    shares: _Shares,
    batch_size: int,
    total: int | None,
    tiling: Tiling | None,
) -> Any:
    """Lay out the stages; what comes out of the last one is how many rows each part has."""
    import ray

    rows = _MOST_ROWS // 4 if total is None else min(_MOST_ROWS, max(2 * batch_size, math.ceil(total / _PARTS)))
    return (
        dataset.map_batches(Decode(images, prepare, batch_size), batch_format="numpy", num_cpus=shares.decoding)
        .map_batches(
            Detect,
            fn_constructor_args=(load, tiling, batch_size),
            # With tiles as they come: a few images fill the network many times over.
            batch_size=batch_size if tiling is None else None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=shares.actors),
            **shares.of_an_actor,
        )
        .map_batches(Write(parts), batch_size=rows, batch_format="pyarrow", num_cpus=0.01)
    )


def _consume(counts: Any, before: int, total: int | None, tell: Progress) -> tuple[int, list[str]]:
    """Run to the end and give how many images were done, and the names of the parts."""
    finished = 0
    names: list[str] = []
    tell(before, total or before)
    for table in counts.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        finished = finished + sum(table["images"].to_pylist())
        names.extend(name for name in table["part"].to_pylist() if name is not None)
        tell(before + finished, total or before + finished)
    return finished, names


def _finish(
    parts: Parts,
    header: Mapping[str, Any],
    listing: Listing | None,
    formats: Sequence[str],
    annotations: str | Path | None,
    categories: str,
    finished: int,
) -> Summary:
    """Merge the parts, and make the other formats of the whole."""
    wanted = None if listing is None else sorted_keys(listing.keys)
    with parts.result_folder() as folder:
        whole = folder / PARQUET
        given = None if annotations is None else _given_ids(parts, listing, annotations)
        with closing(merged(parts.opened(), columns(), settle(wanted), folder)) as tables:
            changed = write_whole(numbered(tables, whole if whole.exists() else None, given), whole, header)
        unread = () if listing is None else listing.unread
        made = made_of(whole, folder, formats, annotations, categories, changed, unread)
    return Summary(
        images=made.images,
        finished=finished,
        resumed=max(0, made.images - finished),
        detections=made.detections,
        uncategorised=made.uncategorised,
        skipped=made.skipped,
        files=made.files if parts.out.is_local else (Path(parts.out.below(PARQUET).path),),
        changed=made.changed or bool(finished),
    )


def _given_ids(parts: Parts, listing: Listing | None, annotations: str | Path) -> dict[str, int]:
    if listing is not None:
        names = listing.names
    else:
        files = (import_pyarrow().parquet.ParquetFile(opened()) for opened in parts.opened())
        names = sorted(
            {name_of(text) for file in files for each in tables_of(file, ["file_name"]) for text in each[0].to_pylist()}
        )
    given = match_images(read_annotations(annotations)["images"], names, annotations)
    return {sort_key(name).decode(): number for name, number in given.items()}


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ImportError("--engine ray needs Ray: pip install 'detpost[scale]'") from None
    import_pyarrow()
    return ray


def _check(batch_size: int, threshold: float, formats: Sequence[str], max_pixels: int, actors: int | None) -> None:
    check_formats(formats)
    for name, value in (("batch_size", batch_size), ("max_pixels", max_pixels), ("actors", actors)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie within [0, 1]; got {threshold}")


def _settings(
    model: Any, backend: str, threshold: float, nms: float | None, trust_remote_code: bool, tiling: Tiling | None
) -> dict[str, Any]:
    if not callable(model):
        return settings_of(model, backend, threshold, trust_remote_code, tiling, nms=nms)
    name = f"{getattr(model, '__module__', '')}.{getattr(model, '__qualname__', type(model).__qualname__)}"
    cut = {} if tiling is None else {"tiles": str(tiling)}
    return {"model": name, "model_identity": name, "backend": backend, "threshold": threshold, **cut}


def _earlier(parts: Parts, out: str | Path, settings: Mapping[str, Any], fresh: bool) -> dict[str, Any] | None:
    """Give the header of the run to go on with; refuse one that cannot be gone on with."""
    journal = Path(parts.out.path) / JOURNAL
    if parts.out.is_local and journal.exists():
        if not fresh:
            raise ValueError(
                f"{out} holds a run without --engine ray: go on without it, take another folder, or --fresh"
            )
        journal.unlink()
    header = None if fresh else parts.header()
    check_settings(header, settings, out)
    return header


def _begin(
    parts: Parts, header: dict[str, Any] | None, known: Mapping[str, Any], settings: Mapping[str, Any], out: Any
) -> dict[str, Any]:
    """Write the header of a new run, or check the spec against that of the one to go on with."""
    settings = with_spec(settings, known["spec"])
    if header is not None:
        check_settings(header, settings, out)
        return header
    header = {"version": known["version"], "settings": settings, "class_names": known["class_names"]}
    parts.start(header)
    return header


def _loader(model: Any, *options: Any) -> Callable[[], Detector]:
    if callable(model):
        return model  # type: ignore[no-any-return]
    # A worker's current folder may be another.
    return partial(_load, Path(model).resolve() if Path(model).exists() else model, *options)


def _load(
    model: str | Path,
    backend: str,
    device: str | None,
    threshold: float,
    nms: float | None,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> Detector:
    from detpost.detector import Detector

    return Detector.load(
        model, backend, device, threshold, nms=nms, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )


def _describe(load: Callable[[], Detector]) -> tuple[Prepare, dict[str, Any]]:
    """Load a detector where detectors will run, and give what the driver has to know of it."""
    import detpost

    detector = load()
    names = {str(label): name for label, name in detector.class_names.items()}
    return detector.prepare, {"version": detpost.__version__, "class_names": names, "spec": detector.spec}


def _fetched(reference: Any) -> Keys:
    import ray

    keys: Keys = ray.get(reference)
    return keys


@contextlib.contextmanager
def _joined(ray: Any, address: str | None, actors: int | None) -> Iterator[None]:
    """Join a cluster, or start Ray on this machine and stop it in the end."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    is_ours = not ray.is_initialized()
    if is_ours and address is not None:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise OSError(f"no Ray cluster at {address!r}: {reason}") from error
    elif is_ours:
        _start(ray, max(os.cpu_count() or 1, (actors or 1) + 1), **options)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    bars = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        if is_ours:
            ray.shutdown()


def _start(ray: Any, cpus: int, **options: Any) -> None:
    """Start Ray on this machine; on a busy one its own patience of half a minute may not be enough at once."""
    shared = _shared_bytes()
    for tries_left in (2, 1, 0):
        try:
            ray.init(address="local", num_cpus=cpus, object_store_memory=shared, include_dashboard=False, **options)
            return
        except Exception as error:  # Ray raises no narrower class
            ray.shutdown()
            if not tries_left or "timed out" not in str(error):
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise RuntimeError(f"Ray does not start here: {reason}") from error


def _shared_bytes() -> int:
    """Tell how much memory Ray's processes may share: half of what is free where it lies."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
    return max(_LEAST_SHARED_BYTES, min(_SHARED_BYTES, shutil.disk_usage(place).free // 2))


class _Shares(NamedTuple):
    """How many detectors there are, and what each stage takes of the processors and GPUs."""

    actors: int
    num_cpus: float
    num_gpus: float
    decoding: float

    @property
    def of_an_actor(self) -> dict[str, Any]:
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}


def _shares(ray: Any, device: str | None, actors: int | None) -> _Shares:
    """Share out what Ray has."""
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 1.0), int(resources.get("GPU", 0))
    on_gpu = gpus > 0 if device is None else device.startswith("cuda")
    if on_gpu and not gpus:
        raise ValueError(f"device {device!r} needs a GPU, and Ray has none: take 'cpu', or join a cluster that has")
    count = actors or (gpus if on_gpu else max(1, int(cpus) // 2))
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    # One processor is left for decoding, however many detectors there are, and when the largest node is lost, too: Ray
    # starts the lost detectors again on those that are left, and a run whose processors are all theirs stands still.
    left = cpus - (max(nodes) if len(nodes) > 1 else 0.0) - 1
    # Stages that ask for the same become one.
    share = max(0.001, min(0.99, left / count)) if cpus > 1 else 0.5
    return _Shares(count, math.floor(share * 1000) / 1000, float(on_gpu), 1.0 if cpus > 1 else 0.4)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Raise what a worker raised, in place of Ray's account of all that passed it on."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        chain: list[BaseException] = [error]
        while (inner := getattr(chain[-1], "cause", None) or chain[-1].__cause__) is not None:
            chain = [*chain, inner]
        cause = chain[-1]
        line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        if isinstance(cause, ray.exceptions.RayError):  # the worker's own error is text in Ray's account of it
            account = "\n".join(map(str, chain))
            raised = re.findall(r"^(?!ray\.)(?:\w+\.)*\w+(?:Error|Exception): (.+)$", account, re.MULTILINE)
            line = raised[-1] if raised else line
        kinds = (OSError, ValueError, TypeError, ImportError)
        kind = next((kind for kind in kinds if isinstance(cause, kind)), RuntimeError)
        raise kind(line) from error
