"""Follow many growing files, line by line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

Key = TypeVar("Key")

_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 20
_FILES_A_POLL = 64  # each is opened, a load for a shared file system: 8,000 ranks have 8,000 logs


@dataclass
class _File:
    path: Path
    position: int = 0
    partial: bytes = b""

    def size(self) -> int:
        """Return the bytes in the file now.

        It is opened for this, as NFS caches the answer to a stat.
        """
        try:
            with self.path.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
        except OSError:
            return self.position
        if size < self.position:  # truncated by another program: what comes is new
            self.position, self.partial = 0, b""
        return size

    def read(self, until: int) -> list[str] | None:
        """Return the lines that the next chunk completes. None when there is no more data."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.position)
                chunk = stream.read(min(_CHUNK, until - self.position))
        except OSError:
            return None
        if not chunk:
            return None
        self.position += len(chunk)
        *lines, self.partial = (self.partial + chunk).split(b"\n")
        if len(self.partial) > _LONGEST_LINE:  # a file without lines must not fill memory
            lines, self.partial = [*lines, self.partial], b""
        return [_text(line) for line in lines]


class Follower(Generic[Key]):
    """Reads data that is appended to files, in whole lines. The files need not exist yet.

    Memory stays below a chunk and an unfinished line for each file. A file that is unreadable now
    is tried again at the next call.
    """

    def __init__(self) -> None:
        self._files: dict[Key, _File] = {}
        self._turn = 0

    def add(self, key: Key, path: Path, position: int = 0) -> None:
        """Follow a file from a byte on. `key` is returned with each of its lines."""
        self._files[key] = _File(path, position)

    def skip_to_end(self) -> None:
        """Skip all that the files hold now."""
        for file in self._files.values():
            file.position, file.partial = file.size(), b""

    def poll(self) -> Iterator[tuple[Key, str]]:
        """Yield the lines completed since the last call. A partial line waits until it is complete.

        The files take turns, and data written during this call is left for the next one. So a rank
        that never stops writing does not delay the others. With many files, a call looks at the
        first, and at some of the others in turn.
        """
        keys = list(self._files)
        if len(keys) > _FILES_A_POLL:
            others, count = keys[1:], _FILES_A_POLL - 1
            keys = [keys[0], *(others * 2)[self._turn : self._turn + count]]
            self._turn = (self._turn + count) % len(others)
        yield from self._read(keys)

    def _read(self, keys: list[Key]) -> Iterator[tuple[Key, str]]:
        behind = {key: self._files[key].size() for key in keys}
        while behind:
            for key, size in list(behind.items()):
                lines = self._files[key].read(until=size)
                if lines is None:
                    del behind[key]
                else:
                    yield from ((key, line) for line in lines)

    def finish(self) -> Iterator[tuple[Key, str]]:
        """Yield the rest, including a last line without its end."""
        yield from self._read(list(self._files))
        for key, file in self._files.items():
            if file.partial:
                yield key, _text(file.partial)
                file.partial = b""


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")
