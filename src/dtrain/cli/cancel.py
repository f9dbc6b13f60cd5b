"""`dtrain cancel`: end a run in order."""

from __future__ import annotations

import click

from dtrain.cli import options as shared
from dtrain.run.lookup import find


@click.command("cancel")
@shared.run_argument
@shared.runs_option
@shared.json_option
def command(run: str, runs: str, as_json: bool) -> None:
    """End RUN (an id, a unique prefix, or `last`): its workers save and leave at the next step."""
    from dtrain.launchers import status
    from dtrain.launchers.stopping import cancel

    found = find(run, runs)
    was, _ = status.state_of(found)
    if was == "running":
        cancel(found)
    state, _ = status.state_of(found)
    if as_json:
        shared.print_json({"id": found.id, "was": was, "state": state})
    elif was == "running":
        click.echo(f"{found.id}: {state}")
    else:
        click.echo(f"{found.id}: nothing to cancel, it is {state}")
