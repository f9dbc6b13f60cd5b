"""`dtrain checkpoint diff`: which parameters differ in two checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dtrain.cli import completers
from dtrain.cli import options as shared
from dtrain.console import out

if TYPE_CHECKING:
    from dtrain.checkpoints.differences import Difference, Differences

_HEADS = ("TENSOR", "DIFFERENT", "OF", "LARGEST", "RELATIVE", "NAN")


@click.command(
    "diff",
    cls=shared.Command,
    examples=(
        ("dtrain checkpoint diff digits-4f:100 digits-4f:200", "Compare two steps."),
        ("dtrain checkpoint diff --all run-a run-b", "Compare the whole states of two runs."),
    ),
)
@click.argument("one", shell_complete=completers.runs)
@click.argument("other", shell_complete=completers.runs)
@shared.option(
    shared.WHAT,
    "--all",
    "everything",
    is_flag=True,
    help="Compare the whole state, not only the model.",
)
@shared.runs_option
@shared.json_option
def command(one: str, other: str, everything: bool, runs: str, as_json: bool) -> int:
    """Show which parameters and buffers differ in checkpoints ONE and OTHER, and by how much.

    Each is RUN:STEP, RUN:best, RUN (its newest), or a directory. They may have been saved under
    different strategies, by different numbers of processes. The exit code is 1 if they differ.
    """
    from dataclasses import asdict

    from dtrain.checkpoints.contents import opened
    from dtrain.checkpoints.differences import compare
    from dtrain.checkpoints.lookup import find

    found = [find(text, runs) for text in (one, other)]
    with opened(found[0]) as first, opened(found[1]) as second:
        result = compare(first, second, everything=everything)
    if as_json:
        shared.print_json({"are_same": result.are_same, **asdict(result)})
    else:
        click.echo("\n".join(_lines(result, [each.name for each in found])))
    return 0 if result.are_same else 1


def _lines(result: Differences, names: list[str]) -> list[str]:
    from dtrain.cli.checkpoint import table
    from dtrain.words import counted

    lines: list[str] = []
    for name, only in zip(names, result.only, strict=True):
        lines += [f"only in {name}: {each}" for each in only]
    for name, (one, other) in result.other_kind.items():
        lines.append(f"other type or shape: {name}: {one} in {names[0]}, {other} in {names[1]}")
    lines += [f"other value: {name}" for name in result.values]
    if result.tensors:
        lines += table.lines(_HEADS, [_cells(each) for each in result.tensors], out.width())
    return [*lines, f"the same: {counted(result.same, 'tensor')}"]


def _cells(each: Difference) -> tuple[str, ...]:
    nan = f"{each.nan[0]}, {each.nan[1]}" if any(each.nan) else "-"
    numbers = (f"{each.different}", f"{each.elements}", f"{each.largest:.3g}")
    return (each.name, *numbers, f"{each.relative:.2g}", nan)
