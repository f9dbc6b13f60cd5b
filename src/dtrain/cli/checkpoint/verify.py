"""`dtrain checkpoint verify`: whether every byte of checkpoints is what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dtrain.cli import completers
from dtrain.cli import options as shared
from dtrain.console import out

if TYPE_CHECKING:
    from dtrain.checkpoints.verifying import Verified


@click.command(
    "verify",
    cls=shared.Command,
    examples=(
        ("dtrain checkpoint verify", "All checkpoints of the newest run."),
        ("dtrain checkpoint verify digits-4f:200", "One checkpoint of another run."),
    ),
)
@click.argument("checkpoints", nargs=-1, shell_complete=completers.runs)
@shared.runs_option
@shared.json_option
def command(checkpoints: tuple[str, ...], runs: str, as_json: bool) -> int:
    """Verify every byte of CHECKPOINTS, on all cores.

    Each is RUN:STEP, RUN:best, a directory, or RUN for all of its checkpoints; without any, those
    of the newest run. Of a run at a URL, the files are downloaded. The exit code is 1 if any is
    damaged.
    """
    from dtrain.checkpoints.lookup import find_all
    from dtrain.checkpoints.verifying import verify

    found = [each for text in checkpoints or ("last",) for each in find_all(text, runs)]
    done = []
    for each in found:
        done.append(verify(each))
        if not as_json:
            click.echo("\n".join(lines(done[-1])))
    if as_json:
        shared.print_json([each.to_json() for each in done])
    return 0 if all(each.intact for each in done) else 1


def lines(done: Verified) -> list[str]:
    """Return the result for people."""
    from dtrain.words import size

    if not done.intact:
        head = f"{done.name}: {out.paint('damaged', 'red')}"
        return [head, *(f"  {each.message}  [{each.code}]" for each in done.damage)]
    rate = size(round(done.bytes / max(done.seconds, 1e-9)))
    took = f"{size(done.bytes)} in {done.seconds:.2f} s ({rate}/s)"
    return [f"{done.name}: {out.paint('intact', 'green')}, {took}"]
