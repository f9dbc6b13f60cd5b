"""Summarize a run for users and programs: its state, its metrics, why it failed."""

from __future__ import annotations

import time
from typing import Any

from dtrain.errors import DtrainError
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers import base, status
from dtrain.plainjson import numbers
from dtrain.run import events, files, verdict
from dtrain.run.attempts import DAMAGED, Handle, Result, State
from dtrain.run.lookup import attempt_of
from dtrain.run.progress import Progress
from dtrain.run.rundir import RunDir
from dtrain.run.verdict import Verdict


def summary(run: RunDir, *, recent: bool = False) -> dict[str, Any]:
    """Return a summary of a run: its state, location, progress and newest metrics.

    Args:
        run: the run.
        recent: whether to read only recent metrics, if it is running.
    """
    plan = LaunchPlan.read(run)
    handle = Handle.read(run)
    state, result = status.state_of(run)
    attempt = handle.attempt if handle else plan.attempt
    progress = Progress.read(run, recent=recent and state == "running")
    why, failed_in = _why(run, state, attempt)
    if failed_in and (progress.step or 0) < failed_in - 1:
        progress.step = failed_in - 1
    train = _metrics(progress, "train")
    begun = handle or result
    started = None if begun is None else begun.started
    ended = None if result is None else result.ended
    newest = {"running": time.time(), "lost": progress.updated}.get(state, ended)
    lasted = None if started is None or newest is None else max(0.0, newest - started)
    return {
        "id": run.id,
        "state": state,
        "why": why,
        "exit_code": None if result is None else result.exit_code,
        "attempt": attempt,
        "launcher": plan.launcher,
        "strategy": plan.strategy,
        "trainer": plan.trainer,
        "nodes": plan.nodes,
        "world_size": plan.world_size,
        "set": plan.set_by_flags,
        "sweep": None if plan.sweep is None else plan.sweep.sweep,
        "sweep_values": {} if plan.sweep is None else plan.sweep.values,
        "started": started,
        "ended": ended,
        "duration": lasted,
        "step": progress.step,
        "total_steps": progress.total_steps,
        "percent": progress.percent,
        "eta": progress.end if state == "running" else None,
        "samples_per_second": train.get("samples_per_second"),
        "train": train,
        **{split: _metrics(progress, split) for split in ("eval", "validate", "test")},
        "waits": _waits(run) if state == "running" else None,
        "warning": events.ungrouped_warning(run),
        "checkpoint": progress.checkpoint,
        "parameters_sha256": _digest(run),
        **_described(run, plan.launcher),
        "url": run.url,
        "path": str(run.path),
    }


def row(run: RunDir) -> dict[str, Any]:
    """Return the summary of a run in a list of many, or the reason why it cannot be read."""
    try:
        return summary(run, recent=True)
    except (DtrainError, OSError) as error:
        unknown = dict.fromkeys(("step", "world_size", "strategy", "launcher", "started"))
        path = {"url": run.url, "path": str(run.path)}
        return {"id": run.id, "state": DAMAGED, "reason": str(error), **unknown, **path}


def judged(run: RunDir, attempt: int | None = None) -> tuple[int, State, Verdict | None]:
    """Return an attempt of a run, its state, and the verdict if it failed.

    Args:
        run: the run.
        attempt: its number. None means the newest.

    Raises:
        RunNotFound: there is no such attempt.
    """
    number = attempt_of(run, attempt)
    found = verdict.read(run, number) or verdict.judge(run, number)
    if number == run.attempts()[-1]:
        state = status.state_of(run)[0]
    else:
        result = Result.read(run, number)
        state = "failed" if result is None else result.state
    return number, state, found if state in ("failed", "lost") else None


def _why(run: RunDir, state: str, attempt: int) -> tuple[str | None, int | None]:
    """Return a line about why a run failed, and the step in which it failed, where they are
    known."""
    found = None
    if state in ("failed", "lost"):
        found = verdict.read(run, attempt) or verdict.judge(run, attempt)
    if found is not None:
        return verdict.summary(found), found.culprit.step
    return ("its launcher was killed" if state == "lost" else None), None


def _waits(run: RunDir) -> str | None:
    """Return what a running run waits for, one line for each."""
    waits: dict[tuple[str, Any], str] = {}
    for event in files.read_lines(run.events, event=str):
        if event["event"] == "threads_left":
            waits["rank", event.get("rank")] = str(event.get("what"))
        elif event["event"] == "silent":
            waits["node", event.get("node_rank")] = str(event.get("what"))
        elif event["event"] == "heard":
            waits.pop(("node", event.get("node_rank")), None)
        elif event["event"] == "workers_started":
            waits.clear()
    return "\n".join(waits.values()) or None


def _digest(run: RunDir) -> str | None:
    """Return the digest of the final parameters."""
    known = files.read_lines(run.events, event=str, parameters_sha256=str)
    return next((e["parameters_sha256"] for e in reversed([*known])), None)


def _described(run: RunDir, launcher: str) -> dict[str, str]:
    """Return facts that only some launchers know, for example the state of the batch job."""
    found = base.load(launcher)
    return found.describe(run) if isinstance(found, base.Describable) else {}


def _metrics(progress: Progress, split: str) -> dict[str, Any]:
    return numbers(progress.metrics.get(split, {}))
