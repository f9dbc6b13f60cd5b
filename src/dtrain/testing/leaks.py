"""The fixture `leak_guard`: it fails a test that leaves something behind, and removes the leak.

It checks after each test, and is cheap enough for an autouse fixture (about a millisecond):

* processes started by the test: children, their descendants, and orphans that carry this process's
  mark in their environment. A process that existed before the test (a cluster's daemon) may start
  others;
* ports that this process listens on;
* files in /dev/shm, unless another living process has them open, or made them;
* environment variables.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dtrain.testing import client

_MARK = "DTRAIN_LEAK_GUARD"
_GRACE_S = 2.0
"""The time that a process which was just killed may take to disappear."""
_SHM = Path("/dev/shm")
_IGNORED = ("PYTEST_CURRENT_TEST",)


@pytest.fixture
def leak_guard() -> Iterator[None]:
    """Fail the test if it leaves a process, a listening port, a file in /dev/shm or an env change.

    Use it as the first fixture (autouse), so that other fixtures have cleaned up when it checks.
    """
    with watching() as leaks:
        yield
    if leaks:
        pytest.fail("the test left behind:\n  " + "\n  ".join(leaks), pytrace=False)


@contextlib.contextmanager
def watching(*, processes: bool = True) -> Generator[list[str]]:
    """Collect a line for each thing that the block leaves behind, and end them all.

    Args:
        processes: False where daemons that outlive a test start processes of their own.
    """
    _mark_environment()
    before = _Snapshot.now()
    leaks: list[str] = []
    try:
        yield leaks
    finally:
        if processes:
            leaks += _leaked_processes(before)
        leaks += _leaked_ports(before)
        leaks += _leaked_shm(before)
        leaks += _leaked_environment(before)


@dataclass(frozen=True)
class _Snapshot:
    pids: set[int]
    sockets: dict[str, int]
    shm: set[str]
    env: dict[str, str]

    @classmethod
    def now(cls) -> _Snapshot:
        return cls(_pids(), _sockets(), set(_shm_names()), dict(os.environ))


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    state: str
    name: str

    @classmethod
    def read(cls, pid: int) -> _Process | None:
        """Return the process; None if it no longer exists."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        name, _, rest = stat.partition("(")[2].rpartition(")")
        state, parent = rest.split()[:2]
        return cls(pid, int(parent), state, name)

    def __str__(self) -> str:
        command = _read(f"/proc/{self.pid}/cmdline").replace("\0", " ").strip()
        state = " (dead, never waited for)" if self.state == "Z" else ""
        return f"process {self.pid}{state}: {command[:200] or self.name}"


def _mark_environment() -> None:
    """Add this process's mark to the environment that its children inherit.

    It comes after the marks of outer guards.
    """
    marks = [mark for mark in os.environ.get(_MARK, "").split(":") if mark]
    if _own_mark() not in marks:
        os.environ[_MARK] = ":".join([*marks, _own_mark()])


def _own_mark() -> str:
    # A pid is reused, but never together with its start time.
    started = _read("/proc/self/stat").rpartition(")")[2].split()[19]
    return f"{os.getpid()}-{started}"


def _leaked_processes(before: _Snapshot) -> list[str]:
    found = _after_grace(lambda: _new_processes(before))
    lines = [str(process) for process in found]
    for process in found:
        with contextlib.suppress(OSError):
            os.kill(process.pid, signal.SIGKILL)
    for process in found:
        if process.parent == os.getpid():
            with contextlib.suppress(OSError):
                os.waitpid(process.pid, 0)
    return lines


def _after_grace(find: Callable[[], list[_Process]]) -> list[_Process]:
    """Return the processes that still exist after a moment, or at once if all are zombies.

    A zombie child of this process does not disappear without a wait.
    """
    deadline = time.monotonic() + _GRACE_S
    while found := find():
        if all(process.state == "Z" for process in found) or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return found


def _new_processes(before: _Snapshot) -> list[_Process]:
    read = (_Process.read(pid) for pid in _pids() - before.pids - client.server_pids())
    new = {process.pid: process for process in read if process}
    return [process for process in new.values() if _is_of_test(process, new)]


def _is_of_test(process: _Process, new: dict[int, _Process]) -> bool:
    """Return whether the test started a process: a descendant of this one, or a marked orphan."""
    oldest = process
    while oldest.parent in new:
        oldest = new[oldest.parent]
    if oldest.parent == os.getpid():
        return "resource_tracker" not in _read(f"/proc/{process.pid}/cmdline")
    orphaned = oldest.parent == 1 and process.state != "Z"
    return orphaned and _own_mark() in _read(f"/proc/{process.pid}/environ")


def _leaked_ports(before: _Snapshot) -> list[str]:
    deadline = time.monotonic() + _GRACE_S
    while found := _new_ports(before):
        if time.monotonic() > deadline:
            break
        gc.collect()  # a server in a cycle of garbage, or one that a thread is about to close
        time.sleep(0.01)
    for inode, (_, fd) in found.items():
        # Its owner may still close the descriptor. This only ends the listening.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as copy:
            if str(os.fstat(copy.fileno()).st_ino) == inode:
                copy.shutdown(socket.SHUT_RDWR)
    return [f"listening port {port}" for port, _ in found.values()]


def _new_ports(before: _Snapshot) -> dict[str, tuple[int, int]]:
    """Return inode → (port, descriptor) of ports on which this process did not listen before."""
    new = {inode: fd for inode, fd in _sockets().items() if inode not in before.sockets}
    if not new:
        return {}
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in _read(f"/proc/self/net/{table}").splitlines()[1:]
    ]
    return {
        row[9]: (int(row[1].rpartition(":")[2], 16), new[row[9]])
        for row in rows
        if row[3] == "0A" and row[9] in new
    }


def _leaked_shm(before: _Snapshot) -> list[str]:
    lines = []
    for name in set(_shm_names()) - before.shm:
        path = _SHM / name
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid() and not _is_of_others(path):
                path.unlink()
                lines.append(f"file {path}")
    return lines


def _is_of_others(path: Path) -> bool:
    """Return whether another living process has the file open, or is named in its name.

    torch names files this way: `torch_PID_…`. Without this check, a short-lived file of another
    test worker would count as a leak of this one.
    """
    others = _pids() - {os.getpid()}
    number = re.search(r"\d+", path.name)
    if number is not None and int(number[0]) in others:
        return True
    for pid in others:
        if str(path) in _read(f"/proc/{pid}/maps"):
            return True
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{fd}") == str(path):
                    return True
    return False


def _leaked_environment(before: _Snapshot) -> list[str]:
    lines = []
    for name in sorted(before.env.keys() | os.environ.keys()):
        was, now = before.env.get(name), os.environ.get(name)
        if was == now or name in _IGNORED:
            continue
        # Values may be secrets, so only names are shown.
        how = "set" if was is None else "removed" if now is None else "changed"
        lines.append(f"environment variable {name}, {how}")
        if was is None:
            del os.environ[name]
        else:
            os.environ[name] = was
    return lines


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def _sockets() -> dict[str, int]:
    """Return this process's sockets: inode to descriptor."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:["):
                found[target[8:-1]] = int(name)
    return found


def _shm_names() -> list[str]:
    try:
        return os.listdir(_SHM)
    except OSError:
        return []


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
