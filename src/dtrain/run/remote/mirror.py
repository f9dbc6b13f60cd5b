"""Synchronization of a run's directory on this host with its permanent copy at a URL.

Everything is copied except checkpoints (see `checkpoints.py`) and the files in `sync.NEVER`. A file
that only grows is copied in pieces, because a URL cannot be appended to and only new data should be
sent. The first piece has the file's own name, the next ones have a suffix.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dtrain.errors import DamagedError
from dtrain.run import files, sync
from dtrain.run.remote.store import RemoteStore
from dtrain.run.rundir import RunDir
from dtrain.run.sync import ChangeScanner, Stat

PIECE = 1 << 20
_MARK = ".part-"
STARTING = ("job.yaml", "resolved.yaml", "plan.json")
"""Files that only the launching side writes."""
LAUNCH = (*STARTING, *(f"attempts/*/{name}.json" for name in ("handle", "result", "verdict")))
"""Files that the launching side writes of a run that continues without it."""
LOGS = ("*.log*", "attempts/*/node-*/*.jsonl")
CODE = ("code/*",)
SNAPSHOT = ("code/git.json", "code/changes.patch", "code/untracked/*")


@dataclass
class _Index:
    """The known state of both copies, as .mirror.json records it."""

    sent: dict[str, Stat] = field(default_factory=dict)
    """The files at the URL, by name."""
    seen: dict[str, str] = field(default_factory=dict)
    """The version of each file that was brought here, by its name at the URL."""


class Mirror:
    """The two copies of a run's directory."""

    def __init__(self, run: RunDir, url: str) -> None:
        self._run = run
        self._store = RemoteStore(url)
        self._index = _Index()
        with contextlib.suppress(DamagedError):  # then all files are compared again
            self._index = files.read_as(_Index, run.sync_index) or self._index
        self._scanner = ChangeScanner(run.path, self._index.sent)

    def push(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        """Copy new data from this host to the URL.

        Args:
            include: patterns of the files that this process is responsible for. Without any, all.
            exclude: patterns of files that it is not responsible for.

        Raises:
            RemoteStoreError: the URL does not answer.
        """
        try:
            for name, (sent, _), now in self._scanner.changed(include, exclude):
                with contextlib.suppress(FileNotFoundError):
                    self._push(name, sent, now[0])
                    self._index.sent[name] = now
        finally:
            self._remember()

    def pull(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        """Copy new data from the URL to this host.

        Args:
            include: patterns of the files that are wanted. Without any, all are.
            exclude: patterns of files that are not wanted.

        Raises:
            RemoteStoreError: the URL does not answer.
        """
        try:
            for name, info in sorted(self._store.files().items()):
                wanted = not include or sync.matches(name, include)
                if not wanted or sync.matches(name, ("checkpoints/*", ".*", *exclude)):
                    continue
                version = _version(info)
                if self._index.seen.get(name) != version:
                    self._pull(name, info)
                    self._index.seen[name] = version
        finally:
            self._remember()

    def send_heartbeat(self) -> None:
        """Write a heartbeat with its time: a process drives the run."""
        self._store.write(self._run.heartbeat.name, json.dumps({"time": time.time()}).encode())

    def _push(self, name: str, sent: int, size: int) -> None:
        path = self._run.path / name
        if not sync.grows(name):
            self._store.put(path, name)
            return
        # the last piece is sent again as a whole
        first = sent // PIECE if size >= sent else 0
        with path.open("rb") as file:
            for number in range(first, max(1, -(-size // PIECE))):
                file.seek(number * PIECE)
                part = f"{name}{_MARK}{number:06d}" if number else name
                self._store.write(part, file.read(min(PIECE, size - number * PIECE)))

    def _pull(self, name: str, info: Any) -> None:
        base, mark, number = name.partition(_MARK)
        path = sync.path_inside(self._run.path, base)
        data = None if path is None else self._store.read(name)
        if path is None or data is None:
            return
        at = int(number) * PIECE if mark else 0
        change = {"name": base, "at": at if sync.grows(base) else None, "bytes": data}
        sync.apply_changes(self._run.path, [change])
        changed = changed_at(info)
        if changed is not None:
            os.utime(path, (changed, changed))
        stat = path.stat()
        self._index.sent[base] = (stat.st_size, stat.st_mtime_ns)

    def _remember(self) -> None:
        files.write_json(self._run.sync_index, asdict(self._index))


def _version(info: Any) -> str:
    """Return a value that changes with a file at a URL.

    Each kind of store reports it differently.
    """
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or changed_at(info)
    return f"{info.get('size')} {tag}"


def changed_at(info: Any) -> float | None:
    """Return when a file was written, in seconds since the epoch."""
    for key in ("LastModified", "mtime", "last_modified", "updated"):
        value = info.get(key)
        if value is not None:
            if isinstance(value, (int, float)):
                return float(value)
            if hasattr(value, "timestamp"):
                return float(value.timestamp())
    return None
