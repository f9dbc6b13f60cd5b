"""What the training has told of itself: the events that rank 0 writes."""

from __future__ import annotations

from typing import Any

from dtrain import rundir
from dtrain.rundir import RunDir

_TRAINING = ("training_started", "stopped", "finished")


def last_word(run: RunDir, attempt: int) -> dict[str, Any] | None:
    """The newest event of an attempt's training; None of a script, and before it has begun."""
    return next((e for e in reversed(_events(run)) if e["attempt"] == attempt), None)


def has_trained(run: RunDir) -> bool:
    """Whether a training has begun in this run."""
    return bool(_events(run))


def _events(run: RunDir) -> list[dict[str, Any]]:
    return [event for event in rundir.read_lines(run.events) if event["event"] in _TRAINING]
