"""The files of a launch by Slurm or Ray in the run directory: logs and messages.

The launching side and the agents of a queued job may never run at the same time, so they exchange
files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.run import files
from dtrain.run.rundir import RunDir
from dtrain.waiting import poll

_LONGEST_PAUSE_S = 2.0  # 1,000 nodes may wait for a head whose prolog takes minutes


@dataclass(frozen=True)
class End:
    """The end of the first node's process of a batch job."""

    exit_code: int
    stopped: bool
    """True when it was asked to stop."""


class SlurmFiles:
    """The directory `slurm/` of a run."""

    def __init__(self, run: RunDir) -> None:
        self.path = run.slurm
        self.script = self.path / "job.sbatch"
        self.array_script = self.path / "array.sbatch"
        """The script submitted for the first run of an array. It starts the script of each run."""
        self.log = self.path / "job.log"
        """The output of the batch script and srun."""

    def submitit_log(self, job_id: str) -> Path:
        """Return the path of srun's output, as submitit names it for a job that it submitted."""
        return self.path / f"{job_id}_0_log.out"

    def node_log(self, node_rank: int) -> Path:
        """Return the path of the output of a node's process, over all attempts."""
        return self.path / f"node-{node_rank}.log"

    def requeue(self, restarts: int | str) -> Path:
        """Return the file that exists when the job must continue in another attempt.

        The batch script looks for it.

        Args:
            restarts: the number of earlier requeues. A script of an earlier requeue must not use a
                later one's file.
        """
        return self.path / f"requeue-{restarts}"

    def cancel(self, first: int) -> Path:
        """Return the file that exists when a user has cancelled the job of attempt `first`."""
        return self.path / f"cancel-{first}"

    def endpoint(self, attempt: int) -> Path:
        """Return the path of the file with the address where the agents of an attempt meet."""
        return self.path / f"attempt-{attempt}-endpoint.json"

    def is_superseded(self, attempt: int) -> bool:
        """Return whether the job has begun a later attempt, as Slurm took this one for dead."""
        return self.endpoint(attempt + 1).exists()

    def end(self, attempt: int) -> Path:
        return self.path / f"attempt-{attempt}-end.json"

    def read_end(self, attempt: int) -> End | None:
        """Return the content of `end`. None while the process runs, or when it was killed."""
        return files.read_as(End, self.end(attempt))

    def await_endpoint(self, attempt: int, timeout_s: float) -> dict[str, Any] | None:
        """Return what the head has written to `endpoint`. None when nothing arrives in time."""

        def read() -> dict[str, Any] | None:
            os.listdir(self.path)  # NFS looks again for a missing file only in a new listing
            return files.read_as(dict[str, Any], self.endpoint(attempt))

        return poll(read, timeout_s, longest_pause_s=_LONGEST_PAUSE_S)


class RayFiles:
    """The directory `ray/` of a run."""

    def __init__(self, run: RunDir) -> None:
        self.path = run.path / "ray"
        self.log = self.path / "driver.log"
        """The output of the driver, which includes Ray's."""
        self.refusal = self.path / "refusal.json"

    def cancel(self, first: int) -> Path:
        """Return the file that exists when a user has cancelled the job of attempt `first`."""
        return self.path / f"cancel-{first}"

    def probe(self, attempt: int) -> Path:
        """Return the directory where driver and nodes write a file for the others to see."""
        return self.path / f"probe-{attempt}"

    def clear(self) -> None:
        """Remove the files of an earlier launch of the run."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in (self.refusal, self.log):
            path.unlink(missing_ok=True)
