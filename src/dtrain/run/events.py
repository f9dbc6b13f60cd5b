"""Queries of a run's events.jsonl: started, stopped, finished."""

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
    """Return the event of a training that was asked to stop before its end, otherwise None."""
    last = next((e for e in reversed(_training_events(run)) if e["attempt"] == attempt), None)
    return last if last is not None and last["event"] == "stopped" else None


def exit_code(stop_event: dict[str, Any]) -> int:
    """Return the exit code of a training that was stopped by a signal: 128 + N."""
    known = signal.Signals.__members__
    return 128 + known.get(stop_event["reason"], signal.SIGTERM)


def stop_message(run: RunDir, attempt: int, code: int) -> str:
    """Return the message for users about an attempt that was asked to stop, with its exit code."""
    event = stop_event(run, attempt)
    who = f" by {event['reason']} to rank {event['rank']}" if event else ""
    if event is None and code - 128 in {*signal.Signals}:
        who = f" by {signal.Signals(code - 128).name} to dtrain launch"
    after = "" if event is None else f" after step {event['step']}"
    lost = unsaved_text(run, attempt)
    return f"{run.id} was stopped{who}{after}{lost}\ncontinue with: dtrain resume {run.id}"


def unsaved_text(run: RunDir, attempt: int) -> str:
    """Return what is lost if an attempt was ended before it could save; otherwise an empty text."""
    trained = [each["event"] for each in _training_events(run) if each["attempt"] == attempt]
    if trained[-1:] != ["training_started"]:
        return ""
    lines = files.read_lines(run.events, event=str)
    steps = [each.get("step") for each in lines if each["event"] == "checkpoint_saved"]
    last = f"the last one is that of step {steps[-1]}" if steps else "there is none"
    return f" before it could save a checkpoint; {last}"


def resumed_step(event: dict[str, Any]) -> int:
    """Return the step that a `training_started` event continues from; 0 for one from the start."""
    step = event.get("resumed_from")
    return step if isinstance(step, int) else 0


def ungrouped_warning(run: RunDir) -> str | None:
    """Return the warning that a script's processes train independently, while this is the case."""
    what, pid = None, None
    for event in files.read_lines(run.events, event=str):
        if event["event"] in ("no_group", "group_made"):
            what, pid = event.get("what"), event.get("pid")
        elif event["event"] == "workers_started" and event.get("node_rank") == 0:  # rank 0's
            # a short script is reported after its end
            pids = event.get("pids")
            what = what if isinstance(pids, list) and pid in pids else None
    return what


def ungrouped_suffix(run: RunDir) -> str:
    """Return this warning as an addition to a message about the end, or an empty text."""
    suffix = ", but without a process group: each process trained alone"
    return "" if ungrouped_warning(run) is None else suffix


def accepted_job(run: RunDir) -> Path:
    """Return the resolved job of the last attempt that trained, by default the newest.

    An attempt may be refused because its checkpoint is of other data. The next attempt must not
    inherit its job. A batch job makes further attempts with the job that it was given.
    """
    trained = max((event["attempt"] for event in _training_events(run)), default=None)
    jobs = (
        run.resolved_of(each)
        for each in reversed(run.attempts())
        if trained is None or each <= trained
    )
    return next((path for path in jobs if path.exists()), run.resolved)


def has_trained(run: RunDir) -> bool:
    """Return whether a training, or a worker started by hand, has begun in this run."""
    return any(event["event"] in _BEGUN for event in files.read_lines(run.events, event=str))


def _training_events(run: RunDir) -> list[dict[str, Any]]:
    return [
        event
        for event in files.read_lines(run.events, event=str, attempt=int)
        if event["event"] in _TRAINING
    ]


def note_event(run: RunDir, event: str, **fields: Any) -> None:
    """Add an event to events.jsonl. A full disk does not cause an error."""
    with contextlib.suppress(OSError):
        files.append_line(run.events, {"time": time.time(), "event": event, **fields})
