"""The sweeps of `dtrain launch --sweep` and of commands that take the id of a sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from dtrain.cli import options as shared
from dtrain.console import out

if TYPE_CHECKING:
    from dtrain.planning import Prepared, Request
    from dtrain.sweeping.sweep import Sweep
    from dtrain.sweeping.values import Values


def choices(
    texts: Sequence[str], file: str | None, sample: int | None, options: dict[str, Any]
) -> list[Values]:
    """Return the values of each run; errors as those of `sweeping.values.choices`."""
    from dtrain.sweeping import values

    given = [text.partition("=")[0].strip() for text in options["overrides"]]
    return values.choices(texts, file, sample, [*given, *shared.written_flags(options)])


def launch(
    job: str | None,
    chosen: Sequence[Values],
    options: dict[str, Any],
    *,
    at_once: int | None,
    detach: bool,
    quiet: bool,
) -> int:
    """Make a run for each of the chosen values, and follow them. Return the exit code."""
    from dtrain.errors import DtrainError
    from dtrain.sweeping import making
    from dtrain.sweeping.drive import Console, drive, of_launch

    sweep = making.write(_planned(job, chosen, options), detach)
    request = of_launch(shared.request(options))
    try:
        return drive(sweep, request, at_once, Console(out.say, quiet, out.state), detach=detach)
    except DtrainError:
        making.remove(sweep.runs)
        raise


def resume(
    sweep: Sweep, request: Request, *, at_once: int | None, detach: bool, quiet: bool
) -> int:
    """Continue the runs of a sweep that have not succeeded. Return the exit code."""
    from dtrain.sweeping.drive import Console, drive

    return drive(sweep, request, at_once, Console(out.say, quiet, out.state), detach=detach)


def show(
    job: str | None, chosen: Sequence[Values], at_once: int | None, options: dict[str, Any]
) -> None:
    """Print the planned launch: each run's values, and the script of an array."""
    from dtrain.launchers.base import ArrayCapable

    planned = _planned(job, chosen, options)
    plans = [each.plan for each in planned]
    for plan in plans:
        click.echo(f"{plan.run_id}: {plan.sweep}")
    for note in plans[0].notes:
        click.echo(note)
    launcher = planned[0].launcher
    if isinstance(launcher, ArrayCapable):
        click.echo("\n".join(launcher.preview_array(plans, at_once)))


def _planned(job: str | None, chosen: Sequence[Values], options: dict[str, Any]) -> list[Prepared]:
    from dtrain.sweeping import making

    return making.plan(shared.job_of(job, options), chosen, shared.request(options))


def status(sweep: Sweep, as_json: bool) -> None:
    """Print a table of the runs of a sweep, and how many are in each state."""
    from dtrain.launchers.summary import row
    from dtrain.words import counted

    found = [row(run) for run in sweep.runs]
    if as_json:
        shared.print_json({"id": sweep.id, "missing": sweep.missing, "runs": found})
        return
    click.echo("\n".join(_table(sweep.fields, found)))
    counts = Counter(each["state"] for each in found)
    parts = [f"{number} {out.state(state)}" for state, number in counts.items()]
    parts += [f"{len(sweep.missing)} removed"] if sweep.missing else []
    click.echo(f"{counted(sweep.elements[0].count, 'run')}: {', '.join(parts)}")


def cancel(sweep: Sweep, as_json: bool) -> None:
    """Stop all runs of a sweep that have not ended."""
    from dtrain.sweeping.cancelling import cancel_all

    before, after = cancel_all(sweep)
    if as_json:
        rows = [{"id": run.id, "was": before[run], "state": after[run]} for run in sweep.runs]
        shared.print_json({"id": sweep.id, "runs": rows})
        return
    stopped = [run for run in sweep.runs if before[run] in ("running", "prepared")]
    for run in stopped:
        click.echo(f"{run.id}: {out.state(after[run])}")
    if not stopped:
        click.echo(f"no run of sweep {sweep.id} is running; nothing to cancel")


def _table(fields: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each run: its values, state, step and metric."""
    from dtrain.cli.checkpoint import table
    from dtrain.cli.runs import cells

    heads = ["RUN", *fields, "STATE", "STEP", "DURATION", "METRIC"]
    lines = []
    for row in rows:
        own = row.get("sweep_values", {})  # a damaged run has none
        values = {name: str(own.get(name, "-")) for name in fields}
        lines.append([{**cells(row), **values}[head] for head in heads])
    return table.lines(heads, lines, out.width(), left=len(heads))
