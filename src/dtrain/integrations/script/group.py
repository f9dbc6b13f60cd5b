"""The process group that a script makes by itself: how long it waits, and whether there is one."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import constants, distributed_c10d

from dtrain.ranks import RankInfo
from dtrain.run.events import note_event
from dtrain.run.rundir import RunDir

PATIENCE_S = 10.0
"""Most scripts have made their group by then: they begin with it."""


class Group:
    """Watches whether the script of this process makes a group.

    Without one each process trains alone, and nothing fails.
    """

    def __init__(self, run: RunDir, timeout_s: float) -> None:
        """Begin, before the script runs: its libraries take torch's constants when imported.

        Args:
            run: where to tell of what is missing.
            timeout_s: of groups for which the script names none; torch's is 10 or 30 minutes.
        """
        self._run = run
        ranks = RankInfo.from_env()
        self._size = ranks.world_size
        self._is_to_tell = ranks.world_size > 1 and ranks.is_rank_zero
        self._made = self._told = False
        limit = timedelta(seconds=timeout_s)
        for module in (constants, distributed_c10d):
            for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
                setattr(module, name, limit)
        dist.init_process_group = distributed_c10d.init_process_group = self._watched()
        if self._is_to_tell:
            timer = threading.Timer(PATIENCE_S, self.tell_if_none, (f"after {PATIENCE_S:g} s",))
            timer.daemon = True
            timer.start()

    def _watched(self) -> Callable[..., None]:
        make = dist.init_process_group

        @functools.wraps(make)
        def watched(*args: Any, **kwargs: Any) -> None:
            make(*args, **kwargs)
            self._made = True
            if self._told:
                note_event(self._run, "group_made", pid=os.getpid())

        return watched

    def is_over(self) -> bool:
        """Whether a group was made and destroyed."""
        return self._made and not dist.is_initialized()

    def tell_if_none(self, when: str) -> None:
        """Warn where several processes have no group; rank 0 does so for all."""
        if self._made or not self._is_to_tell:
            return
        what = (
            f"no process group {when}: without torch.distributed.init_process_group() each of the "
            f"{self._size} processes trains by itself"
        )
        note_event(self._run, "no_group", what=what, pid=os.getpid())
        if not self._told:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            print(f"{stamp} WARNING dtrain: {what}", file=sys.stderr, flush=True)
        self._told = True
