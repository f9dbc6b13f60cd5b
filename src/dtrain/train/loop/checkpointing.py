"""What a checkpoint of the native trainer holds, and how a training is restored from it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from dtrain.errors import CheckpointError
from dtrain.train import collectives
from dtrain.train.checkpoint.content import contribution
from dtrain.train.checkpoint.leaves import refuse_unreadable, restoring
from dtrain.train.checkpoint.parts import is_part, whole
from dtrain.train.checkpoint.retention import Retention
from dtrain.train.checkpoint.state import (
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    plain_parameters,
)
from dtrain.train.checkpoint.store import CheckpointStore, Loaded, Saved
from dtrain.train.context import TrainContext
from dtrain.train.digest import local
from dtrain.train.loop.callbacks import Callbacks
from dtrain.train.loop.grace import Grace
from dtrain.train.loop.metric_callbacks import Keep
from dtrain.train.loop.progress import Progress, SaveClock
from dtrain.train.loop.settings import Settings
from dtrain.train.loop.step import Parts
from dtrain.train.loop.task_state import Kept
from dtrain.train.metrics.events import Events
from dtrain.train.seeding import RandomState, derive_seed, seed_everything

logger = logging.getLogger(__name__)


class Checkpoints:
    """Writes and reads the checkpoints of a run. All ranks call its methods."""

    def __init__(self, context: TrainContext, events: Events) -> None:
        self._context = context
        self._events = events
        self._spec = spec = context.spec.checkpoint
        retention = Retention.of(spec)
        self._store = CheckpointStore(context.run, context.ranks, retention, spec.staging)
        self.saved_step: int | None = None
        """The step of the checkpoint that was saved or read last; it may still be being written."""
        self.folder: Path | None = None
        """The directory of the last checkpoint that is complete."""
        self.on_saved: Callable[[Path], None] = lambda folder: None
        """Called with the directory of each checkpoint once it is on disk."""
        self._complete_step: int | None = None
        """The step of the last checkpoint that is complete."""
        self._to_keep: list[Keep] = []
        """The requests for the checkpoint that is being written."""
        self._is_prepared = False
        self._stop_s = self._stops_s = 0.0
        """How long training stopped for the last save, and for all, in seconds."""
        self._clock = SaveClock(spec)
        self._is_interval_told = False
        self._begun = 0
        """The number of saves that were begun."""
        self._grace = Grace(context, events)
        self._counts = {"saved": 0, "waited": 0, "skipped": 0, "failed": 0}
        """The numbers of checkpoints; `waited` for another to be written."""

    def prepare(self, model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Prepare for the first save, after a step: before it, optimizers have no state."""
        spec = self._spec
        if self._is_prepared or not (spec.every_steps or spec.every_epochs or spec.every):
            return
        self._is_prepared = True
        states = [state for each in optimizers for state in getattr(each, "state", {}).values()]
        values = [v for state in states if isinstance(state, dict) for v in state.values()]
        values += [*model.parameters(), *model.buffers()]
        tensors = [each for each in values if isinstance(each, torch.Tensor)]
        sharded = sum(local(each).nbytes for each in tensors if is_part(each))
        replicas = sum(each.nbytes for each in tensors if not is_part(each))
        size = sharded + replicas // self._context.ranks.world_size
        self._store.prepare(int(1.02 * size) + (1 << 20))

    def may_begin(self, step: int, *, urgent: bool) -> bool:
        """Make sure that no save is in progress. Return False to skip the save of this step.

        Args:
            step: the number of optimizer steps done.
            urgent: whether to wait, also if the job says to skip.
        """
        if not self._store.saving:
            return True
        if self._spec.busy == "skip" and not urgent:
            before = self.saved_step
            logger.info(
                "no checkpoint after step %d: that of step %s is being written", step, before
            )
            self._events.write("checkpoint_skipped", step=step, writing=before)
            self._counts["skipped"] += 1
            self._restart_clock()
            return False
        started = time.monotonic()
        self.finish()
        seconds = time.monotonic() - started
        self._events.write("checkpoint_waited", step=step, seconds=round(seconds, 3))
        self._counts["waited"] += 1
        self._stops_s += seconds
        return True

    def write(
        self,
        step: int,
        state: dict[str, Any],
        own: dict[str, Any],
        progress: dict[str, Any],
        *,
        wait: bool,
    ) -> None:
        """Write a checkpoint; a large one while the training goes on.

        Args:
            step: the number of optimizer steps done.
            state: trees of state by name, the same on all ranks; tensors may be sharded.
            own: more trees by name, of which those of rank 0 are saved.
            progress: the progress as plain JSON.
            wait: whether to return when it is on disk.

        Raises:
            CheckpointError: it cannot be written. Then no part of it is left behind.
        """
        started = time.monotonic()
        about = {
            "time": time.time(),
            "torch": torch.__version__,
            "strategy": self._context.spec.strategy,
            "world_size": self._context.ranks.world_size,
        }
        ranks = self._context.ranks
        content = contribution(state, own, progress, ranks.rank, ranks.world_size)
        self.saved_step = step
        with self._policy():
            saved = self._store.save(step, content, about, wait=wait)
            self._stop_s = time.monotonic() - started
            self._stops_s += self._stop_s
            self._begun += 1
            self._completed(saved)
        self._restart_clock()

    def state(self) -> tuple[bool, bool]:
        """Return whether this rank is still writing, and whether that has failed.

        Only this method is not called by all ranks.
        """
        return self._store.state()

    def proceed(self, *, busy: bool, failed: bool) -> None:
        """Go on with the save in progress, at a step boundary. No save has begun since `state`.

        Args:
            busy: whether any rank was still writing.
            failed: whether it has failed on any rank.
        """
        if self._store.saving and (failed or not busy):
            with self._policy():
                self._completed(self._store.proceed())

    def finish(self) -> None:
        """Wait until the save in progress is complete."""
        with self._policy():
            self._completed(self._store.finish())

    @property
    def overdue(self) -> bool:
        """Whether a checkpoint is due by this process's clock. Only that of rank 0 counts."""
        return self._clock.overdue

    def _restart_clock(self) -> None:
        self._clock.restart(self._stops_s / self._begun if self._begun else None)
        if self._clock.chooses and self._begun and not self._is_interval_told:
            self._is_interval_told = True
            every, cost = self._clock.every_s or 0.0, self._stop_s
            self._events.write(
                "checkpoint_interval", seconds=round(every, 3), stop_seconds=round(cost, 3)
            )
            logger.info("a checkpoint every %.3g s: each stops training for %.2g s", every, cost)

    def stopping(self, step: int) -> None:
        """Report if the time may not suffice for the checkpoint of a training that has to stop."""
        self._grace.stopping(step, int(self._store.saving) + int(self.saved_step != step))

    def close(self) -> None:
        """End the process that writes, and report. A save in progress is lost."""
        self._store.close()
        counts, seconds = self._counts, round(self._stops_s, 3)
        if any(number for what, number in counts.items() if what != "saved"):
            shown = ", ".join(f"{number} {what}" for what, number in counts.items())
            logger.info("checkpoints: %s; training stopped %.2f s for them", shown, seconds)
            self._events.write("checkpoints", **counts, stop_seconds=seconds)

    @contextlib.contextmanager
    def _policy(self) -> Iterator[None]:
        """Act as `checkpoint.on_error` says if a save fails."""
        try:
            yield
        except CheckpointError as error:
            step, self.saved_step = self.saved_step, self._complete_step
            self._to_keep = []
            self._counts["failed"] += 1
            if self._spec.on_error == "stop":
                raise
            self._events.write("checkpoint_failed", step=step, code=error.code, detail=str(error))
            if self._context.ranks.is_rank_zero:
                logger.warning("%s\ntraining goes on without it (checkpoint.on_error)", error)

    def _completed(self, saved: Saved | None) -> None:
        """Report a checkpoint that is complete, if there is one."""
        if saved is None:
            return
        self.folder, self._complete_step = saved.folder, self.saved_step
        self._counts["saved"] += 1
        text = f"saved {saved.folder.name}: {saved.bytes / 1e6:.1f} MB in {saved.seconds:.2f} s"
        went_on = self._stop_s < saved.seconds
        self._grace.measured(self.saved_step, saved.write_seconds, in_background=went_on)
        logger.info("%s%s", text, f"; training stopped {self._stop_s:.2f} s" if went_on else "")
        self._events.write(
            "checkpoint_saved",
            step=self.saved_step,
            checkpoint=saved.folder.name,
            bytes=saved.bytes,
            seconds=round(saved.seconds, 3),
            stop_seconds=round(self._stop_s, 3),
        )
        self.on_saved(saved.folder)
        to_keep, self._to_keep = self._to_keep, []
        self._keep(saved.folder, to_keep)

    def read_newest(
        self, apply: Callable[[Loaded], None], *, keep_open: bool = False
    ) -> Loaded | None:
        """Return the newest intact checkpoint that `apply` accepts, or None when there is none yet.

        Raises:
            CheckpointError: there are checkpoints, but none can be used.
        """
        return self._store.load_newest(apply, keep_open=keep_open)

    def tell_resumed(self, loaded: Loaded, progress: Progress) -> None:
        """Report which checkpoint a training resumed from."""
        self.saved_step = self._complete_step = progress.step
        self.folder = loaded.folder
        logger.info("resumed from %s, after %d steps", loaded.folder.name, progress.step)
        self._events.write(
            "resumed",
            step=progress.step,
            epoch=progress.position.epoch,
            consumed=progress.position.consumed,
            checkpoint=loaded.folder.name,
            rejected=loaded.rejected,
        )

    def keep(self, step: int, *asked: Keep) -> None:
        """Keep the checkpoint of a step, which was just saved, as callbacks have asked."""
        if self._store.saving:
            self._to_keep += asked
        elif self._complete_step == step:
            assert self.folder is not None
            with self._policy():
                self._keep(self.folder, asked)

    def _keep(self, folder: Path, asked: Iterable[Keep]) -> None:
        for each in asked:
            if each.score is not None:
                self._store.score(folder, *each.score)
            if each.as_best:
                self._store.keep_as(folder, "best")


