"""Images read, decoded and resized by threads ahead of the network, in batches."""

from __future__ import annotations

import contextlib
import itertools
import stat
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from detpost.image_files import UprightImage, decoding_bytes, open_image, reduce_decoding
from detpost.images import FileRows, Prepare, PreparedImage, Rows, TensorRows, opened
from detpost.runs.memory import Memory
from detpost.runs.originals import Originals
from detpost.runs.tiles import INPUTS_AT_ONCE, Tile, Tiling, cut

__all__ = ["Loaded", "Reader", "identity_of", "load_content", "load_pixels", "prepared"]

# A batch ends early once its images, as RGB, have this many bytes.
BATCH_BYTES = 512 * 1024**2
# A file that is decoded at a reduced scale keeps at least so many times the pixels of the network's input in each
# direction, for the antialiased resize to have its share.
DRAFT_MARGIN = 2


class Loaded(NamedTuple):
    """One file as it was read: what the network takes, or why there is nothing.

    Args:
        name: its relative path.
        size: of the file, bytes.
        mtime_ns: when it was last changed, nanoseconds.
        ready: what the network takes; ``None`` where the file could not be read or prepared.
        error: why it could not be read; empty where it could.
        failure: what preparing it raised, and its (height, width).
        picture: (3, H, W), uint8, to draw on, where that was asked for and there was room.
        tiles: what the network takes beside the whole image, where it is cut.
    """

    name: str
    size: int
    mtime_ns: int
    ready: PreparedImage | None = None
    error: str = ""
    failure: tuple[Exception, tuple[int, int]] | None = None
    picture: Tensor | None = None
    tiles: tuple[Tile, ...] = ()

    @property
    def rgb_bytes(self) -> int:
        """How many bytes the whole image has as RGB."""
        height, width = self.ready.size if self.ready is not None else (0, 0)
        return 3 * height * width


def identity_of(path: Path) -> tuple[int, int]:
    """Give a file's size and the time of its last change, by which a later run knows it; -1 where nobody may ask."""
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


