"""Detection of new data in a run's directory, and its transfer to another copy.

The data is sent to and from a URL (`run.remote.mirror`), with the heartbeats of Ray's nodes, or in
the output of a Ray job. This module is sent by value to Ray's nodes. All of it except
`apply_changes` needs only the standard library.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

NEVER = ("checkpoints/*", "code/tree-*/*", "code/job-*", "alive.json")
"""Files that are never copied. Hidden files are not copied either, for example secret variables."""
_MAX_BATCH_BYTES = 4 << 20
_MAX_FILE_BYTES = 64 << 20  # a larger file that is rewritten each time is no record of a run
_NEW_S, _REMOVE_S = 5.0, 5.0

Stat = tuple[int, int]
"""Bytes, and the time of the last change in nanoseconds."""
Change = dict[str, Any]
"""The `name` of a file and some `bytes`, with a position `at`. Without one, they are the whole
file."""


class ChangeScanner:
    """Finds new data in a directory since the last scan."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        known: dict[str, Stat] | None = None,
        *,
        max_log_bytes: int = sys.maxsize,
    ) -> None:
        """Prepare the scanner.

        Args:
            folder: the directory.
            known: the files found by the last scan, by name.
            max_log_bytes: the bytes of a log after which the rest is left out.
        """
        self._folder = os.fspath(folder)
        self._max_log_bytes = max_log_bytes
        self.known = {} if known is None else known

    def skip_present(self) -> None:
        """Mark everything that is present now as known."""
        self.known.update({name: now for name, _, now in self.changed()})

    def changed(
        self, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> Iterator[tuple[str, Stat, Stat]]:
        """Yield each file that has changed: its name, its known state and its present state.

        Args:
            include: patterns of the files that are wanted. Without any, all are.
            exclude: patterns of files that are not wanted.
        """
        for name in _names(self._folder, include, exclude):
            try:
                stat = os.stat(os.path.join(self._folder, name))
            except OSError:
                continue
            before, now = self.known.get(name, (0, 0)), (stat.st_size, stat.st_mtime_ns)
            if now != before:
                yield name, before, now

    def changes(self, include: Sequence[str] = ()) -> Iterator[Change]:
        """Yield all new data, in pieces that are small enough to be sent."""
        for name, (start, _), now in self.changed(include):
            path = os.path.join(self._folder, name)
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                if grows(name):
                    yield from self._grown(file, name, start, now)
                else:
                    self.known[name] = now
                    if now[0] <= _MAX_FILE_BYTES:
                        yield {"name": name, "bytes": file.read(now[0])}

    def next_changes(self) -> list[Change]:
        """Return as much of `changes` as is sent at once. Empty when everything was sent."""
        found, room = [], _MAX_BATCH_BYTES
        for change in self.changes():
            found.append(change)
            room -= len(change["bytes"])
            if room <= 0:
                break
        return found

    def _grown(self, file: io.BufferedReader, name: str, at: int, now: Stat) -> Iterator[Change]:
        end = min(now[0], self._max_log_bytes) if name.endswith(".log") else now[0]
        while at < end:
            file.seek(at)
            data = file.read(min(_MAX_BATCH_BYTES, end - at))
            if name.endswith(".jsonl"):
                data = data[: data.rfind(b"\n") + 1]
            if not data:
                return  # the line is not complete yet
            # a file with more data to read does not yet get its final time
            self.known[name] = (at + len(data), now[1] if at + len(data) == now[0] else 0)
            yield {"name": name, "at": at, "bytes": data}
            at += len(data)


def grows(name: str) -> bool:
    """Return whether a file is only ever appended to."""
    return name.endswith((".log", ".jsonl")) or "events.out.tfevents" in name


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _names(folder: str, include: Sequence[str], exclude: Sequence[str]) -> Iterator[str]:
    """Yield the names of files to copy. `plan.json` and similar files come first."""
    found = []
    for here, folders, names in os.walk(folder):
        inside = "" if here == folder else f"{os.path.relpath(here, folder)}/"
        found += [inside + name for name in names if name[0] != "."]
        folders[:] = [n for n in folders if n[0] != "." and not matches(f"{inside}{n}/x", NEVER)]
    for name in sorted(found, key=lambda name: (name.count("/"), name)):
        if (not include or matches(name, include)) and not matches(name, (*NEVER, *exclude)):
            yield name


def path_inside(folder: Path, name: str) -> Path | None:
    """Return the path of a file by its name in a directory. None for a name outside it."""
    path = folder / name
    return path if path.resolve().is_relative_to(folder.resolve()) else None


def apply_changes(folder: Path, changes: Iterable[Change], *, append_lines: bool = False) -> None:
    """Apply the changes that a scanner has found in a directory to a copy of it.

    Args:
        folder: the copy.
        changes: the changes. One that leads out of the directory is skipped.
        append_lines: whether lines are added after those of other writers, not at their position.
    """
    from dtrain.run import files

    for change in changes:
        path = path_inside(folder, change["name"])
        if path is None:
            continue
        files.make_parent(path)
        at, data = change.get("at"), change["bytes"]
        if at is None:
            files.write_atomic(path, data)
        elif append_lines and path.suffix == ".jsonl":
            with path.open("ab") as file:
                file.write(data)
        else:
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.seek(at)
                file.write(data)


# -- a local directory on a node -----------------------------------------------------------------


def create_local_run_dir(run_id: str, package: bytes) -> str:
    """Make a run directory on a node that does not see the driver's. Return its path.

    Args:
        run_id: the name of the directory.
        package: a tar file of the initial files.
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


def remove_local_run_dir(folder: str) -> None:
    """Remove the directory, even if killed workers may still be writing to it."""
    own = os.path.dirname(folder)
    deadline = time.monotonic() + _REMOVE_S
    while os.path.exists(own) and time.monotonic() < deadline:
        shutil.rmtree(own, ignore_errors=True)
        time.sleep(0.05)


_locks: list[int | None] = []
"""Locks held while this process lives, however it ends."""


def _prefix() -> str:
    return f"dtrain-node-{os.getuid()}-"


def _locked(folder: str) -> int | None:
    """Lock a directory until this process ends. Return None if another process has the lock."""
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
