"""The run directory: every path in it, and how files are written there."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from dtrain.errors import LaunchError, UsageError

ATTEMPT_VARIABLE = "DTRAIN_ATTEMPT"


class RunDir:
    """One run's directory. Both planes meet here; nobody else spells a path in it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.job = self.path / "job.yaml"
        self.resolved = self.path / "resolved.yaml"
        """The job with every default and override filled in."""
        self.plan = self.path / "plan.json"
        """The launch plan, secrets by name only."""
        self.url_file = self.path / ".url"
        """Holds `url`."""
        self.beat = self.path / "alive.json"
        """Of a run at a URL: when its driver last said that it lives."""
        self.unsynced = self.path / ".ahead"
        """There while this directory is ahead of its copy at the URL."""
        self.sync_index = self.path / ".mirror.json"
        """What is known of both copies, see `dtrain.run.remote.mirror`."""
        self.code = self.path / "code"
        """The code snapshot: git SHA, patch, untracked files."""
        self.metrics = self.path / "metrics.jsonl"
        """Metrics, one JSON object a line, written by rank 0."""
        self.events = self.path / "events.jsonl"
        """What happened to the run, one JSON object a line: started, saved, restarted, ended."""
        self.checkpoints = self.path / "checkpoints"
        self.slurm = self.path / "slurm"
        """What belongs to the batch job, see `dtrain.run.backend_files`."""
        self.recording = self.path / "recording"
        """What each step did, in a run of `dtrain verify`."""
        self.predictions = self.path / "predictions.npz"
        """What the trained model predicts; row i of each array is sample i of the eval data."""

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def id(self) -> str:
        """The run's id: the directory's name, as `digits-k3v9ab`."""
        return self.path.name

    # -- of the run ------------------------------------------------------------------------

    def secret_env(self, attempt: int) -> Path:
        """Values of secret variables: readable by the owner only, removed at the end.

        Written when an attempt is launched; those that a job makes by itself have them too.
        """
        newest = max((n for n in self._secret_envs() if n <= attempt), default=attempt)
        return self.path / f".env-{newest}.json"

    def remove_secrets(self, attempt: int) -> None:
        """Remove the values of secret variables of an attempt that has ended, and of those before.

        Those of a later attempt, which may have begun, stay.
        """
        for number in self._secret_envs():
            if number <= attempt:
                (self.path / f".env-{number}.json").unlink(missing_ok=True)

    def _secret_envs(self) -> list[int]:
        names = (path.stem.removeprefix(".env-") for path in self.path.glob(".env-*.json"))
        return [int(name) for name in names if name.isdecimal()]

    @property
    def url(self) -> str | None:
        """Where this directory has its lasting copy; None for a run that is kept in it alone."""
        try:
            return self.url_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def code_tree(self, attempt: int) -> Path:
        """The copy of the code that an attempt has, and those that its job makes by itself."""
        return self.code / f"tree-{attempt}"

    def code_tar(self, attempt: int) -> Path:
        """`code_tree` as one file."""
        return self.code / f"tree-{attempt}.tar"

    def job_code(self, attempt: int) -> Path:
        """A link to the job's folder in `code_tree`, for workers to import from."""
        return self.code / f"job-{attempt}"

    def predictions_part(self, rank: int) -> Path:
        """One rank's predictions, until rank 0 has joined all of them."""
        return self.path / ".predictions" / f"rank-{rank:05d}"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint taken after optimizer step `step`."""
        return self.checkpoints / f"step-{step:08d}"

    # -- of an attempt ---------------------------------------------------------------------

    def attempt(self, attempt: int) -> Path:
        """Everything that belongs to one try of the run."""
        return self.path / "attempts" / str(attempt)

    def resolved_of(self, attempt: int) -> Path:
        """The job as one attempt had it; `resolved` is that of the newest."""
        return self.attempt(attempt) / "resolved.yaml"

    def handle(self, attempt: int) -> Path:
        """Who drives an attempt, see `dtrain.run.attempts`."""
        return self.attempt(attempt) / "handle.json"

    def attempts(self) -> list[int]:
        """The attempts made so far, in order."""
        folder = self.path / "attempts"
        if not folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())

    def node(self, attempt: int, node_rank: int) -> Path:
        return self.attempt(attempt) / f"node-{node_rank}"

    def agent_log(self, attempt: int, node_rank: int) -> Path:
        return self.node(attempt, node_rank) / "agent.log"

    def host_log(self, attempt: int, node_rank: int) -> Path:
        """What the fork server of a host says, by the last node that it serves."""
        return self.node(attempt, node_rank) / "host.log"

    def driver_log(self, attempt: int, node_ranks: Sequence[int]) -> Path:
        """What the driver process of a launch from Python says, which serves these nodes here."""
        return self.node(attempt, min(node_ranks, default=0)) / "driver.log"

    def rank_log(self, attempt: int, node_rank: int, rank: int) -> Path:
        """stdout and stderr of one worker, over all restarts of the attempt."""
        return self.node(attempt, node_rank) / f"rank-{rank:05d}.log"

    def rank_logs(self, attempt: int) -> dict[int, tuple[int, Path]]:
        """rank → (node_rank, log path) for every worker log that exists."""
        found: dict[int, tuple[int, Path]] = {}
        for path in sorted(self.attempt(attempt).glob("node-*/rank-*.log")):
            node_rank = path.parent.name.removeprefix("node-")
            rank = path.stem.removeprefix("rank-")
            if node_rank.isdecimal() and rank.isdecimal() and path.is_file():
                found[int(rank)] = (int(node_rank), path)
        return found

    def token(self, attempt: int) -> Path:
        """What the agents of an attempt prove to one another: readable by the owner only."""
        return self.attempt(attempt) / ".token"

    def failures(self, attempt: int) -> Path:
        """Where workers and agents leave their failure records."""
        return self.attempt(attempt) / "failures"

    def failure(self, attempt: int, rank: int) -> Path:
        return self.failures(attempt) / f"rank-{rank:05d}.json"

    def collectives(self, attempt: int, restart: int) -> Path:
        """Folder of the last collectives of every rank that failed in one restart."""
        return self.attempt(attempt) / "collectives" / f"restart-{restart}"

    def node_failure(self, attempt: int, node_rank: int) -> Path:
        """The failure record of a whole node, as one that never joined."""
        return self.failures(attempt) / f"node-{node_rank}.json"

    def result(self, attempt: int) -> Path:
        """How the attempt ended, written by the launcher's side once nothing runs any more."""
        return self.attempt(attempt) / "result.json"

    def verdict(self, attempt: int) -> Path:
        """Who failed first and why, once the attempt has ended."""
        return self.attempt(attempt) / "verdict.json"

    # -- making and finding ----------------------------------------------------------------

    def create(self) -> None:
        """Make the directory and what is always in it.

        Raises:
            LaunchError: it cannot be made or written to; says which folder and why.
        """
        try:
            (self.path / "attempts").mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            kind = UsageError if error.errno == errno.ENAMETOOLONG else LaunchError
            raise kind(
                f"cannot write the run directory {self.path}: {error.strerror}; "
                "choose another place with --runs DIR",
                code="launch.not-writable",
            ) from error


def list_runs(root: str | os.PathLike[str]) -> list[RunDir]:
    """Every run below `root`, oldest first."""
    folder = Path(root).absolute()  # also to say that the current folder is gone
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if (path / "resolved.yaml").is_file()]
    return [RunDir(path) for path in sorted(found, key=lambda path: path.stat().st_ctime_ns)]
