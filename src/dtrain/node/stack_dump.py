"""The present stack of a worker, which its node's agent requests before it kills the worker.

faulthandler answers in C, so a rank that hangs in a C call while it holds the GIL also answers. The
answer goes into the rank's log, like all its output.
"""

from __future__ import annotations

import contextlib
import faulthandler
import linecache
import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from dtrain.run.failures import Frame

SIGNAL = signal.SIGRTMIN + 7
"""The signal that requests a worker's stack. No program is known to use it."""

TO_MEMORY = signal.SIGRTMIN + 8
"""The same signal for a worker that must continue, see `enable_to_memory`."""
_MEMORY_NAME = "dtrain-stack"

_ANSWER_S = 2.0  # longest wait: a stopped process never answers, a busy machine is slow
_QUIET_S = 0.1  # nothing more is written: the answer is complete
_POLL_S = 0.02
_LINE = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$', re.MULTILINE)


def enable() -> None:
    """Answer requests from now on, in this process and in those that it forks."""
    faulthandler.register(SIGNAL, file=2, all_threads=False)


def enable_to_memory() -> None:
    """Answer `TO_MEMORY` too, in this process: into memory, so that no log shows it."""
    faulthandler.register(TO_MEMORY, file=os.memfd_create(_MEMORY_NAME), all_threads=False)


def memory_file(pid: int) -> Path | None:
    """Return where a process answers `TO_MEMORY`. None if it does not: the signal would end it."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        for file in Path(f"/proc/{pid}/fd").iterdir():
            if caught >> (TO_MEMORY - 1) & 1 and _MEMORY_NAME in os.readlink(file):
                return file
    return None


def request(logs: Iterable[Path], send: Callable[[], None]) -> dict[Path, list[Frame]]:
    """Return the stack of each of some workers, innermost call first. Empty without an answer.

    Args:
        logs: the logs of the workers, or the paths that `memory_file` has returned.
        send: sends them the corresponding signal.
    """
    before = {log: size(log) for log in logs}
    send()
    last, quiet_since = dict(before), time.monotonic()
    deadline = quiet_since + _ANSWER_S
    while (now := time.monotonic()) < deadline:
        sizes = {log: size(log) for log in before}
        if sizes != last:
            last, quiet_since = sizes, now
        answered = all(last[log] > began for log, began in before.items())
        if answered and now - quiet_since >= _QUIET_S:
            break
        time.sleep(_POLL_S)
    return {log: frames(_tail(log, began)) for log, began in before.items()}


def frames(text: str) -> list[Frame]:
    """Parse the output of faulthandler. Return the calls, innermost first."""
    return [
        Frame(
            found["file"],
            int(found["line"]),
            found["function"],
            linecache.getline(found["file"], int(found["line"])).strip(),
        )
        for found in _LINE.finditer(text)
    ]


def is_waiting_or_failing(stack: list[Frame]) -> bool:
    """Return whether a rank itself waits for the others, or is about to end with an error."""
    if any(f.function == "record_failure" and f.file.endswith("/node/worker.py") for f in stack):
        return True
    innermost = Path(stack[0].file).as_posix() if stack else ""
    # the wait for DDP's reductions is inside backward
    return "/torch/distributed/" in innermost or innermost.endswith("/torch/autograd/graph.py")


def size(log: Path) -> int:
    """Return the size of a log in bytes, or 0 if there is none."""
    try:
        return os.stat(log).st_size
    except OSError:
        return 0


def _tail(log: Path, begin: int) -> str:
    try:
        with log.open("rb") as file:
            file.seek(begin)
            return file.read().decode(errors="replace")
    except OSError:
        return ""
