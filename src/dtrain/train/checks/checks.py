"""All checks of one training; the training loop calls them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist

from dtrain.train import collectives
from dtrain.train.checks.collective_trace import CHAIN
from dtrain.train.checks.finite import FiniteGuard
from dtrain.train.checks.notices import (
    BufferWrites,
    Unused,
    warn_of_batch_norm,
    warn_of_param_dtype,
)
from dtrain.train.checks.replicas import Ledger, ReplicaError
from dtrain.train.checks.train_state import BUFFERS, MOMENTS, PARAMETERS, TrainState
from dtrain.train.checks.unexpected_change import UnexpectedChangeDetector
from dtrain.train.context import TrainContext
from dtrain.train.data.pipeline import Feed
from dtrain.train.loss import LossModule
from dtrain.train.metrics.events import Events

logger = logging.getLogger(__name__)

_FIRST_STEPS = 3
"""The number of first steps in which the writes of each rank to buffers are recorded."""


class Rollback(Exception):
    """A request to go back to the newest checkpoint. `error` is raised if that is impossible."""

    def __init__(self, error: ReplicaError) -> None:
        super().__init__(str(error))
        self.error = error


class Checks:
    """Compares ranks every `checks.every_steps` steps, and watches state that cannot be compared.

    Args:
        context: the context of the training.
        subject: the state of the training.
        loss: the task's loss over the model. None means that it cannot be computed a second time.
        feed: the training data. None means that dtrain does not read them.
        events: the events of the run.
        fault_hook: called with each step before its first forward. A fault in state that is kept
            between two steps is visible to every check at this point.
        gradients_stay: whether a step's gradients still exist after the step.
    """

    def __init__(
        self,
        context: TrainContext,
        subject: TrainState,
        loss: LossModule | None,
        feed: Feed | None,
        events: Events,
        fault_hook: Callable[[TrainState, int], None],
        *,
        gradients_stay: bool = True,
    ) -> None:
        spec = context.spec.checks
        self._spec = spec
        self._context = context
        self._ranks = context.ranks
        self._events = events
        self._feed = feed
        self._subject = subject
        self._fault_hook = fault_hook
        self._ledger = Ledger(subject) if spec.every_steps and collectives.in_group() else None
        self._unchanged_state, self._unchanged_buffers = _detectors(subject, context)
        writes = BufferWrites(subject.model, events, context)
        self._writes = writes if self._ledger is not None and writes.needed else None
        self._first_steps_end = 0
        self._unused = Unused(
            subject.parameters(), events, active=context.ranks.is_rank_zero and gradients_stay
        )
        self.finite = FiniteGuard(subject, loss, feed, context.spec, context.ranks, context.device)
        self._agreed: int | None = None
        """The last step after which all ranks were the same."""
        self._found: list[str] = []
        self._watched = False
        """Whether the ranks were compared after the last step, so that this step is watched."""
        self._warned: set[str] = set()

    def begin(self, step: int) -> None:
        """Compare what the ranks have built or loaded, before the first step.

        Args:
            step: the number of steps done.
        """
        CHAIN.reset()
        warn_of_batch_norm(self._subject.model, self._context, self._events)
        warn_of_param_dtype(self._context, self._events)
        self._compare(step)
        self._first_steps_end = step + _FIRST_STEPS
        watched = self._unchanged_state is not None or self._writes is not None
        if watched:
            self._subject.before_updates(self._before_update)

    def step_begins(self, step: int, epoch: int, *, idle: bool) -> None:
        """Begin the checks of a step, before its first forward. Steps are counted from 1."""
        if self._watched and self._unchanged_state is not None:
            self._unchanged_state.begin()
        self._fault_hook(self._subject, step)
        if self._watched and self._unchanged_buffers is not None:
            self._found += self._unchanged_buffers.end()
        self.finite.begin(step, epoch)
        if self._writes is not None and (self._watched or step <= self._first_steps_end):
            self._writes.begin(idle=idle)

    def step_ended(self, step: int, *, ends_epoch: bool) -> None:
        """Run the checks that follow a step. All ranks must call it.

        Raises:
            ReplicaError: ranks differ, and the policy is to stop.
            Rollback: ranks differ, and the policy is to roll back.
            DtrainError: samples were read twice or not at all.
        """
        self._unused.step(step, ends_epoch=ends_epoch)
        if self._writes is not None:
            self._writes.end(step)
        if self._watched:
            self._end_watch(step)
        every = self._spec.every_steps
        if every and step % every == 0:
            if self._feed is not None:
                self._feed.check()
            self._compare(step)
            self._watched = self._unchanged_state is not None or self._unchanged_buffers is not None

    def between_steps(self) -> None:
        """Begin to watch the buffers, after the callbacks of a step: nothing may change them."""
        if self._watched and self._unchanged_buffers is not None:
            self._unchanged_buffers.begin()

    def before_save(self, step: int) -> bool:
        """Make sure, before a checkpoint, that ranks agree on its content and that it is finite.

        The ranks are compared even if this step was compared: callbacks have run since.

        Returns:
            Whether a checkpoint may be saved.

        Raises:
            NonFiniteError: something is not finite, and the policy is not to warn.
            ReplicaError: ranks differ, and the policy is to stop.
            Rollback: ranks differ, and the policy is to roll back.
        """
        self._compare(step)
        return self.finite.allows_saving(step)

    def _compare(self, step: int) -> None:
        if self._ledger is None:
            return
        mismatch = self._ledger.compare()
        if mismatch is None:
            self._agreed = step
            return
        self._act(step, mismatch.text, list(mismatch.culprits), list(mismatch.kinds))

    def _act(self, step: int, text: str, culprits: list[int], kinds: list[str]) -> None:
        before = "" if self._agreed is None else f"were one model after step {self._agreed} and "
        error = ReplicaError(
            f"the replicas {before}are not one model after step {step}:\n{text}",
            culprits,
            self._ranks.rank,
        )
        key = repr((kinds, culprits))
        if key not in self._warned:
            self._warned.add(key)
            self._events.write(
                "replicas_differ", step=step, agreed=self._agreed, ranks=culprits, kinds=kinds,
                detail=text,
            )  # fmt: skip
            if self._spec.on_mismatch == "warn" and self._ranks.is_rank_zero:
                logger.warning("%s", error)
        if self._spec.on_mismatch == "stop":
            raise error
        if self._spec.on_mismatch == "rollback":
            raise Rollback(error)

    # -- state that is compared with itself --------------------------------------------------

    def _before_update(self) -> None:
        if self._watched and self._unchanged_state is not None:
            self._found += self._unchanged_state.end()
        if self._writes is not None:
            self._writes.before_update()

    def _end_watch(self, step: int) -> None:
        """Act on all ranks on what any rank has found since the last comparison."""
        self._watched = False
        found, self._found = self._found, []
        if collectives.in_group():
            flag = torch.tensor(len(found))
            dist.all_reduce(flag)
            if not int(flag):
                return
        everyone = collectives.gather_to_all(found)
        culprits = [rank for rank, theirs in enumerate(everyone) if theirs]
        if not culprits:
            return
        lines = [
            f"rank {rank} holds other bits than after step {step - 1}, although the training had "
            f"not changed them:\n{'; '.join(everyone[rank])}"
            for rank in culprits
        ]
        self._act(step, "\n".join(lines), culprits, ["held"])


def _detectors(
    subject: TrainState, context: TrainContext
) -> tuple[UnexpectedChangeDetector | None, UnexpectedChangeDetector | None]:
    """Return detectors for the state that only an update changes, and that only a forward does."""
    several = collectives.in_group() or context.local_devices > 1
    if not context.spec.checks.every_steps or not several:
        return None, None
    no_copy = subject.is_cut() or not collectives.in_group()
    buffers = any(True for _ in subject.model.buffers())
    return (
        UnexpectedChangeDetector(subject, (PARAMETERS, MOMENTS)) if no_copy else None,
        UnexpectedChangeDetector(subject, (BUFFERS,)) if buffers else None,
    )
