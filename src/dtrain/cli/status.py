"""`dtrain status`: the state and progress of one run."""

from __future__ import annotations

import textwrap
import time
from typing import Any

import click

from dtrain.cli import options as shared
from dtrain.console import out
from dtrain.run.lookup import find


@click.command(
    "status",
    cls=shared.Command,
    examples=(
        ("dtrain status", "The run that was started last."),
        ("dtrain status digits-k3", "All runs of a sweep, by its id."),
        ("dtrain status digits-4f --json", "A run by the beginning of its id, as JSON."),
    ),
)
@shared.run_argument
@shared.runs_option
@shared.json_option
def command(run: str, runs: str, as_json: bool) -> None:
    """Show the state, progress and newest metrics of RUN (an id, a unique prefix, or `last`).

    The id of a sweep shows a table of its runs.
    """
    from dtrain.launchers.summary import summary
    from dtrain.sweeping.sweep import find_sweep

    if (sweep := find_sweep(run, runs)) is not None:
        from dtrain.cli import sweep as sweeps

        sweeps.status(sweep, as_json)
        return
    row = summary(find(run, runs))
    if as_json:
        shared.print_json(row)
        return
    texts = {name: text for name, value in row.items() if (text := _text(name, value, row))}
    indent = max(map(len, texts)) + 2
    for name, text in texts.items():
        click.echo(_folded(f"{name:<{indent}}", text))


def _text(name: str, value: Any, row: dict[str, Any]) -> str:
    """Return a value for people. Empty if there is nothing to show."""
    from dtrain.run.files import duration, local_time

    if value in (None, {}) or name in ("total_steps", "percent"):
        return ""
    if name == "state":
        return out.state(value)
    if name == "why":
        return f"{value}; `dtrain why {row['id']}` shows more"
    if name == "step":
        return steps(row)
    if name in ("started", "ended"):
        return local_time(value)
    if name == "duration":
        return duration(value)
    if name == "eta":
        return f"{local_time(value)}, in {duration(value - time.time())}"
    if name == "samples_per_second":
        return f"{value:.6g}"
    if name == "train":
        value = {key: number for key, number in value.items() if key != "samples_per_second"}
    if name in ("set", "sweep_values"):
        return "  ".join(f"{key}={each}" for key, each in value.items())
    if isinstance(value, dict):
        return "  ".join(f"{key} {number:.6g}" for key, number in value.items())
    return str(value)


def steps(row: dict[str, Any]) -> str:
    """Return `20 of 48 (41 %)`, or `20` if the total is not known."""
    if row.get("total_steps") is None:
        return str(row["step"])
    return f"{row['step']} of {row['total_steps']} ({row['percent']} %)"


def _folded(label: str, text: str) -> str:
    """Return a line for a terminal of any width. For a pipe, it is not folded."""
    width = out.width()
    if width is None:
        return label + text
    indent = " " * len(label)
    return "\n".join(
        folded
        for number, line in enumerate(text.splitlines())
        for folded in textwrap.wrap(
            line,
            max(40, width),
            initial_indent=indent if number else label,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )
