"""`dtrain resume`: the next attempt of a run."""

from __future__ import annotations

from typing import Any

import click

from dtrain.cli import options as shared
from dtrain.run.lookup import find


@click.command("resume", cls=shared.LaunchCommand)
@shared.run_argument
@shared.size_options
@click.option("--dry-run", "--dryrun", is_flag=True, help="Show the plan and start nothing.")
@click.option("-q", "--quiet", is_flag=True, help="Show only the end and what went wrong.")
def command(run: str, dry_run: bool, quiet: bool, **options: Any) -> int:
    """Go on with RUN (an id, a unique prefix, or `last`) from its newest good checkpoint.

    The run goes on as it was launched; flags change what they name, as its size.
    """
    from dtrain.cli.launch import start
    from dtrain.cli.plan import show
    from dtrain.resuming import plan_resume

    prepared = plan_resume(find(run, options["runs"]), shared.request(options))
    if dry_run:
        show(prepared, as_json=False, explain=False)
        return 0
    return start(prepared, quiet)
