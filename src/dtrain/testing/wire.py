"""The messages between pytest's process, the server that forks, and the ranks."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, field
from typing import Any, Literal

from dtrain.forking import Channel

is_importing_main = False
"""True while a server imports the caller's script."""

Kind = Literal["passed", "failed", "skipped", "xfailed", "died", "killed"]
"""The end of a rank. `died`: by a signal or its own exit. `killed`: by the server, while it ran."""


@dataclass(frozen=True)
class Layout:
    """The number of ranks, and of (simulated) nodes.

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
        """Return the variables that torchrun would set for `rank`, with gloo on the loopback."""
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
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": master_port,
            "TORCHELASTIC_RUN_ID": "dtrain-testing",
            "TORCHELASTIC_RESTART_COUNT": 0,
            "TORCHELASTIC_MAX_RESTARTS": 0,
            # Rank 0 hosts the store: an agent's store cannot be used twice (pytorch#135712), and
            # a body may destroy its process group and make another.
            "TORCHELASTIC_USE_AGENT_STORE": False,
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": 1,
        }
        return {name: str(value) for name, value in values.items()}


@dataclass(frozen=True)
class Request:
    """One body to run on every rank."""

    layout: Layout
    timeout_s: float
    init: bool
    """True if the ranks join a gloo process group before the body."""
    nodeid: str | None
    """The pytest item whose body is run, or from which a function is called."""
    payload: bytes
    """Data pickled for the ranks, not for the server: see `dtrain.testing.body`."""
    is_item: bool


@dataclass
class Outcome:
    """The end of the body, as the rank itself saw it."""

    kind: Kind
    time: float
    """The `time.monotonic()`, which all processes of a machine share."""
    headline: str = ""
    """One line: the exception's type and message, or the reason of a skip."""
    text: str = ""
    """The traceback, in pytest's form if the body is a test's."""
    where: tuple[str, int] | None = None
    """File and line of the failure."""
    value: bytes | None = None
    """The pickled return value or exception of the body; None if it cannot be pickled."""

    @property
    def is_lost_connection(self) -> bool:
        """True if it failed because another rank ended: gloo's error for that, also as a cause."""
        return self.kind == "failed" and "gloo/transport" in self.headline + self.text


@dataclass
class RankResult:
    """The end of a rank, as the server saw it."""

    rank: int
    outcome: Outcome
    stdout: str = ""
    stderr: str = ""
    stack: str = ""
    """The stack of a rank that had to be killed."""


@dataclass
class Answer:
    """The server's answer to a request."""

    layout: Layout
    results: list[RankResult] = field(default_factory=list)
    """The results by rank."""
    timed_out_s: float | None = None
    """The time limit, if it was exceeded."""


def send(channel: Channel, message: dict[str, Any], value: object) -> None:
    """Send a message with a value, which may be large and is pickled into a file in memory."""
    with open(os.memfd_create("dtrain-value"), "wb") as file:
        pickle.dump(value, file)
        file.flush()
        channel.send(message, [file.fileno()])


def load(file: int) -> Any:
    """Read the value that came with a message."""
    with open(file, "rb") as value:
        value.seek(0)  # the sender has left the offset at the end
        return pickle.load(value)
