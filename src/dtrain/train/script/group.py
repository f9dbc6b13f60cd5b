"""The process group that a script makes by itself."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import constants, distributed_c10d


def wait_at_most(seconds: float) -> None:
    """Give groups for which the script names no timeout this one, not torch's 10 or 30 minutes.

    Before the script runs: its libraries take torch's constants when they are imported.
    """
    limit = timedelta(seconds=seconds)
    for module in (constants, distributed_c10d):
        for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
            setattr(module, name, limit)
