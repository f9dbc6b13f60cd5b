"""`dtrain status`: how one run stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dtrain.cli import options as shared
from dtrain.run.lookup import find

if TYPE_CHECKING:
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
    """How RUN (an id, a unique prefix, or `last`) stands."""
    row = summary(find(run, runs))
    if as_json:
        shared.print_json(row)
        return
    for name, value in row.items():
        if value not in (None, {}):
            click.echo(f"{name.replace('_', ' '):<18} {_text(name, value)}")


def summary(run: RunDir) -> dict[str, Any]:
    """What is known of a run: its state, its place, its last metrics."""
    from dtrain.launchers import status
    from dtrain.plan import LaunchPlan
    from dtrain.run import events, files
    from dtrain.run.attempts import Handle

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


def _described(run: RunDir, launcher: str) -> dict[str, str]:
    """What only some launchers know: how the batch job stands."""
    from dtrain.launchers import base

    found = base.load(launcher)
    return found.describe(run) if isinstance(found, base.Describable) else {}


def _metrics(line: dict[str, Any] | None) -> dict[str, Any]:
    from dtrain.plainjson import numbers

    hidden = ("time", "step", "epoch", "split")
    return numbers({k: v for k, v in (line or {}).items() if k not in hidden})


def _text(name: str, value: Any) -> str:
    if name in ("started", "ended"):
        from dtrain.run.files import local_time

        return local_time(value)
    if isinstance(value, dict):
        return "  ".join(f"{key} {number:.6g}" for key, number in value.items())
    return str(value)
