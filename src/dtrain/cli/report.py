"""`dtrain report`: a page about one or several runs."""

from __future__ import annotations

import click

from dtrain.cli import completers
from dtrain.cli import options as shared


@click.command(
    "report",
    cls=shared.Command,
    examples=(
        ("dtrain report last -o report.html", "A page about the run that was started last."),
        ("dtrain report digits-4f digits-k3 -o both.html", "Two runs, laid over one another."),
    ),
)
@click.argument("names", metavar="[RUN]...", nargs=-1, shell_complete=completers.runs)
@shared.option(
    shared.WHAT,
    "--output",
    "-o",
    metavar="FILE",
    help="The page to write.  [default: report-RUN.html]",
    type=click.Path(dir_okay=False),
)
@shared.runs_option
@shared.json_option
def command(names: tuple[str, ...], output: str | None, runs: str, as_json: bool) -> None:
    """Write one HTML page about each RUN (an id, a unique prefix, or `last`) and its course.

    It shows metrics, phases, checkpoints, failures and what the time went to. The page needs no
    network. Several runs are laid over one another; the id of a sweep stands for all of its runs.
    """
    from dtrain.page.document import write
    from dtrain.report.history import read
    from dtrain.report.page import page_of
    from dtrain.sweeping.sweep import find_runs

    found = find_runs(names or ("last",), runs)
    if as_json:
        shared.print_json([read(run).to_json() for run in found])
        return
    path = output or f"report-{found[0].id}.html"
    write(page_of(found), path)
    click.echo(f"report: {path}")
