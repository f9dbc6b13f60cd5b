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
    """Lightning runs the loop, the hooks, the callbacks and the loggers; the step is dtrain's.

    So samples, gradients, checks, evaluation and checkpoints are those of trainer `native`, bit
    for bit, and a run may change between the two.
    """

    def __init__(self, context: TrainContext) -> None:
        super().__init__(context)
        task = context.task
        self._theirs: list[pl.Callback] = []
        given = task.callbacks
        task.callbacks = lambda: self._ours(given())  # type: ignore[method-assign]

    def _ours(self, callbacks: Any) -> list[Callback]:
        """Those of dtrain; Lightning's are put aside for its Trainer."""
        given = listed(callbacks)
        self._theirs = [each for each in given if isinstance(each, pl.Callback)]
        ours = [each for each in given if not isinstance(each, pl.Callback)]
        for each in ours:
            if not isinstance(each, Callback):
                origin, name = type(each).__module__.partition(".callbacks")[0], type(each).__name__
                known = f"dtrain or {PACKAGE}"
                raise DtrainError(
                    f"callbacks() returned a {name} of {origin}, not one of {known}",
                    code="task.bad-callbacks",
                )
        return ours

    def begin(self, context: TrainContext, injector: Injector, kept: Kept) -> Any:
        """Make Lightning's Trainer first, which a module may ask while it is set up."""
        self._drive = _Drive(context)
        return super().begin(context, injector, kept)

    def drive(self, training: Any) -> TrainResult:
        """Let Lightning's fit loop do all steps."""
        try:
            return self._drive.run(training, self._theirs)
        finally:
            del self._drive  # it holds the training, which is closed before another is made

    def evaluation_wrapper(self, evaluate: Any) -> dict[str, float] | None:
        return self._drive.evaluate(evaluate)


