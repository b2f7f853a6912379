"""Writing artifacts so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from detpost.export.decode_graph import import_onnx

if TYPE_CHECKING:
    import onnx

__all__ = ["replace_when_whole", "write_onnx"]

# Protocol buffers hold 2 GiB at the most; larger weights go to a file beside the model.
_MOST_BYTES_INSIDE = 2**31 - 2**20


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


def write_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, its weights beside it where they are too many for one file."""
    onnx = import_onnx()
    with replace_when_whole(path) as temporary:
        if model.ByteSize() <= _MOST_BYTES_INSIDE:
            onnx.save_model(model, temporary)
            return
        # A new name for the weights each time: the old model keeps its old weights until it is replaced.
        data = Path(tempfile.mkstemp(prefix=f"{path.name}.", suffix=".data", dir=path.parent)[1])
        try:
            onnx.save_model(
                model, temporary, save_as_external_data=True, all_tensors_to_one_file=True, location=data.name
            )
            os.replace(temporary.parent / data.name, data)
        except BaseException:
            data.unlink(missing_ok=True)
            raise
