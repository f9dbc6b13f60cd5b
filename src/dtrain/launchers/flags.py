"""Flags of `dtrain launch` for the most common options of a single launcher.

Every option can be set by `-o NAME=VALUE` too. The flags are read for `--help`, so this module
imports nothing. An external launcher provides its own as a sequence of `Flag`s, named by an entry
point of group `dtrain.flags`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """A flag. It sets the option that is named by its last name without the dashes."""

    names: tuple[str, ...]
    launcher: str
    metavar: str
    help: str
    unit: str = ""
    """The unit of a bare number, where the launcher's own command has one. Empty means the
    option's."""

    @property
    def option(self) -> str:
        return self.names[-1].removeprefix("--").replace("-", "_")


FLAGS = (
    Flag(("--node-rank",), "torchrun", "K", "The rank of this host's node."),
    Flag(("--rdzv-endpoint",), "torchrun", "HOST:PORT", "The address of node 0."),
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


def external_flags() -> tuple[Flag, ...]:
    """Find the flags of external launchers. This takes 0.1 s, too long for `--help`."""
    from importlib.metadata import entry_points

    return tuple(flag for point in entry_points(group="dtrain.flags") for flag in point.load())
