"""The control groups of this process, whose limits are below those of the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def directories(controller: str) -> Iterator[Path]:
    """Yield possible directories of the control group: version 2, version 1, and a container's.

    Args:
        controller: its name in version 1, for example `memory`.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds or controller in kinds.split(","):
                yield _ROOT / kinds / path.lstrip("/")
                yield _ROOT / kinds


def numbers(controller: str, *names: str) -> list[int]:
    """Return the numbers in the first of these files that holds only numbers.

    A limit that is not set has the text `max`, so it is not found.
    """
    for directory in directories(controller):
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                return [int(word) for word in (directory / name).read_text().split()]
    return []
