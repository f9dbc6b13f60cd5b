"""The interface between a node process and the reader of its cluster.

`--placement NAME` selects the reader. An external reader is a class like those in this package, in
the entry-point group `dtrain.placements`.
"""

from __future__ import annotations

import abc
import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.launch_plan import LaunchPlan
from dtrain.run.rundir import RunDir


class Arguments(argparse.Namespace):
    """The arguments of a node process."""

    run_dir: str
    placement: str
    placement_args: str | None
    node_rank: list[int] | None
    parent: int | None
    listen_fd: int | None


@dataclass(frozen=True)
class NodePlacement:
    """The nodes that a process serves, and where they meet the others."""

    plan: LaunchPlan
    """The plan with the present attempt, node names and rendezvous."""
    node_ranks: list[int]
    listen_fd: int | None
    """The open port of the rendezvous, on the head."""
    environ: Mapping[str, str]
    """The environment that the workers inherit."""


class PlacementReader(abc.ABC):
    """Finds out which node a process is. Each node process makes one."""

    def __init__(self, arguments: Arguments, environ: Mapping[str, str]) -> None:
        self.arguments = arguments
        self.environ = environ

    def begin(self, run: RunDir) -> None:  # noqa: B027  most have nothing to do
        """Prepare, before anything else is called. The run directory may be missing here."""

    @abc.abstractmethod
    def join(self, plan: LaunchPlan) -> NodePlacement:
        """Find out which node this is and where the others are.

        Args:
            plan: the plan in plan.json.

        Raises:
            DtrainError: that cannot be found out. The process ends with the error's exit code.
        """

    def is_superseded(self) -> bool:
        """Return whether the launch has begun again without this node. Called from time to time."""
        return False

    def finish(self, status: int, asked_to_stop: bool) -> int:
        """Decide what becomes of the job once the agents have ended. Return the exit code.

        Args:
            status: the worst of the agents' exit codes.
            asked_to_stop: whether this process was asked to stop.
        """
        return status
