"""`dtrain clean`: remove what is no longer needed."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import click

from dtrain.cli import options as shared
from dtrain.console import out
from dtrain.errors import UsageError
from dtrain.run.lookup import local_directory

if TYPE_CHECKING:
    from dtrain.cleaning.finding import Found, Item


@click.command(
    "clean",
    cls=shared.Command,
    examples=(
        ("dtrain clean --dry-run", "Show leftovers, and checkpoints that runs do not keep."),
        ("dtrain clean --failed --older-than 7d", "Also failed runs that ended a week ago."),
        ("dtrain clean --older-than 90d --yes", "Also all old runs, without a question."),
    ),
)
@shared.option(shared.WHAT, "--failed", is_flag=True, help="Also whole runs that have failed.")
@shared.option(
    shared.WHAT,
    "--older-than",
    metavar="TIME",
    help="Also whole runs that ended more than, for example, 30d ago; with --failed, failed ones.",
)
@shared.runs_option
@shared.option(shared.WATCH, "--dry-run", "--dryrun", is_flag=True, help="Remove nothing.")
@shared.option(shared.WATCH, "-y", "--yes", is_flag=True, help="Remove without a question.")
@shared.json_option
def command(
    failed: bool, older_than: str | None, runs: str, dry_run: bool, yes: bool, as_json: bool
) -> int:
    """Show what is no longer needed, and remove it after a question.

    Without options, these are files that killed processes have left, and checkpoints that the runs
    do not keep. Whole runs go only with --failed or --older-than. A running run stays, and so does
    one with a pinned checkpoint.
    """
    from pathlib import Path

    from dtrain.cleaning.finding import find
    from dtrain.cleaning.removing import remove_all
    from dtrain.searching.index import entries
    from dtrain.searching.query import seconds_of

    age = None if older_than is None else seconds_of(older_than)
    if not (dry_run or yes) and (as_json or not sys.stdin.isatty()):
        text = "this would remove files, and cannot ask first; give --dry-run or --yes"
        raise UsageError(text, code="usage.not-confirmed")
    root = Path(local_directory(runs)).absolute()
    found = find(entries(root), root, failed=failed, older_than=age)
    if not as_json:
        click.echo("\n".join(_lines(found, out.width())))
    goes = bool(found.items) and not dry_run
    if goes and not yes:
        goes = click.confirm("Remove this?")
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that the run that is held is released
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    removed, problems = remove_all(found, root) if goes else ([], {})
    if as_json:
        shared.print_json(_as_json(found, removed, problems, dry_run=dry_run))
    elif goes:
        click.echo(f"removed: {_total(removed)}")
        for name, problem in problems.items():
            click.echo(f"not removed: {name}: {problem}", err=True)
    return 1 if problems else 0


def _lines(found: Found, width: int | None) -> list[str]:
    from dtrain.cli.checkpoint import table
    from dtrain.words import size

    items = found.items
    stays = [f"{name} stays: {reason}" for name, reason in found.stays.items()]
    if not items:
        return ["nothing to remove", *stays]
    rows = [(f"{each.run}/{each.name}".strip("/"), size(each.bytes), each.why) for each in items]
    widest = max(len(text) for _, text, _ in rows)
    cells = [(what, text.rjust(widest), why) for what, text, why in rows]
    lines = table.lines(("WHAT", "SIZE", "WHY"), cells, width, left=3)
    return [*lines, f"in total: {_total(items)}", *stays]


def _total(items: list[Item]) -> str:
    from dtrain.words import counted, size

    kinds = [each.kind for each in items]
    parts = [counted(kinds.count(kind), kind) for kind in ("run", "checkpoint", "leftover")]
    named = [part for part in parts if not part.startswith("0 ")]
    return f"{', '.join(named) or 'nothing'}, {size(sum(each.bytes for each in items))}"


def _as_json(
    found: Found, removed: list[Item], problems: dict[str, str], *, dry_run: bool
) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "dry_run": dry_run,
        "found": [asdict(each) for each in found.items],
        "removed": [asdict(each) for each in removed],
        "stays": found.stays,
        "problems": problems,
        "bytes": sum(each.bytes for each in removed),
    }
