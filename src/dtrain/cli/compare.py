"""`dtrain compare`: what differs between runs."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import click

from dtrain.cli import completers
from dtrain.cli import options as shared
from dtrain.console import out
from dtrain.run.lookup import find

if TYPE_CHECKING:
    from dtrain.comparing.compare import Comparison

_MOST_NAME, _LEAST_VALUE, _MOST_VALUE = 30, 8, 60


@click.command(
    "compare",
    cls=shared.Command,
    examples=(
        ("dtrain compare digits-4f digits-k3", "What differs between two runs."),
        ("dtrain compare last digits-4f --json", "The same as JSON."),
    ),
)
@click.argument("first", metavar="RUN", shell_complete=completers.runs)
@click.argument("others", metavar="RUN…", nargs=-1, required=True, shell_complete=completers.runs)
@shared.runs_option
@shared.json_option
def command(first: str, others: tuple[str, ...], runs: str, as_json: bool) -> int:
    """Show what differs between two or more runs, and at which step their losses part.

    Job, code, environment, data and metrics are compared with those of the first RUN. What does
    not change the training, except for rounding, is listed under `launch`. The exit code is 1 if
    anything differs.
    """
    from dtrain.comparing.compare import compare

    result = compare([find(name, runs) for name in (first, *others)])
    if as_json:
        shared.print_json(result.to_json())
    else:
        click.echo("\n".join(_lines(result, out.width())))
    return 0 if result.are_same else 1


def _lines(result: Comparison, width: int | None) -> list[str]:
    from dtrain.comparing.text import parting_text, value_text

    of_runs = result.runs
    rows = [("", [run["id"] for run in of_runs]), ("state", [run["state"] for run in of_runs])]
    rows.append(("step", [f"{run['step'] or 0} of {run['total_steps']}" for run in of_runs]))
    for title, values in result.sections.items():
        if values:
            rows.append((title, []))
            rows += [
                (f"  {name}", [value_text(name, each) for each in v]) for name, v in values.items()
            ]
    texts = [parting_text(each, of_runs[0]["id"]) for each in result.losses]
    unknown = result.unknown
    same = [title for title, v in result.sections.items() if not v and title not in unknown]
    texts += [f"the same: {', '.join(same)}"] if same else []
    texts += [f"not recorded of all: {', '.join(unknown)}"] if unknown else []
    texts += [f"note: {each}" for each in result.notes]
    return [*_table(rows, width), *(line for text in texts for line in _folded(text, width))]


def _folded(text: str, width: int | None) -> list[str]:
    if width is None:
        return [text]
    return textwrap.wrap(
        text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _table(rows: list[tuple[str, list[str]]], width: int | None) -> list[str]:
    """Return rows of a name and a value for each run; a row without values is a heading.

    Args:
        rows: the rows.
        width: the columns that a line may have. None means any number. If there are too few,
            values are shortened in their middle.
    """
    from dtrain.errors import shortened

    number = len(rows[0][1])
    most = max(len(name) for name, _ in rows)
    sizes = [max(len(row[1][k]) for row in rows if row[1]) for k in range(number)]
    if width is not None:
        most = min(most, _MOST_NAME)
        share = max(_LEAST_VALUE, (width - most) // number - 2)
        sizes = [min(size, share) for size in sizes]
    sizes = [min(size, _MOST_VALUE) for size in sizes]
    lines = []
    for name, values in rows:
        cells = [
            shortened(text, size).ljust(size) for text, size in zip(values, sizes, strict=False)
        ]
        lines.append("  ".join([shortened(name, most).ljust(most), *cells]).rstrip())
    return lines
