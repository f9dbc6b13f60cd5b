"""`dtrain status`: the state of one run, and how far it is."""

from __future__ import annotations

import textwrap
import time
from typing import TYPE_CHECKING, Any

import click

from dtrain.cli import options as shared
from dtrain.console import out
from dtrain.run.lookup import find

if TYPE_CHECKING:
    from dtrain.run.progress import Progress
    from dtrain.run.rundir import RunDir


@click.command(
    "status",
    cls=shared.Command,
    examples=(("dtrain status last", "The run that was started last."),),
)
@shared.run_argument
@shared.runs_option
@shared.json_option
def command(run: str, runs: str, as_json: bool) -> None:
    """Show the state, progress and newest metrics of RUN (an id, a unique prefix, or `last`)."""
    row = summary(find(run, runs))
    if as_json:
        shared.print_json(row)
        return
    texts = {name: text for name, value in row.items() if (text := _text(name, value, row))}
    indent = max(map(len, texts)) + 2
    for name, text in texts.items():
        click.echo(_folded(f"{name:<{indent}}", text))


def summary(run: RunDir) -> dict[str, Any]:
    """What is known of a run: its state, its place, how far it is, its newest metrics."""
    from dtrain.launchers import status
    from dtrain.plan import LaunchPlan
    from dtrain.run import events
    from dtrain.run.attempts import Handle
    from dtrain.run.progress import Progress

    plan = LaunchPlan.read(run)
    handle = Handle.read(run)
    state, result = status.state_of(run)
    attempt = handle.attempt if handle else plan.attempt
    progress = Progress.read(run)
    why, failed_in = _why(run, state, attempt)
    if failed_in and (progress.step or 0) < failed_in - 1:
        progress.step = failed_in - 1
    train = _metrics(progress, "train")
    started = None if handle is None else handle.started
    ended = None if result is None else result.ended
    newest = {"running": time.time(), "lost": progress.heard}.get(state, ended)
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
        "started": started,
        "ended": ended,
        "duration": lasted,
        "step": progress.step,
        "total_steps": progress.total_steps,
        "percent": progress.percent,
        "eta": progress.end if state == "running" else None,
        "samples_per_second": train.get("samples_per_second"),
        "train": train,
        "eval": _metrics(progress, "eval"),
        "waits": _waits(run) if state == "running" else None,
        "warning": events.ungrouped_warning(run),
        "checkpoint": progress.checkpoint,
        "parameters_sha256": _digest(run),
        **_described(run, plan.launcher),
        "url": run.url,
        "path": str(run.path),
    }


def _why(run: RunDir, state: str, attempt: int) -> tuple[str | None, int | None]:
    """Why a run failed, in a line, and the step that it failed in, where these are known."""
    from dtrain.run import verdict

    found = None
    if state in ("failed", "lost"):
        found = verdict.read(run, attempt) or verdict.judge(run, attempt)
    if found is not None:
        return verdict.summary(found), found.culprit.step
    return ("its launcher was killed" if state == "lost" else None), None


def _waits(run: RunDir) -> str | None:
    """What a running run waits for, a line for each."""
    from dtrain.run import files

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
    """Of the parameters that training ended with."""
    from dtrain.run import files

    known = files.read_lines(run.events, event=str, parameters_sha256=str)
    return next((e["parameters_sha256"] for e in reversed([*known])), None)


def _described(run: RunDir, launcher: str) -> dict[str, str]:
    """What only some launchers know: how the batch job stands."""
    from dtrain.launchers import base

    found = base.load(launcher)
    return found.describe(run) if isinstance(found, base.Describable) else {}


def _metrics(progress: Progress, split: str) -> dict[str, Any]:
    from dtrain.plainjson import numbers

    return numbers(progress.metrics.get(split, {}))


def _text(name: str, value: Any, row: dict[str, Any]) -> str:
    """A value for people; empty where there is nothing to show."""
    from dtrain.run.files import duration, local_time

    if value in (None, {}) or name in ("total_steps", "percent"):
        return ""
    if name == "state":
        return out.state(value)
    if name == "why":
        return f"{value}; `dtrain why {row['id']}` shows more"
    if name == "step":
        return steps(row)
    if name in ("started", "ended"):
        return local_time(value)
    if name == "duration":
        return duration(value)
    if name == "eta":
        return f"{local_time(value)}, in {duration(value - time.time())}"
    if name == "samples_per_second":
        return f"{value:.6g}"
    if name == "train":
        value = {key: number for key, number in value.items() if key != "samples_per_second"}
    if name == "set":
        return "  ".join(f"{key}={each}" for key, each in value.items())
    if isinstance(value, dict):
        return "  ".join(f"{key} {number:.6g}" for key, number in value.items())
    return str(value)


def steps(row: dict[str, Any]) -> str:
    """`20 of 48 (41 %)`, or `20` where nobody knows how many there will be."""
    if row.get("total_steps") is None:
        return str(row["step"])
    return f"{row['step']} of {row['total_steps']} ({row['percent']} %)"


def _folded(label: str, text: str) -> str:
    """A line for a terminal of any width; for a pipe, one line."""
    width = out.width()
    if width is None:
        return label + text
    indent = " " * len(label)
    return "\n".join(
        folded
        for number, line in enumerate(text.splitlines())
        for folded in textwrap.wrap(
            line,
            max(40, width),
            initial_indent=indent if number else label,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )
