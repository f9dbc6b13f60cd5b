"""`dtrain checkpoint list`: the checkpoints of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dtrain.cli import options as shared
from dtrain.console import out
from dtrain.run.lookup import find

if TYPE_CHECKING:
    from dtrain.checkpoints.listing import Row

_HEADS = ("STEP", "SIZE", "AGE", "METRIC", "KEPT")


@click.command(
    "list",
    cls=shared.Command,
    examples=(
        ("dtrain checkpoint list", "The checkpoints of the newest run."),
        ("dtrain checkpoint list digits-4f --json", "Those of another run, as JSON."),
    ),
)
@shared.run_argument
@shared.runs_option
@shared.json_option
def command(run: str, runs: str, as_json: bool) -> None:
    """List the checkpoints of RUN (an id, a unique prefix, or `last`), the newest last.

    KEPT says why a checkpoint stays when a newer one is saved. Only manifests are read; `dtrain
    checkpoint verify` reads everything.
    """
    from dataclasses import asdict

    from dtrain.checkpoints.listing import rows

    found = find(run, runs)
    listed = rows(found)
    if as_json:
        shared.print_json([asdict(row) for row in listed])
        return
    if not listed:
        click.echo(f"run {found.id} has no checkpoint")
        return
    from dtrain.cli.checkpoint import table

    heads, *lines = table.lines(_HEADS, [_cells(row) for row in listed], out.width(), left=5)
    click.echo(heads)
    for row, line in zip(listed, lines, strict=True):
        click.echo(line if row.state == "complete" else out.paint(line, "red"))
    for row in listed:
        if row.problem is not None and row.state != "incomplete":
            click.echo(f"{row.name}: {row.problem}", err=True)


def _cells(row: Row) -> tuple[str, ...]:
    from dtrain.run.files import duration
    from dtrain.words import size

    best = row.name == "best"
    metric = next((f"{name} {value:.4g}" for name, value in row.metrics.items()), "-")
    if row.state != "complete":
        kept = row.state
    elif best:
        kept = "copy" if row.step is None else f"copy of step {row.step}"
    else:
        kept = row.kept or "-"
    return (
        "best" if best else str(row.step),
        "-" if row.bytes is None else size(row.bytes),
        "-" if row.age is None else duration(row.age),
        metric,
        kept,
    )
