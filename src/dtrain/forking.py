"""The parts of a fork server: imports that are done once, children, and messages.

A fork server imports torch once and forks what needs it. `dtrain.node.fork_server` forks agents
and workers, `dtrain.node.warm` node processes, and `dtrain.testing.server` the ranks of a test. It
has one thread for ever, so that forking stays safe (measured over hundreds of forks). This module
does not import torch.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dtrain.procs import add_current_directory, threads_lost_by_fork

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""numpy's and torch's thread pools start at import, and a forking process must have one thread."""
SERVER_ENDED = "the node's fork server has ended"
"""An agent's error message when this is why it ends. The server's own message has the reason."""
_LARGEST = 1 << 20
_MOST_FILES = 8


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


def import_once(
    modules: Iterable[str],
    preload: Collection[str] = (),
    between: Callable[[], None] = lambda: None,
) -> int:
    """Import what is forked from now on, and return how many threads that started.

    A fork would lose these threads.

    Args:
        modules: the modules, in the order of import.
        preload: the user's modules, which may be in the current directory.
        between: called before each import.
    """
    for module in modules:
        between()
        if module in preload:
            add_current_directory()
        importlib.import_module(module)
    # A collection in a forked worker would write to, and so copy, every object imported
    # here: measured as 0.7-2.6 s in each of 4 ranks at once.
    gc.collect()
    gc.freeze()
    return threads_lost_by_fork()


@dataclass(frozen=True)
class Ended:
    pid: int
    code: int
    """The exit status, or the number of the signal that killed it, negative."""
    peak: int
    """The peak of its resident memory, in bytes."""


class Children:
    """Waits for messages and exits of forked children.

    After it is created, SIGCHLD and every signal with a handler end a `wait`.
    """

    def __init__(self) -> None:
        self._wake, written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)

    def wait(self, sources: Iterable[_HasFileno | int], wait_s: float | None = None) -> set[int]:
        """Wait for a readable source, a child's end or a signal. Return the readable sources."""
        ready = _readable([self._wake, *sources], wait_s)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake, 512):
                pass
        return ready - {self._wake}

    def reap(self) -> Iterator[Ended]:
        """Yield every child that has ended since the last call, including adopted orphans."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.wait4(-1, os.WNOHANG))[0]:
                pid, status, usage = ended
                yield Ended(pid, os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)


class Channel:
    """One end of a socket pair between a fork server and its client.

    Each message is one JSON object; SOCK_SEQPACKET keeps their bounds.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(True)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _LARGEST)

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(left), cls(right)

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: dict[str, Any], files: Sequence[int] = ()) -> None:
        """Send one message with descriptors. Raise `OSError` if the other end is closed."""
        socket.send_fds(self.sock, [json.dumps(message).encode()], files)

    def send_if_room(self, message: dict[str, Any]) -> None:
        """Send one message if there is room for it now. Another thread may call this."""
        with contextlib.suppress(BlockingIOError):
            self.sock.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)

    def receive(self, wait_s: float | None = 0.0) -> dict[str, Any] | None:
        """Return the next message, or None if none has arrived after `wait_s` seconds.

        Raises:
            EOFError: the other end is closed.
        """
        return self.receive_with_files(wait_s)[0]

    def receive_with_files(
        self, wait_s: float | None = 0.0
    ) -> tuple[dict[str, Any] | None, list[int]]:
        """Return the next message as `receive` does, and the descriptors that came with it."""
        if not _readable([self], wait_s):
            return None, []
        try:
            raw, files, _, _ = socket.recv_fds(self.sock, _LARGEST, _MOST_FILES)
        except ConnectionResetError as error:
            raise EOFError from error
        if not raw:
            raise EOFError
        return json.loads(raw), files

    def close(self) -> None:
        self.sock.close()


def _readable(sources: Iterable[_HasFileno | int], wait_s: float | None) -> set[int]:
    poll = select.poll()  # select.select takes no descriptor above 1023
    for source in sources:
        poll.register(source, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if wait_s is None else wait_s * 1000)}
