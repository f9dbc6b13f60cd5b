"""Detection of a run that prints nothing for a while.

It is reported once, with the location of each rank of this node. Only files are checked, every few
seconds, so training is not affected. Silence need not be a fault: a script may print little. So the
time doubles whenever a run continues without help.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from dtrain.integrations.script.command import run_command
from dtrain.launch_plan import LaunchPlan
from dtrain.memory import Memory
from dtrain.node import stack_dump
from dtrain.run import failures, progress_bars
from dtrain.run.failures import Frame
from dtrain.run.verdict import location
from dtrain.words import numbered

_LONGEST_S = 60.0
_CHECKS = 20
"""The number of checks within the waiting time."""
_SWAPS = 100 << 20
"""The swapped bytes that exceed normal housekeeping."""
_MOST_LOGS = 64
"""The most ranks for which all logs are checked. Beyond that, only this node's and rank 0's are."""


class SilenceWatcher:
    """Watches the logs and the metrics of a run, from one node."""

    def __init__(self, plan: LaunchPlan, own: Mapping[int, Path]) -> None:
        """Begin to watch.

        Args:
            plan: the launch.
            own: the logs of this node's ranks.
        """
        # half the timeout of a collective, or the report would come after the end
        self._patience_s = min(_LONGEST_S, plan.collective_timeout_s / 2)
        self._rank0_log = _log(plan, 0)
        self._files = {plan.run.metrics, self._rank0_log, *own.values()}
        if plan.world_size <= _MOST_LOGS:
            self._files |= {_log(plan, rank) for rank in range(plan.world_size)}
        bars = {progress_bars.live_file(path) for path in {self._rank0_log, *own.values()}}
        self._files |= bars
        self._states = self._current_states()
        self._memory = Memory()
        self._last_output_at = self._checked_at = time.monotonic()
        self._reported = False

    def watch(
        self,
        ranks: Mapping[int, int],
        send: Callable[[Iterable[int], int], None],
        event: Callable[..., None],
    ) -> None:
        """Report when the silence has just become too long, and when it is over.

        Call this regularly.

        Args:
            ranks: pid → rank of this node's workers.
            send: sends some of them a signal.
            event: called with a kind of event and its fields.
        """
        change = self._change()
        if change == "silent":
            files = {
                pid: file for pid in ranks if (file := stack_dump.memory_file(pid)) is not None
            }
            answers = stack_dump.request(files.values(), lambda: send(files, stack_dump.TO_MEMORY))
            found = {
                rank: answers[files[pid]] if pid in files else [] for pid, rank in ranks.items()
            }
            what = (
                f"no output and no metric for {self._patience_s:g} s: {describe_locations(found)}"
            )
            swapped = self._memory.swapped()
            event(change, what=f"{what}; this node is swapping" if swapped > _SWAPS else what)
        elif change == "heard":
            event(change)

    def _change(self) -> str:
        now = time.monotonic()
        if now - self._checked_at < self._patience_s / _CHECKS:
            return ""
        self._checked_at = now
        states = self._current_states()
        if states != self._states:
            self._states, self._last_output_at, self._memory = states, now, Memory()
            if not self._reported:
                return ""
            self._reported = False
            self._patience_s *= 2
            return "heard"
        # without a shared disk, the output of rank 0, which speaks for all, is not visible here
        if (
            self._reported
            or now - self._last_output_at < self._patience_s
            or not self._rank0_log.exists()
        ):
            return ""
        self._reported = True
        return "silent"

    def _current_states(self) -> list[tuple[int, int]]:
        return [_state(path) for path in self._files]


def _state(path: Path) -> tuple[int, int]:
    """Return the size and the time of the last change: a bar keeps its size."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def describe_locations(found: Mapping[int, list[Frame]]) -> str:
    """Describe where ranks are. Ranks in the same location are named together.

    Args:
        found: the stack by rank, innermost call first. Empty if a rank has not answered.
    """
    ranks: dict[str, list[int]] = {}
    for rank, stack in sorted(found.items()):
        at = (failures.only_user_frames(stack) or stack)[:1]
        text = f"at {location(at[0])}: {at[0].code}" if at else "without an answer"
        if any(each.function == run_command.__name__ for each in stack):
            text = "in the command"
        ranks.setdefault(text, []).append(rank)
    return "; ".join(f"{numbered('rank', on)} {text}" for text, on in ranks.items())


def _log(plan: LaunchPlan, rank: int) -> Path:
    return plan.run.rank_log(plan.attempt, rank // plan.procs_per_node, rank)
