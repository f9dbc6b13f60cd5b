"""The stores of a run: which process serves them, how agents reach them, and connection errors."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

from torch.distributed import TCPStore

from dtrain import checked, ports
from dtrain.node import sealed
from dtrain.plainjson import to_json
from dtrain.run.failures import FailureRecord

T = TypeVar("T")

FIRST_NOTICE_S = 2.0
"""The time that a node waits for others before its first message."""

# A request takes the head 30 µs, and each agent sends 40 a second: 1,000 agents would be too many.
_FEW_NODES, _PAUSE_PER_NODE_S = 50, 0.001
_WAIT_S, _WAIT_PER_NODE_S = 0.005, 0.002


class RendezvousFailed(Exception):
    """The nodes did not come together. The error names the missing ones.

    Attributes:
        missing: node ranks that did not join.
        hint: the remedy, where this node knows one.
    """

    def __init__(self, message: str, missing: list[int] | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.missing = missing or []
        self.hint = hint


class NodeTaken(Exception):
    """Another agent already has this node's rank. Its state was not changed."""


class PeerFailed(Exception):
    """Another node has failed, so this one stops as well.

    Attributes:
        record: the record of the cause. None when it is not known.
        signal: the signal by which the other node was asked to stop. None when it failed.
    """

    def __init__(
        self, message: str, record: FailureRecord | None = None, signal: int | None = None
    ) -> None:
        super().__init__(message)
        self.record = record
        self.signal = signal

    def to_json(self) -> str:
        return to_json(asdict(_Closed(str(self), self.record, self.signal)))

    @classmethod
    def from_json(cls, text: str) -> PeerFailed:
        try:
            closed = checked.read(_Closed, text)
        except ValueError as error:
            return cls(f"another node failed, and its message is not valid: {error}")
        return cls(closed.reason, closed.record, closed.signal)


@dataclass(frozen=True)
class RendezvousSettings:
    """The information that an agent needs to meet the others."""

    run_id: str
    host: str
    port: int
    node_rank: int
    node_name: str
    min_nodes: int
    max_nodes: int
    join_timeout_s: float
    token: bytes
    """The token of the attempt, the same for all agents."""
    last_call_s: float = 5.0
    """The time to wait for more nodes once there are `min_nodes`, if fewer than `max_nodes`."""
    lost_after_s: float = 30.0
    """The time without a heartbeat after which a node counts as dead."""
    names: tuple[str, ...] = ()
    """The expected node names by rank, used to name one that never joins."""

    def name_of(self, node_rank: int) -> str:
        """Return the name of a node for messages: `node 1 (gpu-b)`."""
        known = self.names[node_rank] if node_rank < len(self.names) else ""
        return f"node {node_rank} ({known})" if known else f"node {node_rank}"


@dataclass(frozen=True)
class _Closed:
    """The message to all nodes by the node that fails first."""

    __pydantic_config__ = checked.CONFIG

    reason: checked.Text
    record: FailureRecord | None
    signal: checked.Signal | None


@dataclass(frozen=True)
class Member:
    __pydantic_config__ = checked.CONFIG

    node_rank: checked.Rank
    name: checked.Name
    address: checked.Name

    def to_json(self) -> str:
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Member:
        """Parse a node's message to the head. Raise RendezvousFailed if it is not valid."""
        return _parse(cls, text)


@dataclass(frozen=True)
class Round:
    """The members of a round, and the head's port on which its workers have their store."""

    __pydantic_config__ = checked.CONFIG

    members: list[Member]
    port: checked.Port

    @property
    def node_ranks(self) -> list[int]:
        return [member.node_rank for member in self.members]

    def to_json(self) -> str:
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str, settings: RendezvousSettings) -> Round:
        """Parse the head's message to a node. Raise RendezvousFailed if it is not valid."""
        found = _parse(cls, text)
        ranks = found.node_ranks
        if ranks != sorted(set(ranks)) or settings.node_rank not in ranks:
            raise RendezvousFailed(
                f"the head's list of nodes is not valid for node {settings.node_rank}: {ranks}"
            )
        if ranks[-1] >= settings.max_nodes:
            raise RendezvousFailed(
                f"the head's list has node {ranks[-1]}, but there are {settings.max_nodes} nodes"
            )
        return found


