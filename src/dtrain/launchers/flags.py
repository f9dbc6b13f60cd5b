"""Flags of `dtrain launch` with which people set options of one launcher most often.

Every option can be set by `-o NAME=VALUE` too. The flags are read for `--help`, so this module
imports nothing. A launcher from outside brings its own as a sequence of `Flag`s, named by an entry
point of group `dtrain.flags`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """A flag that sets the option of its last name, without the dashes."""

    names: tuple[str, ...]
    launcher: str
    metavar: str
    help: str
    unit: str = ""
    """Unit of a bare number, where the launcher's own command has one; empty: the option's."""

    @property
    def option(self) -> str:
        return self.names[-1].removeprefix("--").replace("-", "_")


FLAGS = (
    Flag(("--node-rank",), "torchrun", "K", "Which node this host is."),
    Flag(("--rdzv-endpoint",), "torchrun", "HOST:PORT", "Where node 0 listens."),
    Flag(("-p", "--partition"), "slurm", "NAME", "Partition."),
    Flag(("-A", "--account"), "slurm", "NAME", "Account."),
    Flag(
        ("-t", "--time"), "slurm", "TIME", "Time limit, for example 4h; a number is minutes.", "m"
    ),
    Flag(("--qos",), "slurm", "NAME", "Quality of service."),
    Flag(("--mem",), "slurm", "SIZE", "Memory of each node, for example 64G."),
    Flag(("--gres",), "slurm", "LIST", "Generic resources of each node."),
    Flag(("-C", "--constraint"), "slurm", "LIST", "Features that nodes must have."),
    Flag(("--after",), "slurm", "RUN", "Start when the job of that run has succeeded."),
    Flag(("--address",), "ray", "HOST:PORT", "Head of a running cluster."),
)


def outside() -> tuple[Flag, ...]:
    """Find the flags of launchers from outside; that takes 0.1 s, which `--help` does not have."""
    from importlib.metadata import entry_points

    return tuple(flag for point in entry_points(group="dtrain.flags") for flag in point.load())
