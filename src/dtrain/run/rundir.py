"""The run directory: every path in it, and how files are written there."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from dtrain.errors import LaunchError, UsageError

ATTEMPT_VARIABLE = "DTRAIN_ATTEMPT"
RUN_VARIABLE = "DTRAIN_RUN_DIR"
"""The variable in a script's environment that names its run directory."""


class _Inside:
    """A path in a run directory. It is made when it is used: thousands of runs have many."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: RunDir, _kind: type[RunDir]) -> Path:
        return run.path / self._name


class RunDir:
    """One run's directory. Both planes meet here, and no other module spells a path in it."""

    job = _Inside("job.yaml")
    resolved = _Inside("resolved.yaml")
    """The job with every default and override filled in."""
    plan = _Inside("plan.json")
    """The launch plan, with secrets by name only."""
    url_file = _Inside(".url")
    """The file that holds `url`."""
    heartbeat = _Inside("alive.json")
    """The newest heartbeat of the driver, for a run at a URL."""
    unsynced = _Inside(".ahead")
    """A file that exists while this directory is ahead of its copy at the URL."""
    sync_index = _Inside(".mirror.json")
    """The known state of both copies, see `dtrain.run.remote.mirror`."""
    code = _Inside("code")
    """The code snapshot: git SHA, patch, untracked files."""
    metrics = _Inside("metrics.jsonl")
    """Metrics, one JSON object per line, written by rank 0."""
    events = _Inside("events.jsonl")
    """Events of the run, one JSON object per line: started, saved, restarted, ended."""
    checkpoints = _Inside("checkpoints")
    slurm = _Inside("slurm")
    """The files of the batch job, see `dtrain.run.backend_files`."""
    recording = _Inside("recording")
    """A record of each step, in a run of `dtrain verify`."""
    bench = _Inside("bench.json")
    """What a run of `dtrain bench` has measured, see `dtrain.bench.results`."""
    predictions = _Inside("predictions.npz")
    """Predictions of the trained model. Row i of each array is sample i of the eval data."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def id(self) -> str:
        """Return the run's id: the directory's name, for example `digits-k3v9ab`."""
        return self.path.name

    # -- the run ---------------------------------------------------------------------------

    def secret_env(self, attempt: int) -> Path:
        """Return the file with values of secret variables.

        Only the owner can read it, and it is removed at the end. It is written when an attempt is
        launched. The attempts that a job makes automatically use it too.
        """
        newest = max((n for n in self._secret_envs() if n <= attempt), default=attempt)
        return self.path / f".env-{newest}.json"

    def remove_secrets(self, attempt: int) -> None:
        """Remove the values of secret variables of an attempt that has ended, and of earlier ones.

        Those of a later attempt, which may have begun, remain.
        """
        for number in self._secret_envs():
            if number <= attempt:
                (self.path / f".env-{number}.json").unlink(missing_ok=True)

    def _secret_envs(self) -> list[int]:
        names = (path.stem.removeprefix(".env-") for path in self.path.glob(".env-*.json"))
        return [int(name) for name in names if name.isdecimal()]

    @property
    def url(self) -> str | None:
        """Return where this directory has its permanent copy. None for a run without a copy."""
        try:
            return self.url_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def code_tree(self, attempt: int) -> Path:
        """Return the copy of an attempt's code, also used by attempts that its job makes."""
        return self.code / f"tree-{attempt}"

    def code_tar(self, attempt: int) -> Path:
        """Return the path of `code_tree` as one file."""
        return self.code / f"tree-{attempt}.tar"

    def job_code(self, attempt: int) -> Path:
        """Return the link to the job's directory in `code_tree`, for workers to import from."""
        return self.code / f"job-{attempt}"

    def predictions_part(self, rank: int) -> Path:
        """Return the path of one rank's predictions, used until rank 0 has joined all of them."""
        return self.path / ".predictions" / f"rank-{rank:05d}"

    def checkpoint(self, step: int) -> Path:
        """Return the path of the checkpoint taken after optimizer step `step`."""
        return self.checkpoints / f"step-{step:08d}"

    # -- an attempt ------------------------------------------------------------------------

    def attempt(self, attempt: int) -> Path:
        """Return the directory of everything that belongs to one attempt of the run."""
        return self.path / "attempts" / str(attempt)

    def resolved_of(self, attempt: int) -> Path:
        """Return the path of one attempt's job. `resolved` is that of the newest attempt."""
        return self.attempt(attempt) / "resolved.yaml"

    def handle(self, attempt: int) -> Path:
        """Return the file that names the driver of an attempt, see `dtrain.run.attempts`."""
        return self.attempt(attempt) / "handle.json"

    def attempts(self) -> list[int]:
        """Return the numbers of the attempts made so far, sorted."""
        folder = self.path / "attempts"
        if not folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())

    def node(self, attempt: int, node_rank: int) -> Path:
        return self.attempt(attempt) / f"node-{node_rank}"

    def agent_log(self, attempt: int, node_rank: int) -> Path:
        return self.node(attempt, node_rank) / "agent.log"

    def host_log(self, attempt: int, node_rank: int) -> Path:
        """Return the log of a host's fork server, filed under the last node that it serves."""
        return self.node(attempt, node_rank) / "host.log"

    def driver_log(self, attempt: int, node_ranks: Sequence[int]) -> Path:
        """Return the log of a driver process of a launch from Python that serves these nodes."""
        return self.node(attempt, min(node_ranks, default=0)) / "driver.log"

    def rank_log(self, attempt: int, node_rank: int, rank: int) -> Path:
        """Return the log with stdout and stderr of one worker, over all restarts of the attempt."""
        return self.node(attempt, node_rank) / f"rank-{rank:05d}.log"

    def phases(self, attempt: int, node_rank: int, rank: int) -> Path:
        """Return the record of one rank's time in each phase, see `dtrain.run.phases`."""
        return self.node(attempt, node_rank) / f"rank-{rank:05d}.phases.jsonl"

    def step_profile(self, attempt: int, node_rank: int, rank: int) -> Path:
        """Return the summary of what one rank recorded, see `dtrain.run.step_profile`."""
        return self.node(attempt, node_rank) / f"rank-{rank:05d}.profile.json"

    def trace(self, attempt: int, node_rank: int, rank: int) -> Path:
        """Return the trace of torch.profiler of one rank."""
        return self.node(attempt, node_rank) / f"rank-{rank:05d}.trace.json.gz"

    def memory_snapshot(self, attempt: int, node_rank: int, rank: int) -> Path:
        """Return torch's record of the memory of one rank's GPU."""
        return self.node(attempt, node_rank) / f"rank-{rank:05d}.memory.pickle"

    def usage(self, attempt: int, node_rank: int) -> Path:
        """Return the record of what the ranks of a node use, see `dtrain.node.usage`."""
        return self.node(attempt, node_rank) / "usage.jsonl"

    def rank_logs(self, attempt: int) -> dict[int, tuple[int, Path]]:
        """Return rank → (node_rank, log path) for every worker log that exists."""
        found: dict[int, tuple[int, Path]] = {}
        for path in sorted(self.attempt(attempt).glob("node-*/rank-*.log")):
            node_rank = path.parent.name.removeprefix("node-")
            rank = path.stem.removeprefix("rank-")
            if node_rank.isdecimal() and rank.isdecimal() and path.is_file():
                found[int(rank)] = (int(node_rank), path)
        return found

    def token(self, attempt: int) -> Path:
        """Return the file with the secret of an attempt's agents. Only the owner can read it."""
        return self.attempt(attempt) / ".token"

    def failures(self, attempt: int) -> Path:
        """Return the directory where workers and agents write their failure records."""
        return self.attempt(attempt) / "failures"

    def failure(self, attempt: int, rank: int) -> Path:
        return self.failures(attempt) / f"rank-{rank:05d}.json"

    def error_file(self, attempt: int, restart: int, rank: int) -> Path:
        """Return the file in which a rank's program may report its error, as under torchrun."""
        return self.attempt(attempt) / "errors" / f"restart-{restart}" / f"rank-{rank:05d}.json"

    def collectives(self, attempt: int, restart: int) -> Path:
        """Return the directory of the last collectives of every rank that failed in one restart."""
        return self.attempt(attempt) / "collectives" / f"restart-{restart}"

    def node_failure(self, attempt: int, node_rank: int) -> Path:
        """Return the failure record of a whole node, for example one that never joined."""
        return self.failures(attempt) / f"node-{node_rank}.json"

    def result(self, attempt: int) -> Path:
        """Return the file with the attempt's result, which the launching side writes last."""
        return self.attempt(attempt) / "result.json"

    def verdict(self, attempt: int) -> Path:
        """Return the file that names the rank that failed first, and why, after the end."""
        return self.attempt(attempt) / "verdict.json"

    # -- making and finding ----------------------------------------------------------------

    def create(self) -> None:
        """Make the directory and the files that it always has.

        Raises:
            LaunchError: it cannot be made or written to. The error gives path and reason.
        """
        try:
            (self.path / "attempts").mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            kind = UsageError if error.errno == errno.ENAMETOOLONG else LaunchError
            raise kind(
                f"cannot write the run directory {self.path}: {error.strerror}; "
                "choose another directory with --runs DIR",
                code="launch.not-writable",
            ) from error


def list_runs(root: str | os.PathLike[str]) -> list[RunDir]:
    """Return every run below `root`, the one that was started last at the end."""
    folder = Path(root).absolute()  # this also detects that the current directory is gone
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found: list[tuple[int, str]] = []
    for name in names:
        with contextlib.suppress(OSError):
            job = os.stat(f"{folder}/{name}/resolved.yaml")  # written again by each attempt
            if stat.S_ISREG(job.st_mode):
                found.append((job.st_mtime_ns, name))
    return [RunDir(folder / name) for _, name in sorted(found)]
