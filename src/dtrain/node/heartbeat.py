"""Heartbeats: each agent sends them to the head, and an agent and its fork server exchange them.

A process that was stopped or swapped out keeps its connections, so nothing else reveals it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable

from dtrain.forking import Channel
from dtrain.node.sealed import HeadGone, Store

_BEAT_S = 1.0
_LONGEST_PAUSE_S = 5.0


def pause_s(lost_after_s: float) -> float:
    """Return the heartbeat interval of an agent and its fork server, a fraction of that time."""
    return min(_LONGEST_PAUSE_S, lost_after_s / 6)


def silence_message(who: str, seconds: float) -> str:
    return (
        f"{who} has not answered for {seconds:g} s: it may be stopped, swapped out or disconnected"
    )


class Silence:
    """The time without a new sign of another process, as far as this process could observe it.

    This process may itself have been stopped, for example when Slurm suspends a job. That time must
    not count when it continues.
    """

    def __init__(self, pause_s: float) -> None:
        """Prepare to check about every `pause_s` seconds."""
        self._most_s = 2 * pause_s
        self._sign: object = None
        self._checked_at = time.monotonic()
        self._seconds = 0.0

    def unchanged_s(self, sign: object) -> float:
        """Return for how many seconds the sign has not changed."""
        now = time.monotonic()
        passed, self._checked_at = now - self._checked_at, now
        self._seconds = self._seconds + min(passed, self._most_s) if sign == self._sign else 0.0
        self._sign = sign
        return self._seconds


class Heartbeats:
    """Keeps the heartbeats of all nodes in the head's store. A thread sends this node's own."""

    def __init__(self, store: Store, node_rank: int, lost_after_s: float) -> None:
        self._store = store
        self._node_rank = node_rank
        self._lost_after_s = lost_after_s
        self._silences: dict[int, Silence] = {}
        self._gone: set[int] = set()
        self._beats = 0
        self._stopped = threading.Event()
        self._check_at = 0.0
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def has_duplicate(self) -> bool:
        """Return whether another agent sends heartbeats as this node. This takes 3.5 s."""
        before = self._beats_of_others()
        time.sleep(3.5 * _BEAT_S)
        return self._beats_of_others() > before + 1  # one of this process's may not be counted yet

    def _beats_of_others(self) -> int:
        return self._store.add(f"beat/{self._node_rank}", 0) - self._beats

    def mark_lost(self, node_rank: int) -> None:
        """Mark a node as lost. Its end was seen on this host."""
        self._gone.add(node_rank)
        self._check_at = 0.0

    def lost(self, node_ranks: Iterable[int]) -> list[int]:
        """Return the given nodes that have sent no heartbeat for too long."""
        ranks = [rank for rank in node_ranks if rank != self._node_rank]
        beats = self._store.get_all([f"beat/{rank}" for rank in ranks])
        lost = []
        for rank, beat in zip(ranks, beats, strict=True):
            silence = self._silences.setdefault(rank, Silence(_BEAT_S))
            if silence.unchanged_s(beat) > self._lost_after_s or rank in self._gone:
                lost.append(rank)
        return lost

    def lost_rate_limited(self, node_ranks: Iterable[int]) -> list[int]:
        """Return the same at most once a second. Calls in between report no lost node."""
        now = time.monotonic()
        if now < self._check_at:
            return []
        self._check_at = now + _BEAT_S
        return self.lost(node_ranks)

    def _beat(self) -> None:
        store = self._store.clone()  # a separate connection: a waiting call holds the other one
        while not self._stopped.wait(_BEAT_S):
            try:
                store.add(f"beat/{self._node_rank}", 1)
                self._beats += 1
            except HeadGone:
                return  # the head is gone; the main thread detects it


class Peer:
    """The other end of a channel, which sends heartbeats."""

    def __init__(self, lost_after_s: float) -> None:
        self._lost_after_s = lost_after_s
        self._silence = Silence(pause_s(lost_after_s))
        self._signs = 0

    def hear(self) -> None:
        self._signs += 1

    def is_silent(self) -> bool:
        """Return whether it has sent a heartbeat once and then none for too long.

        Call this when all its messages have been received.
        """
        return self._signs > 0 and self._silence.unchanged_s(self._signs) > self._lost_after_s


def send_heartbeats(channel: Channel, lost_after_s: float) -> None:
    """Send heartbeats from a thread, even while the main thread is blocked."""

    def send() -> None:
        with contextlib.suppress(OSError):  # it has ended; the main thread detects it
            while True:
                channel.send_if_room({"alive": True})
                time.sleep(pause_s(lost_after_s))

    threading.Thread(target=send, name="heartbeat", daemon=True).start()
