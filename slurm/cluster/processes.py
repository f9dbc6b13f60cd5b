"""Looking at processes, ending them, and waiting with a bound."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from cluster.spec import ClusterError

Found = TypeVar("Found")


def wait_until(
    what: str, look: Callable[[], Found | None], timeout_s: float, step_s: float = 0.02
) -> Found:
    """What `look` finds at last; an error that says what was waited for when it never does."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(step_s)
    return found


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    state_and_parent = _state_and_parent(pid)
    return state_and_parent is not None and state_and_parent[0] not in "ZX"


def children(pid: int) -> list[int]:
    """Of a process with one thread."""
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


def name_of(pid: int) -> str:
    """Of its program; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def descendants(ancestor: int) -> set[int]:
    """All that live, below `ancestor`."""
    parents = {}
    for pid in all_pids():
        if (found := _state_and_parent(pid)) and found[0] not in "ZX":
            parents[pid] = found[1]
    below: set[int] = set()
    while new := {pid for pid, parent in parents.items() if parent in {ancestor, *below}} - below:
        below |= new
    return below


def sharing_network(namespace: str) -> set[int]:
    """All whose network namespace is this one (as `network_of` tells it)."""
    return {pid for pid in all_pids() if network_of(pid) == namespace}


def network_of(pid: int) -> str:
    """Its network namespace; empty when it is gone or not ours to see."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def all_pids() -> list[int]:
    """Of every process that can be seen from here."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def kill(pids: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal; to one that is gone already is no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def reap() -> None:
    """Take leave of children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def tail(path: Path, lines: int = 8) -> str:
    """The end of a log, indented; empty when there is none."""
    try:
        last = path.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return ""
    return "".join(f"\n  {line}" for line in last)


def _state_and_parent(pid: int) -> tuple[str, int] | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, parent = stat.rpartition(")")[2].split()[:2]
    return state, int(parent)
