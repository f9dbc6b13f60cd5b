"""What is new in a run's directory, and how it gets into another copy of it.

It travels to and from a URL (`run.remote.mirror`), with the beats of Ray's nodes, or in the output
of a Ray job. Sent by value to Ray's nodes: all but `apply_changes` needs only the standard library.
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
"""Files that do not travel, as hidden ones do not, among them the values of secret variables."""
_MOST_AT_ONCE = 4 << 20
_MOST_OF_A_FILE = 64 << 20  # what is larger and written anew each time is no record of a run
_NEW_S, _GONE_S = 5.0, 5.0

Stat = tuple[int, int]
"""Bytes, and time of the last change in nanoseconds."""
Change = dict[str, Any]
"""`name` of a file and some `bytes`: they belong `at` a position, or else are the whole file."""


class ChangeScanner:
    """Finds what is new in a folder since the last look."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        known: dict[str, Stat] | None = None,
        *,
        most_of_a_log: int = sys.maxsize,
    ) -> None:
        """Prepare.

        Args:
            folder: the folder.
            known: name → what was there at the last look.
            most_of_a_log: bytes of a log after which the rest is left out.
        """
        self._folder = os.fspath(folder)
        self._most_of_a_log = most_of_a_log
        self.known = {} if known is None else known

    def skip_present(self) -> None:
        """Take what is there now for known."""
        self.known.update({name: now for name, _, now in self.changed()})

    def changed(
        self, only: Sequence[str] = (), but: Sequence[str] = ()
    ) -> Iterator[tuple[str, Stat, Stat]]:
        """Each file that is not as it is known: its name, how it was known, how it is now.

        Args:
            only: patterns of the files that are wanted; none: all.
            but: patterns of files that are not.
        """
        for name in _names(self._folder, only, but):
            try:
                stat = os.stat(os.path.join(self._folder, name))
            except OSError:
                continue
            before, now = self.known.get(name, (0, 0)), (stat.st_size, stat.st_mtime_ns)
            if now != before:
                yield name, before, now

    def changes(self, only: Sequence[str] = ()) -> Iterator[Change]:
        """All that is new, in pieces that are small enough to be sent."""
        for name, (start, _), now in self.changed(only):
            path = os.path.join(self._folder, name)
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                if grows(name):
                    yield from self._grown(file, name, start, now)
                else:
                    self.known[name] = now
                    if now[0] <= _MOST_OF_A_FILE:
                        yield {"name": name, "bytes": file.read(now[0])}

    def next_changes(self) -> list[Change]:
        """As much of `changes` as is sent at once; empty when all was."""
        found, room = [], _MOST_AT_ONCE
        for change in self.changes():
            found.append(change)
            room -= len(change["bytes"])
            if room <= 0:
                break
        return found

    def _grown(self, file: io.BufferedReader, name: str, at: int, now: Stat) -> Iterator[Change]:
        end = min(now[0], self._most_of_a_log) if name.endswith(".log") else now[0]
        while at < end:
            file.seek(at)
            data = file.read(min(_MOST_AT_ONCE, end - at))
            if name.endswith(".jsonl"):
                data = data[: data.rfind(b"\n") + 1]
            if not data:
                return  # not all of the line is there yet
            # of a file that has more to tell, the time is not yet that of all
            self.known[name] = (at + len(data), now[1] if at + len(data) == now[0] else 0)
            yield {"name": name, "at": at, "bytes": data}
            at += len(data)


def grows(name: str) -> bool:
    """Whether a file is only ever appended to."""
    return name.endswith((".log", ".jsonl")) or "events.out.tfevents" in name


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _names(folder: str, only: Sequence[str], but: Sequence[str]) -> Iterator[str]:
    """The names of files that travel, `plan.json` and the like first."""
    found = []
    for here, folders, names in os.walk(folder):
        inside = "" if here == folder else f"{os.path.relpath(here, folder)}/"
        found += [inside + name for name in names if name[0] != "."]
        folders[:] = [n for n in folders if n[0] != "." and not matches(f"{inside}{n}/x", NEVER)]
    for name in sorted(found, key=lambda name: (name.count("/"), name)):
        if (not only or matches(name, only)) and not matches(name, (*NEVER, *but)):
            yield name


def path_inside(folder: Path, name: str) -> Path | None:
    """The path of a file by its name in a folder; None for a name that leads out of it."""
    path = folder / name
    return path if path.resolve().is_relative_to(folder.resolve()) else None


def apply_changes(folder: Path, changes: Iterable[Change], *, append_lines: bool = False) -> None:
    """Make in a copy of a folder what a scanner has found in another.

    Args:
        folder: the copy.
        changes: what was found; one that leads out of the folder is passed over.
        append_lines: whether lines are added to those of other writers, not put where they were.
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


# -- a directory of a node's own -----------------------------------------------------------------


def create_local_run_dir(run_id: str, package: bytes) -> str:
    """Make a run directory on a node that does not see the driver's; its path.

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


def remove_local_run_dir(folder: str) -> None:
    """Remove it, where workers that were killed may still be writing."""
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
