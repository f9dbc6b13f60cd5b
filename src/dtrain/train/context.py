"""The input and the result of a trainer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.task import Task

if TYPE_CHECKING:
    import torch

    from dtrain.train.tracing.tracer import Recorder


class StopFlag:
    """A request to stop at the next step boundary.

    `request` only sets attributes, so a signal handler may call it at any moment.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        """The reason for the request, in words; None if there is no request."""
        self.since = 0.0
        """When it came, by the monotonic clock."""

    def request(self, reason: str) -> None:
        if self.reason is None:
            self.since = time.monotonic()
            self.reason = reason


@dataclass(frozen=True)
class TrainContext:
    """Everything that a trainer needs. The process group is made before it and destroyed after."""

    spec: JobSpec
    run: RunDir
    ranks: RankInfo
    attempt: int
    task: Task
    device: torch.device
    local_devices: int = 1
    """The number of replicas of `dp`: GPUs, or on the CPU the requested number of processes."""
    stop: StopFlag = field(default_factory=StopFlag)
    recorder: Recorder | None = None
    """Records what each step does in a run of `dtrain verify`; the trainer passes it each step."""
    code_dir: Path = Path()
    """The directory of the job's files, or of a copy of them."""

    @property
    def shards_model(self) -> bool:
        """Return whether each process holds a part of the model."""
        return self.spec.strategy == "fsdp" and self.ranks.world_size > 1


@dataclass(frozen=True)
class TrainResult:
    """The result of a training, the same on every rank."""

    metrics: dict[str, float]
    """The metrics of the last evaluation; empty if there was none."""
    steps: int
    """The number of optimizer steps done, over all attempts."""
    seconds: float
    """The time in this process, from `run()` to the result."""
    stopped: str | None = None
    """The reason of the request that stopped training before its end; None if complete."""
    stopped_early: bool = False
    """Whether early stopping ended the training, which is then complete."""
    checkpoint: Path | None = None
    """The checkpoint of the last step."""
    parameters_sha256: str | None = None
    """The digest of the final parameters; None if training was stopped on request."""
