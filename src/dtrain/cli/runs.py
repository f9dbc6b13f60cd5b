"""`dtrain runs`: the runs of a folder."""

from __future__ import annotations

import time
from typing import Any

import click

from dtrain.cli import options as shared
from dtrain.cli.finding import here


@click.command("runs")
@shared.runs_option
@shared.json_option
def command(runs: str, as_json: bool) -> None:
    """List the runs, the oldest first."""
    from dtrain.cli.status import summary
    from dtrain.rundir import list_runs

    rows = [summary(run) for run in list_runs(here(runs))]
    if as_json:
        shared.print_json(rows)
    elif not rows:
        click.echo(f"no runs in {runs}")
    else:
        click.echo("\n".join(_table(rows)))


def _table(rows: list[dict[str, Any]]) -> list[str]:
    cells = [("RUN", "STATE", "STEP", "RANKS", "STRATEGY", "LAUNCHER", "STARTED")]
    for row in rows:
        started = row["started"]
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started)) if started else "-"
        step = "-" if row["step"] is None else str(row["step"])
        size = str(row["world_size"])
        cells.append((row["id"], row["state"], step, size, row["strategy"], row["launcher"], when))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
