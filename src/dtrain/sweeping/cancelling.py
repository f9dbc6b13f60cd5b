"""Cancel a sweep: its runs that wait do not start, and those that run are stopped."""

from __future__ import annotations

import signal
import time

from dtrain.errors import DtrainError
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers import status, stopping
from dtrain.run.attempts import Handle, Result, State
from dtrain.run.remote import runs as remote
from dtrain.run.rundir import RunDir
from dtrain.sweeping.sweep import Sweep

_ROUNDS = 3


def cancel_all(sweep: Sweep) -> tuple[dict[RunDir, State], dict[RunDir, State]]:
    """Cancel the runs of a sweep. Return their states before and afterwards.

    The command that follows the sweep starts none of the cancelled runs. It may start one at the
    moment at which this looks at it, so this looks again.

    Raises:
        UsageError: a run is driven from another host.
    """
    before = _states(sweep)
    now = before
    for _ in range(_ROUNDS):
        for run in reversed(sweep.runs):  # those that wait first: the last ones
            if now[run] == "prepared":
                _withdraw(run)
        for run in sweep.runs:
            if status.state_of(run)[0] == "running":
                stopping.cancel(run)
        now = _states(sweep)
        if not {"prepared", "running"} & {*now.values()}:
            break
    return before, now


def _states(sweep: Sweep) -> dict[RunDir, State]:
    return {run: status.state_of(run)[0] for run in sweep.runs}


def _withdraw(run: RunDir) -> None:
    """Record that a run that has not started was cancelled."""
    now = time.time()
    plan = LaunchPlan.read(run)
    try:
        Handle.of_this_process(plan.launcher, plan.attempt).claim(run)
        remote.claim(run, run.handle(plan.attempt))
    except (DtrainError, FileExistsError):  # it starts at this moment, and is stopped as a run
        return
    Result("cancelled", 128 + signal.SIGTERM, now, now).write(run, plan.attempt)
    remote.push(run)
