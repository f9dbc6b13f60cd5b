"""A run's directory on this host, and its lasting copy at a URL, kept alike.

Everything goes there but checkpoints (see `checkpoints.py`) and what never travels. A file that
only grows goes in pieces, as a URL cannot be appended to and what is new is all that shall travel:
the first under the file's own name, the next with a suffix.
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
"""What the launching side alone writes."""
LAUNCH = (*STARTING, *(f"attempts/*/{name}.json" for name in ("handle", "result", "verdict")))
"""What it writes of a run that goes on without it."""
LOGS = ("*.log*",)
CODE = ("code/*",)


@dataclass
class _Index:
    """What is known of both copies: .mirror.json."""

    sent: dict[str, Stat] = field(default_factory=dict)
    """name → what is at the URL."""
    seen: dict[str, str] = field(default_factory=dict)
    """name at the URL → which version of it was brought here."""


class Mirror:
    """The two copies of a run's directory."""

    def __init__(self, run: RunDir, url: str) -> None:
        self._run = run
        self._store = RemoteStore(url)
        self._index = _Index()
        with contextlib.suppress(DamagedError):  # then all is compared again
            self._index = files.read_as(_Index, run.sync_index) or self._index
        self._scanner = ChangeScanner(run.path, self._index.sent)

    def push(self, only: Sequence[str] = (), but: Sequence[str] = ()) -> None:
        """Copy what is new here to the URL.

        Args:
            only: patterns of the files that this process answers for; none: all.
            but: patterns of files that it does not.

        Raises:
            RemoteStoreError: the URL does not answer.
        """
        try:
            for name, (sent, _), now in self._scanner.changed(only, but):
                with contextlib.suppress(FileNotFoundError):
                    self._push(name, sent, now[0])
                    self._index.sent[name] = now
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
            for name, about in sorted(self._store.files().items()):
                wanted = not only or sync.matches(name, only)
                if not wanted or sync.matches(name, ("checkpoints/*", ".*", *but)):
                    continue
                version = _version(about)
                if self._index.seen.get(name) != version:
                    self._pull(name, about)
                    self._index.seen[name] = version
        finally:
            self._remember()

    def beat(self) -> None:
        """Say that someone drives the run, and when this was."""
        self._store.write(self._run.beat.name, json.dumps({"time": time.time()}).encode())

    def _push(self, name: str, sent: int, size: int) -> None:
        path = self._run.path / name
        if not sync.grows(name):
            self._store.put(path, name)
            return
        # what was sent of the last piece goes again, whole
        first = sent // PIECE if size >= sent else 0
        with path.open("rb") as file:
            for number in range(first, max(1, -(-size // PIECE))):
                file.seek(number * PIECE)
                part = f"{name}{_MARK}{number:06d}" if number else name
                self._store.write(part, file.read(min(PIECE, size - number * PIECE)))

    def _pull(self, name: str, about: Any) -> None:
        base, mark, number = name.partition(_MARK)
        path = sync.path_inside(self._run.path, base)
        data = None if path is None else self._store.read(name)
        if path is None or data is None:
            return
        at = int(number) * PIECE if mark else 0
        change = {"name": base, "at": at if sync.grows(base) else None, "bytes": data}
        sync.apply_changes(self._run.path, [change])
        changed = changed_at(about)
        if changed is not None:
            os.utime(path, (changed, changed))
        stat = path.stat()
        self._index.sent[base] = (stat.st_size, stat.st_mtime_ns)

    def _remember(self) -> None:
        files.write_json(self._run.sync_index, asdict(self._index))


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
