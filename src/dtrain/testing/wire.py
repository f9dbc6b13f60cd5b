"""What pytest's process, the server that forks, and the ranks say to each other."""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Literal

MASTER_ADDR = "127.0.0.1"

Kind = Literal["passed", "failed", "skipped", "xfailed", "died", "killed"]
"""How a rank ended. `died`: by a signal or an exit of its own; `killed`: by us, still running."""


@dataclass(frozen=True)
class Layout:
    """How many ranks there are, and on how many (pretended) nodes.

    Raises:
        ValueError: the ranks cannot be spread evenly.
    """

    world_size: int
    nodes: int = 1

    def __post_init__(self) -> None:
        for name, value in (("world_size", self.world_size), ("nodes", self.nodes)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; give a whole number of at least 1")
        if self.world_size % self.nodes:
            raise ValueError(
                f"{self.world_size} ranks cannot be spread evenly over {self.nodes} nodes"
            )

    def env(self, rank: int, master_port: int) -> dict[str, str]:
        """The variables that torchrun would set for `rank`, and gloo bound to the loopback."""
        per_node = self.world_size // self.nodes
        node, local_rank = divmod(rank, per_node)
        values: dict[str, object] = {
            "RANK": rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": per_node,
            "GROUP_RANK": node,
            "GROUP_WORLD_SIZE": self.nodes,
            "NODE_RANK": node,
            "ROLE_RANK": rank,
            "ROLE_WORLD_SIZE": self.world_size,
            "ROLE_NAME": "default",
            "MASTER_ADDR": MASTER_ADDR,
            "MASTER_PORT": master_port,
            "TORCHELASTIC_RUN_ID": "dtrain-testing",
            "TORCHELASTIC_RESTART_COUNT": 0,
            "TORCHELASTIC_MAX_RESTARTS": 0,
            # Rank 0 hosts the store: an agent's store cannot be used twice (pytorch#135712), and
            # a body may well destroy its process group and make another.
            "TORCHELASTIC_USE_AGENT_STORE": False,
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": 1,
        }
        return {name: str(value) for name, value in values.items()}


@dataclass(frozen=True)
class Request:
    """One body to run on every rank."""

    number: int
    """Comes back with the answer: one that was given up on is told from the next."""
    layout: Layout
    timeout_s: float
    init: bool
    """Whether the ranks join a gloo process group before the body."""
    nodeid: str | None
    """The pytest item whose body is run, or from which a function is called."""
    payload: bytes
    """Pickled for the ranks, not for the server: see `dtrain.testing.body`."""
    is_item: bool


@dataclass
class Outcome:
    """How the body ended, as the rank itself saw it."""

    kind: Kind
    time: float
    """Of `time.monotonic()`, which all processes of a machine share."""
    headline: str = ""
    """One line: the exception's type and message, or the reason of a skip."""
    text: str = ""
    """The traceback, as pytest would show it when the body is a test's."""
    where: tuple[str, int] | None = None
    """File and line of the failure."""
    value: bytes | None = None
    """Pickled: what the body returned, or the exception it raised; None when it cannot be."""

    @property
    def is_lost_connection(self) -> bool:
        """Whether it failed because another rank ended: gloo's words for that, also as a cause."""
        return self.kind == "failed" and "gloo/transport" in self.headline + self.text


@dataclass
class RankResult:
    """How a rank ended, as the server saw it."""

    rank: int
    outcome: Outcome
    stdout: str = ""
    stderr: str = ""
    stack: str = ""
    """Where a rank that had to be killed was."""


@dataclass
class Answer:
    """What the server has to say to a request."""

    number: int
    layout: Layout
    results: list[RankResult] = field(default_factory=list)
    """By rank."""
    timed_out_s: float | None = None
    """The limit, when it was passed."""


class Channel:
    """Whole messages over a stream socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()

    def fileno(self) -> int:
        """The socket's descriptor, to wait on."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; the other side sees the end."""
        self._socket.close()

    def send(self, message: bytes) -> None:
        """Send one message; OSError when the other side is gone."""
        self._socket.settimeout(None)
        self._socket.sendall(struct.pack("<Q", len(message)) + message)

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """The next message; None when the other side is gone; TimeoutError when none came."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if len(self._buffer) >= 8:
                end = 8 + struct.unpack_from("<Q", self._buffer)[0]
                if len(self._buffer) >= end:
                    message = bytes(self._buffer[8:end])
                    del self._buffer[:end]
                    return message
            if deadline is not None:
                self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
            else:
                self._socket.settimeout(None)
            try:
                chunk = self._socket.recv(1 << 20)
            except ConnectionError:
                return None
            if not chunk:
                return None
            self._buffer += chunk
