"""Images to draw on: kept from the reading where there is room, read again where there was none."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from detpost.image_files import UprightImage, decoding_bytes, open_image
from detpost.images import MOST_PIXELS, FileRows, Rows, shrunk
from detpost.runs.memory import Memory

__all__ = ["Originals"]

# The image itself, where it was read again, and Pillow's copy with a fourth byte a pixel.
_DRAWING_COPIES = 3


class Originals:
    """Images as uint8 tensors (3, H, W); a very large one is a whole number of times smaller.

    Args:
        root: the folder that names are relative to.
        max_pixels: images with more are not read.
        memory: room for them.
    """

    def __init__(self, root: Path, max_pixels: int, memory: Memory) -> None:
        self._root, self._max_pixels, self._memory = root, max_pixels, memory

    def keep(self, image: Rows) -> Tensor | None:
        """Keep an image that was just decoded, if there is room."""
        times = _times(image)
        size = 3 * max(1, image.height // times) * max(1, image.width // times)
        if not self._memory.keep(size):
            return None
        try:
            return _original(image)
        except BaseException:
            self._memory.let_go(size)
            raise

    def let_go(self, kept: Tensor | None) -> None:
        """Give back the room of an image that nobody will draw on."""
        if kept is not None:
            self._memory.let_go(kept.numel())

    @contextlib.contextmanager
    def drawable(self, name: str, kept: Tensor | None = None) -> Iterator[Tensor]:
        """Give an image to draw on, with room for the copies that drawing makes.

        Args:
            name: its relative path.
            kept: what :meth:`keep` gave; its room is given back in the end.

        Yields:
            The image.

        Raises:
            OSError: it cannot be read any more.
        """
        try:
            image = self._read(name) if kept is None else kept
            with self._memory.working(_DRAWING_COPIES * image.numel()):
                yield image
        finally:
            self.let_go(kept)

    def _read(self, name: str) -> Tensor:
        with (
            open_image(self._root / name, self._max_pixels) as file,
            self._memory.working(decoding_bytes(file)),
            contextlib.closing(file),
        ):
            return _original(FileRows(UprightImage(file)))


def _times(image: Rows) -> int:
    return max(1, math.ceil(math.sqrt(image.height * image.width / MOST_PIXELS)))


def _original(image: Rows) -> Tensor:
    times = _times(image)
    return image.rows(0, image.height) if times == 1 else shrunk(image, times)
