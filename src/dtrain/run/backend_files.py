"""What a launch by Slurm or Ray keeps in its run's directory: logs, and word between its ends.

The launching side and the agents of a queued job may never run at the same time, so they leave
each other files.
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
    """How the first node's process of a batch job ended."""

    exit_code: int
    left: bool
    """Whether it was asked to leave."""


class SlurmFiles:
    """The folder `slurm/` of a run."""

    def __init__(self, run: RunDir) -> None:
        self.path = run.slurm
        self.script = self.path / "job.sbatch"
        self.array_script = self.path / "array.sbatch"
        """Of the first run of an array: what was submitted, and starts the script of each."""
        self.log = self.path / "job.log"
        """What the batch script and srun said."""

    def submitit_log(self, job_id: str) -> Path:
        """What srun said, as submitit names it, when submitit has submitted the job."""
        return self.path / f"{job_id}_0_log.out"

    def node_log(self, node_rank: int) -> Path:
        """What a node's process said, over all attempts."""
        return self.path / f"node-{node_rank}.log"

    def requeue(self, restarts: int | str) -> Path:
        """There when the job is to go on in another attempt; the batch script looks for it.

        Args:
            restarts: how often it was requeued before; a script of an earlier time must not
                take this for its own.
        """
        return self.path / f"requeue-{restarts}"

    def cancel(self, first: int) -> Path:
        """There when someone has cancelled the job that began with attempt `first`."""
        return self.path / f"cancel-{first}"

    def endpoint(self, attempt: int) -> Path:
        """Where the agents of an attempt meet."""
        return self.path / f"attempt-{attempt}-endpoint.json"

    def is_superseded(self, attempt: int) -> bool:
        """Whether the job has begun a later attempt: Slurm had taken this one for dead."""
        return self.endpoint(attempt + 1).exists()

    def end(self, attempt: int) -> Path:
        return self.path / f"attempt-{attempt}-end.json"

    def read_end(self, attempt: int) -> End | None:
        """What is in `end`; None while it runs, or when it was killed."""
        return files.read_as(End, self.end(attempt))

    def await_endpoint(self, attempt: int, timeout_s: float) -> dict[str, Any] | None:
        """What the head has written to `endpoint`; None when nothing comes in time."""

        def look() -> dict[str, Any] | None:
            os.listdir(self.path)  # NFS looks for a file that was missing only in a new listing
            return files.read_as(dict[str, Any], self.endpoint(attempt))

        return poll(look, timeout_s, longest_pause_s=_LONGEST_PAUSE_S)


class RayFiles:
    """The folder `ray/` of a run."""

    def __init__(self, run: RunDir) -> None:
        self.path = run.path / "ray"
        self.log = self.path / "driver.log"
        """What the driver, and Ray in it, said."""
        self.refusal = self.path / "refusal.json"

    def cancel(self, first: int) -> Path:
        """There when someone has cancelled the job that began with attempt `first`."""
        return self.path / f"cancel-{first}"

    def probe(self, attempt: int) -> Path:
        """A folder in which the driver and every node leave a file for the others to see."""
        return self.path / f"probe-{attempt}"

    def clear(self) -> None:
        """Forget what an earlier launch of the run has left."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in (self.refusal, self.log):
            path.unlink(missing_ok=True)
