"""The run directory: every path in it, and how files are written there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from dtrain.errors import LaunchError, UsageError

ATTEMPT_VARIABLE = "DTRAIN_ATTEMPT"


class RunDir:
    """One run's directory. Both planes meet here; nobody else spells a path in it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def id(self) -> str:
        """The run's id: the directory's name, as `digits-k3v9ab`."""
        return self.path.name

    # -- of the run ------------------------------------------------------------------------

    @property
    def job(self) -> Path:
        return self.path / "job.yaml"

    @property
    def resolved(self) -> Path:
        """The job with every default and override filled in."""
        return self.path / "resolved.yaml"

    @property
    def plan(self) -> Path:
        """The launch plan, secrets by name only."""
        return self.path / "plan.json"

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
    def url_file(self) -> Path:
        """Holds `url`."""
        return self.path / ".url"

    @property
    def url(self) -> str | None:
        """Where this directory has its lasting copy; None for a run that is kept in it alone."""
        try:
            return self.url_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    @property
    def beat(self) -> Path:
        """Of a run at a URL: when its driver last said that it lives."""
        return self.path / "alive.json"

    @property
    def unsynced(self) -> Path:
        """There while this directory is ahead of its copy at the URL."""
        return self.path / ".ahead"

    @property
    def sync_index(self) -> Path:
        """What is known of both copies, see `dtrain.run.remote.mirror`."""
        return self.path / ".mirror.json"

    @property
    def code(self) -> Path:
        """The code snapshot: git SHA, patch, untracked files."""
        return self.path / "code"

    def code_tree(self, attempt: int) -> Path:
        """The copy of the code that an attempt has, and those that its job makes by itself."""
        return self.code / f"tree-{attempt}"

    def code_tar(self, attempt: int) -> Path:
        """`code_tree` as one file."""
        return self.code / f"tree-{attempt}.tar"

    def job_code(self, attempt: int) -> Path:
        """A link to the job's folder in `code_tree`, for workers to import from."""
        return self.code / f"job-{attempt}"

    @property
    def metrics(self) -> Path:
        """Metrics, one JSON object a line, written by rank 0."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """What happened to the run, one JSON object a line: started, saved, restarted, ended."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def slurm(self) -> Path:
        """What belongs to the batch job, see `dtrain.run.backend_files`."""
        return self.path / "slurm"

    @property
    def recording(self) -> Path:
        """What each step did, in a run of `dtrain verify`."""
        return self.path / "recording"

    @property
    def predictions(self) -> Path:
        """What the trained model predicts; row i of each array is sample i of the eval data."""
        return self.path / "predictions.npz"

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
                "choose another place with --runs DIR"
            ) from error


def list_runs(root: str | os.PathLike[str]) -> list[RunDir]:
    """Every run below `root`, oldest first."""
    folder = Path(root).absolute()  # also to say that the current folder is gone
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if (path / "resolved.yaml").is_file()]
    return [RunDir(path) for path in sorted(found, key=lambda path: path.stat().st_ctime_ns)]
