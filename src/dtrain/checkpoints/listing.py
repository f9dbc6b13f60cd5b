"""List the checkpoints of a run: what each is, and why it is kept. Only small files are read."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from dtrain.checkpoints.lookup import BEST, of_run, retention_of
from dtrain.plainjson import numbers
from dtrain.run import files
from dtrain.run.manifest import Manifest
from dtrain.run.rundir import RunDir
from dtrain.train.checkpoint.directory import is_step, step_of
from dtrain.train.checkpoint.files import PROGRESS, is_aside
from dtrain.train.checkpoint.retention import Marks

_REJECTED = ".rejected"
_NOT_METRICS = ("time", "step", "epoch", "split")


@dataclass
class Row:
    """A checkpoint in the list."""

    name: str
    """The name of its directory, for example `step-00000020`."""
    state: str
    """`complete`, `rejected`, `incomplete` or `damaged`."""
    step: int | None
    bytes: int | None = None
    saved: float | None = None
    """The time when it was saved, in seconds since the epoch."""
    age: float | None = None
    """The seconds since then."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The score for which it is one of the best, then the metrics of the evaluation."""
    pinned: bool = False
    kept: str | None = None
    """Why it stays when a newer one is saved: `newest`, `best` or `pinned`. None if it does not."""
    problem: str | None = None
    """Why its manifest cannot be used."""
    about: dict[str, Any] = field(default_factory=dict)


def rows(run: RunDir) -> list[Row]:
    """Return the checkpoints of a run, the newest last; then `best`, which is a copy of one.

    Raises:
        JobError: the job of the run is damaged.
        OSError: the file system or the URL reported an error.
    """
    directory, retention = of_run(run), retention_of(run)
    marks, evaluations = directory.marks(), _evaluations(run)
    found = []
    for name, listed in directory.manifests().items():
        row = _row(name, listed)
        if row is None:
            continue
        if name == BEST and isinstance(listed, Manifest):
            progress = directory.small_file(name, listed, PROGRESS) or b""
            step = (files.parse_line(progress) or {}).get("step")
            row.step = step if isinstance(step, int) else None
        mark = marks.get(name, Marks())
        row.pinned = mark.pinned
        row.metrics = evaluations.get(row.step, {})
        if mark.score is not None:
            metric, value = mark.score
            row.metrics = {metric: value} | row.metrics
        found.append(row)
    if retention is not None:
        names = [folder.name for folder in directory.newest_first()]
        kept = retention.kept(names, marks)
        for row in found:
            row.kept = kept.get(row.name)
    return sorted(found, key=lambda row: (row.name == BEST, row.step or 0, row.name))


def _row(name: str, listed: Any) -> Row | None:
    """Return what a name and a manifest say. None for a directory that is no checkpoint."""
    step_name = name.removesuffix(_REJECTED).removeprefix(".").partition(".")[0]
    step = step_of(step_name) if is_step(step_name) else None
    if step is None and name != BEST:
        return None
    if name.startswith("."):
        return Row(name, "incomplete", step) if is_aside(name) else None
    row = Row(name, "rejected" if name.endswith(_REJECTED) else "complete", step)
    if not isinstance(listed, Manifest):
        row.problem = str(listed)
        row.state = "damaged" if row.state == "complete" else row.state
        return row
    row.bytes, row.about = listed.bytes, listed.about
    saved = listed.about.get("time")
    if isinstance(saved, int | float):
        row.saved, row.age = saved, time.time() - saved
    return row


def _evaluations(run: RunDir) -> dict[int | None, dict[str, float]]:
    """Return the metrics of evaluations by step."""
    found: dict[int | None, dict[str, float]] = {}
    for line in files.read_lines(run.metrics, split=str, step=int):
        if line["split"] == "eval":
            values = {name: value for name, value in line.items() if name not in _NOT_METRICS}
            found[line["step"]] = numbers(values)
    return found
