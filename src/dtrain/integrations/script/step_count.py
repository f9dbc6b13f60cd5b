"""Counts the steps of a script by those of its optimizer, to profile some of them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from dtrain.job.spec import StepProfileSpec
from dtrain.ranks import RankInfo
from dtrain.run.events import note_event
from dtrain.run.rundir import RunDir
from dtrain.train.metrics.profiler import StepProfiler


class StepCount:
    """Calls a profiler after each step of the first optimizer that makes one.

    Where the script's first step begins is not known, so it is never recorded.
    """

    def __init__(
        self,
        spec: StepProfileSpec,
        run: RunDir,
        ranks: RankInfo,
        attempt: int,
        device: torch.device,
    ) -> None:
        self._run, self._ranks, self._spec = run, ranks, spec
        self._profiler = StepProfiler(spec, run, ranks, attempt, device)
        self._optimizer: weakref.ref[Any] | None = None
        self._steps = 0
        register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if self._optimizer is None:
            self._optimizer = weakref.ref(optimizer)
        if self._optimizer() is optimizer:
            self._steps += 1
            self._profiler.step_begins(self._steps)

    def close(self) -> None:
        """Write the rest, and warn if the steps were not reached."""
        self._profiler.close()
        first, last = self._spec.steps
        if self._steps < max(2, first):
            what = (
                f"profile: rank {self._ranks.rank} recorded no step from {first} to {last}: it "
                f"made {self._steps} steps with an optimizer of torch; a script's first step is "
                "never recorded"
            )
            note_event(self._run, "notice", what=what)
