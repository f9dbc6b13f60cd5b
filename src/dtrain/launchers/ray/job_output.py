"""A run's small files in a Ray job's output, for who does not share the cluster's disk.

The job prints what is new in its run directory, a JSON object a line; the other side writes it
into a directory of its own. Every line says where its bytes belong, so that all may come again.
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
_MOST_OF_A_LOG = 1_000_000
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
    """While it lasts, print what is new in a job's run directory."""
    scanner = ChangeScanner(run.path, most_of_a_log=_MOST_OF_A_LOG)

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
    """Write what a job has printed so far into a run directory; other lines are passed over."""
    for line in output.splitlines():
        change = files.parse_line(line.removeprefix(_MARK)) if line.startswith(_MARK) else None
        if change is not None:
            change["bytes"] = change["bytes"].encode("latin-1")
            sync.apply_changes(run.path, [change])
