"""What is known of a run, for people and programs: its state, its metrics, why it failed."""

from __future__ import annotations

from typing import Any

from dtrain.errors import DtrainError, RunNotFound
from dtrain.launchers import base, status
from dtrain.plainjson import numbers
from dtrain.plan import LaunchPlan
from dtrain.run import events, files, verdict
from dtrain.run.attempts import Handle, Result, State
from dtrain.run.rundir import RunDir
from dtrain.run.verdict import Verdict

DAMAGED = "damaged"
"""State of a run whose directory cannot be read."""


def summary(run: RunDir) -> dict[str, Any]:
    """What is known of a run: its state, its place, its last metrics."""
    plan = LaunchPlan.read(run)
    handle = Handle.read(run)
    state, result = status.state_of(run)
    last: dict[str, dict[str, Any]] = {}
    for line in files.read_lines(run.metrics, split=str, step=int):
        last[line["split"]] = line
    finished: dict[str, Any] = {}
    waits: dict[tuple[str, Any], str] = {}
    for event in files.read_lines(run.events, event=str):
        if event["event"] == "finished":
            finished = event
        elif event["event"] == "threads_left":
            waits["rank", event.get("rank")] = str(event.get("what"))
        elif event["event"] == "silent":
            waits["node", event.get("node_rank")] = str(event.get("what"))
        elif event["event"] == "heard":
            waits.pop(("node", event.get("node_rank")), None)
        elif event["event"] == "workers_started":
            waits.clear()
    newest = max(last.values(), key=lambda line: line["step"], default=None)
    return {
        "id": run.id,
        "state": state,
        "exit_code": None if result is None else result.exit_code,
        "attempt": handle.attempt if handle else plan.attempt,
        "launcher": plan.launcher,
        "strategy": plan.strategy,
        "trainer": plan.trainer,
        "nodes": plan.nodes,
        "world_size": plan.world_size,
        "started": None if handle is None else handle.started,
        "ended": None if result is None else result.ended,
        "step": None if newest is None else newest["step"],
        "train": _metrics(last.get("train")),
        "eval": _metrics(last.get("eval")),
        "waits": "\n".join(waits.values()) or None if state == "running" else None,
        "warning": events.ungrouped_warning(run),
        "parameters_sha256": finished.get("parameters_sha256"),
        **_described(run, plan.launcher),
        "url": run.url,
        "path": str(run.path),
    }


def row(run: RunDir) -> dict[str, Any]:
    """What is known of a run; of one that cannot be read, why not."""
    try:
        return summary(run)
    except (DtrainError, OSError) as error:
        unknown = dict.fromkeys(("step", "world_size", "strategy", "launcher", "started"))
        path = {"url": run.url, "path": str(run.path)}
        return {"id": run.id, "state": DAMAGED, "reason": str(error), **unknown, **path}


def judged(run: RunDir, attempt: int | None = None) -> tuple[int, State, Verdict | None]:
    """An attempt of a run, how it stands, and the verdict of one that failed.

    Args:
        run: the run.
        attempt: its number; None: the newest.

    Raises:
        RunNotFound: there is no such attempt.
    """
    attempts = run.attempts()
    if not attempts or (attempt is not None and attempt not in attempts):
        raise RunNotFound(f"run {run.id} has no attempt {attempt or 0}; it has {attempts}")
    number = attempts[-1] if attempt is None else attempt
    found = verdict.read(run, number) or verdict.judge(run, number)
    if number == attempts[-1]:
        state = status.state_of(run)[0]
    else:
        result = Result.read(run, number)
        state = "failed" if result is None else result.state
    return number, state, found if state in ("failed", "lost") else None


def _described(run: RunDir, launcher: str) -> dict[str, str]:
    """What only some launchers know: how the batch job stands."""
    found = base.load(launcher)
    return found.describe(run) if isinstance(found, base.Describable) else {}


def _metrics(line: dict[str, Any] | None) -> dict[str, Any]:
    hidden = ("time", "step", "epoch", "split")
    return numbers({k: v for k, v in (line or {}).items() if k not in hidden})
