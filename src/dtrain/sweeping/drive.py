"""Start the runs of a sweep and follow them to their ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from dtrain.errors import UsageError
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers import base, status, supervise
from dtrain.launchers.base import ArrayCapable, Shareable
from dtrain.launchers.stopping import StopForwarder, stop_requests
from dtrain.planning import Request
from dtrain.resuming import fields_of, plan_resume
from dtrain.run.rundir import RunDir
from dtrain.sweeping.array import Array
from dtrain.sweeping.queue import Queue
from dtrain.sweeping.sweep import Sweep
from dtrain.sweeping.work import Change, Work
from dtrain.words import counted, few

_TICK_S = 0.1


@dataclass(frozen=True)
class Console:
    """Where a sweep prints a line for each change of a run."""

    say: Callable[[str], None]
    """Print a line."""
    quiet: bool = False
    """Whether to print only how runs end."""
    paint: Callable[[str], str] = str
    """Give a state its colour."""

    def note(self, text: str) -> None:
        """Print a line that is not needed."""
        if not self.quiet:
            self.say(text)


def drive(
    sweep: Sweep, request: Request, at_once: int | None, console: Console, *, detach: bool = False
) -> int:
    """Start the runs of a sweep that have not succeeded, and follow them. Return the exit code.

    The exit code is 0 when all of these runs have succeeded. Otherwise it is that of the first one
    that has not. When stopped by signal N, it is 128 + N.

    Args:
        sweep: the sweep.
        request: what a resume of each run changes.
        at_once: how many runs may run at the same time. None means as many as find place.
        console: where the changes of runs are printed.
        detach: return as soon as all are submitted.

    Raises:
        UsageError: nothing is left to run, or an option would have no effect.
        JobError, PlanError, LaunchError: as for a run.
    """
    runs = _to_do(sweep, request, console)
    first = plan_resume(runs[0], request)  # what is wrong with all of them is said once
    first.refuse_unlaunchable(detach)
    is_array = isinstance(first.launcher, ArrayCapable)
    if at_once is not None and detach and not is_array:
        text = "--at-once needs a command that follows the runs; leave out --detach"
        raise UsageError(text, code="usage.flag-without-effect")
    console.note(f"sweep {sweep.id}: {counted(len(runs), 'run')}")
    with stop_requests() as stop:
        work = _work(runs, request, at_once, detach)
        with contextlib.closing(work):
            follower = _Follower(sweep, console)
            if not (detach and is_array):
                forwarder = StopForwarder(stop, first.plan.stop_timeout_s, console.say)
                while work.is_busy(stop.count > 0):
                    for change in work.step(stop.count > 0):
                        follower.show(change, detach)
                    forwarder.forward(work.live())
                    time.sleep(_TICK_S)
    code = follower.code if stop.signal is None else 128 + stop.signal
    if detach and not code:
        console.say(f"submitted {counted(len(runs), 'run')}; dtrain status {sweep.id} lists them")
    elif code:
        console.say(f"continue with: dtrain resume {sweep.id}")
    return code


def _to_do(sweep: Sweep, request: Request, console: Console) -> list[RunDir]:
    """Return the runs to start, and say which others there are.

    Raises:
        UsageError: there is none.
    """
    longer = any(field.partition(".")[0] == "train" for field in fields_of(request))
    states = {run: status.state_of(run)[0] for run in sweep.runs}
    if missing := sweep.missing:
        ids = few(f"{sweep.id}-{index}" for index in missing)
        console.say(f"{counted(len(missing), 'run')} of the sweep no longer exist: {ids}")
    if running := [run.id for run, state in states.items() if state == "running"]:
        console.say(f"already running: {few(running)}")
    found = [
        run
        for run, state in states.items()
        if state != "running" and (longer or state != "succeeded")
    ]
    if not found:
        text = f"no run of sweep {sweep.id} is left to run: {len(running)} running, " + (
            f"{len(states) - len(running)} succeeded"
        )
        raise UsageError(text, code="sweep.finished")
    return found


def _work(runs: list[RunDir], request: Request, at_once: int | None, detach: bool) -> Work:
    plans = [LaunchPlan.read(run) for run in runs]
    launcher = base.load(plans[0].launcher)
    if request.launcher is not None or isinstance(launcher, ArrayCapable):
        planned = [plan_resume(run, request) for run in runs]
        launcher, plans = planned[0].launcher, [each.plan for each in planned]
        if isinstance(launcher, ArrayCapable):
            return Array(launcher, planned, at_once)
    if not isinstance(launcher, Shareable):
        raise UsageError(
            f"launcher {plans[0].launcher!r} starts one run at a time, not a sweep",
            code="usage.sweep-unsupported",
        )
    largest = max(plans, key=lambda plan: (plan.gpus_per_node * plan.nodes, plan.world_size))
    slots = launcher.slots(largest, len(plans), at_once)
    return Queue(plans, request, slots, detach=detach)


class _Follower:
    """Prints what happens to the runs, and keeps the exit code of the first that fails."""

    def __init__(self, sweep: Sweep, console: Console) -> None:
        self._values = {
            run.id: str(element) for run, element in zip(sweep.runs, sweep.elements, strict=True)
        }
        self._console = console
        self.code = 0

    def show(self, change: Change, detach: bool) -> None:
        """Print a change. With `detach`, a run has not ended when its driver has."""
        run = change.run
        name = f"{run.id} ({self._values[run.id]})"
        if not change.has_ended:
            self._console.note(f"{name}: {change.text}")
            return
        if change.text:
            self._console.say(f"{name}: not started\n{change.text}")
            self.code = self.code or 1
            return
        if detach:
            return
        state, result = status.state_of(run)
        code = 1 if result is None else result.exit_code
        self.code = self.code or code
        plan = LaunchPlan.read(run)
        more = supervise.outcome(plan) if state == "succeeded" else ""
        if state in ("failed", "lost"):
            more = f"; dtrain why {run.id}"
        self._console.say(f"{name}: {self._console.paint(state)}{more}")


def of_launch(request: Request) -> Request:
    """Return what the first start of a run adds to what its directory has.

    Those are the values of secret variables, which are kept nowhere, and options that are not kept.
    """
    return Request(
        runs=request.runs,
        fields={name: at for name, at in request.fields.items() if name.startswith("launch.env.")},
        options={name: at for name, at in request.options.items() if name == "after"},
        preflight=request.preflight,
    )
