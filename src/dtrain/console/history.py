"""Logs that are already written, merged by the times that stand in them."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[,.](\d{3}) ")


def merged(logs: Mapping[int, Path]) -> Iterator[tuple[float, int, str]]:
    """(time, rank, line) of several ranks' logs, in order of time; reads as it goes.

    A line without a time of its own has that of the line before it.
    """
    return heapq.merge(*(_timed(rank, path) for rank, path in logs.items()), key=lambda x: x[0])


def _timed(rank: int, path: Path) -> Iterator[tuple[float, int, str]]:
    now = 0.0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            now = max(now, _time_of(line) or now)
            yield now, rank, line.rstrip("\n")


def _time_of(line: str) -> float | None:
    match = _STAMP.match(line)
    if match is None:
        return None
    try:
        return datetime.fromisoformat(f"{match[1]}.{match[2]}").timestamp()
    except ValueError:
        return None
