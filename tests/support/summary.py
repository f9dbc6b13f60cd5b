"""What `make test` says at its end: the slowest tests, and how much of the time was waiting."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any

import psutil
import pytest

_SHOWN = 10


class Summary:
    """A plugin of the process that reports."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()
        self._started = time.monotonic()
        self._idle = _idle_s()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        seconds = time.monotonic() - self._started
        cores = os.cpu_count() or 1
        waited = (_idle_s() - self._idle) / (seconds * cores)
        terminalreporter.section(f"slowest {_SHOWN}")
        for name, spent in self._seconds.most_common(_SHOWN):
            terminalreporter.write_line(f"{spent:7.1f} s  {name}")
        terminalreporter.write_line(
            f"{seconds:.0f} s on {cores} cores, of whose time {waited:.0%} was waiting"
        )


def _idle_s() -> float:
    """Seconds since boot that the machine's cores had nothing to do, summed."""
    times = psutil.cpu_times()
    return float(times.idle + times.iowait)