class TaskModule(pl.LightningModule):
    """A task's model as a LightningModule: `pl_module.model` in Lightning's callbacks."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self) -> None:
        """Lightning wants to see one; see `DtrainStrategy.training_step`."""

    def configure_optimizers(self) -> None:
        """Likewise; see `DtrainStrategy.setup`."""


class _Drive(pl.Callback):
    """One fit, and what joins the two."""

    def __init__(self, context: TrainContext) -> None:
        # which devices there are, and what else could be installed
        logging.getLogger(f"{PACKAGE}.utilities.rank_zero").setLevel(logging.WARNING)
        self._context = context
        self._task = context.task if isinstance(context.task, ModuleTask) else None
        self._exhausted = self._leaving = False
        self._result: TrainResult | None = None
        self._trainer = trainer = self._make_trainer()
        disable_signal_handlers(trainer)
        fit: Any = trainer.fit_loop
        after(fit.epoch_loop, "on_advance_end", self._after_batch)
        after(fit, "on_advance_end", self._settle)
        after(fit, "on_run_end", self._finish)
        log: Any = trainer._logger_connector
        fit.epoch_loop._results = reductions.QuietResults(True, trainer)
        tell_epoch = log.update_train_epoch_metrics
        log.update_train_epoch_metrics = lambda: self._epoch_ended(tell_epoch)
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
        """What `training_step` logged for the epoch that has just ended."""
        training.logged = self._logged.of_step
        trainer.strategy.join(training)
        add_callbacks(trainer, callbacks)
        told = () if task is None else (task.train_loader, task.shown)
        loader = StepLoader(training, self._begin, self._end, *told)
        self._loader = loader
        module.automatic_optimization = False
        if task is not None:
            task.begin(self._logged, training.course.steps_per_epoch)
            training.data.watchers.append(task.reads)
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
                enable_checkpointing=False,  # but for callbacks that are
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
        """Put Lightning's counters where training is, before anyone looks at them."""
        if self._task is None:
            theirs = [each for each in trainer.callbacks if each is not self]
            refuse_callbacks(theirs, sharded=self._context.shards_model)
            _look_at(theirs, self._context.ranks)
        progress = self._training.progress
        epochs = trainer.fit_loop.epoch_progress
        for count in (epochs.total, epochs.current):
            count.ready = count.started = count.processed = progress.position.epoch
            count.completed = progress.position.epoch
        trainer.fit_loop.epoch_loop._batches_that_stepped = progress.step
        self._count()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give Lightning's callbacks, the module's own too, what a checkpoint holds for them."""
        if self._task is not None:
            self._task.set_up_is_over()
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
            self._leave()
        if self._training.progress.stopped_early:
            self._end()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Metrics of the epoch, over all ranks."""
        self._of_epoch = self._publish(self._logged.of_epoch())

    def _epoch_ended(self, tell: Callable[[], None]) -> None:
        """Write what was logged for the epoch, before Lightning forgets it."""
        others = reductions.of_epoch(self._trainer.fit_loop.epoch_loop._results)
        self._training.epoch_ended(others | self._logged.shown(self._of_epoch))
        tell()

    def _finish(self) -> None:
        """End training inside of the fit, whose own end takes things apart, after all hooks."""
        if self._trainer.should_stop and not self._exhausted:
            self._training.progress.stopped_early = True  # by a callback of Lightning's
        self._result = self._training.end(complete=True)

    # -- in between --------------------------------------------------------------------------

    def _step(self) -> None:
        """Do a step; Lightning calls this for the module's training step."""
        assert self._loader.current is not None
        with self._logged.training(self._trainer.fit_loop.epoch_loop.batch_idx):
            self._training.update(*self._loader.current)
        self._count()

    def _after_batch(self) -> None:
        """After the hooks of a step evaluate, and save; at the end of an epoch, after its hooks."""
        self._leaving = not self._training.evaluate_if_due()
        if self._training.progress.stopped_early:
            self._end()
        if not self._trainer.fit_loop.epoch_loop.done:
            self._settle()

    def _settle(self) -> None:
        if self._leaving:
            self._leave()
        self._training.save_if_due()

    def _leave(self) -> None:
        self._result = self._training.end(complete=False)
        raise StopFit

    def _begin(self, done: int) -> None:
        """Lightning has just counted from 0; training may begin in the middle of an epoch."""
        loop = self._trainer.fit_loop
        count = loop.epoch_loop.batch_progress.current
        count.ready = count.started = count.processed = count.completed = done
        loop._data_fetcher.fetched += done

    def _end(self) -> None:
        self._exhausted = True
        self._trainer.should_stop = True

    def _count(self) -> None:
        """`trainer.global_step` follows the steps that were done."""
        loop = self._trainer.fit_loop.epoch_loop
        automatic = loop.automatic_optimization.optim_progress.optimizer.step
        for steps in (automatic, loop.manual_optimization.optim_step_progress):
            # Lightning looks at one or the other, as `automatic_optimization` is just now
            steps.total.ready = steps.total.completed = self._training.progress.step

    def evaluate(self, evaluate: Any) -> dict[str, float] | None:
        """Lightning's hooks around an evaluation, and what it knows of metrics."""
        self._count()
        for hook in ("on_validation_start", "on_validation_epoch_start"):
            self._call(hook)
        with self._logged.evaluating():
            metrics: dict[str, float] | None = evaluate()
            if metrics is None:
                return None
            self._know(metrics | self._logged.counted())
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
        """Give them to Lightning's loggers; by the names that they have there."""
        named = self._know(metrics)
        for each in self._trainer.loggers:
            each.log_metrics(named, step=self._trainer.global_step)
        return named

    def _know(self, metrics: dict[str, float]) -> dict[str, float]:
        """Let `trainer.callback_metrics` have them; by the names that Lightning gives them."""
        forked = self._logged.forked
        named = {forked.get(name, name): value for name, value in metrics.items()}
        known = {name: torch.tensor(value) for name, value in {**metrics, **named}.items()}
        self._trainer.callback_metrics.update(known)
        return named


def _look_at(callbacks: list[pl.Callback], ranks: RankInfo) -> None:
    """Refuse what a task's steps cannot follow, and say what is lost."""
    for each in callbacks:
        why = why_callback_needs_loops(each)
        if why is None:
            continue
        if not is_overridden("on_save_checkpoint", each, pl.Callback):
            raise UsageError(
                f"{why}, which dtrain's step does not follow", code="lightning.needs-own-loops"
            )
        if ranks.is_rank_zero:
            logger.warning(
                "%s keeps something in Lightning's checkpoints that dtrain's do not have: a resume "
                "begins it anew",
                type(each).__name__,
            )
