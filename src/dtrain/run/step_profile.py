"""What torch.profiler recorded of some steps of a rank, as the rank writes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from dtrain.errors import DamagedError
from dtrain.run import files
from dtrain.run.rundir import RunDir


@dataclass(frozen=True)
class Operator:
    """All calls of an operator in the steps."""

    name: str
    calls: int
    cpu_s: float
    """Seconds on the CPU, without the operators that it calls."""
    device_s: float
    """Seconds of the kernels that it started on the GPU."""
    share: float
    """Its part of the time of the steps: of the GPU if there is one, otherwise of the CPU."""


@dataclass(frozen=True)
class Communication:
    """The time in which the rank exchanged data with others, or waited for them to do so."""

    seconds: float
    share: float
    """The part of the time of the steps."""
    overlapped: float
    """The part of `seconds` in which the rank also computed."""
    calls: dict[str, int]
    """How often each operation ran: `gloo:all_reduce`, or a kernel of NCCL."""


@dataclass(frozen=True)
class StepProfile:
    """A rank's profile."""

    rank: int
    attempt: int
    restart: int
    first_step: int
    last_step: int
    device: str
    seconds: float
    """The time of all these steps."""
    operators: list[Operator]
    """The slowest operators, the slowest one first."""
    communication: Communication
    trace: str
    """The path of the trace in the run directory, for https://ui.perfetto.dev."""
    memory: str | None = None
    """The path of the memory snapshot, for https://pytorch.org/memory_viz. None without a GPU."""

    @property
    def num_steps(self) -> int:
        return self.last_step - self.first_step + 1


def read_step_profiles(run: RunDir) -> Iterator[StepProfile]:
    """Yield the profiles of all attempts, the newest attempt first. Damaged ones are left out."""
    for attempt in reversed(run.attempts()):
        for path in sorted(run.attempt(attempt).glob("node-*/rank-*.profile.json")):
            with contextlib.suppress(DamagedError):
                found = files.read_as(StepProfile, path)
                if found is not None:
                    yield found
