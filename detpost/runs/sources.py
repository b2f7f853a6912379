"""Where a distributed run's images are, and how a worker gets at them: listed files, or the columns of a dataset."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detpost.images import Prepare
from detpost.runs.find_images import SUFFIXES, FoundImages, find_images
from detpost.runs.memory import Memory
from detpost.runs.parts import Keys, Place, is_among, key_array, key_of, place_of
from detpost.runs.reading import Loaded, Reader, identity_of, load_content, load_pixels
from detpost.runs.tiles import Tiling

__all__ = ["Columns", "Listed", "Listing", "list_images", "packed_files"]

Block = Mapping[str, "np.ndarray[Any, Any]"]
Image = tuple[str, bytes, Callable[[Prepare], Loaded]]

NAME_COLUMNS = ("file_name", "path", "filename", "__key__", "key", "id", "uid")
IMAGE_COLUMNS = ("image", "bytes", "img", "image_bytes", "data")
PACKED = {"parquet": (".parquet",), "webdataset": (".tar", ".tar.gz", ".tgz")}
# More than this times the pixels that are allowed is no image of so many pixels.
_MOST_BYTES_PER_PIXEL = 16


class Listing(NamedTuple):
    """Image files, wherever they are.

    Args:
        place: the folder that the names are relative to.
        names: relative paths with ``/``, sorted, each once.
        keys: what each is known by, its size and the time of its last change included.
        unread: folders that could not be looked into, and why.
    """

    place: Place
    names: list[str]
    keys: list[bytes]
    unread: tuple[tuple[str, str], ...] = ()


def list_images(sources: Sequence[str | Path] | FoundImages) -> Listing:
    """List images.

    Args:
        sources: as :func:`detpost.runs.find_images.find_images` takes them; or one address of a folder or a file, as
            ``s3://bucket/photos``.

    Returns:
        The images.

    Raises:
        OSError: a source that does not exist.
        ValueError: no images, or several sources of which one is an address.
    """
    if not isinstance(sources, FoundImages):
        addresses = [str(source) for source in sources if "://" in str(source)]
        if addresses and len(sources) > 1:
            raise ValueError(f"{addresses[0]} is one of {len(sources)} sources: name one folder at a time")
        place = place_of(addresses[0]) if addresses else None
        if place is not None and not place.is_local:
            return _list_address(addresses[0], place)
        sources = find_images(sources if place is None else [place.path])
    root, names, unread = sources
    keys = [key_of(name, *identity_of(root / name)) for name in names]
    return Listing(place_of(root), names, keys, unread)


def _list_address(address: str, place: Place) -> Listing:
    found = place.files(recursive=True)
    if not found:
        parent, _, base = place.path.rpartition("/")
        found = [info for info in Place(place.filesystem, parent).files() if info.base_name == base]
        place = Place(place.filesystem, parent)
    if not found:
        raise FileNotFoundError(f"no image or folder at {address!r}")
    start = len(place.path.rstrip("/")) + 1
    by_name = {info.path[start:]: info for info in found if posixpath.splitext(info.path)[1].lower() in SUFFIXES}
    if not by_name:
        raise ValueError(f"no images in {address}: looked for files ending in {' '.join(sorted(SUFFIXES))}")
    names = sorted(name for name in by_name if not any(part.startswith(".") for part in name.split("/")))
    return Listing(place, names, [key_of(name, by_name[name].size, by_name[name].mtime_ns or -1) for name in names])


def packed_files(sources: Sequence[str | Path]) -> tuple[str, list[str], Any] | None:
    """Find sources that hold many images a file.

    Args:
        sources: Parquet files or webdataset's tar files, patterns of them, or one folder or address of them.

    Returns:
        ``"parquet"`` or ``"webdataset"``, the paths, and the file system they are in; ``None`` for images of their own.
    """
    import glob

    texts = [str(source) for source in sources]
    paths = [path for text in texts for path in (sorted(glob.glob(text)) if glob.has_magic(text) else [text])]
    for kind, endings in PACKED.items():
        if paths and all(path.lower().endswith(endings) and not Path(path).is_dir() for path in paths):
            places = [place_of(path) for path in paths]
            return kind, [place.path for place in places], places[0].filesystem
    if len(texts) != 1:
        return None
    place = place_of(texts[0])
    found = _paths_in(place) if paths == texts else []
    for kind, endings in PACKED.items():
        inside = sorted(path for path in found if path.lower().endswith(endings))
        if inside and not any(posixpath.splitext(path)[1].lower() in SUFFIXES for path in found):
            return kind, inside, place.filesystem
    return None


def _paths_in(place: Place) -> list[str]:
    """List a folder's files."""
    if not place.is_local:
        return [info.path for info in place.files()]
    # pyarrow's own list ends at the first name that is not UTF-8.
    folder = Path(place.path)
    return [str(path) for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


class Listed:
    """Loads listed files, whose names and keys a block has.

    Args:
        place: the folder that the names are relative to.
        max_pixels: images with more are not read.
        tiling: how they are cut; ``None`` where they are not.
    """

    def __init__(self, place: Place, max_pixels: int, tiling: Tiling | None = None) -> None:
        self._place, self._max_pixels, self._tiling = place, max_pixels, tiling

    def __call__(self, block: Block) -> Iterator[Image]:
        """Give the images of a block."""
        for name, key in zip(block["name"], block["key"], strict=True):
            text = bytes(name).decode("utf-8", "surrogatepass")
            yield text, bytes(key), partial(self._load, text)

    def _load(self, name: str, prepare: Prepare) -> Loaded:
        if self._place.is_local:
            return Reader(Path(self._place.path), prepare, 1, self._max_pixels, 1, Memory(), None, self._tiling).read(
                name
            )
        place = self._place.below(name)
        try:
            with place.filesystem.open_input_stream(place.path) as file:
                content = file.read(_MOST_BYTES_PER_PIXEL * self._max_pixels)
        except FileNotFoundError:
            return Loaded(name, -1, -1, error="the file is gone")
        except OSError as error:
            return Loaded(name, -1, -1, error=" ".join(str(error).split())[:200] or "cannot be read")
        return load_content(name, content, prepare, self._max_pixels, self._tiling)


class Columns:
    """Loads images out of a dataset's columns.

    Args:
        name: the column of names; ``None`` looks for one.
        image: the column of images; ``None`` looks for one.
        done: the sorted keys of what is finished; or what gives them, on the worker.
        max_pixels: images with more are not read.
        tiling: how they are cut; ``None`` where they are not.
    """

    def __init__(
        self,
        name: str | None,
        image: str | None,
        done: Callable[[], Keys],
        max_pixels: int,
        tiling: Tiling | None = None,
    ) -> None:
        self._name, self._image, self._done = name, image, done
        self._max_pixels, self._tiling = max_pixels, tiling

    def __call__(self, block: Block) -> Iterator[Image]:
        """Give the images of a block that are not finished.

        Raises:
            ValueError: no column of names or of images.
        """
        if not any(len(values) for values in block.values()):
            return
        names, images = self._columns(block)
        keys = [key_of(name) for name in names]
        finished = is_among(key_array(keys), self._done())
        for name, key, image, is_finished in zip(names, keys, images, finished, strict=True):
            if not is_finished:
                yield name, key, partial(self._load, name, image)

    def _columns(self, block: Block) -> tuple[list[str], list[Any]]:
        """Find the names and the images."""
        image = self._image or next((name for name in IMAGE_COLUMNS if name in block), None)
        endings = [name for name in block if f".{name.lower()}" in SUFFIXES]
        if image is None and endings:  # webdataset names a column by the ending of its files
            rows = zip(*(block[ending] for ending in endings), strict=True)
            images = [next((value for value in row if value is not None), None) for row in rows]
        elif image is None or image not in block:
            raise ValueError(f"no column of images among {', '.join(block)}: name it with --image-column")
        else:
            images = list(block[image])
        name = self._name or next((name for name in NAME_COLUMNS if name in block), None)
        if name is not None and name in block:
            return [_text(value) for value in block[name]], images
        paths = [value.get("path") if isinstance(value, Mapping) else None for value in images]
        if name is None and images and all(paths):
            return [_text(path) for path in paths], images
        raise ValueError(f"no column of names among {', '.join(block)}: name it with --name-column")

    def _load(self, name: str, image: Any, prepare: Prepare) -> Loaded:
        content = image.get("bytes") if isinstance(image, Mapping) else image
        if content is None:
            return Loaded(name, -1, -1, error="there is no image in its row")
        if isinstance(content, (bytes, bytearray, memoryview, np.bytes_)):
            return load_content(name, bytes(content), prepare, self._max_pixels, self._tiling)
        return load_pixels(name, np.asarray(content), prepare, self._max_pixels, self._tiling)


def _text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
