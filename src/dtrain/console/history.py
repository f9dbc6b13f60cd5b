"""Logs that are already written, merged by the times in their lines."""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[,.](\d{3}) ")


def merged(
    logs: Mapping[int, Path], read: dict[int, int] | None = None
) -> Iterator[tuple[float, int, str]]:
    """Yield (time, rank, line) of several ranks' logs in order of time, and read them on demand.

    A line without a time has that of the line before it.

    Args:
        logs: the file of each rank.
        read: receives the number of bytes read from each file, for a later reader. A last line
            without an end is left for that reader.
    """
    timed = (_timed(rank, path, read) for rank, path in logs.items())
    return heapq.merge(*timed, key=lambda each: each[0])


def _timed(rank: int, path: Path, read: dict[int, int] | None) -> Iterator[tuple[float, int, str]]:
    now = 0.0
    for line in _lines(path) if read is None else _whole_lines(rank, path, read):
        now = max(now, _time_of(line) or now)
        yield now, rank, line


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            yield line.rstrip("\n")


def _whole_lines(rank: int, path: Path, read: dict[int, int]) -> Iterator[str]:
    """Yield the present lines of the file. Lines that are written meanwhile are left for later."""
    with path.open("rb") as file:
        size, read[rank] = file.seek(0, os.SEEK_END), file.seek(0)
        for line in file:
            if not line.endswith(b"\n") or read[rank] + len(line) > size:
                return
            read[rank] += len(line)
            yield line[:-1].decode(errors="replace")


def _time_of(line: str) -> float | None:
    match = _STAMP.match(line)
    if match is None:
        return None
    try:
        return datetime.fromisoformat(f"{match[1]}.{match[2]}").timestamp()
    except ValueError:
        return None
