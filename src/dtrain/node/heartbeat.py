"""Who is alive: each agent tells the head, and an agent and its fork server tell one another.

A process that was stopped or swapped out keeps its connections, so nothing else tells of it.
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
    """How often an agent and its fork server say that they are there: a few times in that time."""
    return min(_LONGEST_PAUSE_S, lost_after_s / 6)


def of_silence(who: str, seconds: float) -> str:
    return f"{who} has not answered for {seconds:g} s: it is stopped, swapped out or cut off"


class Silence:
    """How long there was no new sign of somebody, as far as we could look.

    We may have been stopped ourselves, as all processes of a job are that Slurm suspends: that
    time must not count when we go on.
    """

    def __init__(self, pause_s: float) -> None:
        """Prepare to look about every `pause_s` seconds."""
        self._most_s = 2 * pause_s
        self._sign: object = None
        self._looked_at = time.monotonic()
        self._seconds = 0.0

    def look(self, sign: object) -> float:
        """For how many seconds the sign has been what it is now."""
        now = time.monotonic()
        passed, self._looked_at = now - self._looked_at, now
        self._seconds = self._seconds + min(passed, self._most_s) if sign == self._sign else 0.0
        self._sign = sign
        return self._seconds


class Hearts:
    """Keeps the heartbeats of all nodes in the head's store; a thread sends our own."""

    def __init__(self, store: Store, node_rank: int, lost_after_s: float) -> None:
        self._store = store
        self._node_rank = node_rank
        self._lost_after_s = lost_after_s
        self._silences: dict[int, Silence] = {}
        self._gone: set[int] = set()
        self._beats = 0
        self._stopped = threading.Event()
        self._look_at = 0.0
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def has_twin(self) -> bool:
        """Whether another agent beats as our node; it takes 3.5 s to know."""
        before = self._beats_of_others()
        time.sleep(3.5 * _BEAT_S)
        return self._beats_of_others() > before + 1  # one of ours may not be counted yet

    def _beats_of_others(self) -> int:
        return self._store.add(f"beat/{self._node_rank}", 0) - self._beats

    def lose(self, node_rank: int) -> None:
        """Take a node for lost whose end was seen on this host."""
        self._gone.add(node_rank)
        self._look_at = 0.0

    def lost(self, node_ranks: Iterable[int]) -> list[int]:
        """Return those of some nodes that have sent no heartbeat for too long."""
        ranks = [rank for rank in node_ranks if rank != self._node_rank]
        beats = self._store.get_all([f"beat/{rank}" for rank in ranks])
        lost = []
        for rank, beat in zip(ranks, beats, strict=True):
            silence = self._silences.setdefault(rank, Silence(_BEAT_S))
            if silence.look(beat) > self._lost_after_s or rank in self._gone:
                lost.append(rank)
        return lost

    def lost_now_and_then(self, node_ranks: Iterable[int]) -> list[int]:
        """Do the same at most once a second; between, nothing is lost."""
        now = time.monotonic()
        if now < self._look_at:
            return []
        self._look_at = now + _BEAT_S
        return self.lost(node_ranks)

    def _beat(self) -> None:
        store = self._store.clone()  # a connection of its own: a waiting call holds the other's
        while not self._stopped.wait(_BEAT_S):
            try:
                store.add(f"beat/{self._node_rank}", 1)
                self._beats += 1
            except HeadGone:
                return  # the head is gone; the main thread finds out by itself


class Peer:
    """The other end of a channel, which now and then says that it is there."""

    def __init__(self, lost_after_s: float) -> None:
        self._lost_after_s = lost_after_s
        self._silence = Silence(pause_s(lost_after_s))
        self._signs = 0

    def hear(self) -> None:
        self._signs += 1

    def is_silent(self) -> bool:
        """Whether it has said something once and then nothing for too long.

        To be asked when all that it said is heard.
        """
        return self._signs > 0 and self._silence.look(self._signs) > self._lost_after_s


def send_heartbeats(channel: Channel, lost_after_s: float) -> None:
    """Say from a thread that we are there, whatever our main thread waits for."""

    def tell() -> None:
        with contextlib.suppress(OSError):  # it has ended; the main thread finds out by itself
            while True:
                channel.offer({"alive": True})
                time.sleep(pause_s(lost_after_s))

    threading.Thread(target=tell, name="pulse", daemon=True).start()
