"""Bounds on what decoding and drawing hold, for threads that share them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["Memory"]

# With what decoders keep beside the pixels, 1 GiB together: what is decoded or drawn at one moment, and what waits
# to be drawn.
WORKING_BYTES = 640 * 1024**2
WAITING_BYTES = 192 * 1024**2


class Memory:
    """Room for what is worked on, which one waits for, and for what waits itself, which one does without.

    Args:
        working: most bytes that are worked on at once. What needs more than that is worked on alone.
        waiting: most bytes that wait.
    """

    def __init__(self, working: int = WORKING_BYTES, waiting: int = WAITING_BYTES) -> None:
        self._limit, self._waiting_limit = working, waiting
        self._working = self._waiting = 0
        self._changed = threading.Condition()
        self._closed = False

    @contextlib.contextmanager
    def working(self, size: int) -> Iterator[None]:
        """Wait for room to work on so many bytes, and hold it."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._working == 0 or self._working + size <= self._limit)
            self._working = self._working + size
        try:
            yield
        finally:
            with self._changed:
                self._working = self._working - size
                self._changed.notify_all()

    def keep(self, size: int) -> bool:
        """Take room for so many bytes that wait, if there is any."""
        with self._changed:
            fits = self._waiting + size <= self._waiting_limit
            self._waiting = self._waiting + size * fits
            return fits

    def let_go(self, size: int) -> None:
        """Give that room back."""
        with self._changed:
            self._waiting = self._waiting - size

    def close(self) -> None:
        """Keep nobody waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
