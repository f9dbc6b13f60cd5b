"""`dtrain runs`: the runs of a directory."""

from __future__ import annotations

from typing import Any

import click

from dtrain.cli import options as shared
from dtrain.console import out
from dtrain.run.lookup import local_directory

_LEFT_OUT = ("LAUNCHER", "STRATEGY", "RANKS", "STARTED", "SET")
"""Columns that a narrow terminal does not show, in this order."""
_SHORTEST_SET = 16
_HAS_A_COLUMN = (
    "name",
    "strategy",
    "launch.nodes",
    "launch.procs_per_node",
    "launch.gpus_per_node",
)


@click.command(
    "runs",
    cls=shared.Command,
    examples=(
        ("dtrain runs", "All runs in the directory `runs`, the newest last."),
        ("dtrain runs --runs s3://bucket/runs --json", "All runs at a URL, as JSON."),
    ),
)
@shared.runs_option
@shared.json_option
def command(runs: str, as_json: bool) -> None:
    """List the runs, the newest last.

    A narrow terminal shows fewer columns; --json, and a pipe, have all of them.
    """
    from dtrain.launchers.summary import DAMAGED, row
    from dtrain.run.rundir import list_runs

    rows = [row(run) for run in list_runs(local_directory(runs))]
    if as_json:
        shared.print_json(rows)
    elif not rows:
        click.echo(f"no runs in {runs}")
    else:
        click.echo("\n".join(table(rows, out.width())))
        for each in rows:
            if each["state"] == DAMAGED:
                click.echo(each["reason"], err=True)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Return a row of the table, by heading."""
    from dtrain.run.files import duration, local_time

    last = row.get("eval") or {k: v for k, v in row.get("train", {}).items() if k == "loss"}
    metric = next((f"{name} {value:.4g}" for name, value in last.items()), None)
    done, total = row["step"], row.get("total_steps")
    given = row.get("set", {}).items()
    values = {
        "RUN": row["id"],
        "STATE": row["state"],
        "STEP": done if total in (None, done) else f"{done or 0}/{total}",
        "RANKS": row["world_size"],
        "STRATEGY": row["strategy"],
        "LAUNCHER": row["launcher"],
        "STARTED": local_time(row["started"]) if row["started"] else None,
        "DURATION": None if row.get("duration") is None else duration(row["duration"]),
        "METRIC": metric,
        "SET": " ".join(f"{k}={v}" for k, v in given if k not in _HAS_A_COLUMN) or None,
    }
    return {name: "-" if value is None else str(value) for name, value in values.items()}


def table(rows: list[dict[str, Any]], width: int | None) -> list[str]:
    """Return the runs as lines.

    Args:
        rows: summaries of the runs.
        width: the columns that a line may have. None means any number. If there are too few, SET is
            shortened, then LAUNCHER, STRATEGY, RANKS and STARTED are left out, then SET.
    """
    cells = [_cells(row) for row in rows]
    widths = {name: max(len(name), *(len(each[name]) for each in cells)) for name in cells[0]}
    if width is not None:
        wanted = widths["SET"]
        widths["SET"] = min(wanted, _SHORTEST_SET)
        left_out = list(_LEFT_OUT)
        while _total(widths) > width and left_out:
            del widths[left_out.pop(0)]
        if "SET" in widths:
            widths["SET"] = min(wanted, widths["SET"] + width - _total(widths))
    lines = ["  ".join(name.ljust(size) for name, size in widths.items()).rstrip()]
    for each in cells:
        parts = [_padded(name, each[name], size) for name, size in widths.items()]
        lines.append("  ".join(parts).rstrip())
    return lines


def _total(widths: dict[str, int]) -> int:
    return sum(widths.values()) + 2 * (len(widths) - 1)


def _padded(name: str, text: str, size: int) -> str:
    if len(text) > size:
        text = f"{text[: size - 2]} …"
    return (out.state(text) if name == "STATE" else text) + " " * (size - len(text))
