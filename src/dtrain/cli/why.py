"""`dtrain why`: the verdict of a failed run."""

from __future__ import annotations

import click

from dtrain.cli import options as shared
from dtrain.console import out
from dtrain.run.lookup import find

_NOT_FAILED = {
    "succeeded": "it succeeded",
    "running": "it is running",
    "prepared": "it has not been started",
    "failed": "that attempt left no record",
}


@click.command(
    "why",
    cls=shared.Command,
    examples=(
        ("dtrain why", "Why the run that was started last failed."),
        ("dtrain why digits-4f --attempt 0", "Why the first attempt of a run failed."),
    ),
)
@shared.run_argument
@shared.runs_option
@shared.option(
    shared.WHAT,
    "--attempt",
    type=int,
    metavar="N",
    help="Number of the attempt.  [default: the newest]",
)
@shared.json_option
def command(run: str, runs: str, attempt: int | None, as_json: bool) -> None:
    """Show why RUN (an id, a unique prefix, or `last`) failed, and what to try."""
    from dtrain.launchers.summary import judged
    from dtrain.run import events, verdict
    from dtrain.run.attempts import Result

    found = find(run, runs)
    number, state, failed = judged(found, attempt)
    if as_json:
        shared.print_json(failed.to_json() if failed else None)
    elif failed is not None:
        click.echo(verdict.render(failed, found, out.width(), out.paint))
    elif state == "lost":
        click.echo(f"run {found.id} was ended from outside: its launcher was killed")
    elif state == "cancelled":
        result = Result.read(found, number)
        click.echo(events.stop_message(found, number, 0 if result is None else result.exit_code))
    else:
        click.echo(f"run {found.id} has not failed: {_NOT_FAILED[state]}")
