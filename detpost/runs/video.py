"""Detection in a video: frames in, results with their times out; decoding, the network and writing overlap."""

from __future__ import annotations

import contextlib
import csv
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch

from detpost.images import TensorRows
from detpost.runs.batches import detect_batch
from detpost.runs.reading import Loaded, prepared
from detpost.runs.results import CSV_HEADER, csv_rows, detections_of, replaced
from detpost.runs.tiles import Tiling

if TYPE_CHECKING:
    from detpost.detector import Detector

__all__ = ["FORMATS", "VideoSummary", "detect_video", "is_video"]

FORMATS = ("jsonl", "csv")
ANNOTATED = "annotated.mp4"
SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        *("3gp", "avi", "flv", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "ogv", "ts", "webm", "wmv"),
        *("m3u8", "mpd"),
    )
)
# Seconds without a byte after which a stream is at its end.
_SILENCE = 30.0
_STREAMS = frozenset({"rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "rtp"})

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class VideoSummary:
    """What was done.

    Args:
        frames: how many were detected in.
        detections: in all of them.
        unreadable: packets of the file or stream that could not be decoded.
        stopped: what ended it before its time, Ctrl-C or what the source raised; the results are those of the frames
            until then. Empty where nothing did.
        files: what was written.
    """

    frames: int
    detections: int
    unreadable: int
    stopped: str
    files: tuple[Path, ...]


class _Frame(NamedTuple):
    """One frame: which, when (seconds, and ticks of the time base), what the network takes, and what is drawn on."""

    number: int
    time: float
    ticks: int
    loaded: Loaded


def is_video(source: str | Path) -> bool:
    """Tell a video from images: by the ending of a file or address, or as the address of a stream.

    Example:
        >>> is_video("clip.MP4"), is_video("rtsp://camera/1"), is_video("photos")
        (True, True, False)
    """
    text = str(source)
    address = urlsplit(text) if "://" in text else None
    if address is not None and address.scheme.lower() in _STREAMS:
        return True
    name = text if address is None else address.path
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not Path(text).is_dir()


def detect_video(
    source: str | Path,
    out: str | Path,
    *,
    model: str | Path = "tiny",
    backend: str = "eager",
    device: str | None = None,
    batch_size: int = 8,
    threshold: float = 0.5,
    nms: float | None = None,
    formats: Sequence[str] = ("jsonl",),
    draw: bool = False,
    stride: int = 1,
    start: float = 0.0,
    end: float | None = None,
    fresh: bool = False,
    tiling: Tiling | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> VideoSummary:
    """Detect in the frames of a video file or stream.

    One thread decodes and resizes, the caller's runs the network, another draws and writes; between them waits a batch
    each. Frames are turned upright as a player shows them. Ctrl-C ends a stream as its own end does.

    Args:
        source: a file or an address that FFmpeg opens: ``rtsp://``, ``https://`` and others.
        out: folder for ``detections.jsonl`` (a line for each frame), ``detections.csv`` (one for each detection) and
            ``annotated.mp4``; made where missing.
        model: as :meth:`detpost.Detector.load` takes it.
        backend: as :meth:`detpost.Detector.load` takes it.
        device: as :meth:`detpost.Detector.load` takes it.
        batch_size: most frames, or tiles of them, that go through the network at once.
        threshold: detections with ``score > threshold`` are kept.
        nms: as :meth:`detpost.Detector.load` takes it.
        formats: ``"jsonl"`` and ``"csv"``.
        draw: whether to write the annotated video, with the frames that were detected in and their times.
        stride: each how manieth frame is detected in, from the first one at ``start`` on.
        start: seconds from the video's beginning; frames before are left out.
        end: likewise; frames at it and after are left out.
        fresh: whether results of an earlier run are written over.
        tiling: cuts frames into tiles; ``None``: the whole alone.
        trust_remote_code: as :meth:`detpost.Detector.load` takes it.
        allow_pickle: as :meth:`detpost.Detector.load` takes it.
        progress: called with how many frames are done and about how many there are, where the file says that.

    Returns:
        What was done.

    Raises:
        ImportError: PyAV is missing; the message names the extra.
        OSError: a source that is not there or is no video.
        ValueError: an argument out of range, no frames in that time, or a folder that has results already.
    """
    _check_arguments(batch_size, threshold, formats, stride, start, end)
    folder = Path(out)
    paths = {name: folder / f"detections.{name}" for name in dict.fromkeys(formats)}
    files = [*paths.values(), *([folder / ANNOTATED] if draw else [])]
    if not fresh and (there := next((path for path in files if path.exists()), None)):
        raise ValueError(f"{there} is there already: take another folder, or --fresh")
    with contextlib.ExitStack() as stack:
        video = stack.enter_context(_Video(source, stride, start, end))
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
        folder.mkdir(parents=True, exist_ok=True)
        writers = [stack.enter_context(_WRITERS[name](path)) for name, path in paths.items()]
        if draw:
            writers = [*writers, stack.enter_context(_annotated(folder / ANNOTATED, video))]
        frames = _batches(video.frames(detector, draw, tiling), batch_size)
        count, detections = _run(detector, video, frames, writers, tiling, batch_size, progress)
        if count == 0:
            raise ValueError(f"{source} has no frame that can be decoded from {start:g} s on")
    return VideoSummary(count, detections, video.unreadable, video.stopped, tuple(files))


def _check_arguments(
    batch_size: int, threshold: float, formats: Sequence[str], stride: int, start: float, end: float | None
) -> None:
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(
            f"results of a video are written as {' or '.join(FORMATS)}; got {', '.join(unknown) or 'none'}"
        )
    for name, value in (("batch_size", batch_size), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie within [0, 1]; got {threshold}")
    if start < 0 or (end is not None and end <= start):
        raise ValueError(f"start and end must be seconds, 0 <= start < end; got {start:g} and {end}")


# ----------------------------------------------------------------------------------------------------------------------
# Frames in
# ----------------------------------------------------------------------------------------------------------------------


class _Video:
    """An open file or stream.

    Args:
        source: as of :func:`detect_video`, and so are the others.
        stride: likewise.
        start: likewise.
        end: likewise.
    """

    def __init__(self, source: str | Path, stride: int, start: float, end: float | None) -> None:
        self._source, self._stride, self._start, self._end = str(source), stride, start, end
        self.unreadable, self.stopped = 0, ""
        self.closing = threading.Event()

    def __enter__(self) -> _Video:
        try:
            import av
        except ImportError:
            raise ImportError("video needs PyAV: pip install 'detpost[video]'") from None
        try:
            # A camera that says nothing any more ends; a file may lie on a slow disk.
            timeout = _SILENCE if "://" in self._source else None
            self._container: Any = av.open(self._source, timeout=timeout)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise OSError(f"cannot open video {self._source!r}: {reason}") from None
        if not self._container.streams.video:
            self._container.close()
            raise OSError(f"no video in {self._source!r}")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.time_base: Fraction = self._stream.time_base or Fraction(1, 90_000)
        self.rate: Fraction = self._stream.average_rate or Fraction(25)
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def expected(self) -> int | None:
        """Say about how many frames will come; ``None`` of a stream."""
        if not self._container.duration:
            return None
        seconds: float = self._container.duration / 1e6
        seconds = min(seconds, self._end or seconds) - self._start
        return max(0, -(-round(seconds * float(self.rate)) // self._stride))

    def frames(self, detector: Detector, draw: bool, tiling: Tiling | None) -> Iterator[_Frame]:
        """Decode and prepare frames, in their order."""
        taken = -1
        for time, ticks, frame in self._timed():
            if time < self._start:
                continue
            taken = taken + 1
            if self.closing.is_set() or (self._end is not None and time >= self._end):
                return
            if taken % self._stride:
                continue
            pixels = _upright(frame.to_ndarray(format="rgb24"), frame.rotation)  # (H, W, 3)
            image = torch.from_numpy(pixels).permute(2, 0, 1)
            loaded = prepared(TensorRows(image), Loaded(str(taken), -1, -1), detector.prepare, tiling)
            yield _Frame(taken, time, ticks, loaded._replace(picture=image if draw else None))

    def _timed(self) -> Iterator[tuple[float, int, Any]]:
        """Give each frame with its seconds from the video's beginning, and as ticks."""
        import av

        first = self._stream.start_time or 0
        if self._start > 0 and self._container.duration:
            # To the last frame before it that can be decoded by itself; from the beginning where there is no way back.
            with contextlib.suppress(av.error.FFmpegError):
                self._container.seek(first + int(self._start / self.time_base), stream=self._stream)
        last = -1
        for frame in self._decoded():
            if frame.pts is None:  # as of a stream without times
                ticks = last + max(1, round(1 / self.rate / self.time_base)) if last >= 0 else 0
            else:
                ticks = frame.pts - first
            last = max(last + 1, ticks)
            yield float(last * self.time_base), last, frame

    def _decoded(self) -> Iterator[Any]:
        import av

        try:
            for packet in self._container.demux(self._stream):
                try:
                    yield from packet.decode()
                except av.error.InvalidDataError:
                    self.unreadable = self.unreadable + 1
        except av.error.FFmpegError as error:  # what was seen until then is not lost
            self.stopped = f"the source broke off: {error.strerror or error}"


def _upright(pixels: np.ndarray[Any, Any], rotation: int) -> np.ndarray[Any, Any]:
    """Turn a frame by the degrees, counter-clockwise, that a player turns it."""
    return np.ascontiguousarray(np.rot90(pixels, round(rotation / 90) % 4))


def _batches(frames: Iterator[_Frame], size: int) -> Iterator[list[_Frame]]:
    batch: list[_Frame] = []
    for frame in frames:
        batch = [*batch, frame]
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ----------------------------------------------------------------------------------------------------------------------
# Between the threads
# ----------------------------------------------------------------------------------------------------------------------


Write = Callable[[_Frame, Mapping[str, Any]], None]


def _run(
    detector: Detector,
    video: _Video,
    frames: Iterator[list[_Frame]],
    writers: Sequence[Write],
    tiling: Tiling | None,
    batch_size: int,
    progress: Progress | None,
) -> tuple[int, int]:
    """Take batches from a thread, detect, hand them to another; count frames and detections."""

    def write(done: tuple[list[_Frame], list[dict[str, Any]]]) -> None:
        for frame, row in zip(*done, strict=True):
            for writer in writers:
                writer(frame, row)

    expected = video.expected() if progress else None
    count = detections = 0
    with _Consumer(write) as consumer, _Ahead(frames, video.closing) as ahead:
        try:
            for batch in ahead:
                loaded = [frame.loaded for frame in batch]
                ids = {frame.loaded.name: frame.number for frame in batch}
                rows = detect_batch(detector, loaded, ids, count > 0, tiling, batch_size)
                consumer.put((batch, rows))
                count, detections = count + len(rows), detections + sum(len(row.get("scores", ())) for row in rows)
                if progress and expected is not None:
                    progress(count, max(expected, count))
        except KeyboardInterrupt:
            if count == 0:
                raise
            video.stopped = "interrupted"
    return count, detections


class _Ahead:
    """Runs an iterator in a thread, one item ahead of who takes them; what it raises is raised there.

    Args:
        items: the iterator.
        closing: tells the iterator that nobody takes any more.
    """

    def __init__(self, items: Iterable[Any], closing: threading.Event) -> None:
        self._items, self._closing = items, closing
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(1)
        self._thread = threading.Thread(target=self._fill, name="detpost-decode", daemon=True)

    def __enter__(self) -> Iterator[Any]:
        self._thread.start()
        return self._taken()

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        while self._thread.is_alive():  # it may wait for room
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)
        self._thread.join()

    def _fill(self) -> None:
        try:
            for item in self._items:
                self._queue.put(("item", item))
                if self._closing.is_set():
                    return
            self._queue.put(("end", None))
        except BaseException as error:
            self._queue.put(("error", error))

    def _taken(self) -> Iterator[Any]:
        while True:
            kind, item = self._queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise item
            yield item


class _Consumer:
    """Calls a function on one item after the other, in a thread; what it raises is raised by the next call or the end.

    Args:
        consume: the function.
    """

    def __init__(self, consume: Callable[[Any], None]) -> None:
        self._consume = consume
        self._queue: queue.Queue[Any] = queue.Queue(1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="detpost-write", daemon=True)

    def __enter__(self) -> _Consumer:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._check()

    def put(self, item: Any) -> None:
        """Hand an item over, and wait for room."""
        self._check()
        self._queue.put(item)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._consume(item)
                except BaseException as error:
                    self._error = error


# ----------------------------------------------------------------------------------------------------------------------
# Results out
# ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _json_lines(path: Path) -> Iterator[Write]:
    with replaced(path, text=True) as (file, _):

        def write(frame: _Frame, row: Mapping[str, Any]) -> None:
            known = {name: row[name] for name in ("width", "height", "error") if name in row}
            found = {} if "error" in row else {"detections": detections_of(row)}
            file.write(json.dumps({"frame": frame.number, "time": frame.time, **known, **found}) + "\n")

        yield write


@contextlib.contextmanager
def _table(path: Path) -> Iterator[Write]:
    with replaced(path, text=True) as (file, _):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["frame", "time", *CSV_HEADER])

        def write(frame: _Frame, row: Mapping[str, Any]) -> None:
            table.writerows([frame.number, frame.time, *values] for values in csv_rows(row))

        yield write


_WRITERS: Mapping[str, Callable[[Path], contextlib.AbstractContextManager[Write]]] = {
    "jsonl": _json_lines,
    "csv": _table,
}


@contextlib.contextmanager
def _annotated(path: Path, video: _Video) -> Iterator[Write]:
    """Draw and encode frames, with the times that they have, the first one at 0."""
    import av

    from detpost.runs.drawing import draw

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with replaced(path) as (file, _), av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=video.rate)
        stream.pix_fmt = "yuv420p"
        base = video.time_base if codec == "libx264" else Fraction(1, 1000)  # finer ones MPEG-4 cannot say
        stream.codec_context.time_base = base
        first: list[int] = []

        def write(frame: _Frame, row: Mapping[str, Any]) -> None:
            assert frame.loaded.picture is not None
            found = {
                "scores": torch.tensor(row.get("scores", []), dtype=torch.float32, device="cpu"),
                "labels": torch.tensor(row.get("labels", []), dtype=torch.int64, device="cpu"),
                "boxes": torch.tensor(row.get("boxes", []), dtype=torch.float32, device="cpu").reshape(-1, 4),
                "label_names": row.get("names", []),
            }
            drawn = draw(frame.loaded.picture, found)
            height, width = (side + side % 2 for side in drawn.shape[:2])  # the codec's chroma has half of each
            drawn = np.pad(drawn, ((0, height - drawn.shape[0]), (0, width - drawn.shape[1]), (0, 0)), mode="edge")
            if not first:
                first.append(frame.ticks)
                stream.width, stream.height = width, height
            encoded = av.VideoFrame.from_ndarray(drawn, format="rgb24")
            if (stream.width, stream.height) != (width, height):
                encoded = encoded.reformat(width=stream.width, height=stream.height)
            encoded.pts = round((frame.ticks - first[0]) * video.time_base / base)
            encoded.time_base = base
            container.mux(stream.encode(encoded))

        yield write
        if first:
            container.mux(stream.encode(None))
