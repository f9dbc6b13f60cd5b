"""What a trainer is given, and what it gives back."""

from __future__ import annotations

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
    """A request to leave at the next step boundary.

    `request` only sets an attribute, so a signal handler may call it at any moment.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why, in words; None while nobody has asked."""

    def request(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason


@dataclass(frozen=True)
class TrainContext:
    """Everything a trainer needs; the process group is up before and taken down after."""

    spec: JobSpec
    run: RunDir
    ranks: RankInfo
    attempt: int
    task: Task
    device: torch.device
    local_devices: int = 1
    """Replicas of `dp`: GPUs, or as many as the processes asked for on the CPU."""
    stop: StopFlag = field(default_factory=StopFlag)
    recorder: Recorder | None = None
    """Writes what each step does, in a run of `dtrain verify`; a trainer tells it of each."""
    code_dir: Path = Path()
    """Where the job's files are, or a copy of them."""

    @property
    def shards_model(self) -> bool:
        """Whether each process holds a part of the model."""
        return self.spec.strategy == "fsdp" and self.ranks.world_size > 1


@dataclass(frozen=True)
class TrainResult:
    """How a training ended; the same on every rank."""

    metrics: dict[str, float]
    """Of the last evaluation; empty when there was none."""
    steps: int
    """Optimizer steps done, over all attempts."""
    seconds: float
    """Of this process, from `run()` to here."""
    stopped: str | None = None
    """Why training left before its end, when it was asked to; None when it is complete."""
    stopped_early: bool = False
    """Whether early stopping ended it; it is complete then."""
    checkpoint: Path | None = None
    """The checkpoint of the last step."""
    parameters_sha256: str | None = None
    """Digest of the final parameters; None when training was asked to leave."""
