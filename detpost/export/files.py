"""Writing artifacts so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from detpost.export.graph import import_onnx
from detpost.export.weights import load_weights, move_weights_out, weights_size

if TYPE_CHECKING:
    import onnx

__all__ = ["replace_when_whole", "write_onnx"]

# Protocol buffers hold 2 GiB at the most, and the graph needs room too; larger weights go to a file beside the model.
_MOST_BYTES_INSIDE = 2**31 - 2**26


@contextlib.contextmanager
def replace_when_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its place when the block ends without an error.

    An interruption leaves what was there before, and nothing else.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary = folder / path.name
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_onnx(model: onnx.ModelProto, path: Path, folder: Path | None, check: Callable[[Path], None]) -> None:
    """Write a model, its weights beside it where they are too many for one file.

    Args:
        model: changed where its weights move out.
        path: the file; the weights' name is made of it and of their content, so that the old model keeps its old ones.
        folder: what the names of the files that the model refers to are relative to.
        check: called with the model's temporary path before it takes its place; raises to keep it from that.
    """
    onnx = import_onnx()
    fresh: list[Path] = []
    try:
        with replace_when_whole(path) as temporary:
            if weights_size(model, folder) <= _MOST_BYTES_INSIDE:
                load_weights(model, folder)
                onnx.save_model(model, temporary)
                check(temporary)
                return
            data = move_weights_out(model, folder, temporary.parent, path.name)
            onnx.save_model(model, temporary)
            check(temporary)
            placed = path.parent / data.name
            fresh += [] if placed.exists() else [placed]
            os.replace(data, placed)
    except BaseException:
        for placed in fresh:
            placed.unlink(missing_ok=True)
        raise
