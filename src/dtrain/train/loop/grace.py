"""Whether the time that a preemption leaves is enough for the last checkpoint."""

from __future__ import annotations

import logging
import math
import time

from dtrain.train.context import TrainContext
from dtrain.train.metrics.events import Events

logger = logging.getLogger(__name__)


class Grace:
    """Compares the measured time of a save with the time until workers are killed.

    Workers that are asked to stop are killed after `launch.stop_timeout`.
    """

    def __init__(self, context: TrainContext, events: Events) -> None:
        self._context = context
        self._events = events
        self._timeout_s = context.spec.launch.stop_timeout
        self._write_s = 0.0
        self._is_told = False

    def measured(self, step: int | None, write_s: float, *, in_background: bool) -> None:
        """Take the time of a save, and report once if it is too long. All ranks call it.

        Args:
            step: the step of the checkpoint.
            write_s: the time that the slowest rank needed to write, in seconds.
            in_background: whether training went on meanwhile. Then two may have to be written: the
                one in progress, and that of the last step.
        """
        self._write_s = write_s
        needed = write_s * (2 if in_background else 1)
        if needed <= self._timeout_s or self._is_told:
            return
        self._is_told = True
        self._report(step, needed, self._timeout_s)
        if self._context.ranks.is_rank_zero:
            logger.warning(
                "a checkpoint takes %.1f s to write, but workers that are asked to stop are killed "
                "after %g s: a preemption may lose the steps since the last checkpoint. If the "
                "machines allow it, set launch.stop_timeout to %d s or more",
                write_s,
                self._timeout_s,
                math.ceil(1.5 * needed),
            )

    def stopping(self, step: int, saves: int) -> None:
        """Report before the last save if the time that is left may not be enough.

        Args:
            step: the number of steps done.
            saves: the number of checkpoints to write: also one that is in progress.
        """
        stop = self._context.stop
        if stop.reason is None:  # only another rank was asked
            return
        needed = self._write_s * saves
        left = max(0.0, self._timeout_s - (time.monotonic() - stop.since))
        if needed > left:
            self._report(step, needed, left)
            logger.warning(
                "the checkpoint after step %d takes about %.1f s, but the workers are killed in "
                "%.1f s (launch.stop_timeout)",
                step,
                needed,
                left,
            )

    def _report(self, step: int | None, needed: float, left: float) -> None:
        self._events.write("grace_short", step=step, needed=round(needed, 3), left=round(left, 3))
