"""The client of the server that forks ranks: it starts, uses and ends the server."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dtrain.forking import Channel
from dtrain.procs import fork_child
from dtrain.testing import wire
from dtrain.testing.server import open_fds, serve
from dtrain.testing.wire import Answer, Request

if TYPE_CHECKING:
    import pytest

_START_S = 300.0
_SLACK_S = 60.0
"""The time that the server may need beyond a request's own limit.

It is for stacks, killing, and a busy machine.
"""

_forked: Server | None = None
_own: Server | None = None


class ServerError(RuntimeError):
    """The process that forks the ranks failed."""


class Server:
    """The process that forks ranks, as the requesting process sees it.

    Create one with `fork` or `start`.
    """

    def __init__(self, pid: int, channel: Channel, log_fd: int) -> None:
        self.pid = pid
        self.owner = os.getpid()
        self.alive = True
        self._channel = channel
        self._log_fd = log_fd
        self._ready = False
        self._number = 0
        self._lock = threading.Lock()

    @classmethod
    def fork(cls, items: Mapping[str, pytest.Function]) -> Server:
        """Fork a server from this process, which has every test module imported.

        Call it before anything is computed here: threads and locks do not survive a fork.
        """
        client_end, server_end = Channel.pair()
        log_fd = os.memfd_create("dtrain-ranks")
        parent = os.getpid()
        # A file object whose descriptor is closed elsewhere might later write to, or close,
        # another file with the same number. So everything that is open stays open.
        keep = open_fds() - {client_end.fileno()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # for OpenBLAS's idle threads
            pid = fork_child(
                lambda: serve(server_end, parent, items),
                stdout=log_fd,
                stderr=log_fd,
                keep_fds=keep,
            )
        server_end.close()
        return cls(pid, client_end, log_fd)

    @classmethod
    def start(cls) -> Server:
        """Start a server in a new interpreter. That works from any process and in any state."""
        import subprocess

        client_end, server_end = Channel.pair()
        log_fd = os.memfd_create("dtrain-ranks")
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from dtrain.testing import server; "
            f"server.main({server_end.fileno()}, {os.getpid()})"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            pass_fds=[server_end.fileno()],
            start_new_session=True,  # ^C is for the caller, which forwards it
        )
        process.returncode = 0  # waited for in close(), by pid
        server_end.close()
        return cls(process.pid, client_end, log_fd)

    def run(self, request: Request, main: dict[str, Any] | None = None) -> Answer:
        """Run a body on every rank, and wait until no rank is left.

        Args:
            request: what to run.
            main: multiprocessing's data for importing the script that the body refers to.

        Raises:
            ServerError: the server died, or does not answer.
        """
        with self._lock:
            self._await_ready()
            self._number += 1
            try:
                try:
                    wire.send(self._channel, {"run": self._number}, (request, main))
                except OSError as error:
                    raise self._failure("died") from error
                return self._answer(request.timeout_s + _SLACK_S)
            except ServerError:
                raise
            except BaseException:  # ^C, or a timeout of other code
                self._cancel()
                raise

    def close(self) -> None:
        """End the server and its ranks, and wait for it."""
        if os.getpid() != self.owner or not self.alive:
            return
        self.alive = False
        self._channel.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self._log_fd)

    def _await_ready(self) -> None:
        if not self.alive:
            raise ServerError("the process that forks ranks died in an earlier test")
        if not self._ready:
            self._receive(_START_S)
            self._ready = True

    def _answer(self, timeout_s: float) -> Answer:
        while True:
            message, files = self._receive(timeout_s)
            answer: Answer = wire.load(*files)
            if message["run"] == self._number:  # otherwise it answers a cancelled request
                return answer

    def _receive(self, timeout_s: float) -> tuple[dict[str, Any], list[int]]:
        try:
            message, files = self._channel.receive_with_files(timeout_s)
        except EOFError as error:
            raise self._failure("died") from error
        if message is None:
            raise self._failure(f"has not answered for {timeout_s:g} s")
        return message, files

    def _failure(self, what: str) -> ServerError:
        size = os.fstat(self._log_fd).st_size
        output = os.pread(self._log_fd, 4096, max(0, size - 4096)).decode(errors="replace")
        self.close()
        return ServerError(f"the process that forks ranks {what}\n{output}".rstrip())

    def _cancel(self) -> None:
        try:
            self._channel.send({"cancel": self._number})
            self._answer(5.0)
        except BaseException:
            self.close()


def current_server() -> Server:
    """Return the server that was forked for this pytest session, or one of this process's own."""
    global _own
    if _forked is not None and has_forked():
        return _forked
    if _own is None or not _own.alive or _own.owner != os.getpid():
        _own = Server.start()
        atexit.register(_own.close)
    return _own


def server_pids() -> set[int]:
    """Return the servers that live on between calls. They are not leaks."""
    return {server.pid for server in (_forked, _own) if server is not None and server.alive}


def has_forked() -> bool:
    """Return whether this pytest session has a server that was forked for it."""
    return _forked is not None and _forked.owner == os.getpid()


def use_forked(server: Server | None) -> Server | None:
    """Make `run_ranks` use `server`, and return the previous one."""
    global _forked
    before, _forked = _forked, server
    return before
