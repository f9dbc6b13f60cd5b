"""The TCPStore of a run: who serves it, how agents reach it, what they say when they cannot."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from dtrain import ports

FIRST_NOTICE_S = 2.0
"""How long a node waits in silence for others."""

_SILENCE_S = 30.0  # a head that answers nothing for so long is taken for gone
# One question takes the head 30 µs, and each agent has 40 a second: 1,000 would be too many for it.
_FEW_NODES, _PAUSE_PER_NODE_S = 50, 0.001


class RendezvousFailed(Exception):
    """The nodes did not come together; names who is missing.

    Attributes:
        missing: node ranks that did not join.
    """

    def __init__(self, message: str, missing: list[int] | None = None) -> None:
        super().__init__(message)
        self.missing = missing or []


class PeerFailed(Exception):
    """Another node has given up, so this one stops as well.

    Attributes:
        record: the failure record of the cause, as JSON; None when it is not known.
        signal: the signal by which the other node was asked to stop; None when it failed.
    """

    def __init__(
        self, message: str, record: dict[str, Any] | None = None, signal: int | None = None
    ) -> None:
        super().__init__(message)
        self.record = record
        self.signal = signal


@dataclass(frozen=True)
class RendezvousSettings:
    """What an agent must know to meet the others."""

    run_id: str
    host: str
    port: int
    node_rank: int
    node_name: str
    min_nodes: int
    max_nodes: int
    join_timeout_s: float
    last_call_s: float = 5.0
    """With fewer than `max_nodes`: how long to wait for more once there are `min_nodes`."""
    lost_after_s: float = 10.0
    """A node whose heartbeat has stood still so long is taken for dead."""
    names: tuple[str, ...] = ()
    """Expected node names by rank, to name one that never joins."""

    @property
    def bind_host(self) -> str:
        """Where the head listens: on loopback only, when all nodes are on this machine."""
        return self.host if self.host == "127.0.0.1" else ""

    def name_of(self, node_rank: int) -> str:
        """A node as people know it: `node 1 (gpu-b)`."""
        known = self.names[node_rank] if node_rank < len(self.names) else ""
        return f"node {node_rank} ({known})" if known else f"node {node_rank}"


class Paced:
    """What the head has answered; of many nodes, each asks it again only after a while."""

    def __init__(self, nodes: int) -> None:
        self.pause_s = _PAUSE_PER_NODE_S * max(0, nodes - _FEW_NODES)
        self._answers: dict[str, tuple[int, float]] = {}

    def __call__(self, key: str, ask: Callable[[], int]) -> int:
        """The answer to a question, asked now or a moment ago."""
        now = time.monotonic()
        answer, asked_at = self._answers.get(key, (0, 0.0))
        if now - asked_at >= self.pause_s:
            answer = ask()
            self._answers[key] = answer, now
        return answer


def serve(settings: RendezvousSettings, listener: socket.socket | None) -> TCPStore:
    """The run's store, served by this process.

    Args:
        settings: host, port and run.
        listener: a socket already listening on the port; None opens it.

    Raises:
        RendezvousFailed: the port is taken.
    """
    if listener is None:
        try:
            listener = ports.listen(settings.bind_host, settings.port)
        except OSError as error:
            raise RendezvousFailed(
                f"port {settings.port} of the rendezvous cannot be opened here: "
                f"{error.strerror}; choose another with --rdzv-endpoint HOST:PORT"
            ) from error
    store = on_listener(settings, listener)
    store.set("run_id", settings.run_id)
    return store


def serve_anywhere(settings: RendezvousSettings, key: str) -> tuple[TCPStore, int]:
    """A further store on a free port of the key's candidates, and that port."""
    listener = ports.listen_on_candidate(settings.bind_host, key)
    port = int(listener.getsockname()[1])
    return on_listener(settings, listener), port


def on_listener(settings: RendezvousSettings, listener: socket.socket) -> TCPStore:
    """A store on a socket that already listens, so that nobody can take its port before us."""
    port = int(listener.getsockname()[1])
    fd = listener.detach()
    return TCPStore(
        settings.host, port, is_master=True, wait_for_workers=False, master_listen_fd=fd
    )


def connect(settings: RendezvousSettings, notice: Callable[[str], None]) -> TCPStore:
    """The run's store, served by the head.

    Args:
        settings: host, port and run.
        notice: told in a sentence that we are waiting for the head.

    Raises:
        RendezvousFailed: the head does not answer in time, or another run answers there.
    """
    _wait_until_reachable(settings, notice)
    timeout = timedelta(seconds=max(settings.join_timeout_s, 1.0))
    store = TCPStore(settings.host, settings.port, is_master=False, timeout=timeout)
    store.set_timeout(timedelta(seconds=_SILENCE_S))
    answer = store.get("run_id").decode()
    if answer != settings.run_id:
        raise RendezvousFailed(
            f"run {answer!r} answers at {settings.host}:{settings.port}, not "
            f"{settings.run_id!r}; give each run its own --rdzv-endpoint"
        )
    return store


def _wait_until_reachable(settings: RendezvousSettings, notice: Callable[[str], None]) -> None:
    started = time.monotonic()
    notice_at = started + FIRST_NOTICE_S
    while True:
        try:
            with socket.create_connection((settings.host, settings.port), timeout=5):
                return
        except OSError as error:
            waited = time.monotonic() - started
            place = f"{settings.name_of(0)} at {settings.host}:{settings.port}"
            if waited > settings.join_timeout_s:
                raise RendezvousFailed(
                    f"{place} cannot be reached after {waited:.0f} s: {error}", [0]
                ) from error
            if time.monotonic() >= notice_at:
                notice(f"waiting for {place}: {error}")
                notice_at = time.monotonic() + 2 * waited
        time.sleep(0.1)  # between two tries to connect; bounded by the join timeout
