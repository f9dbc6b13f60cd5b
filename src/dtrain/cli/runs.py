"""`dtrain runs`: the runs of a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dtrain.cli import options as shared
from dtrain.run.lookup import here

if TYPE_CHECKING:
    from dtrain.run.rundir import RunDir

_DAMAGED = "damaged"


@click.command(
    "runs",
    cls=shared.Command,
    examples=(("dtrain runs", "All runs in the folder `runs`, the newest last."),),
)
@shared.runs_option
@shared.json_option
def command(runs: str, as_json: bool) -> None:
    """List the runs, the oldest first."""
    from dtrain.run.rundir import list_runs

    rows = [_row(run) for run in list_runs(here(runs))]
    if as_json:
        shared.print_json(rows)
    elif not rows:
        click.echo(f"no runs in {runs}")
    else:
        click.echo("\n".join(_table(rows)))
        for row in rows:
            if row["state"] == _DAMAGED:
                click.echo(row["reason"], err=True)


def _row(run: RunDir) -> dict[str, Any]:
    """What is known of a run; of one that cannot be read, why not."""
    from dtrain.cli.status import summary
    from dtrain.errors import DtrainError

    try:
        return summary(run)
    except (DtrainError, OSError) as error:
        unknown = dict.fromkeys(("step", "world_size", "strategy", "launcher", "started"))
        path = {"url": run.url, "path": str(run.path)}
        return {"id": run.id, "state": _DAMAGED, "reason": str(error), **unknown, **path}


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
