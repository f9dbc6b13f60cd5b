"""A run's directory on this host, and its lasting copy at a URL, kept alike.

Everything goes there but checkpoints (see `checkpoints.py`), hidden files, among them the
values of secret variables, and copies of code. A file that only grows goes in pieces, so
that what is new is all that travels: the first under the file's own name, the next with a suffix.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dtrain.errors import DamagedError
from dtrain.run import files
from dtrain.run.remote.store import RemoteStore, RemoteStoreError
from dtrain.run.rundir import RunDir

PIECE = 1 << 20
_MARK = ".part-"
STARTING = ("job.yaml", "resolved.yaml", "plan.json")
"""What the launching side alone writes."""
LAUNCH = (*STARTING, *(f"attempts/*/{name}.json" for name in ("handle", "result", "verdict")))
"""What it writes of a run that goes on without it."""
LOGS = ("*.log*",)
CODE = ("code/*",)
_NEVER = ("checkpoints/*", "code/tree-*/*", "code/job-*", "alive.json")
_PAUSE_S, _BEAT_S = 5.0, 20.0


class Mirror:
    """The two copies of a run's directory."""

    def __init__(self, run: RunDir, url: str) -> None:
        self._run = run
        self._place = RemoteStore(url)
        self._index = run.path / ".mirror.json"
        known: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(DamagedError):  # then all is compared again
            known = files.read_as(dict[str, dict[str, Any]], self._index) or {}
        self._sent: dict[str, list[int]] = known.get("sent", {})
        """name → bytes and time of change of what is at the URL."""
        self._seen: dict[str, str] = known.get("seen", {})
        """name at the URL → which version of it was brought here."""

    def push(self, only: Sequence[str] = (), but: Sequence[str] = ()) -> None:
        """Copy what is new here to the URL.

        Args:
            only: patterns of the files that this process answers for; none: all.
            but: patterns of files that it does not.

        Raises:
            RemoteStoreError: the URL does not answer.
        """
        try:
            for name in _files(self._run.path, only, but):
                self._push(name)
        finally:
            self._remember()

    def pull(self, only: Sequence[str] = (), but: Sequence[str] = ()) -> None:
        """Copy what is new at the URL to here.

        Args:
            only: patterns of the files that are wanted; none: all.
            but: patterns of files that are not.

        Raises:
            RemoteStoreError: the URL does not answer.
        """
        try:
            for name, about in sorted(self._place.files().items()):
                version = _version(about)
                wanted = not only or _matches(name, only)
                if not wanted or _matches(name, ("checkpoints/*", ".*", *but)):
                    continue
                if self._seen.get(name) == version:
                    continue
                self._pull(name, about)
                self._seen[name] = version
        finally:
            self._remember()

    def beat(self) -> None:
        """Say that someone drives the run, and when this was."""
        self._place.write(self._run.beat.name, json.dumps({"time": time.time()}).encode())

    def _push(self, name: str) -> None:
        path = self._run.path / name
        try:
            stat = path.stat()
        except FileNotFoundError:
            return
        size, changed = self._sent.get(name, [-1, 0])
        if [stat.st_size, stat.st_mtime_ns] == [size, changed]:
            return
        if grows(name):
            # what was sent of the last piece goes again, whole
            first = max(0, size) // PIECE if stat.st_size >= size else 0
            with path.open("rb") as file:
                for number in range(first, max(1, -(-stat.st_size // PIECE))):
                    file.seek(number * PIECE)
                    end = min(PIECE, stat.st_size - number * PIECE)
                    self._place.write(_piece(name, number), file.read(end))
        else:
            self._place.put(path, name)
        self._sent[name] = [stat.st_size, stat.st_mtime_ns]

    def _pull(self, name: str, about: Any) -> None:
        base, mark, number = name.partition(_MARK)
        path = self._run.path / base
        files.make_parent(path)
        data = self._place.read(name)
        if data is None:
            return
        if grows(base):
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.seek(int(number) * PIECE if mark else 0)
                file.write(data)
        else:
            files.write_atomic(path, data)
        changed = changed_at(about)
        if changed is not None:
            os.utime(path, (changed, changed))
        stat = path.stat()
        self._sent[base] = [stat.st_size, stat.st_mtime_ns]

    def _remember(self) -> None:
        files.write_json(self._index, {"sent": self._sent, "seen": self._seen})


class Pusher:
    """Pushes what is new, every few seconds, from a thread, until it is ended."""

    def __init__(self, mirror: Mirror, only: Sequence[str] = (), but: Sequence[str] = ()) -> None:
        self._mirror, self._only, self._but = mirror, only, but
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self.trouble = ""
        """Why the URL could not be written to, the last time; empty when it could."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def end(self) -> str:
        """Push the rest; why it could not, empty when all is there."""
        self._ended.set()
        self._thread.join()
        self._try()
        return self.trouble

    def _keep(self) -> None:
        beat_at = 0.0
        while True:
            if not self._only and time.monotonic() >= beat_at:
                self._try(beat=True)
                beat_at = time.monotonic() + _BEAT_S
            else:
                self._try()
            if self._ended.wait(_PAUSE_S):
                return

    def _try(self, *, beat: bool = False) -> None:
        try:
            if beat:
                self._mirror.beat()
            self._mirror.push(self._only, self._but)
            self.trouble = ""
        except (RemoteStoreError, OSError) as error:
            self.trouble = str(error)


def grows(name: str) -> bool:
    """Whether a file is only ever appended to."""
    return name.endswith((".log", ".jsonl")) or "events.out.tfevents" in name


def _piece(name: str, number: int) -> str:
    return f"{name}{_MARK}{number:06d}" if number else name


def _files(folder: Path, only: Sequence[str], but: Sequence[str]) -> Iterator[str]:
    """The names of a run's files that are to be kept, `plan.json` and the like first."""
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(here, n), folder) for n in names if n[0] != "."]
        inside = os.path.relpath(here, folder)
        folders[:] = [n for n in folders if not _matches(f"{inside}/{n}/x".lstrip("./"), _NEVER)]
    for name in sorted(found, key=lambda name: (name.count("/"), name)):
        wanted = not only or _matches(name, only)
        if wanted and not _matches(name, (*_NEVER, *but)):
            yield name


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _version(about: Any) -> str:
    """What changes with a file at a URL; every kind of place tells it in another way."""
    tag = about.get("ETag") or about.get("etag") or about.get("md5Hash") or changed_at(about)
    return f"{about.get('size')} {tag}"


def changed_at(about: Any) -> float | None:
    """When a file was written, in seconds since the epoch."""
    for key in ("LastModified", "mtime", "last_modified", "updated"):
        value = about.get(key)
        if value is not None:
            if isinstance(value, (int, float)):
                return float(value)
            if hasattr(value, "timestamp"):
                return float(value.timestamp())
    return None
