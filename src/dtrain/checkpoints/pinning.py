"""Pin checkpoints, so that retention keeps them."""

from __future__ import annotations

import time

from dtrain.checkpoints.lookup import Found, find
from dtrain.errors import UsageError
from dtrain.train.checkpoint.directory import CheckpointDirectory, is_step
from dtrain.train.checkpoint.retention import PIN


def pin(text: str, runs: str) -> str:
    """Pin the checkpoint that a user named, and return its name.

    Raises:
        UsageError: there is no such checkpoint, or it is in no run.
        OSError: the file system or the URL reported an error.
    """
    found, directory = _pinnable(text, runs)
    directory.mark(found.folder, PIN, {"time": time.time()})
    return found.name


def unpin(text: str, runs: str) -> str:
    """Unpin a checkpoint; as for `pin`."""
    found, directory = _pinnable(text, runs)
    directory.unmark(found.folder, PIN)
    return found.name


def _pinnable(text: str, runs: str) -> tuple[Found, CheckpointDirectory]:
    found = find(text, runs)
    if found.directory is None or not is_step(found.folder.name):
        raise UsageError(
            f"{found.name} is not the checkpoint of a step of a run, and nothing removes it",
            code="checkpoint.not-of-a-step",
        )
    return found, found.directory
