"""`dtrain checkpoint unpin`: keep a checkpoint no longer than others."""

from __future__ import annotations

import click

from dtrain.cli import options as shared


@click.command(
    "unpin",
    cls=shared.Command,
    examples=(
        ("dtrain checkpoint unpin", "Unpin the newest checkpoint of the newest run."),
        ("dtrain checkpoint unpin digits-4f:200", "Unpin another one."),
    ),
)
@shared.checkpoint_argument
@shared.runs_option
def command(checkpoint: str, runs: str) -> None:
    """Keep CHECKPOINT (RUN:STEP, RUN, or a directory) no longer than others.

    It is removed when a newer one is saved, if it is not one of the newest or the best.
    """
    from dtrain.checkpoints.pinning import unpin

    click.echo(f"{unpin(checkpoint, runs)} is not pinned")
