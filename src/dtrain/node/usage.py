"""What the ranks of a node use: cores, memory, and the GPUs of their host."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping

import psutil

from dtrain import memory
from dtrain.doctor import gpus
from dtrain.run.files import append_line
from dtrain.run.phases import Pace
from dtrain.run.rundir import RunDir


class UsageLog:
    """Appends what a node's ranks use to `RunDir.usage`, now and then.

    A record has `time` (seconds since the epoch), `cpus` (how many this process may use),
    `memory_used` and `memory_total` of the host in bytes, `ranks`: for each rank with its child
    processes the cores in use and the resident bytes, and `gpus`: see `gpus.readings`.
    """

    def __init__(self, run: RunDir, attempt: int, node_rank: int) -> None:
        self._path = run.usage(attempt, node_rank)
        self._pace = Pace()
        self._seen: dict[psutil.Process, float] = {}
        """The CPU time of each process at the last record, in seconds."""
        self._seen_at = time.monotonic()

    def record(self, ranks: Mapping[int, int]) -> None:
        """Append a record if one is due.

        Args:
            ranks: pid → rank of the node's workers.
        """
        if not self._pace.due():
            return
        now = time.monotonic()
        passed, self._seen_at = now - self._seen_at, now
        seen: dict[psutil.Process, float] = {}
        used: dict[int, list[float]] = {}
        for pid, rank in ranks.items():
            cores = resident = 0.0
            for process in _with_children(pid):
                with contextlib.suppress(psutil.Error):  # it has just ended
                    times = process.cpu_times()
                    seen[process] = times.user + times.system
                    cores += (seen[process] - self._seen.get(process, 0.0)) / passed
                    resident += process.memory_info().rss
            used[rank] = [round(cores, 3), int(resident)]
        self._seen = seen
        total = memory.total()
        line = {
            "time": time.time(),
            "cpus": len(os.sched_getaffinity(0)),
            "memory_used": total - memory.available(),
            "memory_total": total,
            "ranks": used,
            "gpus": gpus.readings(),
        }
        with contextlib.suppress(OSError):  # a full disk must not end the training
            append_line(self._path, line)


def _with_children(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []
