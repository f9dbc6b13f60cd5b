"""The process group that a script makes by itself."""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import constants, distributed_c10d

_made = False


def watch_group(timeout_s: float) -> None:
    """Note when a group is made, and give those without a timeout of the script's this one.

    torch's own is 10 or 30 minutes. To be called before the script runs: its libraries take
    torch's constants when they are imported.
    """
    limit = timedelta(seconds=timeout_s)
    for module in (constants, distributed_c10d):
        for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
            setattr(module, name, limit)
    make = dist.init_process_group

    @functools.wraps(make)
    def noted(*args: Any, **kwargs: Any) -> None:
        global _made
        make(*args, **kwargs)
        _made = True

    dist.init_process_group = distributed_c10d.init_process_group = noted


def may_be_awaited() -> bool:
    """Whether other ranks may wait for this one: the group is not destroyed, or not made yet."""
    return not _made or dist.is_initialized()
