"""The fixture `leak_guard`: a test that leaves something behind fails, and what it left is ended.

Looked at after each test, and cheap enough for an autouse fixture (about a millisecond):

* processes started by the test: children, their descendants, and orphans that carry our mark in
  their environment; one that was in place before the test may start others (a cluster's daemons);
* ports that this process listens on;
* files in /dev/shm, unless a living process of someone else's has them open, or made them;
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
_SETTLE_S = 2.0
"""How long what was killed a moment ago may take to be gone."""
_SHM = Path("/dev/shm")
_NOT_OURS = ("PYTEST_CURRENT_TEST",)


@pytest.fixture
def leak_guard() -> Iterator[None]:
    """Fail the test if it leaves a process, a listening port, a file in /dev/shm or an env change.

    Use it as the first fixture (autouse), so that others have cleaned up when it looks.
    """
    with watching() as leaks:
        yield
    if leaks:
        pytest.fail("the test left behind:\n  " + "\n  ".join(leaks), pytrace=False)


@contextlib.contextmanager
def watching(*, processes: bool = True) -> Generator[list[str]]:
    """Collect, when the block is left, a line for each thing it left behind, and end them all.

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
        """None when there is no such process any more."""
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
    """Put our pid where processes started from here inherit it, behind those of outer guards."""
    marks = [mark for mark in os.environ.get(_MARK, "").split(":") if mark]
    if _own_mark() not in marks:
        os.environ[_MARK] = ":".join([*marks, _own_mark()])


def _own_mark() -> str:
    # A pid is used again, together with its time of start never.
    started = _read("/proc/self/stat").rpartition(")")[2].split()[19]
    return f"{os.getpid()}-{started}"


def _leaked_processes(before: _Snapshot) -> list[str]:
    found = _settled(lambda: _new_processes(before))
    lines = [str(process) for process in found]
    for process in found:
        with contextlib.suppress(OSError):
            os.kill(process.pid, signal.SIGKILL)
    for process in found:
        if process.parent == os.getpid():
            with contextlib.suppress(OSError):
                os.waitpid(process.pid, 0)
    return lines


def _settled(look: Callable[[], list[_Process]]) -> list[_Process]:
    """What is still found after a moment; a zombie of ours will not go away by itself."""
    deadline = time.monotonic() + _SETTLE_S
    while found := look():
        if all(process.state == "Z" for process in found) or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return found


def _new_processes(before: _Snapshot) -> list[_Process]:
    read = (_Process.read(pid) for pid in _pids() - before.pids - client.server_pids())
    new = {process.pid: process for process in read if process}
    return [process for process in new.values() if _is_ours(process, new)]


def _is_ours(process: _Process, new: dict[int, _Process]) -> bool:
    """Whether the test started it: by descent from us alone, or, orphaned, by the mark."""
    oldest = process
    while oldest.parent in new:
        oldest = new[oldest.parent]
    if oldest.parent == os.getpid():
        return "resource_tracker" not in _read(f"/proc/{process.pid}/cmdline")
    orphaned = oldest.parent == 1 and process.state != "Z"
    return orphaned and _own_mark() in _read(f"/proc/{process.pid}/environ")


def _leaked_ports(before: _Snapshot) -> list[str]:
    deadline = time.monotonic() + _SETTLE_S
    while found := _new_ports(before):
        if time.monotonic() > deadline:
            break
        gc.collect()  # a server in a cycle of garbage, or one that a thread is about to close
        time.sleep(0.01)
    for inode, (_, fd) in found.items():
        # Its owner may still close the descriptor; this only ends the listening.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as copy:
            if str(os.fstat(copy.fileno()).st_ino) == inode:
                copy.shutdown(socket.SHUT_RDWR)
    return [f"listening port {port}" for port, _ in found.values()]


def _new_ports(before: _Snapshot) -> dict[str, tuple[int, int]]:
    """Port and descriptor of what this process listens on and did not before, by inode."""
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
    """Whether a living process that is not this one has the file open, or is named in its name.

    As torch does it: `torch_PID_…`. Otherwise tests of another worker, which leave a file for a
    moment, would be taken for ours.
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
        if was == now or name in _NOT_OURS:
            continue
        # Values may be secrets: only names are shown.
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
    """Our sockets: inode to descriptor."""
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
