"""A run's small files in a Ray job's output, for hosts that do not share the cluster's disk.

The job prints changes of its run directory, one JSON object per line. The receiver writes them into
a local run directory. Every line gives the position of its bytes, so lines may be received again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import IO

from dtrain.run import files, sync
from dtrain.run.rundir import RunDir
from dtrain.run.sync import Change, ChangeScanner
from dtrain.waiting import repeating

_MARK = "@dtrain "
_MAX_LOG_BYTES = 1_000_000
_PAUSE_S = 1.0
_FILES = (
    "events.jsonl",
    "metrics.jsonl",
    "ray/*.json",
    "attempts/*/*.json",
    "attempts/*/node-*/*.log",
)


@contextlib.contextmanager
def printing(run: RunDir, out: IO[str]) -> Iterator[None]:
    """Print changes in a job's run directory while the context is open."""
    scanner = ChangeScanner(run.path, max_log_bytes=_MAX_LOG_BYTES)

    def print_new() -> None:
        for change in scanner.changes(_FILES):
            print_change(change, out)

    try:
        with repeating(print_new, _PAUSE_S):
            yield
    finally:
        print_new()


def print_change(change: Change, out: IO[str]) -> None:
    line = {**change, "bytes": change["bytes"].decode("latin-1")}
    print(_MARK + json.dumps(line), file=out, flush=True)


def apply(run: RunDir, output: str) -> None:
    """Write the changes that a job has printed so far into a run directory. Ignore other lines."""
    for line in output.splitlines():
        change = files.parse_line(line.removeprefix(_MARK)) if line.startswith(_MARK) else None
        if change is not None:
            change["bytes"] = change["bytes"].encode("latin-1")
            sync.apply_changes(run.path, [change])
