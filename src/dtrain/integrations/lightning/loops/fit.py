"""One fit by Lightning's own loops, and dtrain's work at its step boundaries."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from dtrain.errors import UsageError
from dtrain.integrations.lightning import reductions
from dtrain.integrations.lightning.callbacks import StopFit, name_callback, refuse_callbacks
from dtrain.integrations.lightning.compat import (
    PACKAGE,
    MisconfigurationException,
    after,
    extract_batch_size,
    pl,
    quietly,
)
from dtrain.integrations.lightning.environment import disable_signal_handlers
from dtrain.integrations.lightning.loops.reading import Reading
from dtrain.integrations.lightning.loops.state import (
    ExactResults,
    dumped,
    refuse_other_step,
    restored,
)
from dtrain.integrations.lightning.loops.strategy import LoopsDDP, LoopsFSDP
from dtrain.integrations.lightning.loops.trainer_arguments import trainer_arguments
from dtrain.integrations.lightning.module import ModuleTask
from dtrain.integrations.lightning.state import Metrics
from dtrain.train import collectives
from dtrain.train.checkpoint.state import is_sharded, parameters_sha256
from dtrain.train.checkpoint.store import Loaded
from dtrain.train.checks.checks import Checks
from dtrain.train.checks.initial_state import compare_surroundings
from dtrain.train.checks.train_state import TrainState
from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.data.placement import EpochPlan, Position
from dtrain.train.faults import Injector
from dtrain.train.loop.callbacks import Callbacks, View
from dtrain.train.loop.checkpointing import Checkpoints
from dtrain.train.loop.metric_callbacks import Keep
from dtrain.train.loop.progress import Progress, Schedule, refuse_to_end_before
from dtrain.train.loop.reporting import Report
from dtrain.train.metrics.events import Events
from dtrain.train.metrics.phases import PhaseClock
from dtrain.train.seeding import RandomState, derive_seed, seed_everything
from dtrain.train.strategies.base import broadcast_buffers
from dtrain.train.weights.initial import InitialWeights


class _Loss:
    """The loss that a training step returned; a fault of `--inject` replaces the method."""

    def loss(self, module: pl.LightningModule, loss: torch.Tensor) -> torch.Tensor:
        return loss


class Fit(pl.Callback):
    def __init__(self, context: TrainContext, injector: Injector) -> None:
        self._started = time.monotonic()
        self._context, self._injector = context, injector
        spec, task = context.spec, context.task
        assert isinstance(task, ModuleTask)
        compare_surroundings(task, spec.seed)
        seed_everything(derive_seed("model", spec.seed))
        self._module, self._data_module = task.made()
        if context.recorder is not None:
            context.recorder.watch_module(self._module)
        self._see_losses(self._module)
        self._events = Events(context.run, context.ranks, context.attempt)
        self._report = Report(context, self._events)
        self._phases = PhaseClock.of(context)
        self._checkpoints = Checkpoints(context, self._events)
        self._loaded = self._checkpoints.read_newest(_check, keep_open=True)
        self._initial = InitialWeights(context)
        self.progress = Progress()
        if self._loaded is not None:
            self.progress = Progress.from_saved(self._loaded.progress, {})
            refuse_to_end_before(self.progress.position.epoch, spec.train.epochs, "epoch")
            if self._loaded.tensors["extras"]["train"] != spec.to_plain()["train"]:
                self.progress.stopped_early = False  # the job has another end now
        self._schedule = Schedule(spec)
        self._loss = _Loss()
        self._reading = Reading(
            context, self._events, injector, self._module, self.progress, self._loaded
        )
        self._trainer = self._make_trainer()
        self._metrics: Metrics | None = None
        self._validated: dict[str, float] = {}
        self._tested: dict[str, float] = {}
        """The metrics of a validation before the training, and of a test after it."""
        self._before_updates: list[Callable[[], None]] = []
        self._sums: list[float | torch.Tensor] = [0.0, 0.0]
        """The sum of this rank's losses in this step, and the number of their samples."""
        self._rate, self._rate_known = 0.0, False
        """The learning rate of this step, once an optimizer has stepped in it."""
        self._in_step = False
        self._read = self._batch_size = 0
        """The number of samples of all processes in this step so far, and of this process's
        current batch."""
        self._mid_epoch = self.progress.position.consumed > 0
        self._flags = dict.fromkeys(("stop", "save", "end", "busy", "failed"), False)
        self._to_keep: list[Keep] = []
        self._validation_pending = False
        self._begun = False
        self._whole = contextlib.ExitStack()
        """A stack that is open while parameters are whole: in a validation, test or prediction."""
        self._result: TrainResult | None = None

    def run(self) -> TrainResult:
        """Fit to the end, or until a rank is asked to stop.

        Raises:
            DtrainError: a check failed, or the module breaks a rule.
            Exception: the module or a callback raised it.
        """
        with quietly():
            try:
                if self._loaded is None:
                    self._also_run("validate")
                self._trainer.fit(
                    self._module,
                    datamodule=self._data_module,
                    ckpt_path=None if self._loaded is None else str(self._loaded.folder),
                )
                result = self._result or self._without_steps()
                if result.stopped is not None:
                    return result
                self._also_run("test")
                self._also_run("predict")
            except Exception as error:
                name_callback(error, self)
                raise
        result = replace(result, metrics={**result.metrics, **self._tested})
        self._report.finished(result)
        return result

    def _also_run(self, stage: str) -> None:
        """Run another of Lightning's loops if the job asks for it; callbacks write predictions."""
        if stage in self._context.spec.lightning.also_run:
            more = {"return_predictions": False} if stage == "predict" else {"verbose": False}
            getattr(self._trainer, stage)(self._module, datamodule=self._data_module, **more)

    def finish_saving(self) -> None:
        """Wait until the checkpoint that is being written is complete."""
        self._checkpoints.finish()

    def close(self) -> None:
        """End loader processes, and release the module's wrapper."""
        self._checkpoints.close()
        if self._loaded is not None:
            self._loaded.close()
        self._reading.close()
        self._phases.close()
        self._report.close()
        self._strategy.close()

    # -- before the first step ---------------------------------------------------------------

    def _make_trainer(self) -> pl.Trainer:
        context = self._context
        loaded = None if self._loaded is None else restored(self._loaded.tensors)
        kind = LoopsFSDP if context.shards_model else LoopsDDP
        self._strategy = strategy = kind(context, self._weighed, loaded)
        automatic = self._module.automatic_optimization
        # hides its messages about devices and about other packages to install
        logging.getLogger(f"{PACKAGE}.utilities.rank_zero").setLevel(logging.WARNING)
        try:
            trainer = pl.Trainer(
                strategy=strategy, callbacks=[self], **trainer_arguments(context, automatic)
            )
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise UsageError(
                f"lightning.trainer: {error}", code="lightning.trainer-refused"
            ) from None
        disable_signal_handlers(trainer)
        self._join(trainer)
        return trainer

    def _join(self, trainer: pl.Trainer) -> None:
        """Insert dtrain's work between the parts of Lightning's loops."""
        data: Any = trainer._data_connector
        fit: Any = trainer.fit_loop
        steps: Any = fit.epoch_loop
        log: Any = trainer._logger_connector
        advance = steps.advance
        after(trainer._callback_connector, "_attach_model_callbacks", self._check_callbacks)
        after(data, "prepare_data", self._seed_data)
        # here Lightning has made all layers, and restores a checkpoint if there is one
        after(trainer._checkpoint_connector, "_restore_modules_and_callbacks", self._load_initial)
        self._reading.join(trainer)
        steps.advance = lambda fetcher: self._advance(fetcher, advance)
        after(steps, "on_advance_end", self._after_batch)
        after(fit, "on_advance_end", self._after_epoch)
        after(fit, "on_run_end", self._end)
        steps._results = ExactResults(True, trainer)
        for loop in (steps.val_loop, trainer.validate_loop, trainer.test_loop):
            loop._results = ExactResults(False, trainer)
        after(log, "epoch_end_reached", self._combine_results)
        update = log.update_train_epoch_metrics
        log.update_train_epoch_metrics = lambda: self._epoch_ended(update)
        log_metrics = log.log_eval_end_metrics
        log.log_eval_end_metrics = lambda metrics: self._evaluated(metrics, log_metrics)

    def _check_callbacks(self) -> None:
        refuse_callbacks(self._trainer.callbacks, sharded=self._context.shards_model)

    def _seed_data(self) -> None:
        """Seed after `prepare_data`, which runs on one process per node: `setup` draws the same."""
        seed_everything(derive_seed("train_dataset", self._context.spec.seed))

    def _load_initial(self) -> None:
        """Load the initial weights for a fit, and for a validation before it.

        A fit may make the layers again in `setup`, but not after they were sharded.
        """
        is_before = not self._begun and self._trainer.state.fn in ("fit", "validate")
        if is_before and not is_sharded(self._module):
            self._initial.load(self._module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a training stopped that was stopped early."""
        trainer.should_stop = self.progress.stopped_early

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare for the first step; everything is made and restored."""
        self._phases.begin(self.progress.step)
        context = self._context
        optimizers = list(trainer.strategy.optimizers)
        schedulers = [each.scheduler for each in trainer.lr_scheduler_configs]
        self._optimizers = optimizers
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._state = TrainState(
            pl_module,
            optimizers,
            schedulers,
            scaler,
            lambda: self.progress.counters(),
            hear_updates=self._before_updates.append,
        )
        self._metrics = Metrics(pl_module)
        if context.recorder is not None:
            context.recorder.watch_optimizers(optimizers, resumed=self._loaded is not None)
        feed = None if self._reading.placed is None else self._reading.placed.feed
        loss: Any = self._loss
        plan = self._epoch_plan()
        self._injector.begin(loss, self._state, plan.total_steps)
        self._checks = Checks(
            context,
            self._state,
            None,
            feed,
            self._events,
            self._injector.between_steps,
            gradients_stay=pl_module.automatic_optimization,
        )
        self._checks.begin(self.progress.step)
        first = optimizers[0] if optimizers else None
        self._view = View(context, pl_module, first, self._report.note, self._keep)
        self._callbacks = Callbacks(context, self._view, evaluates=trainer.enable_validation)
        self._checkpoints.on_saved = self._callbacks.saved
        if self._loaded is not None:
            self._restore(self._loaded)
        self._callbacks.start(self.progress)
        self._initial.tell(self._events)
        self._report.started(self.progress, plan, resumed=self._loaded is not None)
        if self._validated:
            self._report.measured("validate", self.progress, self._validated)

    def _restore(self, loaded: Loaded) -> None:
        """Restore the parts of a checkpoint that Lightning does not restore."""
        assert self._metrics is not None
        ranks, loops, extras = self._context.ranks, self._trainer.fit_loop, loaded.tensors["extras"]
        self._checkpoints.tell_resumed(loaded, self.progress)
        self._callbacks.load_state_dict(extras["callbacks"])
        self._metrics.load(extras["metrics"], ranks.rank, ranks.world_size)
        loops.epoch_loop._results.load(extras["logged"], ranks.rank)
        known = loaded.tensors["lightning"]["callback_metrics"]
        self._trainer._logger_connector._callback_metrics.update(known)
        self._validation_pending = extras["owes_validation"]
        loaded.close()
        loops.epoch_loop.val_loop.restarting = False

    def _epoch_plan(self) -> EpochPlan:
        """Return the length of this training, for reports."""
        trainer, spec = self._trainer, self._context.spec
        steps, epochs = spec.train.steps, spec.train.epochs
        batches = trainer.fit_loop.max_batches
        placed = self._reading.placed
        size = None if placed is None else placed.feed.order.num_samples
        batch = spec.train.global_batch_size
        if self._module.automatic_optimization is False:
            steps = None  # Lightning counts those of each optimizer
        if epochs is not None and batches != float("inf"):
            per_epoch = -(-int(batches) // trainer.accumulate_grad_batches)
            steps = min(steps or per_epoch * epochs, per_epoch * epochs)
        return EpochPlan(size, batch, epochs, steps, at_least=self._context.ranks.world_size)

    def _advance(self, fetcher: Any, advance: Callable[[Any], None]) -> None:
        """Run a batch; before the first one, restore the state of the batch loop."""
        trainer = self._trainer
        if not self._begun:
            self._begun = self._reading.begun = True
            for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop):
                loop._restarting = False  # every checkpoint is from a step boundary
            if self._loaded is not None:
                # a schedule sets this at the start of an epoch, which was before the checkpoint
                extras = self._loaded.tensors["extras"]
                trainer.accumulate_grad_batches = extras["accumulated"]
            self._begin_random()
            if self._validation_pending:  # Lightning validates after this
                self._validation_pending = False
                return
        if not self._in_step:
            self._in_step, self._read = True, 0
            self._checks.step_begins(self.progress.step + 1, trainer.current_epoch, idle=False)
        advance(fetcher)

    def _begin_random(self) -> None:
        ranks, seed = self._context.ranks, self._context.spec.seed
        random = [] if self._loaded is None else self._loaded.tensors["extras"]["random"]
        self._loaded = None
        if len(random) == ranks.world_size:
            RandomState.from_saved(random[ranks.rank]).restore()
        else:
            seed_everything(derive_seed("train", seed, ranks.rank, self.progress.step))

    # -- in a step ---------------------------------------------------------------------------

    def _see_losses(self, module: pl.LightningModule) -> None:
        """Note the losses within the forward of the strategy's wrapper around the module."""
        step = module.training_step

        @functools.wraps(step)
        def seen(*args: Any, **kwargs: Any) -> Any:
            return self._returned(step(*args, **kwargs))

        module.training_step = seen

    def _returned(self, returned: Any) -> Any:
        """Note the loss that a training step returned, if any; a fault may change it."""
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        if not isinstance(loss, torch.Tensor):
            return returned
        changed = self._loss.loss(self._module, loss)
        samples = self._samples()
        self._sums[0] = self._sums[0] + changed.detach().double() * samples
        self._sums[1] = self._sums[1] + samples
        if changed is loss:
            return returned
        return {**returned, "loss": changed} if isinstance(returned, Mapping) else changed

    def _weighed(self, loss: torch.Tensor) -> torch.Tensor:
        self._checks.finite.note(loss)
        scale = 1.0 if self._reading.placed is None else self._reading.placed.scale()
        return loss if scale == 1.0 else loss * scale

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_size = _size(batch) if self._reading.placed is None else 0
        self._phases.enter("forward")

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor
    ) -> None:
        self._phases.enter("backward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._phases.enter("forward")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Refuse a gradient that is not finite; with `on_nan: skip`, drop it."""
        self._phases.enter("optimizer")
        if optimizer.param_groups and not self._rate_known:
            # the first optimizer's, before its scheduler changes it
            self._rate, self._rate_known = float(optimizer.param_groups[0]["lr"]), True
        for call in self._before_updates:
            call()
        if not self._checks.finite.gradients_are_finite():
            losses = collectives.gather_to_all(self._checks.finite.own_loss())
            if not self._checks.finite.accepts(sum(losses), None):
                for parameter in pl_module.parameters():
                    parameter.grad = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._read += self._samples() * self._context.ranks.world_size
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self._stepped()
        self._phases.enter("data")

    def _samples(self) -> int:
        """Return the number of this process's samples in the current micro-batch."""
        placed = self._reading.placed
        if placed is not None and placed.current is not None:
            return placed.current.samples
        return self._batch_size

    def _stepped(self) -> None:
        """Record a step, compare the ranks and report; requests are acted on later."""
        progress, trainer = self.progress, self._trainer
        epoch = trainer.current_epoch
        ends_epoch = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        progress.step += 1
        samples, before = self._read, progress.position.consumed
        placed = self._reading.placed
        if placed is not None and placed.current is not None:
            samples = placed.current.batch.stop - before
        progress.position = Position(epoch, before + samples)
        if ends_epoch:
            progress.position = Position(epoch + 1, 0)
        self._mid_epoch, self._in_step = not ends_epoch, False
        self._phases.enter("reduction")
        if self._context.ranks.world_size > 1:
            broadcast_buffers(list(self._module.buffers()))
        loss = self._exchange()
        self._phases.enter("other")
        self._checkpoints.proceed(busy=self._flags["busy"], failed=self._flags["failed"])
        self._checkpoints.prepare(self._module, self._optimizers)
        self._record(epoch, loss)
        self._checks.step_ended(progress.step, ends_epoch=ends_epoch)
        self._view.batch_size = samples
        ends = self._callbacks.step(float("nan") if loss is None else loss, ends_epoch=ends_epoch)
        self._flags["end"] = self._flags["end"] or ends
        values = functools.partial(self._values, loss, self._sums)
        self._report.step(progress.step, epoch, samples, values)
        self._sums, self._rate_known = [0.0, 0.0], False
        self._phases.step_done(progress.step)

    def _exchange(self) -> float | None:
        """Exchange requests, and losses if they are used; return the mean loss."""
        is_used = self._report.due(self.progress.step) or self._context.recorder is not None
        total, weight = map(float, self._sums) if is_used else (0.0, 0.0)
        requests = [
            self._context.stop.reason is not None,
            self._context.ranks.is_rank_zero and self._checkpoints.overdue,
            self._view.ending is not None,
            *self._checkpoints.state(),
        ]
        total, weight, *counts = _summed([total, weight, *map(float, requests)])
        self._flags = dict(zip(self._flags, (each > 0 for each in counts), strict=True))
        return total / weight if weight else None

    def _values(self, loss: float | None, sums: list[float | torch.Tensor]) -> dict[str, float]:
        """Return a line of metrics with the values that the step logged. Called by all ranks.

        Args:
            loss: the mean over all ranks if it is known.
            sums: the sum of this rank's losses in the step, and the number of their samples.
        """
        if loss is None:  # the line was not due until this became the last step
            total, weight = _summed([float(each) for each in sums])
            loss = total / weight if weight else None
        results = self._trainer.fit_loop.epoch_loop._results
        logged = reductions.of_step(results, float(self._samples()))
        values = {} if loss is None else {"loss": loss}
        values |= {"lr": self._rate} if self._optimizers else {}
        self._report.keep_names("train", logged.keys() - values.keys())
        return {**logged, **values}

    def _epoch_ended(self, update: Callable[[], None]) -> None:
        """Write the values logged for the epoch, before Lightning's update resets them."""
        values = reductions.of_epoch(self._trainer.fit_loop.epoch_loop._results)
        self._report.keep_names("train", values)
        self._report.epoch_ended(self.progress, values)
        update()

    def _record(self, epoch: int, loss: float | None) -> None:
        if self._context.recorder is not None:
            self._context.recorder.step(self.progress.step, epoch, loss=loss, grad_norm=None)

    # -- between two steps -------------------------------------------------------------------

    def _after_batch(self) -> None:
        """Act on requests, unless the epoch ends here: `_after_epoch` acts after its hooks."""
        loop = self._trainer.fit_loop.epoch_loop
        if self._flags["end"]:
            self.progress.stopped_early = self._trainer.should_stop = True
        if not self._in_step and not loop.done:
            self._boundary()

    def _after_epoch(self) -> None:
        """Act on requests after an epoch; after the last one, `_end` follows and saves."""
        trainer = self._trainer
        self._in_step = False  # it is True if the last batch was skipped
        if trainer.fit_loop.done:
            return
        self._mid_epoch = False
        self.progress.position = Position(trainer.current_epoch, 0)
        if self._reading.placed is not None:
            self._reading.placed.skip_to_epoch(trainer.current_epoch)
        self._boundary()

    def _boundary(self) -> None:
        if self._flags["stop"]:
            self._stop(validation_pending=False)
        to_keep, self._to_keep = self._to_keep, []
        due = to_keep or self._flags["save"] or self._schedule.save_due(self.progress)
        with self._phases.within("checkpoint"):
            if due and self._save(urgent=bool(to_keep)):
                self._checkpoints.keep(self.progress.step, *to_keep)
        if self._mid_epoch:
            self._checks.between_steps()

    def _save(
        self, *, wait: bool = False, urgent: bool = False, validation_pending: bool = False
    ) -> bool:
        """Save a checkpoint unless this step has one; return whether the state is good.

        Args:
            wait: whether to return when it is on disk.
            urgent: whether to save even if another save is in progress.
            validation_pending: whether Lightning has to validate after a resume.
        """
        placed, progress = self._reading.placed, self.progress
        if wait:
            self._checkpoints.finish()
        if placed is not None:
            placed.feed.check()
        if not self._checks.before_save(progress.step):
            return False
        if self._checkpoints.saved_step == progress.step:
            return True
        if not self._checkpoints.may_begin(progress.step, urgent=wait or urgent):
            return True
        if placed is not None:
            progress.feed = placed.feed.state_dict()
        assert self._metrics is not None
        extras = {
            "random": collectives.gather_to_zero(RandomState.capture().to_saved()),
            "metrics": self._metrics.state(),
            "logged": self._trainer.fit_loop.epoch_loop._results.state(),
            "callbacks": self._callbacks.state_dict(),
            "train": self._context.spec.to_plain()["train"],
            "owes_validation": validation_pending,
            "accumulated": self._trainer.accumulate_grad_batches,
        }
        with self._strategy.keeping_shards():
            state = dumped(self._trainer, mid_epoch=self._mid_epoch or validation_pending)
        own = {"lightning": state.pop("lightning"), "extras": extras}
        saved = progress.to_saved(self._reading.identity)
        self._checkpoints.write(progress.step, state, own, saved, wait=wait)
        return True

    def _keep(self, asked: Keep) -> None:
        self._to_keep.append(asked)

    def _stop(self, *, validation_pending: bool) -> None:
        self._report.last_step()
        self._checkpoints.stopping(self.progress.step)
        self._save(wait=True, validation_pending=validation_pending)
        reasons = collectives.gather_to_all(self._context.stop.reason)
        rank, reason = next((r, why) for r, why in enumerate(reasons) if why is not None)
        self._report.left(self.progress, reason, rank)
        self._result = self._as_result(stopped=reason)
        raise StopFit

    def _end(self) -> None:
        """End after Lightning's `on_train_end`, in which callbacks may change the weights."""
        self._report.last_step()
        if self._trainer.should_stop:
            self.progress.stopped_early = True
        self._validate_at_end()
        self._injector.end(self._state, self.progress.step)
        if self._save(wait=True):
            self._checkpoints.keep(self.progress.step, *self._to_keep)
        self._callbacks.end()
        self._result = self._as_result(parameters_sha256=parameters_sha256(self._module))

    def _validate_at_end(self) -> None:
        """Validate the final state, unless that is done."""
        trainer = self._trainer
        if not trainer.enable_validation or self.progress.evaluated_step == self.progress.step:
            return
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    # -- validation --------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make parameters whole before other callbacks: ranks may have unequally many batches."""
        self._whole.enter_context(self._phases.within("evaluation"))
        self._whole.enter_context(self._strategy.whole())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._whole.close()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Stop in a validation if a rank is asked to stop; the next attempt validates again."""
        if (
            trainer.state.fn != "fit"
            or trainer.sanity_checking
            or not self._reading.validation_is_placed
            or self._in_step
        ):
            return
        asked = torch.tensor(int(self._context.stop.reason is not None))
        if collectives.in_group():
            dist.all_reduce(asked)
        if int(asked):
            trainer.fit_loop.epoch_loop.val_loop._module_mode.restore(pl_module)
            self._whole.close()
            self._stop(validation_pending=True)

    def _combine_results(self) -> None:
        if not self._trainer.sanity_checking:
            results: Any = self._trainer._results
            results.combine()

    def _evaluated(self, metrics: Mapping[str, Any], log_metrics: Callable[[Any], None]) -> None:
        log_metrics(metrics)
        stage, known = self._trainer.state.fn, {n: float(each) for n, each in metrics.items()}
        if self._trainer.sanity_checking:
            return
        if stage == "validate":
            self._validated = known
            self._report.keep_names("validate", known)
        if stage == "test":
            self._tested = known
            self._report.keep_names("test", known)
            self._report.measured("test", self.progress, known)
        if stage != "fit":
            return
        progress = self.progress
        progress.metrics = known
        self._report.keep_names("eval", known)
        progress.evaluated_step = progress.step
        self._report.evaluated(progress)
        if self._callbacks.evaluated(progress.metrics):
            self._flags["end"] = True

    def _without_steps(self) -> TrainResult:
        """Return the result if no step was left: the checkpoint is from the last step."""
        if self._loaded is None:
            raise UsageError(
                f"{type(self._module).__name__} trained nothing: Lightning's fit ended before its "
                "first batch, for example because of limit_train_batches: 0",
                code="lightning.no-batches",
            )
        self._report.started(self.progress, self._epoch_plan(), resumed=True)
        self._checkpoints.tell_resumed(self._loaded, self.progress)
        return self._as_result(parameters_sha256=parameters_sha256(self._module))

    def _as_result(self, **ended: Any) -> TrainResult:
        return TrainResult(
            metrics=self.progress.metrics,
            steps=self.progress.step,
            seconds=time.monotonic() - self._started,
            stopped_early=self.progress.stopped_early,
            checkpoint=self._checkpoints.folder,
            **ended,
        )


def _check(found: Loaded) -> None:
    """Refuse a checkpoint that was not made with Lightning's loops."""
    refuse_other_step(found.tensors)


def _summed(values: list[float]) -> list[float]:
    """Return the sums of numbers over all ranks."""
    sums = torch.tensor(values, dtype=torch.float64)
    if collectives.in_group():
        dist.all_reduce(sums)
    return [float(each) for each in sums]


def _size(batch: Any) -> int:
    """Return the number of samples in a batch; 1 if Lightning cannot find it."""
    try:
        return int(extract_batch_size(batch))
    except MisconfigurationException:
        return 1
