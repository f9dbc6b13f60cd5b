"""Facts about this host's memory: how much there is, and why a rank was killed."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

from dtrain import cgroups

_PAGE = resource.getpagesize()


class Memory:
    """Watches this node's memory from now on."""

    def __init__(self) -> None:
        self._kills = _kills()
        self._swapped = _swapped()

    def ran_out(self) -> bool:
        """Return whether the kernel has since killed a process because memory ran out.

        It counts the kills of this process's control group if that is readable, else those of the
        host.
        """
        return _kills() > self._kills

    def swapped(self) -> int:
        """Return how many bytes the host has swapped since, in and out."""
        return _swapped() - self._swapped

    def describe(self, peak: int) -> str:
        """Describe the numbers in words.

        Args:
            peak: the most memory that a rank had, in bytes.
        """
        facts = _numbers(Path("/proc/meminfo"))
        total, free = (1024 * facts.get(name, 0) for name in ("MemTotal", "MemAvailable"))
        text = f"the rank had {_gb(peak)} at most, the node has {_gb(total)}, {_gb(free)} free now"
        limit = _limit()
        if limit is not None and limit < total:
            text += f", the limit here is {_gb(limit)}"
        if self.swapped() > peak / 10:
            text += f", and {_gb(self.swapped())} were swapped meanwhile"
        return text


def total() -> int:
    """Return the memory that this process can have, in bytes: the host's, or the limit below it."""
    here = 1024 * _numbers(Path("/proc/meminfo")).get("MemTotal", 0)
    limit = _limit()
    return here if limit is None else min(here, limit)


def available() -> int:
    """Return how much of `total` is not in use, in bytes."""
    free = 1024 * _numbers(Path("/proc/meminfo")).get("MemAvailable", 0)
    limit = _limit()
    return free if limit is None else max(0, min(free, limit - _in_use()))


def _in_use() -> int:
    """Return what the processes below the memory limit use together, without the page cache."""
    for group in cgroups.directories("memory"):
        for name in ("memory.current", "memory.usage_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                used = int((group / name).read_text())
                return used - _numbers(group / "memory.stat").get("inactive_file", 0)
    return 0


def _kills() -> int:
    for group in cgroups.directories("memory"):
        for name in ("memory.events", "memory.oom_control"):
            if (kills := _numbers(group / name).get("oom_kill")) is not None:
                return kills
    return _numbers(Path("/proc/vmstat")).get("oom_kill", 0)


def _swapped() -> int:
    counts = _numbers(Path("/proc/vmstat"))
    return _PAGE * (counts.get("pswpin", 0) + counts.get("pswpout", 0))


def _limit() -> int | None:
    """Return the memory limit of this process and its forks together. None without a limit."""
    limits = cgroups.numbers("memory", "memory.max", "memory.limit_in_bytes")
    return limits[0] if limits else None


def _numbers(path: Path) -> dict[str, int]:
    """Parse `name number` or `name: number unit`, line by line."""
    with contextlib.suppress(OSError):
        words = [line.split() for line in path.read_text().splitlines()]
        return {w[0].rstrip(":"): int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}
    return {}


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
