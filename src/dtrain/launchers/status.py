"""Find the state of a run: whether its newest attempt runs, and how it ended."""

from __future__ import annotations

import time
from typing import Any

from dtrain.launch_plan import LaunchPlan
from dtrain.launchers import base
from dtrain.plainjson import to_json
from dtrain.run import events, failures, files, verdict
from dtrain.run.attempts import Handle, Result, State
from dtrain.run.rundir import RunDir

_ATTEMPT = 0  # a run started by hand has only one
_FACTS: dict[str, dict[str, type]] = {
    "worker_started": {"process": dict},
    "worker_ended": {"exit_code": int},
}


def state_of(run: RunDir) -> tuple[State, Result | None]:
    """Return the state of the newest attempt of a run."""
    handle = Handle.read(run)
    if handle is None:
        return _by_hand(run)
    result = Result.read(run, handle.attempt)
    if result is not None:
        return result.state, result
    if base.load(handle.launcher).is_running(run):
        return "running", None
    result = Result.read(run, handle.attempt)  # written by the first process that saw the end
    if result is None:
        run.remove_secrets(handle.attempt)  # the process that should have done this was killed
        return "lost", None
    return result.state, result


def next_attempt(run: RunDir) -> int:
    """Return the number of the attempt that a relaunch makes, the same on every host of the run.

    Where node 0 has already begun it, this is the running attempt.
    """
    handle = Handle.read(run)
    if handle is None and not events.has_trained(run):
        return 0
    newest = 0 if handle is None else handle.attempt
    return newest if state_of(run)[0] == "running" else newest + 1


def _by_hand(run: RunDir) -> tuple[State, Result | None]:
    """Return the state of a run started by hand, from rank 0's events and all failure records."""
    started, ended = _newest(run, "worker_started"), _newest(run, "worker_ended")
    if started is None:
        return "prepared", None
    if ended is not None and ended["time"] < started["time"]:
        ended = None  # it was started again, by torchrun or by hand
    state, code = _judge(run, started, ended)
    if state == "running":
        return state, None
    run.remove_secrets(_ATTEMPT)
    if state == "lost":
        return state, None
    return state, Result(state, code, started["time"], (ended or {"time": time.time()})["time"])


def _judge(run: RunDir, started: dict[str, Any], ended: dict[str, Any] | None) -> tuple[State, int]:
    """Return the state, and the exit code if it has ended."""
    if ended is not None and ended["exit_code"] == 0:
        stopped = events.stop_event(run, _ATTEMPT)
        return ("succeeded", 0) if stopped is None else ("cancelled", events.exit_code(stopped))
    found = verdict.judge(run, _ATTEMPT)
    newest = max((each.time for each in failures.read_all(run, _ATTEMPT)), default=0.0)
    if found is not None and newest > started["time"]:
        again = found.restarts < LaunchPlan.read(run).max_restarts
        return ("running", 0) if again else ("failed", found.exit_code)
    known = {"launcher": "torchrun", "attempt": _ATTEMPT, "first": _ATTEMPT}
    fields = {**known, "started": started["time"], **started["process"]}
    process = files.parse_as(Handle, to_json(fields), str(run.events))
    return ("running" if process.is_alive(run) else "lost"), 1


def _newest(run: RunDir, kind: str) -> dict[str, Any] | None:
    found = files.read_lines(run.events, event=str, time=float, **_FACTS[kind])
    return next((event for event in reversed([*found]) if event["event"] == kind), None)
