"""Folding of identical lines of several ranks, within a moment, into one: `[ranks 0-7] …`."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[,.]\d{3} ")
_WARNING = re.compile(r"^WARNING |Warning: ")
_MOST_WAITING = 10_000
_MOST_WARNINGS = 1_000


@dataclass
class _Waiting:
    line: str
    """The line as the first rank wrote it, including the time."""
    text: str
    since: float
    is_warning: bool
    ranks: set[int]


@dataclass
class _Same:
    """The waiting lines of one text, by number."""

    numbers: deque[int]
    newest_of: dict[int, int]
    """The number of the newest line that each rank has printed."""


class LineFolder:
    """Holds each line for a moment, to find the other ranks that print the same.

    A line is shown at the position where the first rank printed it. So within a moment, lines of
    another rank that also printed it may change their order. No line is lost, with one exception: a
    warning that was shown for one rank is not shown again for the others, however late they print
    it.
    """

    def __init__(self, world_size: int, window_s: float, emit: Callable[[str], None]) -> None:
        """Prepare to fold lines.

        Args:
            world_size: the number of ranks. A line that all of them have printed no longer waits.
            window_s: how long a line waits for other ranks to print the same.
            emit: called with each line to show, in the order in which they were first printed.
        """
        self._world_size = world_size
        self._window_s = window_s
        self._emit = emit
        self._waiting: OrderedDict[int, _Waiting] = OrderedDict()  # by number, oldest first
        self._same: dict[str, _Same] = {}  # by text
        self._next_number = 0
        self._warned: dict[str, set[int]] = {}
        self._in_warning: set[int] = set()

    def feed(self, rank: int, line: str, now: float) -> None:
        """Take in a line of one rank. `now` is in seconds of any monotonic clock."""
        self.flush(now)
        text = _STAMP.sub("", line)
        is_warning = self._is_warning(rank, text)
        if not (is_warning and self._has_been_shown(rank, text)):
            self._join(rank, line, text, now, is_warning)
        self.flush(now)

    def flush(self, now: float) -> None:
        """Show the lines that have waited long enough. `inf` shows all."""
        while self._waiting:
            waiting = next(iter(self._waiting.values()))
            if (
                len(waiting.ranks) < self._world_size
                and now - waiting.since < self._window_s
                and len(self._waiting) <= _MOST_WAITING
            ):
                return
            self._waiting.popitem(last=False)
            same = self._same[waiting.text]
            same.numbers.popleft()
            if not same.numbers:
                del self._same[waiting.text]
            if waiting.is_warning:
                self._remember(waiting)
            self._emit(self._prefixed(waiting))

    def _join(self, rank: int, line: str, text: str, now: float, is_warning: bool) -> None:
        """Add the rank to the first such line that it has not printed yet, or let the line wait."""
        same = self._same.setdefault(text, _Same(deque(), {}))
        later = bisect_right(same.numbers, same.newest_of.get(rank, -1))
        if later == len(same.numbers):
            same.numbers.append(self._next_number)
            self._waiting[self._next_number] = _Waiting(line, text, now, is_warning, set())
            self._next_number += 1
        same.newest_of[rank] = same.numbers[later]
        self._waiting[same.numbers[later]].ranks.add(rank)

    def _is_warning(self, rank: int, text: str) -> bool:
        """Return whether this is a warning, or the indented source line that Python adds to one."""
        source_line = rank in self._in_warning and text.startswith("  ")
        self._in_warning.discard(rank)
        if _WARNING.search(text):
            self._in_warning.add(rank)
            return True
        return source_line

    def _has_been_shown(self, rank: int, text: str) -> bool:
        """Return whether this is a late rank's copy of a warning.

        The second one of a rank is shown.
        """
        ranks = self._warned.get(text)
        if ranks is None or rank in ranks:
            return False
        ranks.add(rank)
        return True

    def _remember(self, warning: _Waiting) -> None:
        self._warned.setdefault(warning.text, set()).update(warning.ranks)
        if len(self._warned) > _MOST_WARNINGS:
            del self._warned[next(iter(self._warned))]

    def _prefixed(self, waiting: _Waiting) -> str:
        if self._world_size == 1:
            return waiting.line
        return f"{rank_label(waiting.ranks)} {waiting.line}"


def rank_label(ranks: Iterable[int]) -> str:
    """Return a label for ranks, for example `[rank 3]` or `[ranks 0-3,6]`."""
    ordered = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"[rank{'s' if len(ordered) > 1 else ''} {text}]"
