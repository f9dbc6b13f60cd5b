"""A node's own run directory, where nodes share no disk, and what is new in it for the driver.

Sent by value with the actor: only the standard library is imported here.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from typing import Any

_MOST_AT_ONCE = 4 << 20
_MOST_OF_A_FILE = 64 << 20  # what is larger and written anew each time is no record of a run
_NEW_S, _GONE_S = 5.0, 5.0
_LINES = (".jsonl",)
_GROWING = (".log",)


def settle(run_id: str, package: bytes) -> str:
    """Make the node's run directory; its path.

    Args:
        run_id: name of the directory.
        package: a tar file of what is to be in it.
    """
    root = os.environ.get("DTRAIN_STAGING") or tempfile.gettempdir()
    os.makedirs(root, exist_ok=True)
    _remove_orphans(root)
    own = tempfile.mkdtemp(prefix=_prefix(), dir=root)
    _locks.append(_locked(own))
    folder = os.path.join(own, run_id)
    os.mkdir(folder, mode=0o700)
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, **safe)  # type: ignore[arg-type]
    os.chmod(folder, 0o700)
    return folder


def remove(folder: str) -> None:
    """Remove what `settle` has made, where workers that were killed may still be writing."""
    own = os.path.dirname(folder)
    deadline = time.monotonic() + _GONE_S
    while os.path.exists(own) and time.monotonic() < deadline:
        shutil.rmtree(own, ignore_errors=True)
        time.sleep(0.05)


_locks: list[int | None] = []
"""Held while this process lives, however it ends."""


def _prefix() -> str:
    return f"dtrain-node-{os.getuid()}-"


def _locked(folder: str) -> int | None:
    """A lock on a folder, which ends with this process; None when another has it."""
    lock = os.open(os.path.join(folder, ".lock"), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _remove_orphans(root: str) -> None:
    """Remove the directories of actors that were killed."""
    for name in os.listdir(root):
        folder = os.path.join(root, name)
        with contextlib.suppress(OSError):
            is_new = time.time() - os.stat(folder).st_mtime < _NEW_S  # and not locked yet
            lock = None if is_new or not name.startswith(_prefix()) else _locked(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


class News:
    """What is new in a folder since the last look, in pieces that are small enough to be sent."""

    def __init__(self, folder: str) -> None:
        """Take what is there now for known."""
        self._folder = folder
        self._told: dict[str, tuple[int, int]] = {}
        for name in self._names():
            self._told[name] = self._stat(name) or (0, 0)

    def collect(self) -> list[dict[str, Any]]:
        """The next pieces, oldest first; empty when all is told.

        Each has the `name` of a file and some `bytes`: whole `lines` to be appended, bytes that
        belong `at` a position, or else all that the file now holds.
        """
        pieces: list[dict[str, Any]] = []
        room = _MOST_AT_ONCE
        for name in self._names():
            for piece in self._pieces(name):
                pieces.append(piece)
                room -= len(piece["bytes"])
            if room <= 0:
                break
        return pieces

    def _names(self) -> Iterator[str]:
        for here, folders, files in os.walk(self._folder):
            inside = os.path.relpath(here, self._folder)
            skipped = {"checkpoints", "code"} if inside == "." else set()
            folders[:] = sorted(set(folders) - skipped - {n for n in folders if n[0] == "."})
            for name in sorted(files):
                if not name.startswith("."):
                    yield os.path.normpath(os.path.join(inside, name))

    def _stat(self, name: str) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            stat = os.stat(os.path.join(self._folder, name))
            return stat.st_size, stat.st_mtime_ns
        return None

    def _pieces(self, name: str) -> Iterator[dict[str, Any]]:
        now, (size, changed) = self._stat(name), self._told.get(name, (0, 0))
        if now is None or now == (size, changed):
            return
        grows = name.endswith((*_LINES, *_GROWING)) or "events.out.tfevents" in name
        if not grows and now[0] > _MOST_OF_A_FILE:
            self._told[name] = now
            return
        with open(os.path.join(self._folder, name), "rb") as file:
            file.seek(size if grows else 0)
            data = file.read(_MOST_AT_ONCE if grows else now[0])
        if name.endswith(_LINES):
            data = data[: data.rfind(b"\n") + 1]
            if data:
                yield {"name": name, "lines": True, "bytes": data}
        elif grows:
            yield {"name": name, "at": size, "bytes": data}
        else:
            yield {"name": name, "bytes": data}
        end = size + len(data) if grows else now[0]
        # of a file that has more to tell, the time is not yet that of all
        self._told[name] = (end, now[1] if end == now[0] else 0)
