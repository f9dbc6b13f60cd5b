"""Where a worker is just now, asked by its node's agent before it is killed.

The answer is given by faulthandler in C, so a rank that hangs in a C call, with Python's lock in
its hands, gives it too. It goes into the rank's log, like all that the rank says.
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
"""Asks a worker for its stack; no program is known to use it."""

ASIDE = signal.SIGRTMIN + 8
"""Likewise, while it is to go on; see `answer_aside`."""
_ASIDE_NAME = "dtrain-stack"

_ANSWER_S = 2.0  # longest wait: a stopped process never answers, a busy machine is slow
_QUIET_S = 0.1  # nothing more is written: the answer is whole
_POLL_S = 0.02
_LINE = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$', re.MULTILINE)


def answer() -> None:
    """Answer from now on, in this process and in those that it forks."""
    faulthandler.register(SIGNAL, file=2, all_threads=False)


def answer_aside() -> None:
    """Answer `ASIDE` too, in this process: into memory, so that no log shows it."""
    faulthandler.register(ASIDE, file=os.memfd_create(_ASIDE_NAME), all_threads=False)


def aside(pid: int) -> Path | None:
    """Where a process answers `ASIDE`; None when it does not, and the signal would end it."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        for file in Path(f"/proc/{pid}/fd").iterdir():
            if caught >> (ASIDE - 1) & 1 and _ASIDE_NAME in os.readlink(file):
                return file
    return None


def ask(logs: Iterable[Path], send: Callable[[], None]) -> dict[Path, list[Frame]]:
    """Get the stack of each of some workers, innermost call first; empty without an answer.

    Args:
        logs: of the workers, or what `aside` has found.
        send: sends them the signal that goes with it.
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
    """Read what faulthandler wrote: the calls, innermost first."""
    return [
        Frame(
            found["file"],
            int(found["line"]),
            found["function"],
            linecache.getline(found["file"], int(found["line"])).strip(),
        )
        for found in _LINE.finditer(text)
    ]


def waits_or_leaves(stack: list[Frame]) -> bool:
    """Whether a rank waits for the others itself, or is about to end with an error."""
    if any(f.function == "record_failure" and f.file.endswith("/node/worker.py") for f in stack):
        return True
    innermost = Path(stack[0].file).as_posix() if stack else ""
    # DDP's reductions are waited for inside of backward
    return "/torch/distributed/" in innermost or innermost.endswith("/torch/autograd/graph.py")


def size(log: Path) -> int:
    """In bytes; 0 where there is none."""
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
