"""What is known of every run, remembered once a run has ended.

To summarize a run, all of its metrics and events are read, and pydantic is imported. So the row of
a run that has ended is kept in a hidden file beside the runs, with a digest of the state of the
files that it was made from. When one of these has changed, for example by a resume, the row is made
again. Each user has a file of their own, which only they can read. If it is damaged, or cannot be
written, rows are made again too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from dtrain import __version__
from dtrain.errors import DamagedError
from dtrain.plainjson import to_json
from dtrain.run import files
from dtrain.run.attempts import DAMAGED
from dtrain.run.rundir import RunDir, list_runs

SPLITS = ("train", "eval", "validate", "test")
_FORMAT = f"1 {__version__}"
_IN_RUN = ("attempts", "plan.json", "resolved.yaml", "events.jsonl", "metrics.jsonl")
_IN_ATTEMPT = (".", "result.json")
"""The directory changes when a file in it is replaced, as all of dtrain's are."""
_SETTLED_NS = 60 * 1_000_000_000
"""For a minute after a change, rows are not remembered: a file may change again without another
time of change, and a queue may still say something else of a job that has ended."""
_MOST_FIELDS = 20_000
_INDENTED = re.compile(r"^[ \t?:-]{200}", re.MULTILINE)


@dataclass(frozen=True)
class _Line:
    """A line of the file: what is remembered of a run."""

    id: str
    attempt: str
    """The number of the newest attempt."""
    row: str
    job: str
    digest: str

    @classmethod
    def of(cls, run: RunDir) -> tuple[_Line, bool]:
        """Read a run. Return whether it can be remembered too."""
        from dtrain.launchers.summary import row

        attempt = ""
        with contextlib.suppress(OSError):
            attempt = str(max(run.attempts(), default=""))
        stats, has_ended = _stats(str(run.path), attempt)
        found = row(run)
        texts = to_json(found), to_json(_job_of(run))
        line = cls(run.id, attempt, *texts, _digest(stats, *texts))
        return line, has_ended and found["state"] != DAMAGED

    def is_current(self, path: str) -> bool:
        return self.digest == _digest(_stats(path, self.attempt)[0], self.row, self.job)


@dataclass
class Entry:
    """A run, and what is known of it."""

    run: RunDir
    row: dict[str, Any]
    """The run as `dtrain status --json` prints it."""
    _job: str

    @cached_property
    def job(self) -> dict[str, Any]:
        """The fields of the resolved job by their dotted names; empty if it cannot be read."""
        found: dict[str, Any] = json.loads(self._job)
        return found


def entries(root: str | os.PathLike[str]) -> list[Entry]:
    """Return what is known of every run below `root`, the oldest first."""
    file = _file(Path(root).absolute())
    known = _read(file)
    lines = [(run, *_current(run, known)) for run in list_runs(root)]
    _remember(file, known, {line.id: line for _, line, has_ended in lines if has_ended})
    return [_entry(run, line) for run, line, _ in lines]


def entry(run: RunDir) -> Entry:
    """Return what is known of one run."""
    file = _file(run.path.parent)
    known = _read(file)
    line, has_ended = _current(run, known)
    if has_ended:
        _remember(file, known, {**known, run.id: line})
    return _entry(run, line)


def _file(root: Path) -> Path:
    return root / f".index-{os.geteuid()}"


def _current(run: RunDir, known: dict[str, _Line]) -> tuple[_Line, bool]:
    """Return what is remembered of a run, or else what is read now, and whether it has ended."""
    line = known.get(run.id)
    return (line, True) if line is not None and line.is_current(str(run.path)) else _Line.of(run)


def _entry(run: RunDir, line: _Line) -> Entry:
    row = json.loads(line.row)
    row["path"] = str(run.path)
    return Entry(run, row, line.job)


def _stats(path: str, attempt: str) -> tuple[str, bool]:
    """Return the state of the files that a row is made from, and whether the run has ended.

    The times of change are those of the file system, which no user can set.
    """
    found: list[tuple[int, ...] | None] = []
    newest = 0
    for name in (*_IN_RUN, *(f"attempts/{attempt}/{name}" for name in _IN_ATTEMPT)):
        try:
            now = os.stat(f"{path}/{name}")
        except OSError:
            found.append(None)
            continue
        found.append((now.st_ino, now.st_size, now.st_ctime_ns))
        newest = max(newest, now.st_ctime_ns)
    has_result = found[-1] is not None
    return str(found), has_result and newest < time.time_ns() - _SETTLED_NS


def _digest(*texts: str) -> str:
    return blake2b("\n".join(texts).encode(errors="replace"), digest_size=16).hexdigest()


def _read(file: Path) -> dict[str, _Line]:
    """Return what is remembered, by the id of the run."""
    try:
        about = file.lstat()
        if about.st_uid != os.geteuid() or not stat.S_ISREG(about.st_mode):
            return {}
        head, *lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return {}
    parts = (line.split("\t") for line in lines if head == _FORMAT)
    return {each[0]: _Line(*each) for each in parts if len(each) == len(fields(_Line))}


def _remember(file: Path, known: dict[str, _Line], lines: dict[str, _Line]) -> None:
    """Write what is remembered, if it has changed. JSON has neither a line break nor a tab."""
    kept = {name: line for name, line in lines.items() if name.isprintable()}
    if kept == known:
        return
    texts = ("\t".join(astuple(line)) for line in kept.values())
    with contextlib.suppress(OSError):  # of another user, or read-only
        files.write_atomic(file, "\n".join([_FORMAT, *texts, ""]), mode=0o600)


def _job_of(run: RunDir) -> dict[str, Any]:
    import yaml

    try:
        text = files.read_text(run.resolved) or ""
        # libyaml is ten times faster, but crashes if values are nested thousands of times
        may_be_deep = text.count("[") + text.count("{") > 200 or _INDENTED.search(text) is not None
        loader = yaml.SafeLoader if may_be_deep else getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        job = yaml.load(text, loader)
        return dict(islice(_flat(job, ""), _MOST_FIELDS)) if isinstance(job, dict) else {}
    except (DamagedError, OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a job. The value of `launch.nodes` is the largest number of nodes."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value[-1] if name == "launch.nodes" and isinstance(value, list) else value
