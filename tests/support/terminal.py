"""A terminal of its own for a command, and what is on its screen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyte

from support.launch import DTRAIN


class Terminal:
    """The screen of a running command, as a person sees it, and its keyboard."""

    def __init__(self, fd: int, process: subprocess.Popen[bytes], columns: int, rows: int) -> None:
        self._fd = fd
        self.process = process
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)

    @property
    def lines(self) -> list[str]:
        """The lines on the screen, from the top, without spaces at their ends."""
        return [line.rstrip() for line in self._screen.display]

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def until(self, what: str, look: Callable[[list[str]], object], timeout_s: float = 60) -> None:
        """Wait until the lines on the screen satisfy a condition."""
        deadline = time.monotonic() + timeout_s
        while not look(self.lines):
            assert time.monotonic() < deadline, f"no {what} on\n" + "\n".join(self.lines)
            self._read(0.2)

    def wait(self, timeout_s: float = 60) -> int:
        """Wait for the end of the command, and return its exit code."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it goes on with\n" + "\n".join(self.lines)
            self._read(0.2)
        return self.process.returncode

    def _read(self, timeout_s: float) -> None:
        if select.select([self._fd], [], [], timeout_s)[0]:
            with contextlib.suppress(OSError):  # the other end is closed
                self._stream.feed(os.read(self._fd, 1 << 16))


@contextlib.contextmanager
def terminal(
    *arguments: str | Path, cwd: Path, columns: int = 80, rows: int = 24
) -> Iterator[Terminal]:
    """Run a dtrain command on a terminal. It has ended when the block has, or is killed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    size = {"COLUMNS": str(columns), "LINES": str(rows)}  # xdist sets COLUMNS too
    process = subprocess.Popen(
        [*DTRAIN, *map(str, arguments)], cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", **size},
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Terminal(ours, process, columns, rows)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)
