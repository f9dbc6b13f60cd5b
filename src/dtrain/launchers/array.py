"""Start and follow several runs that one command submits together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtrain.errors import DtrainError
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers import prepare, status, supervise
from dtrain.launchers.base import ArrayCapable, Submitted
from dtrain.launchers.stopping import Stop, StopForwarder, stop_requests
from dtrain.run.attempts import Handle

if TYPE_CHECKING:
    from dtrain.job.spec import JobSpec

_TICK_S = 0.2


@dataclass(frozen=True)
class Element:
    plan: LaunchPlan
    job: JobSpec
    job_text: str
    chosen: str
    """The difference from the other runs: `train.lr=0.1`."""


def drive_array(
    launcher: ArrayCapable,
    elements: Sequence[Element],
    say: Callable[[str], None],
    *,
    at_once: int | None = None,
    detach: bool = False,
    quiet: bool = False,
    paint: Callable[[str], str] = str,
) -> int:
    """Write the run directories, submit them, and follow them to their ends. Return the exit code.

    The exit code is 0 when all runs have succeeded. Otherwise it is that of the first one that has
    not. This process does not drive the runs: they continue when it is killed. `paint` gives a
    state its colour.

    Raises:
        LaunchError: the array cannot be submitted.
    """
    plans = [element.plan for element in elements]
    say_state = supervise.discard if quiet else say
    started = time.time()
    written: list[LaunchPlan] = []
    try:
        for element in elements:
            plan = element.plan
            handle = Handle.of_this_process(plan.launcher, plan.attempt)  # until it is submitted
            prepare.prepare(plan, element.job, element.job_text, handle)
            written.append(plan)
            say_state(f"{element.plan.run_id}: {element.chosen}")
        launches = launcher.start_array(plans, at_once)
    except DtrainError as error:
        for plan in written:
            supervise.record_refusal(plan, error, started)
        raise
    if detach:
        say(f"submitted {len(plans)} runs; `dtrain runs` lists them")
        return 0
    with stop_requests() as stop:
        return _Follower(elements, launches, say, say_state, paint).follow(stop)


class _Follower:
    """A follower that prints the state of each run until all have ended."""

    def __init__(
        self,
        elements: Sequence[Element],
        launches: Sequence[Submitted],
        say: Callable[[str], None],
        say_state: Callable[[str], None],
        paint: Callable[[str], str],
    ) -> None:
        self._live = dict(zip((element.plan.run_id for element in elements), launches, strict=True))
        self._elements = {element.plan.run_id: element for element in elements}
        self._codes = dict.fromkeys(self._elements, 0)
        self._shown: dict[str, str] = {}
        self._say = say
        self._say_state = say_state
        self._paint = paint

    def follow(self, stop: Stop) -> int:
        timeout_s = max(element.plan.stop_timeout_s for element in self._elements.values())
        forwarder = StopForwarder(stop, timeout_s, self._say)
        while self._live:
            self._poll()
            forwarder.forward(self._live.values())
            time.sleep(_TICK_S)
        if stop.signal is not None:
            return 128 + stop.signal
        return next((code for code in self._codes.values() if code), 0)

    def _poll(self) -> None:
        for run_id, launch in list(self._live.items()):
            has_ended = launch.poll() is not None
            if launch.description and self._shown.get(run_id) != launch.description:
                self._shown[run_id] = launch.description
                self._say_state(f"{run_id}: {launch.description}")
            if has_ended and self._has_result(run_id):
                del self._live[run_id]

    def _has_result(self, run_id: str) -> bool:
        element = self._elements[run_id]
        state, result = status.state_of(element.plan.run)
        if result is None and state != "lost":
            return False
        self._codes[run_id] = 1 if result is None else result.exit_code
        more = supervise.outcome(element.plan) if state == "succeeded" else f"; dtrain why {run_id}"
        self._say(f"{run_id} ({element.chosen}): {self._paint(state)}{more}")
        return True
