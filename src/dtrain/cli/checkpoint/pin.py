"""`dtrain checkpoint pin`: keep a checkpoint until it is unpinned."""

from __future__ import annotations

import click

from dtrain.cli import options as shared


@click.command(
    "pin",
    cls=shared.Command,
    examples=(
        ("dtrain checkpoint pin", "Keep the newest checkpoint of the newest run."),
        ("dtrain checkpoint pin digits-4f:200", "Keep another one."),
    ),
)
@shared.checkpoint_argument
@shared.runs_option
def command(checkpoint: str, runs: str) -> None:
    """Keep CHECKPOINT (RUN:STEP, RUN, or a directory) until it is unpinned.

    Neither a training nor `dtrain checkpoint prune` removes it.
    """
    from dtrain.checkpoints.pinning import pin

    click.echo(f"{pin(checkpoint, runs)} is pinned")
