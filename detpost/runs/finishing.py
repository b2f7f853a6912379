"""What becomes of a batch after the network: pictures, then the journal, while the next batch is in the network."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detpost.runs.journal import Journal
    from detpost.runs.originals import Originals
    from detpost.runs.pictures import Pictures
    from detpost.runs.reading import Loaded

__all__ = ["Finisher", "draw_missing"]


class Finisher:
    """Finishes one batch at a time, in order, in threads of its own.

    A run that is killed loses the batch that is being finished and the one in the network, and no more.

    Args:
        journal: what a later run goes on from.
        originals: the images to draw on; ``None`` draws nothing.
        pictures: where they go; ``None`` draws nothing.
        workers: threads that draw.
    """

    def __init__(self, journal: Journal, originals: Originals | None, pictures: Pictures | None, workers: int) -> None:
        self._journal, self._originals, self._pictures = journal, originals, pictures
        self._drawing = ThreadPoolExecutor(workers, thread_name_prefix="detpost-draw")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="detpost-write")
        self._last: Future[int] | None = None

    def __enter__(self) -> Finisher:
        return self

    def __exit__(self, *_: object) -> None:
        self._writing.shutdown()
        self._drawing.shutdown(cancel_futures=True)

    def start(self, batch: Sequence[Loaded], rows: Sequence[Mapping[str, Any]]) -> int:
        """Finish a batch in the background, once the one before it is finished.

        Args:
            batch: what was read.
            rows: of the journal, one for each.

        Returns:
            How many images the one before it had.
        """
        before = self.wait()
        self._last = self._writing.submit(self._finish, batch, rows)
        return before

    def wait(self) -> int:
        """Wait for the batch that was started last, and give how many images it had; what it raised is raised here."""
        last, self._last = self._last, None
        return 0 if last is None else last.result()

    def _finish(self, batch: Sequence[Loaded], rows: Sequence[Mapping[str, Any]]) -> int:
        if self._pictures is not None:
            # Before the journal: an image that is finished has its picture.
            list(self._drawing.map(self._draw, batch, rows))
        self._journal.append(rows)
        return len(batch)

    def _draw(self, loaded: Loaded, row: Mapping[str, Any]) -> None:
        assert self._pictures is not None
        assert self._originals is not None
        if "error" in row:
            self._originals.let_go(loaded.picture)
            self._pictures.remove(loaded.name)
            return
        with self._originals.drawable(loaded.name, loaded.picture) as image:
            self._pictures.put(image, row, (row["height"], row["width"]))


def draw_missing(journal: Journal, originals: Originals, pictures: Pictures, names: Sequence[str], workers: int) -> int:
    """Draw, from the journal, what earlier runs detected and did not draw.

    Args:
        journal: of the run.
        originals: the images to draw on.
        pictures: where they go.
        names: of all images.
        workers: threads.

    Returns:
        How many were drawn.
    """

    def put(row: Mapping[str, Any]) -> None:
        with originals.drawable(row["file_name"]) as image:
            pictures.put(image, row, (row["height"], row["width"]))

    missing = [name for name in names if not pictures.place(name).exists()]
    drawn = 0
    running: deque[Future[None]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="detpost-draw") as pool:
        try:
            for row in journal.rows(missing):
                if "error" not in row:
                    running.append(pool.submit(put, row))
                    drawn = drawn + 1
                if len(running) > 2 * workers:
                    running.popleft().result()
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return drawn
