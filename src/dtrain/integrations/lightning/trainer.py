"""Trainer `lightning`: a dtrain task, or a LightningModule, under Lightning's Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from dtrain.callback import Callback
from dtrain.errors import DtrainError, UsageError
from dtrain.integrations.lightning import reductions
from dtrain.integrations.lightning.callbacks import (
    StopFit,
    add_callbacks,
    name_callback,
    refuse_callbacks,
    why_callback_needs_loops,
)
from dtrain.integrations.lightning.compat import PACKAGE, after, call, is_overridden, pl, quietly
from dtrain.integrations.lightning.environment import DtrainStrategy, disable_signal_handlers
from dtrain.integrations.lightning.logging import Logged
from dtrain.integrations.lightning.module import ModuleTask
from dtrain.integrations.lightning.state import Counts, EpochSums, States
from dtrain.integrations.lightning.step_loader import StepLoader
from dtrain.ranks import RankInfo
from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.faults import Injector
from dtrain.train.loop.callbacks import listed
from dtrain.train.loop.native import NativeTrainer
from dtrain.train.loop.task_state import Kept
from dtrain.train.loop.training import Training

logger = logging.getLogger(__name__)


class LightningTrainer(NativeTrainer):
    """A trainer in which Lightning runs the loop, hooks, callbacks and loggers, but not the step.

    The step is dtrain's. So samples, gradients, checks, evaluation and checkpoints are those of
    trainer `native`, bit for bit, and a run may change between the two.
    """

    def __init__(self, context: TrainContext) -> None:
        super().__init__(context)
        task = context.task
        self._lightning_callbacks: list[pl.Callback] = []
        given = task.callbacks
        task.callbacks = lambda: self._dtrain_callbacks(given())  # type: ignore[method-assign]

    def _dtrain_callbacks(self, callbacks: Any) -> list[Callback]:
        """Return the callbacks of dtrain, and keep Lightning's for its Trainer."""
        given = listed(callbacks)
        self._lightning_callbacks = [each for each in given if isinstance(each, pl.Callback)]
        own = [each for each in given if not isinstance(each, pl.Callback)]
        for each in own:
            if not isinstance(each, Callback):
                origin, name = type(each).__module__.partition(".callbacks")[0], type(each).__name__
                known = f"dtrain or {PACKAGE}"
                raise DtrainError(
                    f"callbacks() returned a {name} of {origin}, not one of {known}",
                    code="task.bad-callbacks",
                )
        return own

    def begin(self, context: TrainContext, injector: Injector, kept: Kept) -> Any:
        """Make Lightning's Trainer first, because a module may use it while it is set up."""
        self._drive = _Drive(context)
        return super().begin(context, injector, kept)

    def drive(self, training: Any) -> TrainResult:
        """Run all steps in Lightning's fit loop."""
        try:
            return self._drive.run(training, self._lightning_callbacks)
        finally:
            del self._drive  # it refers to the training, which is closed before another is made

    def evaluation_wrapper(self, evaluate: Any) -> dict[str, float] | None:
        return self._drive.evaluate(evaluate)