def _parse(kind: type[T], text: str) -> T:
    try:
        return checked.read(kind, text)
    except ValueError as error:
        raise RendezvousFailed(f"the message of another node is not valid: {error}") from error


class RateLimitedCache:
    """Caches the head's answers. With many nodes, each asks again only after a while."""

    def __init__(self, nodes: int) -> None:
        self.pause_s = _PAUSE_PER_NODE_S * max(0, nodes - _FEW_NODES)
        self._answers: dict[str, tuple[int, float]] = {}

    def __call__(self, key: str, ask: Callable[[], int]) -> int:
        now = time.monotonic()
        answer, asked_at = self._answers.get(key, (0, 0.0))
        if now - asked_at >= self.pause_s:
            answer = ask()
            self._answers[key] = answer, now
        return answer


def wait_s(nodes: int) -> float:
    """Return how long one of so many nodes pauses before it asks again for a missing answer."""
    return max(_WAIT_S, _WAIT_PER_NODE_S * nodes)


def serve(settings: RendezvousSettings, listener: socket.socket | None) -> sealed.Server:
    """Return the run's store, served by this process.

    Args:
        settings: the host, port and run.
        listener: a socket that already listens on the port. None opens one.

    Raises:
        RendezvousFailed: the port is taken.
    """
    if listener is None:
        try:
            listener = ports.listen(ports.to_listen_on(settings.host), settings.port)
        except OSError as error:
            raise RendezvousFailed(
                f"port {settings.port} of the rendezvous cannot be opened here: "
                f"{error.strerror}; choose another with --rdzv-endpoint HOST:PORT"
            ) from error
    return sealed.Server(listener, settings.run_id, settings.token)


def serve_anywhere(settings: RendezvousSettings, key: str) -> tuple[TCPStore, int]:
    """Return a torch store for workers, and its port, a free one of the key's candidates."""
    listener = ports.listen_on_candidate(ports.to_listen_on(settings.host), key)
    port = int(listener.getsockname()[1])
    store = TCPStore(
        settings.host,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # it listens: no other process can take the port first
    )
    return store, port


def connect(settings: RendezvousSettings, notice: Callable[[str], None]) -> sealed.Remote:
    """Return the run's store, served by the head.

    Args:
        settings: the host, port and run.
        notice: called with a sentence while the head is awaited.

    Raises:
        RendezvousFailed: the head does not answer in time, or another run answers there.
    """
    sock = _reach(settings, notice)
    sock.settimeout(max(settings.join_timeout_s, 1.0))
    address = (settings.host, settings.port)
    where = f"{settings.host}:{settings.port}"
    try:
        store = sealed.Remote(address, settings.token, sock)
    except OSError as error:
        raise RendezvousFailed(
            f"{settings.name_of(0)} does not answer at {where}: {error}", [0]
        ) from error
    if store.run_id != settings.run_id:
        raise RendezvousFailed(
            f"run {store.run_id!r} answers at {where}, not {settings.run_id!r}; give each run its "
            "own --rdzv-endpoint"
        )
    try:
        store.get("")
    except sealed.HeadGone as error:
        raise RendezvousFailed(
            f"run {settings.run_id} at {where} has another token than this host: both must use "
            "the same run directory, see docs/security.md"
        ) from error
    return store


def _reach(settings: RendezvousSettings, notice: Callable[[str], None]) -> socket.socket:
    """Connect to the head, which may take a while to start."""
    started = time.monotonic()
    notice_at = started + FIRST_NOTICE_S
    while True:
        try:
            return socket.create_connection((settings.host, settings.port), timeout=5)
        except OSError as error:
            waited = time.monotonic() - started
            head = f"{settings.name_of(0)} at {settings.host}:{settings.port}"
            if waited > settings.join_timeout_s:
                from dtrain.doctor.network import why_unreachable

                raise RendezvousFailed(
                    f"{head} cannot be reached after {waited:.0f} s: {error}",
                    [0],
                    why_unreachable(settings.host, settings.port, error),
                ) from error
            if time.monotonic() >= notice_at:
                notice(f"waiting for {head}: {error}")
                notice_at = time.monotonic() + 2 * waited
        time.sleep(0.1)  # between two tries to connect; bounded by the join timeout
