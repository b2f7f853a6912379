"""The stages of a distributed run: decode and resize; detect; write a part. Tables of Arrow go from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from detpost.image_files import blocks_kept
from detpost.images import Prepare, PreparedImage
from detpost.runs.batches import detect_batch, failure_text
from detpost.runs.parquet import import_pyarrow, table_of
from detpost.runs.parts import Parts, columns
from detpost.runs.reading import Loaded
from detpost.runs.tiles import INPUTS_AT_ONCE, Tile, Tiling

if TYPE_CHECKING:
    import pyarrow

    from detpost.detector import Detector

__all__ = ["Decode", "Detect", "Write"]

# Gives the images of a block: a name, a key, and what loads it for the network.
Images = Callable[[Mapping[str, "np.ndarray[Any, Any]"]], Iterator[tuple[str, bytes, Callable[[Prepare], Loaded]]]]

# A black image, (3, H, W), that every detector takes: where it does not go through either, the model fails.
_PROBE = (3, 96, 128)


class Decode:
    """Decodes and resizes: a task on a CPU.

    Args:
        images: of a block.
        prepare: what the network's detector does to each image.
        batch_size: images that make one table; or fewer, where they have eight times as many tiles.
    """

    def __init__(self, images: Images, prepare: Prepare, batch_size: int) -> None:
        self._images, self._prepare, self._batch_size = images, prepare, batch_size

    def __call__(self, block: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[pyarrow.Table]:
        """Give what was read, an image that cannot be read as a row with its error."""
        with blocks_kept():
            yield from self._tables(block)

    def _tables(self, block: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[pyarrow.Table]:
        waiting: list[tuple[Loaded, bytes]] = []
        for _, key, load in self._images(block):
            waiting.append((load(self._prepare), key))
            tiles = sum(len(loaded.tiles) for loaded, _ in waiting)
            if len(waiting) == self._batch_size or tiles >= INPUTS_AT_ONCE * self._batch_size:
                yield _packed(waiting)
                waiting = []
        yield _packed(waiting)


class Detect:
    """Detects, with the post-processing: an actor with one detector.

    Args:
        load: makes the detector.
        tiling: how images were cut; ``None`` where they were not.
        inputs: most that go through the network at once where they were.
    """

    def __init__(self, load: Callable[[], Detector], tiling: Tiling | None = None, inputs: int = 1) -> None:
        self._detector = load()
        self._tiling, self._inputs = tiling, inputs
        self._gone_through = False

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """Give the rows of the result.

        Raises:
            RuntimeError, ValueError, ZeroDivisionError: the model fails, and not for an image's sake.
        """
        batch = _unpacked(table)
        ids = {loaded.name: 0 for loaded in batch}
        rows = detect_batch(self._detector, batch, ids, True, self._tiling, self._inputs)
        if not self._gone_through:
            if all("error" in row for row in rows):
                self._detector.predict(torch.zeros(_PROBE))
            self._gone_through = True
        keyed = [{**row, "image_id": None, "key": key} for row, key in zip(rows, table["key"].to_pylist(), strict=True)]
        return table_of(keyed, columns())


class Write:
    """Writes rows as one part.

    Args:
        parts: where.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """Write them, and give how many there are and the part's name."""
        name = self._parts.write(table) if table.num_rows else None
        pa = import_pyarrow()
        return pa.table({"images": pa.array([table.num_rows], pa.int64()), "part": pa.array([name], pa.string())})


def _packed(images: Sequence[tuple[Loaded, bytes]]) -> pyarrow.Table:
    """Bring what was read into a table."""
    pa = import_pyarrow()
    rows = [_row(loaded, key) for loaded, key in images]
    input_kinds: dict[str, Any] = {
        **dict.fromkeys(("dtype", "shape"), pa.string()),
        **dict.fromkeys(("pixels", "mask"), pa.large_binary()),
    }
    kinds: dict[str, Any] = {
        **dict.fromkeys(("name", "key"), pa.binary()),
        "error": pa.string(),
        **dict.fromkeys(("height", "width"), pa.int32()),
        **input_kinds,
        "tiles": pa.list_(pa.struct({**dict.fromkeys(("x", "y", "height", "width"), pa.int32()), **input_kinds})),
    }
    return pa.table({name: pa.array([row.get(name) for row in rows], kind) for name, kind in kinds.items()})


def _row(loaded: Loaded, key: bytes) -> dict[str, Any]:
    # A name in no valid encoding is no text; it becomes that where the result is written.
    row = {"name": loaded.name.encode("utf-8", "surrogatepass"), "key": key}
    if loaded.failure is not None:
        return {**row, "error": failure_text(*loaded.failure)}
    if loaded.ready is None:
        return {**row, "error": loaded.error.encode("utf-8", "backslashreplace").decode()}
    tiles = [{**dict(zip("xy", tile.corner, strict=True)), **_plain(tile.ready)} for tile in loaded.tiles]
    return {**row, **_plain(loaded.ready), "tiles": tiles}


def _plain(ready: PreparedImage) -> dict[str, Any]:
    """Give what Arrow holds of a network's input."""
    pixels = ready.pixels.contiguous().numpy()  # (3, h, w)
    mask = None if ready.mask is None else ready.mask.to(torch.uint8).contiguous().numpy().tobytes()
    return {
        **dict(zip(("height", "width"), ready.size, strict=True)),
        **{"dtype": pixels.dtype.str, "shape": " ".join(map(str, pixels.shape)), "pixels": pixels.tobytes()},
        "mask": mask,
    }


def _unpacked(table: pyarrow.Table) -> list[Loaded]:
    return [_loaded(row) for row in table.to_pylist()]


def _loaded(row: Mapping[str, Any]) -> Loaded:
    name = row["name"].decode("utf-8", "surrogatepass")
    if row["error"] is not None:
        return Loaded(name, -1, -1, error=row["error"])
    tiles = [Tile((tile["x"], tile["y"]), _ready(tile)) for tile in row["tiles"]]
    return Loaded(name, -1, -1, ready=_ready(row), tiles=tuple(tiles))


def _ready(row: Mapping[str, Any]) -> PreparedImage:
    shape = tuple(map(int, row["shape"].split()))
    # A copy: Arrow's memory cannot be written to, and a tensor may be.
    pixels = torch.from_numpy(np.frombuffer(row["pixels"], row["dtype"]).reshape(shape).copy())
    mask = row["mask"]
    if mask is not None:
        mask = torch.from_numpy(np.frombuffer(mask, np.uint8).reshape(shape[1:]).astype(np.bool_))
    return PreparedImage(pixels, (row["height"], row["width"]), mask)
