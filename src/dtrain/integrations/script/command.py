"""Running a program that need not be Python, like `torchrun --no-python`."""

from __future__ import annotations

import codecs
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from dtrain import procs
from dtrain.errors import UsageError
from dtrain.integrations.script.stopping import prepare
from dtrain.run import failures
from dtrain.run.failures import Kind
from dtrain.run.rundir import RunDir

_PARENT_ENDED = signal.SIGRTMIN + 9
"""The signal by which the kernel reports that the fork server has ended."""
_TAIL_LINES = 8
_TAIL_BYTES = 16 << 10
_STDERR_S = 1.0
"""The time to read the rest of stderr after the program has ended. A process that it has left in
the background may keep stderr open for longer."""


@dataclass(frozen=True)
class Ended:
    """How a command has ended."""

    command: str
    status: int
    """The exit status, or the number of the signal that killed it, negative."""
    stderr: list[str]
    """The last lines of its stderr."""

    def describe(self) -> tuple[Kind, str]:
        """Return the kind of failure, and a text with the last lines of stderr."""
        kind: Kind = "exit" if self.status > 0 else "signal"
        how = f"{self.command} {failures.describe_exit(self.status)}"
        return kind, "\n".join([how, *self.stderr])


def run_command(command: Sequence[str], folder: Path, run: RunDir) -> Ended:
    """Run a program as a child of this process, and wait for its end.

    It has this process's environment and stdout. Its stderr goes through this process, into the
    same log, so that a failure can be reported with its last lines. A signal to stop reaches the
    program and its children, as with torchrun. They end when this process's parent ends.

    Args:
        command: the program and its arguments. A relative path is relative to `folder`.
        folder: the directory of the job.
        run: the run directory, where `dtrain.checkpoint` saves.

    Raises:
        UsageError: there is no such program, or it may not be executed.
    """
    prepare(run)
    signal.signal(_PARENT_ENDED, lambda *_: os.killpg(0, signal.SIGKILL))
    procs.die_with_parent(os.getppid(), _PARENT_ENDED)
    program = command[0]
    argv = [str(folder / program) if os.sep in program else program, *command[1:]]
    try:
        process = subprocess.Popen(argv, stderr=subprocess.PIPE)
    except OSError as error:
        raise UsageError(
            f"command {program!r} cannot be started here: {error.strerror}; a program without a "
            f"slash is looked for in PATH={os.environ.get('PATH', '')}",
            code="script.command-not-started",
        ) from None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, _pass_on)
    assert process.stderr is not None
    tail = bytearray()
    reader = threading.Thread(target=_copy, args=(process.stderr, tail), daemon=True)
    reader.start()
    status = process.wait()
    reader.join(_STDERR_S)
    if status == -signal.SIGKILL:  # the agent finds out whether memory ran out
        os.kill(os.getpid(), signal.SIGKILL)
    return Ended(program, status, _lines(tail))


def _pass_on(number: int, _frame: FrameType | None) -> None:
    """Send a signal to the program and to its children, which are all in this process's group."""
    before = signal.signal(number, signal.SIG_IGN)
    os.killpg(0, number)
    signal.signal(number, before)


def _copy(stderr: IO[bytes], tail: bytearray) -> None:
    """Copy all that comes to this process's stderr, and keep the last bytes of it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while chunk := os.read(stderr.fileno(), 1024):
        sys.stderr.write(decoder.decode(chunk))
        tail += chunk
        del tail[:-_TAIL_BYTES]


def _lines(raw: bytearray) -> list[str]:
    text = raw.decode(errors="replace")
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return [line for line in lines if line][-_TAIL_LINES:]
