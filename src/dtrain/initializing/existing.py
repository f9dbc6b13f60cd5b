"""What a command line, a batch script or a Lightning script says of a job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Existing:
    """A job, as far as it was read. What could not be carried over is in `left_out`."""

    name: str = ""
    job: dict[str, Any] = field(default_factory=dict)
    """Fields of job.yaml: a program with `script_args`, or a task with its sections."""
    launcher: str | None = None
    nodes: str | None = None
    """A number, or `min:max`."""
    procs: int | str | None = None
    """Processes per node: a number, or `gpu`, `cpu` or `auto`. None if nothing is said."""
    gpus: int | None = None
    batch_per_process: int | None = None
    """Samples per step of each process, from which `train.global_batch_size` is computed."""
    launch: dict[str, Any] = field(default_factory=dict)
    """Further fields of section `launch` of the profile."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the launcher."""
    left_out: list[str] = field(default_factory=list)
    """A sentence for each thing that was not carried over, with its place."""

    def leave_out(self, place: str, what: str, why: str) -> None:
        self.left_out.append(f"{place}: {what}: {why}")
