"""The position of a process: its rank, its node and the world size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

FOREIGN_PREFIXES = ("MASTER_", "SLURM_", "SUBMITIT_", "PET_", "TORCHELASTIC_", "GROUP_", "ROLE_")
FOREIGN_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")


@dataclass(frozen=True)
class RankInfo:
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    restart: int = 0
    """The number of times that the agent has restarted the workers within this attempt."""

    @property
    def is_rank_zero(self) -> bool:
        """True if this process logs and writes for all."""
        return self.rank == 0

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> RankInfo:
        """Read the variables that torchrun and dtrain's agent set; without them, one process.

        Args:
            environ: the environment; None means `os.environ`.
        """
        env = os.environ if environ is None else environ
        return cls(
            rank=int(env.get("RANK", 0)),
            world_size=int(env.get("WORLD_SIZE", 1)),
            local_rank=int(env.get("LOCAL_RANK", 0)),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", 1)),
            node_rank=int(env.get("GROUP_RANK", env.get("NODE_RANK", 0))),
            restart=int(env.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )


def scrubbed(environ: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of an environment without the variables of another job's launcher.

    A launch from inside a Slurm job or a torchrun worker would otherwise pass the RANK and
    MASTER_ADDR of that job to its own processes.
    """
    return {
        name: value
        for name, value in environ.items()
        if name not in FOREIGN_NAMES and not name.startswith(FOREIGN_PREFIXES)
    }
