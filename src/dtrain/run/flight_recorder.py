"""The last collectives of a rank, in memory that outlives the process however it ends.

Whoever forks a worker makes a ring and shares it with the worker; a call costs a copy of 160
bytes, and what was written is there after SIGABRT and `kill -9` too. It is not a file: to write to
a mapped file on a full disk is a bus error.
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
    """The last `SLOTS` calls of a process that is forked after this is made."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE + NOTE_BYTES)

    def write(self, number: int, text: str) -> None:
        """Call `number`, counted from 1."""
        start = _HEAD.size + (number - 1) % SLOTS * _SLOT_BYTES
        slot = text.encode()[:_SLOT_BYTES].ljust(_SLOT_BYTES, b"\0")
        self._memory[start : start + _SLOT_BYTES] = slot
        _HEAD.pack_into(self._memory, 0, number)

    def contents(self) -> bytes:
        """The calls, for `read_ring`."""
        return self._memory[:_SIZE]

    def leave(self, note: bytes) -> None:
        """Keep how the process left, in at most `NOTE_BYTES`."""
        self._memory[_SIZE:] = note.ljust(NOTE_BYTES, b"\0")

    def left(self) -> bytes:
        """What `leave` has kept; empty where it was not called."""
        return self._memory[_SIZE:].rstrip(b"\0")


def read_ring(path: Path) -> dict[int, str]:
    """The calls that were kept, by number; empty when the file is missing or cut."""
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
    """Where the ranks' calls begin to differ."""

    number: int
    rank: int
    """The first rank that differs from the majority, or from rank 0 where there is none."""
    decided: bool
    """Whether there is a majority."""
    call: str
    """That rank's."""
    others: str
    """The others'."""
    other: int
    """One of those."""


def first_divergence(rings: Mapping[int, Mapping[int, str]]) -> Divergence | None:
    """The first call that is not the same on all ranks that made it; None when there is none.

    Args:
        rings: of each rank, its calls by number.
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
