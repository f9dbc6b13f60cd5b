"""The interface of what runs the runs of a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dtrain.launchers.base import Launch
from dtrain.run.rundir import RunDir


@dataclass(frozen=True)
class Change:
    """Something that happened to a run of a sweep."""

    run: RunDir
    text: str = ""
    """What happened, in words."""
    has_ended: bool = False
    """Whether the run, or the attempt to start it, is over."""


class Work(Protocol):
    """Runs that are started and followed."""

    def live(self) -> Sequence[Launch]:
        """Return the launches that have not ended."""

    def is_busy(self, stopping: bool) -> bool:
        """Return whether there is more to do. While it is stopping, no further run starts."""

    def step(self, stopping: bool) -> Iterator[Change]:
        """Start what can be started, and yield what has happened since the last call."""

    def close(self) -> None:
        """End what must not outlive this process."""
