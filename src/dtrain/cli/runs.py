"""`dtrain runs`: the runs of a folder."""

from __future__ import annotations

from typing import Any

import click

from dtrain.cli import options as shared
from dtrain.run.lookup import here


@click.command("runs")
@shared.runs_option
@shared.json_option
def command(runs: str, as_json: bool) -> None:
    """List the runs, the oldest first."""
    from dtrain.launchers.summary import DAMAGED, row
    from dtrain.run.rundir import list_runs

    rows = [row(run) for run in list_runs(here(runs))]
    if as_json:
        shared.print_json(rows)
    elif not rows:
        click.echo(f"no runs in {runs}")
    else:
        click.echo("\n".join(_table(rows)))
        for each in rows:
            if each["state"] == DAMAGED:
                click.echo(each["reason"], err=True)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    from dtrain.run.files import local_time

    cells: list[tuple[str, ...]] = [
        ("RUN", "STATE", "STEP", "RANKS", "STRATEGY", "LAUNCHER", "STARTED")
    ]
    for row in rows:
        when = local_time(row["started"]) if row["started"] else None
        told = (row["step"], row["world_size"], row["strategy"], row["launcher"], when)
        shown = ("-" if value is None else str(value) for value in told)
        cells.append((row["id"], row["state"], *shown))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
