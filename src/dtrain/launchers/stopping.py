"""Forward Ctrl-C and other signals from a command to the launches that it follows."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from dtrain.errors import UsageError
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers import base
from dtrain.launchers.base import Launch
from dtrain.run.attempts import Handle
from dtrain.run.rundir import RunDir

_KILL_AFTER_S = 5.0  # after the workers' own stop_timeout


class Stop:
    """A counter of Ctrl-C and SIGTERM: the first asks the workers to exit cleanly, the second
    kills."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.count = 0

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """Count a signal. This is the handler of all of them."""
        self.signal = self.signal or number
        self.count += 1


class StopForwarder:
    """Forward requests to stop. The first is clean; a second one, or a timeout, kills."""

    def __init__(self, stop: Stop, timeout_s: float, say: Callable[[str], None]) -> None:
        self._stop = stop
        self._timeout_s = timeout_s
        self._say = say
        self._forwarded = 0
        self._deadline = float("inf")

    def forward(self, launches: Iterable[Launch]) -> None:
        """Forward the requests made since the last call."""
        launches = list(launches)
        if self._stop.count and not self._forwarded:
            self._forwarded = self._stop.count
            self._deadline = time.monotonic() + self._timeout_s + _KILL_AFTER_S
            self._say("stopping at the next step; press Ctrl-C again to kill the workers now")
            for launch in launches:
                launch.stop()
        if self._stop.count > max(self._forwarded, 1) or time.monotonic() > self._deadline:
            for launch in launches:
                launch.kill()


@contextlib.contextmanager
def stop_requests() -> Iterator[Stop]:
    """Count Ctrl-C and other stop signals in this context instead of ending this process."""
    stop = Stop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        sys.stdout.flush()
        for number, handler in before.items():
            signal.signal(number, handler)


def cancel(run: RunDir, timeout_s: float | None = None) -> None:
    """End a run that another process drives: cleanly, and by force when the time is up.

    Args:
        run: the run.
        timeout_s: seconds that it has to exit. None means slightly more than `launch.stop_timeout`.

    Raises:
        UsageError: it was started by hand, or it is driven from another host.
    """
    plan = LaunchPlan.read(run)
    if Handle.read(run) is None:
        raise UsageError(
            f"run {run.id} was started by hand; stop it where it was started",
            code="run.started-by-hand",
        )
    base.load(plan.launcher).cancel(
        run, plan.stop_timeout_s + 10 if timeout_s is None else timeout_s
    )
