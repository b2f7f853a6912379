"""The search for what explains a loss: halves of a graph are dropped as long as the loss does not mind."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Budget", "Measured", "OutOfBudgetError", "expected_runs", "needed", "seconds_of"]


class OutOfBudgetError(Exception):
    """The time that a search may take is over."""


class Budget:
    """A bound on time.

    Args:
        seconds: from now on; ``None`` is no bound.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.until = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    def check(self, needed: float = 0.0) -> None:
        """Raise :class:`OutOfBudgetError` where less than ``needed`` seconds are left."""
        if self.left < needed:
            raise OutOfBudgetError


class Measured:
    """A measure of sets of names that asks once for each, within a budget, and knows what an earlier run asked.

    Args:
        measure: of a set of names.
        budget: the bound; the longest measure so far must fit into what is left.
        journal: a file that keeps the answers, a line each; ``None`` keeps none.
        question: what is measured, to its bytes: answers to another question in the journal are dropped.
        progress: called with the number of measures made.
    """

    def __init__(
        self,
        measure: Callable[[frozenset[str]], float],
        budget: Budget,
        journal: Path | None = None,
        question: str = "",
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._measure, self._budget, self._journal, self._progress = measure, budget, journal, progress
        self.known: Mapping[str, float] = {}
        self.runs = 0
        self.resumed = 0
        self.slowest = 0.0
        if journal is not None:
            self.known = _read(journal, question)
            self.resumed = len(self.known)
            if not self.known:
                journal.parent.mkdir(parents=True, exist_ok=True)
                journal.write_text(json.dumps({"question": question}) + "\n")

    def __call__(self, names: Iterable[str]) -> float:
        """Give the measure of a set of names.

        Raises:
            OutOfBudgetError: the time is over.
        """
        chosen = frozenset(names)
        key = _key(chosen)
        if key not in self.known:
            self._budget.check(self.slowest)
            began = time.monotonic()
            value = self._measure(chosen)
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.known = {**self.known, key: value}
            self.runs = self.runs + 1
            if self._journal is not None:
                with self._journal.open("a") as file:
                    file.write(json.dumps([key, value]) + "\n")
            if self._progress is not None:
                self._progress(self.runs)
        return self.known[key]


def _key(names: frozenset[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:24]


def _read(journal: Path, question: str) -> dict[str, float]:
    """Read the answers of an earlier run that asked the same; half a last line is none."""
    if not journal.is_file():
        return {}
    lines: list[Any] = []
    for line in journal.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    if not lines or lines[0] != {"question": question}:
        return {}
    return {key: value for key, value in lines[1:]}


def needed(
    units: Sequence[str], may_drop: Callable[[frozenset[str], frozenset[str]], bool], kept: frozenset[str] = frozenset()
) -> list[str]:
    """Reduce names to those that are needed (Junker's QuickXplain, 2004, with a rule of one's own).

    Args:
        units: the names, in the order of preference: of two that serve alike the earlier one stays.
        may_drop: tells whether the second set, with names left out of the first, still does.
        kept: what stays in any case.

    Returns:
        Those that are needed, in order; about 2 log2(N) questions for each of them.
    """
    whole = kept | frozenset(units)
    if not units or may_drop(whole, kept):
        return []
    if len(units) == 1:
        return list(units)
    middle = len(units) // 2
    first, second = units[:middle], units[middle:]
    last = needed(second, may_drop, kept | frozenset(first))
    return [*needed(first, may_drop, kept | frozenset(last)), *last]


def expected_runs(units: int, found: int = 2) -> int:
    """Guess how many measures :func:`needed` takes that finds some of the units."""
    return math.ceil(2 * found * max(1.0, math.log2(max(2, units)))) + 4


def seconds_of(text: str) -> float:
    """Read a span of time: ``90``, ``90s``, ``10m``, ``2h``.

    Raises:
        ValueError: anything else.
    """
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    number = text[:-1] if unit else text
    try:
        value = float(number) * (unit or 1)
    except ValueError:
        value = math.nan
    if not value > 0 or math.isinf(value):
        raise ValueError(f"--budget must be a span of time, as 90s, 10m or 2h; got {text!r}")
    return value
