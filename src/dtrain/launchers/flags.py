"""The flags of `dtrain launch` that set options of one launcher.

They are read for `--help`, so this imports nothing. A launcher from outside brings its own as a
sequence of `Flag`s, named by an entry point of group `dtrain.flags`.
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
    multiple: bool = False

    @property
    def option(self) -> str:
        return self.names[-1].removeprefix("--").replace("-", "_")


FLAGS = (
    Flag(("--node-rank",), "torchrun", "K", "which node this host is."),
    Flag(("--rdzv-endpoint",), "torchrun", "HOST:PORT", "where node 0 listens."),
    Flag(("-p", "--partition"), "slurm", "NAME", "partition."),
    Flag(("-A", "--account"), "slurm", "NAME", "account."),
    Flag(("-t", "--time"), "slurm", "TIME", "time limit, as 4h."),
    Flag(
        ("--slurm",),
        "slurm",
        "FLAG=VALUE",
        "any other flag of sbatch, as nice=100; may be repeated.",
        multiple=True,
    ),
    Flag(("--after",), "slurm", "RUN", "start when the job of that run has succeeded."),
    Flag(("--address",), "ray", "HOST:PORT", "a running cluster."),
    Flag(
        ("--ray",),
        "ray",
        "OPTION=VALUE",
        "any option of its profile, as relaunch=5; may be repeated.",
        multiple=True,
    ),
)


def outside() -> tuple[Flag, ...]:
    """Find the flags of launchers from outside; that takes 0.1 s, which `--help` does not have."""
    from importlib.metadata import entry_points

    return tuple(flag for point in entry_points(group="dtrain.flags") for flag in point.load())
