"""Node processes that are forked where torch is imported already, for many short launches."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain import procs
from dtrain.environ import HASH_SEED, inherited_env
from dtrain.errors import LaunchError
from dtrain.node.channel import Channel


class WarmServer:
    """A `python -m dtrain.node.warm` of our own, which imports while we do something else."""

    def __init__(self, modules: Sequence[str], hash_seed: str = "0") -> None:
        """Start it; it ends with us, and with the thread that calls this.

        Args:
            modules: what it imports besides torch; none of them may start a thread.
            hash_seed: of all that it forks; a launch with another is not warm.
        """
        self._channel, theirs = Channel.pair()
        self._exited: dict[int, int] = {}
        self._ready = False
        self._started: list[int] = []
        argv = [sys.executable, "-P", "-m", "dtrain.node.warm", "--parent", str(os.getpid())]
        with contextlib.closing(theirs):
            self._process = subprocess.Popen(
                [*argv, "--socket", str(theirs.fileno()), *modules],
                env={**inherited_env(), HASH_SEED: hash_seed},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what cannot be imported here, a cold launch tells of
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C is ours to pass on
            )

    def is_ready(self) -> bool:
        """Wait until it has imported all; False when it has ended, or cannot fork safely."""
        while not self._ready and self._hear():
            pass
        return self._ready and self._process.poll() is None

    def spawn(
        self, argv: Sequence[str], env: Mapping[str, str], log: Path, listener: socket.socket | None
    ) -> WarmNode:
        """Have it fork what `argv`, a `python -m dtrain.node …`, would start.

        Raises:
            LaunchError: it has ended.
        """
        module = argv.index("dtrain.node")
        told = {"start": list(argv[module + 1 :]), "env": dict(env)}
        with log.open("ab") as file:
            files = [file.fileno(), *([] if listener is None else [listener.fileno()])]
            with contextlib.suppress(OSError):
                self._channel.send(told, files)
        self._started.clear()
        while not self._started:
            if not self._hear():
                raise LaunchError("the process from which nodes are forked has ended")
        return WarmNode(self, self._started[0])

    def send(self, pid: int, number: int) -> None:
        """Signal a node's process group, unless it has ended."""
        with contextlib.suppress(OSError):
            self._channel.send({"pid": pid, "signal": number})

    def exit_code(self, pid: int, wait_s: float | None = 0.0) -> int | None:
        """How a node ended, negative for a signal; None while it runs. None to wait for the end."""
        while pid not in self._exited and self._hear(wait_s):
            pass
        if pid not in self._exited and self._process.poll() is not None:
            return -signal.SIGKILL  # with the server
        return self._exited.get(pid)

    def close(self) -> None:
        """End it, and all that it has forked."""
        self._channel.close()
        if self._process.poll() is None:
            procs.kill_group(self._process.pid)
        self._process.wait()

    def _hear(self, wait_s: float | None = None) -> bool:
        """Take in the next message; False when there is none, or there will be none."""
        if not select.select([self._channel], [], [], wait_s)[0]:
            return False
        try:
            message: dict[str, Any] = self._channel.receive() or {}
        except EOFError:
            self._process.wait()
            return False
        self._ready = self._ready or "ready" in message
        self._started += [message["started"]] if "started" in message else []
        if "exited" in message:
            self._exited[message["exited"]] = message["code"]
        return True


class WarmNode:
    """A node process that the server has forked."""

    def __init__(self, server: WarmServer, pid: int) -> None:
        self._server = server
        self._pid = pid

    def poll(self) -> int | None:
        """Its exit status once it has ended, negative for a signal."""
        return self._server.exit_code(self._pid)

    def send_signal(self, number: int) -> None:
        """Signal it."""
        self._server.send(self._pid, number)

    def kill(self) -> None:
        """End it and wait for that."""
        self._server.send(self._pid, signal.SIGKILL)
        self._server.exit_code(self._pid, wait_s=None)
