"""Find a checkpoint by the name that a user gives: RUN:STEP, RUN:best, RUN, or a directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import CheckpointError, UsageError, quoted
from dtrain.job.load import read_job
from dtrain.run import lookup, manifest
from dtrain.run.events import accepted_job
from dtrain.run.rundir import RunDir
from dtrain.train.checkpoint.directory import CheckpointDirectory, is_step
from dtrain.train.checkpoint.retention import Retention
from dtrain.words import numbered

BEST = "best"


@dataclass(frozen=True)
class Found:
    """A checkpoint that a user named."""

    name: str
    """The name for people, for example `digits-k3v9ab:20`."""
    folder: Path
    directory: CheckpointDirectory | None
    """The checkpoints of its run. None for a directory that is in no run."""

    def fetch(self) -> Path:
        """Return its directory, after a download if it is at a URL.

        Raises:
            CheckpointError: it is not complete. The error names the checkpoint.
        """
        if self.directory is not None:
            try:
                self.directory.fetch(self.folder)
            except CheckpointError as error:
                raise self.named(error) from None
        return self.folder

    def named(self, error: CheckpointError) -> CheckpointError:
        """Return an error with the name of this checkpoint."""
        return CheckpointError(f"checkpoint {self.name}: {error}", code=error.code)


def of_run(run: RunDir, retention: Retention | None = None) -> CheckpointDirectory:
    return CheckpointDirectory(run, retention or Retention(1), patient=False)


def retention_of(run: RunDir) -> Retention | None:
    """Return which checkpoints a run keeps. None for a script, which decides that itself."""
    spec = read_job(accepted_job(run))
    return Retention.of(spec.checkpoint) if spec.task else None


def find(text: str, runs: str) -> Found:
    """Return the checkpoint that a user named; for a run, that is its newest.

    Args:
        text: the name that the user wrote.
        runs: the directory or URL of all runs.

    Raises:
        RunNotFound: there is no such run.
        UsageError: the run has no such checkpoint. The error lists those that it has.
    """
    return find_all(text, runs)[0]


def find_all(text: str, runs: str) -> list[Found]:
    """Return the checkpoint that a user named; for a run, all: the newest first, then `best`."""
    path = Path(text)
    if _is_checkpoint(path):
        return [_at(path.absolute())]
    name, colon, which = text.rpartition(":")
    if not colon or (path / "resolved.yaml").is_file():
        name, colon, which = text, "", ""
    directory = of_run(lookup.find(name, runs))
    run_id = directory.run.id
    names = names_in(directory)
    if not names:
        raise UsageError(
            f"run {run_id} has no checkpoint; `checkpoint:` in job.yaml sets when one is saved",
            code="checkpoint.none-saved",
        )
    wanted = [each for each in names if not colon or _short(each) == _short(which)]
    if not wanted:
        in_order = sorted(names, key=lambda each: (each == BEST, each))
        known = numbered("checkpoint", map(_short, in_order))
        raise UsageError(
            f"run {run_id} has no checkpoint {quoted(which)}; it has {known}",
            code="checkpoint.not-found",
        )
    folder = directory.run.checkpoints
    return [Found(f"{run_id}:{_short(each)}", folder / each, directory) for each in wanted]


def names_in(directory: CheckpointDirectory) -> list[str]:
    """Return the names of a run's checkpoints: of steps, the newest first, then `best`."""
    steps = [each.name for each in directory.newest_first()]
    return [*steps, BEST] if directory.exists(BEST) else steps


def _is_checkpoint(path: Path) -> bool:
    """Return whether it is the directory of a checkpoint, which may be damaged."""
    if not path.name or not path.is_dir():
        return False
    return is_step(path.name) or (path / manifest.NAME).exists()


def _at(folder: Path) -> Found:
    run = RunDir(folder.parent.parent)
    if folder.parent != run.checkpoints or not run.resolved.is_file():
        return Found(str(folder), folder, None)
    return Found(f"{run.id}:{_short(folder.name)}", folder, of_run(run))


def _short(name: str) -> str:
    """Return the number of a step as people write it, for example of `step-00000020`."""
    text = name.removeprefix("step-")
    return str(int(text)) if text.isascii() and text.isdecimal() else text
