"""The last collectives of a rank, in memory that outlives the process however it ends.

The process that forks a worker makes a ring and shares it with the worker. A call costs a copy of
160 bytes. What was written survives SIGABRT and `kill -9`. It is not a file: a write to a mapped
file on a full disk is a bus error.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SLOTS = 64
_SLOT_BYTES = 160
_HEAD = struct.Struct("<Q")
_SIZE = _HEAD.size + SLOTS * _SLOT_BYTES
NOTE_BYTES = 4096


class Ring:
    """The last `SLOTS` calls of a process that is forked after this ring is made."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE + NOTE_BYTES)

    def write(self, number: int, text: str) -> None:
        """Record call `number`, counted from 1."""
        start = _HEAD.size + (number - 1) % SLOTS * _SLOT_BYTES
        slot = text.encode()[:_SLOT_BYTES].ljust(_SLOT_BYTES, b"\0")
        self._memory[start : start + _SLOT_BYTES] = slot
        _HEAD.pack_into(self._memory, 0, number)

    def contents(self) -> bytes:
        """Return the calls, for `read_ring`."""
        return self._memory[:_SIZE]

    def set_exit_note(self, note: bytes) -> None:
        """Record how the process exited, in at most `NOTE_BYTES`."""
        self._memory[_SIZE:] = note.ljust(NOTE_BYTES, b"\0")

    def exit_note(self) -> bytes:
        """Return what `set_exit_note` has recorded. Empty if it was not called."""
        return self._memory[_SIZE:].rstrip(b"\0")


def read_ring(path: Path) -> dict[int, str]:
    """Return the recorded calls by number. Empty when the file is missing or truncated."""
    try:
        raw = path.read_bytes()
    except OSError:
        return {}
    if len(raw) != _SIZE:
        return {}
    (count,) = _HEAD.unpack_from(raw)
    calls = {}
    for number in range(max(1, count - SLOTS + 1), count + 1):
        start = _HEAD.size + (number - 1) % SLOTS * _SLOT_BYTES
        text = raw[start : start + _SLOT_BYTES].rstrip(b"\0")
        calls[number] = text.decode(errors="replace")
    return calls


@dataclass(frozen=True)
class Divergence:
    """The first call in which the ranks differ."""

    number: int
    rank: int
    """The first rank that differs from the majority, or from rank 0 where there is no majority."""
    decided: bool
    """True when there is a majority."""
    call: str
    """The call of that rank."""
    others: str
    """The call of the other ranks."""
    other: int
    """One of the other ranks."""


def first_divergence(rings: Mapping[int, Mapping[int, str]]) -> Divergence | None:
    """Return the first call that is not the same on all ranks that made it. None without one.

    Args:
        rings: the calls of each rank, by number.
    """
    numbers = sorted({number for calls in rings.values() for number in calls})
    for number in numbers:
        made = {rank: calls[number] for rank, calls in sorted(rings.items()) if number in calls}
        (most, votes), *rest = Counter(made.values()).most_common()
        if rest:
            decided = 2 * votes > len(rings)
            reference = most if decided else next(iter(made.values()))
            rank = next(rank for rank, call in made.items() if call != reference)
            other = next(rank for rank, call in made.items() if call == reference)
            return Divergence(number, rank, decided, made[rank], reference, other)
    return None
