"""What a node process asks the reader of its cluster, and what it is told.

`--placement NAME` says which reader. One from outside is a class like those beside this, under the
entry-point group `dtrain.placements`.
"""

from __future__ import annotations

import abc
import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.launch_plan import LaunchPlan
from dtrain.run.rundir import RunDir


class Arguments(argparse.Namespace):
    """What a node process was started with."""

    run_dir: str
    placement: str
    placed_as: str | None
    node_rank: list[int] | None
    parent: int | None
    listen_fd: int | None


@dataclass(frozen=True)
class NodePlacement:
    """Which nodes a process serves, and where they meet the others."""

    plan: LaunchPlan
    """With attempt, node names and rendezvous as they are now."""
    node_ranks: list[int]
    listen_fd: int | None
    """On the head, the open port of the rendezvous."""
    environ: Mapping[str, str]
    """What the workers inherit."""


class PlacementReader(abc.ABC):
    """Finds out who a node process is; made once in each."""

    def __init__(self, arguments: Arguments, environ: Mapping[str, str]) -> None:
        self.arguments = arguments
        self.environ = environ

    def begin(self, run: RunDir) -> None:  # noqa: B027  most have nothing to do
        """Called before anything else; the run's folder may be missing on this host."""

    @abc.abstractmethod
    def join(self, plan: LaunchPlan) -> NodePlacement:
        """Find out who we are and where the others are.

        Args:
            plan: as it stands in plan.json.

        Raises:
            DtrainError: that cannot be found out; the process ends with its exit code.
        """

    def is_superseded(self) -> bool:
        """Whether the launch has begun again without this node; asked now and then."""
        return False

    def finish(self, status: int, asked_to_stop: bool) -> int:
        """Say what becomes of the job once the agents have ended; this process's exit code.

        Args:
            status: the worst of the agents' exit codes.
            asked_to_stop: whether somebody has asked this process to leave.
        """
        return status
