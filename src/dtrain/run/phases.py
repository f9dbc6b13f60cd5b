"""The time of each rank in the phases of its steps, as the ranks record it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from dtrain.run import files
from dtrain.run.rundir import RunDir

Phase = Literal[
    "data", "forward", "backward", "reduction", "optimizer", "evaluation", "checkpoint", "other"
]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""What a rank does, in the order of a step.

- data: it waits for its next micro-batch, and copies it to the device.
- reduction: it waits until the gradients of all ranks are summed, after its own backward. A rank
  that is slower than the others has a shorter reduction.
- other: hooks, checks, and what is not named here.
"""
OWN: tuple[Phase, ...] = ("data", "forward", "backward", "optimizer")
"""The phases in which a rank does not wait for others, except under strategy `fsdp`."""


class Pace:
    """Says when the next line of a record is due: after a second, later less often.

    A record has 1,000 lines after 1,000 seconds, and 4,300 after eight hours.
    """

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()

    def due(self) -> bool:
        """Return whether a line is due. The next one is due later."""
        now = time.monotonic()
        if now - self._last < min(_LONGEST_S, max(_SHORTEST_S, (now - self._started) / 1000)):
            return False
        self._last = now
        return True


_SHORTEST_S, _LONGEST_S = 1.0, 60.0


def straggler(own_seconds: Mapping[int, float]) -> tuple[int, float] | None:
    """Return the slowest rank, and how many times the median it takes.

    Args:
        own_seconds: rank → the seconds of a step in the phases `OWN`.

    Returns:
        None if no rank is much slower than the others.
    """
    if len(own_seconds) < 2:
        return None
    slowest = max(own_seconds, key=lambda rank: own_seconds[rank])
    usual = median(own_seconds.values())
    ratio = own_seconds[slowest] / usual if usual else 1.0
    return (slowest, ratio) if ratio >= _SLOWER else None


_SLOWER = 1.2


def read_phases(run: RunDir, attempt: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rank and each record of its phases, rank by rank, the oldest record first.

    A record has `time` (seconds since the epoch, at its end), `restart`, `step` (the number of
    steps done), `steps` (how many of them are in this record), and `phases`: the seconds of each
    phase that is not zero.
    """
    for rank, path in _of_attempt(run, attempt, "rank-*.phases.jsonl"):
        for line in files.read_lines(path, time=float, step=int, steps=int, phases=dict):
            yield rank, line


def read_usage(run: RunDir, attempt: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the node rank and each record of what its ranks use, see `dtrain.node.usage`."""
    for node_rank, path in _of_attempt(run, attempt, "usage.jsonl"):
        for line in files.read_lines(path, time=float):
            yield node_rank, line


def _of_attempt(run: RunDir, attempt: int, pattern: str) -> Iterator[tuple[int, Path]]:
    """Yield the files of an attempt's nodes, with the rank or node rank in their names."""
    found = []
    for path in run.attempt(attempt).glob(f"node-*/{pattern}"):
        owner = path if path.name.startswith("rank-") else path.parent
        number = owner.name.partition(".")[0].rpartition("-")[2]
        if number.isdecimal():
            found.append((int(number), path))
    yield from sorted(found)
