"""Run the runs of a sweep as one array of a cluster's queue."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from dtrain.errors import DtrainError
from dtrain.launchers import prepare, status, supervise
from dtrain.launchers.base import ArrayCapable, Submitted
from dtrain.planning import Prepared
from dtrain.run.attempts import Handle
from dtrain.run.rundir import RunDir
from dtrain.sweeping.work import Change


class Array:
    """The elements of an array, which continue without this process."""

    def __init__(
        self, launcher: ArrayCapable, planned: Sequence[Prepared], at_once: int | None
    ) -> None:
        """Submit them.

        Raises:
            PlanError, LaunchError: the array cannot be submitted. All runs are recorded as failed.
        """
        started = time.time()
        plans = [each.plan for each in planned]
        try:
            for each in planned:  # the process of this command, until they are submitted
                handle = Handle.of_this_process(each.plan.launcher, each.plan.attempt)
                prepare.prepare(each.plan, each.job.spec, each.job.text, handle)
            launches = launcher.start_array(plans, at_once)
        except DtrainError as error:
            for plan in plans:
                supervise.record_refusal(plan, error, started, keep=True)
            raise
        self._live: dict[RunDir, Submitted] = {
            plan.run: launch for plan, launch in zip(plans, launches, strict=True)
        }
        self._shown: dict[RunDir, str] = {}

    def live(self) -> list[Submitted]:
        return list(self._live.values())

    def is_busy(self, stopping: bool) -> bool:
        return bool(self._live)

    def step(self, stopping: bool) -> Iterator[Change]:
        """See `Work.step`. A run ends with its result, which may be later than its job's end."""
        for run, launch in list(self._live.items()):
            has_ended = launch.poll() is not None
            if launch.description and self._shown.get(run) != launch.description:
                self._shown[run] = launch.description
                yield Change(run, launch.description)
            if has_ended:
                state, result = status.state_of(run)
                if result is not None or state == "lost":
                    del self._live[run]
                    yield Change(run, has_ended=True)

    def close(self) -> None:
        """Leave the elements to the cluster."""
