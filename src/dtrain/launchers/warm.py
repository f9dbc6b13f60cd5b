"""Fork node processes from a process that has already imported torch, for many short launches."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain import procs
from dtrain.environ import HASH_SEED, inherited_env
from dtrain.errors import LaunchError
from dtrain.forking import Channel
from dtrain.launch_plan import LaunchPlan

Kind = tuple[str, str]
"""What all launches of one warm server share: the trainer, and the hash seed."""


def kind_of(plan: LaunchPlan) -> Kind:
    return plan.trainer, plan.worker_env[HASH_SEED]


class WarmClient:
    """The end of a socket to a `python -m dtrain.node.warm`, over which it is asked to fork."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._exited: dict[int, int] = {}
        self._ready = False
        self._ended = False

    def spawn(
        self, argv: Sequence[str], env: Mapping[str, str], log: Path, listener: socket.socket | None
    ) -> WarmNode:
        """Make it fork the process that `argv`, a `python -m dtrain.node …`, would start.

        Raises:
            LaunchError: it has ended.
        """
        module = argv.index("dtrain.node")
        request = {"start": list(argv[module + 1 :]), "env": dict(env)}
        with log.open("ab") as file:
            files = [file.fileno(), *([] if listener is None else [listener.fileno()])]
            with contextlib.suppress(OSError):
                self._channel.send(request, files)
        while (message := self._receive()) is not None and "started" not in message:
            pass
        if message is None:
            raise LaunchError(
                "the process from which nodes are forked has ended", code="launch.fork-server-ended"
            )
        return WarmNode(self, message["started"])

    def send(self, pid: int, number: int) -> None:
        """Send a signal to a node's process group, unless it has ended."""
        with contextlib.suppress(OSError):
            self._channel.send({"pid": pid, "signal": number})

    def exit_code(self, pid: int, wait_s: float | None = 0.0) -> int | None:
        """Return how a node ended, negative for a signal, or None while it runs.

        `wait_s` None waits for the end.
        """
        while pid not in self._exited and self._receive(wait_s) is not None:
            pass
        if pid not in self._exited and self._ended:
            return -signal.SIGKILL  # it died with the server
        return self._exited.get(pid)

    def _receive(self, wait_s: float | None = None) -> dict[str, Any] | None:
        """Read the next message. Return None when there is none, or when there will be none."""
        try:
            message = self._channel.receive(wait_s)
        except EOFError:
            self._ended = True
            return None
        if message is not None and "exited" in message:
            self._exited[message["exited"]] = message["code"]
        self._ready = self._ready or (message is not None and "ready" in message)
        return message


class WarmServer(WarmClient):
    """A `python -m dtrain.node.warm` process, which imports while this process does other work."""

    def __init__(self, modules: Sequence[str], hash_seed: str = "0") -> None:
        """Start it. It ends with this process, once the last one of its clients has ended.

        Args:
            modules: the modules that it imports in addition to torch. None of them may start a
                thread.
            hash_seed: the hash seed of everything that it forks. A launch with another one is not
                warm.
        """
        channel, child_end = Channel.pair()
        super().__init__(channel)
        argv = [sys.executable, "-P", "-m", "dtrain.node.warm", "--socket", str(child_end.fileno())]
        with contextlib.closing(child_end):
            self._process = procs.start_child(
                [*argv, *modules],
                env={**inherited_env(), HASH_SEED: hash_seed},
                log=None,  # a cold launch reports failed imports
                pass_fds=[child_end.fileno()],
            )

    def is_ready(self) -> bool:
        """Wait until it has imported everything. Return False if it has ended, or cannot fork
        safely."""
        while not self._ready and self._receive() is not None:
            pass
        return self._ready and self._process.poll() is None

    def connect(self) -> Channel:
        """Return a socket for another process, whose nodes end with it and not with this one."""
        ours, theirs = Channel.pair()
        with contextlib.closing(theirs), contextlib.suppress(OSError):
            self._channel.send({"client": True}, [theirs.fileno()])
        return ours

    def close(self) -> None:
        """End it, and everything that it has forked."""
        self._channel.close()
        if self._process.poll() is None:
            procs.kill_group(self._process.pid)
        self._process.wait()


class WarmNode:
    """A node process that the server has forked, with the interface of `subprocess.Popen`."""

    def __init__(self, server: WarmClient, pid: int) -> None:
        self._server = server
        self._pid = pid

    def poll(self) -> int | None:
        return self._server.exit_code(self._pid)

    def send_signal(self, number: int) -> None:
        self._server.send(self._pid, number)

    def kill(self) -> None:
        self._server.send(self._pid, signal.SIGKILL)
        self._server.exit_code(self._pid, wait_s=None)
