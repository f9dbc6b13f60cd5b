"""What events.jsonl says of a run: started, stopped, finished."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import Any

from dtrain.run import files
from dtrain.run.rundir import RunDir

_TRAINING = ("training_started", "stopped", "finished")
_BEGUN = ("training_started", "worker_started")


def stop_event(run: RunDir, attempt: int) -> dict[str, Any] | None:
    """The event of a training that was asked to leave before its end; None of any other."""
    last = next((e for e in reversed(_training_events(run)) if e["attempt"] == attempt), None)
    return last if last is not None and last["event"] == "stopped" else None


def exit_code(stop_event: dict[str, Any]) -> int:
    """The exit code of a training that was stopped by a signal: 128 + N."""
    known = signal.Signals.__members__
    return 128 + known.get(stop_event["reason"], signal.SIGTERM)


def stop_message(run: RunDir, attempt: int, code: int) -> str:
    """What people are told of an attempt that was asked to leave, with an exit code."""
    event = stop_event(run, attempt)
    who = f" by {event['reason']} to rank {event['rank']}" if event else ""
    if event is None and code - 128 in {*signal.Signals}:
        who = f" by {signal.Signals(code - 128).name} to dtrain launch"
    after = "" if event is None else f" after step {event['step']}"
    return f"{run.id} was stopped{who}{after}\ngo on with: dtrain resume {run.id}"


def ungrouped_warning(run: RunDir) -> str | None:
    """The warning that a script's processes train each by itself, while that is so."""
    what, pid = None, None
    for event in files.read_lines(run.events, event=str):
        if event["event"] in ("no_group", "group_made"):
            what, pid = event.get("what"), event.get("pid")
        elif event["event"] == "workers_started" and event.get("node_rank") == 0:  # rank 0's
            # a short script is told of after its end
            pids = event.get("pids")
            what = what if isinstance(pids, list) and pid in pids else None
    return what


def but_ungrouped(run: RunDir) -> str:
    """Likewise, to be added to what is said of the end; empty where it is not so."""
    said = ", but without a process group: each process trained alone"
    return "" if ungrouped_warning(run) is None else said


def accepted_job(run: RunDir) -> Path:
    """The resolved job of the last attempt that trained, or else of the newest.

    One that was refused, because its checkpoint is of other data, must not be what the next
    inherits. A batch job makes further attempts with the job that it was given.
    """
    trained = max((event["attempt"] for event in _training_events(run)), default=None)
    kept = (
        run.resolved_of(each)
        for each in reversed(run.attempts())
        if trained is None or each <= trained
    )
    return next((path for path in kept if path.exists()), run.resolved)


def has_trained(run: RunDir) -> bool:
    """Whether a training, or a worker by hand, has begun in this run."""
    return any(event["event"] in _BEGUN for event in files.read_lines(run.events, event=str))


def _training_events(run: RunDir) -> list[dict[str, Any]]:
    return [
        event
        for event in files.read_lines(run.events, event=str, attempt=int)
        if event["event"] in _TRAINING
    ]


def note_event(run: RunDir, event: str, **fields: Any) -> None:
    """Add an event to events.jsonl; what happened is not undone by a disk that is full."""
    with contextlib.suppress(OSError):
        files.append_line(run.events, {"time": time.time(), "event": event, **fields})
