"""`dtrain cancel`: stop a run."""

from __future__ import annotations

import click

from dtrain.cli import completers
from dtrain.cli import options as shared
from dtrain.console import out
from dtrain.run.lookup import find


@click.command(
    "cancel",
    cls=shared.Command,
    examples=(
        ("dtrain cancel last", "Stop the run that was started last."),
        ("dtrain cancel digits-4f", "Stop a run by the beginning of its id."),
    ),
)
@click.argument("run", shell_complete=completers.runs)
@shared.runs_option
@shared.json_option
def command(run: str, runs: str, as_json: bool) -> None:
    """Stop RUN (an id, a unique prefix, or `last`): its workers save a checkpoint, then exit.

    The id of a sweep stops all of its runs, and those that wait do not start.
    """
    from dtrain.launchers import status
    from dtrain.launchers.stopping import cancel
    from dtrain.sweeping.sweep import find_sweep

    if (sweep := find_sweep(run, runs)) is not None:
        from dtrain.cli import sweep as sweeps

        sweeps.cancel(sweep, as_json)
        return
    found = find(run, runs)
    was, _ = status.state_of(found)
    if was == "running":
        cancel(found)
    state, _ = status.state_of(found)
    if as_json:
        shared.print_json({"id": found.id, "was": was, "state": state})
    elif was == "running":
        click.echo(f"{found.id}: {out.state(state)}")
    else:
        click.echo(f"{found.id} has already ended ({state}); nothing to cancel")
