"""How a run stands that no command of ours drives: its workers were started by hand."""

from __future__ import annotations

import time
from typing import Any

from dtrain.plainjson import to_json
from dtrain.plan import LaunchPlan
from dtrain.run import events, failures, files, verdict
from dtrain.run.attempts import Handle, Result, State
from dtrain.run.rundir import RunDir

_ATTEMPT = 0  # by hand there is only one
_FACTS: dict[str, dict[str, type]] = {
    "worker_started": {"process": dict},
    "worker_ended": {"exit_code": int},
}


def state_of(run: RunDir) -> tuple[State, Result | None]:
    """The state by what rank 0 has told of itself, and by the failure records of all ranks."""
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
    """The state, and the exit code of what has ended."""
    if ended is not None and ended["exit_code"] == 0:
        stopped = events.stopped(run, _ATTEMPT)
        return ("succeeded", 0) if stopped is None else ("cancelled", events.exit_code(stopped))
    found = verdict.judge(run, _ATTEMPT)
    newest = max((each.time for each in failures.read_all(run, _ATTEMPT)), default=0.0)
    if found is not None and newest > started["time"]:
        again = found.restarts < LaunchPlan.read(run).max_restarts
        return ("running", 0) if again else ("failed", found.exit_code)
    known = {"launcher": "torchrun", "attempt": _ATTEMPT, "first": _ATTEMPT}
    told_of = {**known, "started": started["time"], **started["process"]}
    process = files.parse_as(Handle, to_json(told_of), str(run.events))
    return ("running" if process.is_alive(run) else "lost"), 1


def _newest(run: RunDir, kind: str) -> dict[str, Any] | None:
    found = files.read_lines(run.events, event=str, time=float, **_FACTS[kind])
    return next((event for event in reversed([*found]) if event["event"] == kind), None)
