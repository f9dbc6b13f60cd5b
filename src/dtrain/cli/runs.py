"""`dtrain runs`: the runs of a directory."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import click

from dtrain.cli import completers
from dtrain.cli import options as shared
from dtrain.console import out
from dtrain.run.lookup import local_directory

if TYPE_CHECKING:
    from dtrain.searching.index import Entry

_LEFT_OUT = ("LAUNCHER", "STRATEGY", "RANKS", "STARTED", "SET")
"""Columns that a narrow terminal does not show, in this order."""
_SHORTEST_SET = 16
_WRITTEN = ("state", "step", "started", "duration", "metric", "set")
"""Columns whose text has more than the value."""


@click.command(
    "runs",
    cls=shared.Command,
    examples=(
        ("dtrain runs", "All runs in the directory `runs`, the newest last."),
        ("dtrain runs --state failed,lost --since 2d", "Those of two days that have failed."),
        ("dtrain runs --where 'train.loss<0.1' --sort eval.loss", "The best ones first."),
        ("dtrain runs --columns run,args.lr,eval.loss", "Other columns."),
        ("dtrain runs --runs s3://bucket/runs --json", "All runs at a URL, as JSON."),
    ),
)
@shared.option(
    shared.WHAT,
    "--state",
    "states",
    multiple=True,
    metavar="STATE,…",
    shell_complete=completers.states,
    help="Only runs in these states; repeatable.",
)
@shared.option(
    shared.WHAT, "--since", metavar="TIME", help="Only runs started since 2d, 12h, or a date."
)
@shared.option(
    shared.WHAT,
    "--where",
    multiple=True,
    metavar="CONDITION",
    help="Only runs for which it holds, for example 'args.lr<0.01'; repeatable.",
)
@shared.option(
    shared.WHAT, "--last", type=click.IntRange(min=1), metavar="N", help="Only the newest N."
)
@shared.runs_option
@shared.option(
    shared.WATCH,
    "--columns",
    metavar="NAME,…",
    shell_complete=completers.columns,
    help="Columns to show: those of the table, fields of the job, or metrics.",
)
@shared.option(
    shared.WATCH,
    "--sort",
    metavar="NAME",
    shell_complete=completers.columns,
    help="Sort by a column, a field or a metric; by -NAME, the largest first.",
)
@shared.option(shared.WATCH, "--reverse", is_flag=True, help="Reverse the order.")
@shared.json_option
def command(runs: str, columns: str | None, as_json: bool, **wanted: Any) -> None:
    """List the runs, the newest last.

    Names in --where, --columns and --sort are those of the columns, of fields of the job
    (`args.lr`), of metrics (`eval.accuracy`, the newest value), and of what `dtrain status --json`
    prints. A run without such a value does not match.

    A narrow terminal shows fewer columns; --json, and a pipe, have all of them.
    """
    from dtrain.run.attempts import DAMAGED
    from dtrain.searching import fields, query
    from dtrain.searching.index import entries

    gc.disable()  # to look for garbage among 5,000 rows takes 0.1 s, and this process ends soon
    found = entries(local_directory(runs))
    names = [] if columns is None else [name.strip() for name in columns.split(",")]
    fields.check(names, found)
    chosen = query.select(found, **wanted)
    rows = [entry.row for entry in chosen]
    if as_json and names:
        values = [{name: fields.value(entry, name) for name in names} for entry in chosen]
        rows = [{"id": row["id"], **each} for row, each in zip(rows, values, strict=True)]
    if as_json:
        shared.print_json(rows)
        return
    if not chosen:
        click.echo(f"no runs in {runs}" if not found else f"none of {len(found)} runs matches")
        return
    click.echo("\n".join(_chosen(chosen, names) if names else table(rows, out.width())))
    for each in rows:
        if each["state"] == DAMAGED:
            click.echo(each["reason"], err=True)


def _chosen(chosen: list[Entry], names: list[str]) -> list[str]:
    """Return the columns that a user has named as lines, all of them whatever the width."""
    from dtrain.cli.checkpoint import table
    from dtrain.searching.fields import COLUMNS

    rows = [[_cell(entry, name) for name in names] for entry in chosen]
    heads = [name.upper() if name.lower() in COLUMNS else name for name in names]
    return table.lines(heads, rows, None, left=len(names))


def _cell(entry: Entry, name: str) -> str:
    from dtrain.run.files import local_time
    from dtrain.searching import fields
    from dtrain.searching.query import as_text

    if name.lower() in _WRITTEN:
        return cells(entry.row)[name.upper()]
    value = fields.value(entry, name)
    if value is None:
        return "-"
    if name in ("ended", "eta"):
        return local_time(value)
    return f"{value:.6g}" if isinstance(value, float) else as_text(value).replace("\n", " ")


def cells(row: dict[str, Any]) -> dict[str, str]:
    """Return a row of the table, by heading."""
    from dtrain.run.files import duration, local_time
    from dtrain.searching.fields import metric_of, set_of

    metric = metric_of(row)
    done, total = row["step"], row.get("total_steps")
    values = {
        "RUN": row["id"],
        "STATE": row["state"],
        "STEP": done if total in (None, done) else f"{done or 0}/{total}",
        "RANKS": row["world_size"],
        "STRATEGY": row["strategy"],
        "LAUNCHER": row["launcher"],
        "STARTED": local_time(row["started"]) if row["started"] else None,
        "DURATION": None if row.get("duration") is None else duration(row["duration"]),
        "METRIC": None if metric is None else f"{metric[0]} {metric[1]:.4g}",
        "SET": set_of(row),
    }
    return {name: "-" if value is None else str(value) for name, value in values.items()}


def table(rows: list[dict[str, Any]], width: int | None) -> list[str]:
    """Return the runs as lines.

    Args:
        rows: summaries of the runs.
        width: the columns that a line may have. None means any number. If there are too few, SET is
            shortened, then LAUNCHER, STRATEGY, RANKS and STARTED are left out, then SET.
    """
    filled = [cells(row) for row in rows]
    widths = {name: max(len(name), *(len(each[name]) for each in filled)) for name in filled[0]}
    if width is not None:
        wanted = widths["SET"]
        widths["SET"] = min(wanted, _SHORTEST_SET)
        left_out = list(_LEFT_OUT)
        while _total(widths) > width and left_out:
            del widths[left_out.pop(0)]
        if "SET" in widths:
            widths["SET"] = min(wanted, widths["SET"] + width - _total(widths))
    lines = ["  ".join(name.ljust(size) for name, size in widths.items()).rstrip()]
    for each in filled:
        parts = [_padded(name, each[name], size) for name, size in widths.items()]
        lines.append("  ".join(parts).rstrip())
    return lines


def _total(widths: dict[str, int]) -> int:
    return sum(widths.values()) + 2 * (len(widths) - 1)


def _padded(name: str, text: str, size: int) -> str:
    if len(text) > size:
        text = f"{text[: size - 2]} …"
    return (out.state(text) if name == "STATE" else text) + " " * (size - len(text))
