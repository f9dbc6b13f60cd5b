"""Follow the nodes of an attempt on a Ray cluster: beats to and from every one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from dtrain.errors import first_line
from dtrain.launchers.ray.placement import NodeView
from dtrain.ports import is_listening

_BEAT_S = 1.0


@dataclass
class Outcome:
    """How an attempt ended."""

    codes: dict[int, int] = field(default_factory=dict)
    """node rank → exit code."""
    lost: dict[int, str] = field(default_factory=dict)
    """node rank → why no exit code came."""

    @property
    def code(self) -> int:
        """The worst of the exit codes."""
        return max([*self.codes.values(), *([1] if self.lost else [])])


class Watch:
    """Beats to and from every node until all have ended."""

    def __init__(
        self,
        actors: Sequence[Any],
        views: Sequence[NodeView],
        grace_s: float,
        lost_after_s: float,
        take_news: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        """Prepare.

        Args:
            actors: in the order of node ranks.
            views: the nodes that they are on.
            grace_s: how long nodes may take to leave when one has failed, or all are asked to.
            lost_after_s: how long a node may be silent.
            take_news: given what is new in the directory of a node that has one of its own.
        """
        self._actors = actors
        self._views = views
        self._outcome = Outcome()
        self._lost_after_s = lost_after_s
        self._grace_s = grace_s
        self._take_news = take_news
        self._beats: dict[Any, int] = {}
        self._good = dict.fromkeys(range(len(self._actors)), time.monotonic())
        self._asked = 0
        self._deadline = float("inf")

    def run(self, stops: Callable[[], int], troubled: Callable[[], bool]) -> Outcome:
        for rank in range(len(self._actors)):
            self._send(rank)
        while len(self._outcome.codes) + len(self._outcome.lost) < len(self._actors):
            waiting = [ref for ref, rank in self._beats.items() if rank not in self._outcome.lost]
            ready, _ = ray.wait(waiting, timeout=0.1) if waiting else ([], [])
            for ref in ready:
                self._hear(self._beats.pop(ref), ref)
            self._give_up_on_the_silent()
            self._pass_on(stops())
            if troubled():
                self._kill()
                return self._outcome
            if time.monotonic() > self._deadline:
                self._kill()
        return self._outcome

    def _send(self, rank: int) -> None:
        self._beats[self._actors[rank].beat.remote(_BEAT_S)] = rank

    def _hear(self, rank: int, ref: Any) -> None:
        try:
            code, news = ray.get(ref)
        except ActorUnavailableError as error:
            if answers(self._views[rank]):
                time.sleep(0.1)  # Ray says next what became of it; do not ask in a tight loop
                self._send(rank)
            else:
                self._lose(rank, f"its raylet is gone ({first_line(error)})")
        except RayError as error:
            gone = not answers(self._views[rank])
            why = "its raylet is gone" if gone else "its actor was killed"
            self._lose(rank, f"{why} ({first_line(error)})")
        else:
            self._good[rank] = time.monotonic()
            self._take_news(news)
            if code is None:
                self._send(rank)
                return
            self._outcome.codes[rank] = code
            if code != 0:  # the agents tell each other to end, and mostly have
                self._deadline = min(self._deadline, time.monotonic() + self._grace_s)

    def _give_up_on_the_silent(self) -> None:
        """Nodes that a cut cable keeps silent; by now they have ended their workers themselves."""
        limit = time.monotonic() - self._lost_after_s - 2 * _BEAT_S
        for rank in set(self._beats.values()) - set(self._outcome.lost):
            if self._good[rank] < limit:
                self._lose(rank, f"no word from it for {self._lost_after_s + 2 * _BEAT_S:.0f} s")

    def _lose(self, rank: int, why: str) -> None:
        self._outcome.lost[rank] = why
        self._kill()  # what the others do now is lost; the sooner all begin again the better

    def _pass_on(self, asked: int) -> None:
        if asked > self._asked == 0:
            self._asked = asked
            self._deadline = min(self._deadline, time.monotonic() + self._grace_s)
            self._signal(signal.SIGTERM)
        elif asked > max(1, self._asked):
            self._asked = asked
            self._kill()

    def _kill(self) -> None:
        self._deadline = time.monotonic() + 5
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for rank, actor in enumerate(self._actors):
            if rank not in self._outcome.codes and rank not in self._outcome.lost:
                actor.signal.remote(int(number))


def answers(node: NodeView) -> bool:
    """Whether a node's raylet can be reached; Ray itself believes a dead one alive for a while."""
    return is_listening(f"{node.address}:{node.port}")
