"""Run the runs of a sweep on this host, as many at the same time as find place."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dtrain.doctor.gpus import VISIBLE
from dtrain.driving import Driver
from dtrain.errors import DtrainError, format_error
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.base import Slot
from dtrain.launchers.driver import LaunchRequest
from dtrain.launchers.warm import Kind, WarmServer, kind_of
from dtrain.planning import Request
from dtrain.resuming import plan_resume
from dtrain.run.attempts import Handle
from dtrain.run.rundir import RunDir
from dtrain.sweeping.work import Change

_KILL_S = 5.0


class Queue:
    """A process for each run that is being trained, which drives it as `dtrain launch` does.

    A run is planned when it is started: only then is it known which port is free.
    """

    def __init__(
        self, plans: Sequence[LaunchPlan], request: Request, slots: Sequence[Slot], *, detach: bool
    ) -> None:
        """Make it; nothing is started before the first `step`.

        Args:
            plans: the plans of the runs as they are now, in the order in which they start.
            request: what a resume of each run changes.
            slots: the places for runs.
            detach: whether a run continues without its driver once it is submitted.
        """
        self._waiting = [(plan.run, _newest(plan.run)) for plan in plans]
        self._request = request
        self._free = list(slots)
        self._running: list[_Driven] = []
        self._detach = detach
        self._server, self._kind = _server(plans)

    def close(self) -> None:
        """See `Work.close`. After an orderly end nothing runs any more."""
        for driven in self._running:
            driven.driver.abandon()
        if self._server is not None:
            self._server.close()

    def live(self) -> list[_Driven]:
        return self._running

    def is_busy(self, stopping: bool) -> bool:
        return bool(self._running) or bool(self._waiting and not stopping)

    def step(self, stopping: bool) -> Iterator[Change]:
        """See `Work.step`. Note which runs have ended, and start the next ones."""
        for driven in [each for each in self._running if not each.driver.is_running()]:
            self._running.remove(driven)
            self._free.append(driven.slot)
            yield Change(driven.run, driven.refusal(), has_ended=True)
        while self._free and self._waiting and not stopping:
            run, newest = self._waiting.pop(0)
            if _newest(run) != newest:  # it was cancelled, or another command has started it
                yield Change(run, has_ended=True)
                continue
            try:
                started = self._start(run, self._free[0])
            except DtrainError as error:  # another command has begun it, or its job is damaged
                yield Change(run, format_error(error), has_ended=True)
                continue
            self._free.pop(0)
            self._running.append(started)
            counts = f"{len(self._running)} running, {len(self._waiting)} waiting"
            yield Change(run, f"started; {counts}")

    def _start(self, run: RunDir, slot: Slot) -> _Driven:
        prepared = plan_resume(run, replace(self._request, cores=slot.cores))
        plan, job = prepared.plan, prepared.job
        env = None if slot.gpus is None else {**os.environ, VISIBLE: slot.gpus}
        server = self._server if kind_of(plan) == self._kind else None
        if server is None or not server.is_ready():
            driver = Driver(env)
        else:
            channel = server.connect()
            driver = Driver(env, channel)
            channel.close()  # it is the driver's now
        driver.send(LaunchRequest(plan, job.spec.to_plain(), job.text, self._detach))
        return _Driven(run, driver, slot)


class _Driven:
    """A run with its driver process."""

    def __init__(self, run: RunDir, driver: Driver, slot: Slot) -> None:
        self.run = run
        self.driver = driver
        self.slot = slot
        self._kill_at = float("inf")

    def poll(self) -> int | None:
        return None if self.driver.is_running() else 0

    def stop(self) -> None:
        self.driver.signal(signal.SIGTERM)

    def kill(self) -> None:
        """See `Launch.kill`. The driver first has the time to record how its run ended."""
        if self._kill_at == float("inf"):
            self._kill_at = time.monotonic() + _KILL_S
            self.driver.signal(signal.SIGTERM)
        elif time.monotonic() > self._kill_at:
            self.driver.kill()

    def refusal(self) -> str:
        """Return why the run could not be started; empty if it was. Release the driver."""
        try:
            self.driver.close()
        except DtrainError as error:
            return format_error(error)
        return ""


def _newest(run: RunDir) -> int | None:
    """Return the number of the newest attempt."""
    handle = Handle.read(run)
    return None if handle is None else handle.attempt


def _server(plans: Sequence[LaunchPlan]) -> tuple[WarmServer | None, Kind]:
    """Import once for all runs that launcher `local` starts, in the time that one needs.

    Runs with another trainer or another PYTHONHASHSEED than the first one import themselves.
    """
    kind = kind_of(plans[0])
    if plans[0].launcher != "local" or len(plans) == 1:
        return None, kind
    modules = [name for plan in plans if kind_of(plan) == kind for name in plan.modules]
    return WarmServer(list(dict.fromkeys(modules)), hash_seed=kind[1]), kind
