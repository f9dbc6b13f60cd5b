"""A run's small files carried over a Ray job's output, to who does not share the cluster's disk.

The job prints what is new in its run directory, a JSON object a line; the other side writes it
into a directory of its own. Every line says where its text belongs, so that all may come again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dtrain.run import files
from dtrain.run.rundir import RunDir

_MARK = "@dtrain "
_MOST_OF_A_LOG = 1_000_000
_PIECE = 100_000
_PATTERNS = (
    "events.jsonl",
    "metrics.jsonl",
    "ray/*.json",
    "attempts/*/*.json",
    "attempts/*/failures/*.json",
    "attempts/*/node-*/*.log",
)


class Mirror:
    """The job's side."""

    def __init__(self, run: RunDir, out: IO[str]) -> None:
        self._run, self._out = run, out
        self._sent: dict[Path, tuple[int, int]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def start(self) -> None:
        """Print what is new, once a second, until `end`."""
        self._thread.start()

    def end(self) -> None:
        """Print the rest."""
        self._ended.set()
        self._thread.join()
        self.send()

    def send(self) -> None:
        """Print what is new."""
        for pattern in _PATTERNS:
            for path in sorted(self._run.path.glob(pattern)):
                for line in self._news(path):
                    _print(line, self._out)

    def _follow(self) -> None:
        while not self._ended.wait(1.0):
            self.send()

    def _news(self, path: Path) -> Iterator[dict[str, object]]:
        name = str(path.relative_to(self._run.path))
        stat = path.stat()
        size, changed = self._sent.get(path, (0, 0))
        if path.suffix == ".json":  # replaced as a whole
            if changed != stat.st_mtime_ns:
                self._sent[path] = stat.st_size, stat.st_mtime_ns
                yield {"path": name, "text": path.read_text(encoding="utf-8")}
            return
        limit = _MOST_OF_A_LOG if path.suffix == ".log" else stat.st_size
        with path.open("rb") as file:
            file.seek(size)
            while size < min(stat.st_size, limit):
                piece = file.read(_PIECE)
                yield {"path": name, "at": size, "text": piece.decode("latin-1")}
                size += len(piece)
        self._sent[path] = size, stat.st_mtime_ns


def tell(name: str, text: str, out: IO[str]) -> None:
    """Print one file of a run directory, by its name in it."""
    _print({"path": name, "text": text}, out)


def _print(line: dict[str, object], out: IO[str]) -> None:
    print(_MARK + json.dumps(line), file=out, flush=True)


def apply(run: RunDir, output: str) -> None:
    """Write what a job has printed so far into a run directory; other lines are passed over."""
    for line in output.splitlines():
        if not line.startswith(_MARK):
            continue
        news = files.parse_line(line.removeprefix(_MARK))
        if news is None:
            continue
        path = run.path / news["path"]
        if not path.resolve().is_relative_to(run.path.resolve()):
            continue
        files.make_parent(path)
        if "at" not in news:
            files.write_atomic(path, news["text"])
            continue
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.seek(news["at"])
            file.write(news["text"].encode("latin-1"))
