"""Remove checkpoints that a run does not keep, but never the last one that is intact."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dtrain.checkpoints.lookup import Found, of_run, retention_of
from dtrain.checkpoints.verifying import Verified, verify
from dtrain.errors import CheckpointError, UsageError
from dtrain.launchers import status
from dtrain.run.attempts import Handle, Held
from dtrain.run.rundir import RunDir
from dtrain.train.checkpoint.directory import CheckpointDirectory
from dtrain.train.checkpoint.retention import Retention

INTACT = "the newest intact one"


@dataclass
class Pruned:
    """What was removed, and what stays."""

    kept: dict[str, str]
    """The names of those that stay, each with the reason."""
    removed: dict[str, int] = field(default_factory=dict)
    """The names of those that were removed, each with the bytes that became free."""
    verified: dict[str, Verified] = field(default_factory=dict)
    """The result for each that was verified."""


def prune(
    run: RunDir, keep: int | None = None, *, dry_run: bool = False, is_held: bool = False
) -> Pruned:
    """Remove the checkpoints of steps that retention does not keep.

    Args:
        run: the run.
        keep: how many of the newest stay. None means as many as the job says.
        dry_run: whether to remove nothing.
        is_held: whether this process holds the run.

    Raises:
        Held: the run is running.
        UsageError: it is a script's, and `keep` is None.
        CheckpointError: no checkpoint is intact. Nothing was removed.
        OSError: the file system or the URL reported an error.
    """
    if not is_held and status.state_of(run)[0] == "running":
        raise Held(run, Handle.read(run))
    retention = retention_of(run)
    if retention is None and keep is None:
        raise UsageError(
            f"run {run.id} is of a script, which decides how many checkpoints it keeps; give "
            "--keep N",
            code="checkpoint.keep-unknown",
        )
    retention = retention or Retention(1)
    if keep is not None:
        retention = replace(retention, newest=keep)
    directory = of_run(run, retention)
    names = [folder.name for folder in directory.newest_first()]
    done = Pruned(retention.kept(names, directory.marks()))
    _keep_an_intact_one(directory, names, done)
    for name in (each for each in names if each not in done.kept):
        done.removed[name] = directory.occupied(name)
        if not dry_run:
            directory.remove([name])
    return done


def _keep_an_intact_one(directory: CheckpointDirectory, names: list[str], done: Pruned) -> None:
    """Verify those that stay. If none is intact, let the newest intact one stay too."""
    for name in (each for each in names if each in done.kept):
        done.verified[name] = verify(Found(name, directory.run.checkpoints / name, directory))
    others = iter([each for each in names if each not in done.kept])
    while names and not any(each.intact for each in done.verified.values()):
        other = next(others, None)
        if other is None:
            raise CheckpointError(
                f"none of the {len(names)} checkpoints of run {directory.run.id} is intact, so "
                "none is removed; `dtrain checkpoint verify` shows the damage",
                code="checkpoint.none-intact",
            )
        found = Found(other, directory.run.checkpoints / other, directory)
        done.verified[other] = verify(found)
        if done.verified[other].intact:
            done.kept[other] = INTACT