class Reader:
    """Reads images for a network, and again for drawing where there was no room to keep them.

    Args:
        root: the folder that names are relative to.
        prepare: what the network's detector does to each image.
        batch_size: most images in a batch.
        max_pixels: images with more are not read.
        workers: threads.
        memory: room for what is decoded at once.
        originals: keeps images to draw on; ``None`` where nothing is drawn.
        tiling: how images are cut; ``None`` where they are not.
        draft: decode JPEG files at a reduced scale where the network's input is far smaller.
    """

    def __init__(
        self,
        root: Path,
        prepare: Prepare,
        batch_size: int,
        max_pixels: int,
        workers: int,
        memory: Memory,
        originals: Originals | None,
        tiling: Tiling | None = None,
        draft: bool = False,
    ) -> None:
        self._root, self._prepare = root, prepare
        self._batch_size, self._max_pixels, self._workers = batch_size, max_pixels, workers
        self._memory, self._originals, self._tiling = memory, originals, tiling
        self._least = prepare.input_size if draft else None
        self._most_tiles = INPUTS_AT_ONCE * batch_size

    def batches(self, names: Sequence[str]) -> Generator[list[Loaded], None, None]:
        """Give batches in order, read ahead by threads.

        Where a batch ends depends on the images from its beginning on and on nothing else, so a resumed run cuts the
        same batches as an uninterrupted one.
        """
        rest = iter(names)
        waiting: deque[Future[Loaded]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="detpost-read")
        try:
            batch: list[Loaded] = []
            while True:
                ahead = itertools.islice(rest, self._ahead(waiting))
                waiting.extend(pool.submit(self.read, name) for name in ahead)
                if waiting:
                    batch.append(waiting.popleft().result())
                if batch and (self._is_full(batch) or not waiting):
                    yield batch
                    batch = []
                elif not waiting:
                    break
        except BaseException:  # readers that wait for room would wait for ever
            self._memory.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _is_full(self, batch: Sequence[Loaded]) -> bool:
        size = sum(loaded.rgb_bytes for loaded in batch)
        tiles = sum(len(loaded.tiles) for loaded in batch)
        return len(batch) == self._batch_size or size >= BATCH_BYTES or tiles >= self._most_tiles

    def _ahead(self, waiting: Sequence[Future[Loaded]]) -> int:
        """Say how many more images may be read: where they are cut, as long as a batch's tiles do not wait yet."""
        most = 2 * self._batch_size + self._workers - len(waiting)
        if self._tiling is None:
            return most
        done = [future.result() for future in waiting if future.done()]
        if sum(len(loaded.tiles) for loaded in done) >= self._most_tiles:
            return 0
        return max(0, min(most, self._workers + 1 - (len(waiting) - len(done))))

    def read(self, name: str) -> Loaded:
        """Read one image; what is wrong with it is part of the answer."""
        path = self._root / name
        identity = identity_of(path)
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
                return Loaded(name, *identity, error="not a regular file")
            return self._decode(path, Loaded(name, *identity))
        except FileNotFoundError:
            reason = "a link to a file that does not exist" if path.is_symlink() else "the file is gone"
        except OSError as error:
            # The file is named beside it: what remains of the line is the reason.
            reason = (error.strerror or str(error)).removeprefix(f"cannot read image {str(path)!r}: ")
        return Loaded(name, *identity, error=reason)

    def _decode(self, path: Path, loaded: Loaded) -> Loaded:
        with open_image(path, self._max_pixels) as file:
            room = self._bytes_of(file)
            size = None
            if self._least is not None:
                size = reduce_decoding(file, *(DRAFT_MARGIN * extent for extent in self._least))
            with self._memory.working(room):
                return self._decoded(file, loaded, size)

    def _decoded(self, file: Any, loaded: Loaded, size: tuple[int, int] | None) -> Loaded:
        """Decode an opened file; the (height, width) is the whole image's, where it is decoded at a reduced scale."""
        with contextlib.closing(file):  # the pixels go before their room does
            image: Rows = FileRows(UprightImage(file))
            picture = self._originals.keep(image) if self._originals else None
            if picture is not None and picture.shape[1:] == (image.height, image.width):
                image = TensorRows(picture)
            result = prepared(image, loaded, self._prepare, self._tiling, size)
            if result.ready is not None:
                return result._replace(picture=picture)
            if self._originals:
                self._originals.let_go(picture)
            return result

    def _bytes_of(self, file: Any) -> int:
        """Tell how much memory decoding takes, and a row of tiles as RGB, whichever way the image is turned."""
        row = 0 if self._tiling is None else 3 * self._tiling.size * max(file.size)
        return decoding_bytes(file) + row


def load_content(name: str, content: bytes, prepare: Prepare, max_pixels: int, tiling: Tiling | None = None) -> Loaded:
    """Decode a file that is in memory already; as :meth:`Reader.read`."""
    loaded = Loaded(name, len(content), -1)
    try:
        with open_image(name, max_pixels, content) as file:
            return prepared(FileRows(UprightImage(file)), loaded, prepare, tiling)
    except OSError as error:
        return loaded._replace(error=str(error).removeprefix(f"cannot read image {name!r}: "))


def load_pixels(name: str, pixels: Any, prepare: Prepare, max_pixels: int, tiling: Tiling | None = None) -> Loaded:
    """Take an image that is decoded already, as :func:`detpost.images.read_image` takes it."""
    loaded = Loaded(name, -1, -1)
    try:
        with opened(pixels) as image:
            if image.height * image.width > max_pixels:
                return loaded._replace(error=f"{image.width} x {image.height} pixels are more than {max_pixels}")
            return prepared(image, loaded, prepare, tiling)
    except (TypeError, ValueError) as error:
        return loaded._replace(error=" ".join(str(error).split()))


def prepared(
    image: Rows,
    loaded: Loaded,
    prepare: Prepare,
    tiling: Tiling | None = None,
    size: tuple[int, int] | None = None,
) -> Loaded:
    """Do to a decoded image what the network's detector does, whole and in tiles; what it raises is in the answer.

    Args:
        image: decoded.
        loaded: what is known of it.
        prepare: what the network's detector does to each image.
        tiling: how it is cut; ``None`` where it is not.
        size: its (height, width), where it was decoded at a reduced scale.

    Returns:
        The same, with what the network takes, or with what was raised.
    """
    try:
        tiles = () if tiling is None else cut(image, tiling, prepare)
        ready = prepare.one(image)
        return loaded._replace(ready=ready if size is None else ready._replace(size=size), tiles=tiles)
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        return loaded._replace(failure=(error, size or (image.height, image.width)))