class Saver(Checkpoints):
    """Saves and resumes the training of a task."""

    def __init__(
        self,
        context: TrainContext,
        parts: Parts,
        callbacks: Callbacks,
        kept: Kept,
        data: dict[str, Any],
        events: Events,
    ) -> None:
        super().__init__(context, events)
        self._parts = parts
        self._callbacks = callbacks
        self.on_saved = callbacks.saved
        self._kept = kept
        self._data = data
        named = plain_parameters(parts.model).items()
        self._parameters = {name: (each, each.requires_grad) for name, each in named}
        """Each parameter by name, and whether the task made it with a gradient."""
        self._settings = Settings(context.spec, parts)
        self._random: dict[str, Any] | None = None
        self._not_restored: list[str] = []
        """State that only the checkpoint or only this training has, one sentence each."""

    def save(self, progress: Progress, *, wait: bool, urgent: bool) -> None:
        """Save a checkpoint unless this step has one. All ranks call it.

        Args:
            progress: the progress to save.
            wait: whether to return when it is on disk.
            urgent: whether to save even if another save is in progress, and the job says to skip.
        """
        if self.saved_step == progress.step or not self.may_begin(progress.step, urgent=urgent):
            return
        random = collectives.gather_to_zero(RandomState.capture().to_saved())
        settings = self._settings.to_saved()
        extras = {**self.small_states(), "random": random, "settings": settings}
        parts = self._parts
        state = {
            "model": model_state(parts.model, keep_vars=True),
            "optimizer": optimizer_state(parts.model, parts.optimizer),
            **self._kept.to_saved(),
        }
        saved = progress.to_saved(self._data)
        self.write(progress.step, state, {"extras": extras}, saved, wait=wait)

    def resume(self) -> Progress | None:
        """Restore the newest intact checkpoint. Return None when the run has none yet.

        Raises:
            CheckpointError: there are checkpoints, but none can be used.
        """
        loaded = self.read_newest(self._apply)
        if loaded is None:
            return None
        progress = Progress.from_saved(loaded.progress, self._data)
        if self._settings.has_new_course(loaded.tensors["extras"]["settings"]):
            progress.stopped_early = False
        self.tell_resumed(loaded, progress)
        for each in self._not_restored:
            self._events.write("state_not_restored", step=progress.step, detail=each)
            if self._context.ranks.is_rank_zero:
                logger.warning("checkpoint %s: %s", loaded.folder.name, each)
        return progress

    def begin_random(self, progress: Progress) -> None:
        """Seed this rank's generators; with the same world size, restore their saved state."""
        if self._random is not None:
            RandomState.from_saved(self._random).restore()
            return
        seed = self._context.spec.seed
        seed_everything(derive_seed("train", seed, self._context.ranks.rank, progress.step))

    def _apply(self, loaded: Loaded) -> None:
        """Load a checkpoint into the parts. Everything is checked before anything is changed."""
        Progress.from_saved(loaded.progress, self._data)
        with restoring("this training"):
            self._load(loaded.tensors)

    def _load(self, tensors: dict[str, Any]) -> None:
        parts, extras = self._parts, tensors["extras"]
        optimizer = {**tensors["optimizer"], "groups": whole(tensors["optimizer"]["groups"])}
        notes = self._settings.reconcile(extras["settings"], optimizer["groups"])
        with restoring("the model"):
            load_model_state(parts.model, tensors["model"])
        with restoring("the optimizer"):
            load_optimizer_state(parts.model, parts.optimizer, optimizer)
        for name, part in (("scheduler", parts.scheduler), ("scaler", parts.scaler)):
            if part is not None and extras[name] is not None:
                with restoring(f"the {name}"):
                    part.load_state_dict(extras[name])
        self._callbacks.load_state_dict(extras["callbacks"])
        for name, (each, made) in self._parameters.items():
            each.requires_grad_(extras["requires_grad"].get(name, made))
        self._not_restored = [*notes, *self._kept.load(tensors)]
        ranks, random = self._context.ranks, extras["random"]
        self._random = random[ranks.rank] if len(random) == ranks.world_size else None

    def small_states(self) -> dict[str, Any]:
        """Return the states of scheduler, scaler and callbacks, and which parameters are frozen.

        It is also called before training, so that nothing is trained that cannot be saved.

        Raises:
            DtrainError: one of these states, the optimizer's or a module's holds an object that a
                checkpoint cannot restore; the message has its path.
        """
        parts, scheduler = self._parts, self._parts.scheduler
        small = {
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "scaler": None if parts.scaler is None else parts.scaler.state_dict(),
            "callbacks": self._callbacks.state_dict(),
        }
        small["requires_grad"] = {
            name: each.requires_grad
            for name, (each, made) in self._parameters.items()
            if each.requires_grad != made
        }
        kind = type(getattr(scheduler, "scheduler", scheduler)).__name__
        refuse_unreadable(small["scheduler"], f"state_dict() of scheduler {kind}")
        optimizer = parts.optimizer
        refuse_unreadable(
            optimizer.state_dict(),
            f"state_dict() of optimizer {type(optimizer).__name__}",
            parts=True,
        )
        for name, value in parts.model.state_dict().items():
            if not isinstance(value, torch.Tensor):
                refuse_unreadable(value, f"get_extra_state() of the model, {name}")
        return small
