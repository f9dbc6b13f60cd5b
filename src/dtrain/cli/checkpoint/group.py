"""`dtrain checkpoint`: the group of commands for the checkpoints of a run."""

from __future__ import annotations

import click

from dtrain.cli.lazy import LazyGroup
from dtrain.cli.options import Command

_HERE = "dtrain.cli.checkpoint"
COMMANDS = {
    "list": (f"{_HERE}.listing", "List the checkpoints of a run, and why each is kept."),
    "show": (f"{_HERE}.show", "Show what a checkpoint contains."),
    "verify": (f"{_HERE}.verify", "Verify every byte of checkpoints."),
    "diff": (f"{_HERE}.diff", "Show which parameters differ in two checkpoints, and by how much."),
    "export": (f"{_HERE}.export", "Write the tensors of a checkpoint into one file."),
    "prune": (f"{_HERE}.prune", "Remove the checkpoints that a run does not keep."),
    "pin": (f"{_HERE}.pin", "Keep a checkpoint until it is unpinned."),
    "unpin": (f"{_HERE}.unpin", "Keep a checkpoint no longer than others."),
}
_MEANT = {
    "check": "verify",
    "clean": "prune",
    "compare": "diff",
    "info": "show",
    "keep": "pin",
    "ls": "list",
    "remove": "prune",
    "rm": "prune",
    "save": "export",
}


class _Group(LazyGroup, Command):
    """A group whose `--help` has examples."""


@click.command(
    "checkpoint",
    cls=_Group,
    table=COMMANDS,
    meant=_MEANT,
    examples=(
        ("dtrain checkpoint list", "The checkpoints of the newest run."),
        ("dtrain checkpoint diff digits-4f:200 digits-4f:best", "Compare two checkpoints."),
    ),
)
def command() -> None:
    """List, verify, compare, export, remove or pin the checkpoints of a run.

    A checkpoint is named RUN:STEP, RUN:best or RUN (its newest), where RUN is an id, a unique
    prefix, or `last`; or by its directory.
    """