class TaskModule(pl.LightningModule):
    """A LightningModule with a task's model: `pl_module.model` in Lightning's callbacks."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self) -> None:
        """Do nothing; Lightning requires this method. See `DtrainStrategy.training_step`."""

    def configure_optimizers(self) -> None:
        """Do nothing; Lightning requires this method. See `DtrainStrategy.setup`."""


class _Drive(pl.Callback):
    """The callback that connects one fit of Lightning with a training of dtrain."""

    def __init__(self, context: TrainContext) -> None:
        # hides its messages about devices and about other packages to install
        logging.getLogger(f"{PACKAGE}.utilities.rank_zero").setLevel(logging.WARNING)
        self._context = context
        self._task = context.task if isinstance(context.task, ModuleTask) else None
        self._exhausted = self._stopping = False
        self._result: TrainResult | None = None
        self._trainer = trainer = self._make_trainer()
        disable_signal_handlers(trainer)
        fit: Any = trainer.fit_loop
        after(fit.epoch_loop, "on_advance_end", self._after_batch)
        after(fit, "on_advance_end", self._settle)
        after(fit, "on_run_end", self._finish)
        log: Any = trainer._logger_connector
        fit.epoch_loop._results = reductions.QuietResults(True, trainer)
        update = log.update_train_epoch_metrics
        log.update_train_epoch_metrics = lambda: self._epoch_ended(update)
        if self._task is not None:
            spec = context.spec
            self._task.attach(trainer, spec.seed, spec.train.global_batch_size)

    def run(self, training: Training, callbacks: list[pl.Callback]) -> TrainResult:
        self._training, task, trainer = training, self._task, self._trainer
        module = TaskModule(training.parts.model) if task is None else task.module
        assert module is not None
        self._module = module
        self._logged = Logged(module, trainer)
        self._of_epoch: dict[str, float] = {}
        """The values that `training_step` logged for the epoch that has just ended."""
        training.logged = self._logged.of_step
        trainer.strategy.join(training)
        add_callbacks(trainer, callbacks)
        user_loader = () if task is None else (task.train_loader, task.ready)
        loader = StepLoader(training, self._begin, self._end, *user_loader)
        self._loader = loader
        module.automatic_optimization = False
        if task is not None:
            task.begin(self._logged, training.course.steps_per_epoch)
            training.data.watchers.append(task.note_samples)
        with quietly():
            try:
                trainer.fit(module, train_dataloaders=loader)
            except Exception as error:
                name_callback(error, self)
                raise
            finally:
                loader.close()
        return self._result or training.end(complete=True)

    def _make_trainer(self) -> pl.Trainer:
        context = self._context
        spec, ranks = context.spec, context.ranks
        given: dict[str, Any] = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(context.run.path / "lightning"),
            "log_every_n_steps": spec.log.every_steps,
            **spec.lightning.trainer,
        }
        try:
            return pl.Trainer(
                accelerator="cuda" if context.device.type == "cuda" else "cpu",
                devices=ranks.local_world_size,
                num_nodes=max(1, ranks.world_size // ranks.local_world_size),
                strategy=DtrainStrategy(ranks, self._step),
                use_distributed_sampler=False,
                max_epochs=spec.train.epochs or -1,
                max_steps=spec.train.steps or -1,
                enable_checkpointing=False,  # callbacks of the user still save
                num_sanity_val_steps=0,
                limit_val_batches=0,
                callbacks=[self],
                **given,
            )
        except TypeError as error:
            raise UsageError(
                f"lightning.trainer: {error}", code="lightning.trainer-refused"
            ) from None

    # -- hooks -------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set Lightning's counters to the training's position before any of them is read."""
        if self._task is None:
            others = [each for each in trainer.callbacks if each is not self]
            refuse_callbacks(others, sharded=self._context.shards_model)
            _check_callbacks(others, self._context.ranks)
        progress = self._training.progress
        epochs = trainer.fit_loop.epoch_progress
        for count in (epochs.total, epochs.current):
            count.ready = count.started = count.processed = progress.position.epoch
            count.completed = progress.position.epoch
        trainer.fit_loop.epoch_loop._batches_that_stepped = progress.step
        self._count()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore Lightning's callbacks from the checkpoint, also those of the module itself."""
        if self._task is not None:
            self._task.restore_methods()
        first = self._context.ranks.is_rank_zero
        self._training.callbacks.add("lightning", States(trainer))
        self._training.callbacks.add(
            "lightning.log", EpochSums(self._logged, self._training.progress, first=first)
        )
        counts = Counts(pl_module, self._context.ranks)
        self._training.callbacks.add("lightning.metrics", counts)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the evaluation that an interrupted attempt skipped."""
        if not self._training.begin():
            self._stop()
        if self._training.progress.stopped_early:
            self._end()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the metrics of the epoch, over all ranks."""
        self._of_epoch = self._publish(self._logged.of_epoch())

    def _epoch_ended(self, update: Callable[[], None]) -> None:
        """Write the values logged for the epoch, before Lightning's update resets them."""
        others = reductions.of_epoch(self._trainer.fit_loop.epoch_loop._results)
        self._training.epoch_ended(others | self._logged.shown(self._of_epoch))
        update()

    def _finish(self) -> None:
        """End the training after all hooks, but inside the fit, whose own end tears down."""
        if self._trainer.should_stop and not self._exhausted:
            self._training.progress.stopped_early = True  # by a Lightning callback
        self._result = self._training.end(complete=True)

    # -- between hooks -----------------------------------------------------------------------

    def _step(self) -> None:
        """Do a step; Lightning calls this for the module's training step."""
        assert self._loader.current is not None
        with self._logged.training(self._trainer.fit_loop.epoch_loop.batch_idx):
            self._training.update(*self._loader.current)
        self._count()

    def _after_batch(self) -> None:
        """Evaluate and save after the hooks of a step; at an epoch's end, save after its hooks."""
        self._stopping = not self._training.evaluate_if_due()
        if self._training.progress.stopped_early:
            self._end()
        if not self._trainer.fit_loop.epoch_loop.done:
            self._settle()

    def _settle(self) -> None:
        if self._stopping:
            self._stop()
        self._training.save_if_due()

    def _stop(self) -> None:
        self._result = self._training.end(complete=False)
        raise StopFit

    def _begin(self, done: int) -> None:
        """Correct Lightning's counters, which start at 0, for a start in the middle of an epoch."""
        loop = self._trainer.fit_loop
        count = loop.epoch_loop.batch_progress.current
        count.ready = count.started = count.processed = count.completed = done
        loop._data_fetcher.fetched += done

    def _end(self) -> None:
        self._exhausted = True
        self._trainer.should_stop = True

    def _count(self) -> None:
        """Set `trainer.global_step` to the number of steps done."""
        loop = self._trainer.fit_loop.epoch_loop
        automatic = loop.automatic_optimization.optim_progress.optimizer.step
        for steps in (automatic, loop.manual_optimization.optim_step_progress):
            # Lightning reads one or the other, by the current `automatic_optimization`
            steps.total.ready = steps.total.completed = self._training.progress.step

    def evaluate(self, evaluate: Any) -> dict[str, float] | None:
        """Evaluate between Lightning's hooks, and give Lightning the metrics."""
        self._count()
        for hook in ("on_validation_start", "on_validation_epoch_start"):
            self._call(hook)
        with self._logged.evaluating():
            metrics: dict[str, float] | None = evaluate()
            if metrics is None:
                return None
            self._set_metrics(metrics | self._logged.counted())
            self._call("on_validation_epoch_end")
            metrics |= self._logged.of_evaluation()
        named = self._publish(metrics)
        self._call("on_validation_end")
        if self._task is not None:
            self._training.keep_names("eval", named)
        return named

    def _call(self, hook: str) -> None:
        call._call_callback_hooks(self._trainer, hook)
        call._call_lightning_module_hook(self._trainer, hook)

    def _publish(self, metrics: dict[str, float]) -> dict[str, float]:
        """Give metrics to Lightning's loggers; return them by the names that they have there."""
        named = self._set_metrics(metrics)
        for each in self._trainer.loggers:
            each.log_metrics(named, step=self._trainer.global_step)
        return named

    def _set_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Put metrics into `trainer.callback_metrics`; return them by Lightning's names."""
        forked = self._logged.forked
        named = {forked.get(name, name): value for name, value in metrics.items()}
        known = {name: torch.tensor(value) for name, value in {**metrics, **named}.items()}
        self._trainer.callback_metrics.update(known)
        return named


def _check_callbacks(callbacks: list[pl.Callback], ranks: RankInfo) -> None:
    """Refuse callbacks that need Lightning's loops, and warn of state that is lost."""
    for each in callbacks:
        why = why_callback_needs_loops(each)
        if why is None:
            continue
        if not is_overridden("on_save_checkpoint", each, pl.Callback):
            raise UsageError(
                f"{why}, which dtrain's step does not support", code="lightning.needs-own-loops"
            )
        if ranks.is_rank_zero:
            logger.warning(
                "%s has state in Lightning's checkpoints that dtrain's do not contain: after a "
                "resume it starts without that state",
                type(each).__name__,
            )
