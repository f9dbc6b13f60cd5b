"""Trainer `lightning`: a dtrain task, or a LightningModule, under Lightning's Trainer."""

from __future__ import annotations

import logging
import traceback
import warnings
from typing import Any

import torch

from dtrain.callback import Callback
from dtrain.errors import DtrainError, UsageError
from dtrain.integrations.lightning.compat import PACKAGE, call, is_overridden, pl
from dtrain.integrations.lightning.environment import DtrainStrategy
from dtrain.integrations.lightning.logging import Logged
from dtrain.integrations.lightning.module import ModuleTask
from dtrain.integrations.lightning.state import EpochSums, States
from dtrain.integrations.lightning.step_loader import StepLoader
from dtrain.ranks import RankInfo
from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.importing import load_class
from dtrain.train.loop.callbacks import listed
from dtrain.train.loop.native import NativeTrainer
from dtrain.train.loop.training import Training

logger = logging.getLogger(__name__)


class LightningTrainer(NativeTrainer):
    """Lightning runs the loop, the hooks, the callbacks and the loggers; the step is dtrain's.

    So samples, gradients, checks, evaluation and checkpoints are those of trainer `native`, bit
    for bit, and a run may change between the two.
    """

    def __init__(self, context: TrainContext) -> None:
        super().__init__(context)
        task, spec = context.task, context.spec.lightning
        if isinstance(task, ModuleTask):
            if spec.data_module is not None:
                make = load_class("lightning.data_module", spec.data_module, context.code_dir)
                task.data_module = _made(make, pl.LightningDataModule, spec.data_args)
        elif spec.data_module is not None:
            raise UsageError("lightning.data_module is for a LightningModule; a task has data")
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
                raise DtrainError(f"callbacks() returned a {name} of {origin}, not one of {known}")
        return ours

    def drive(self, training: Training) -> TrainResult:
        """Let Lightning's fit loop do all steps."""
        task = self._context.task
        module = task.module if isinstance(task, ModuleTask) else TaskModule(training.parts.model)
        assert module is not None
        self._drive = _Drive(self._context, training, module)
        try:
            return self._drive.run(self._theirs)
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

    def __init__(
        self, context: TrainContext, training: Training, module: pl.LightningModule
    ) -> None:
        self._context = context
        self._training = training
        self._module = module
        self._task = context.task if isinstance(context.task, ModuleTask) else None
        self._logged = Logged(module, context.ranks.world_size)
        self._complete = True
        self._exhausted = False
        self._result: TrainResult | None = None

    def run(self, callbacks: list[pl.Callback]) -> TrainResult:
        training, module = self._training, self._module
        # which devices there are, and what else could be installed
        logging.getLogger(f"{PACKAGE}.utilities.rank_zero").setLevel(logging.WARNING)
        loader = StepLoader(training, self._begin, self._end, shows_batch=self._task is not None)
        self._loader = loader
        self._trainer = trainer = self._make_trainer(callbacks)
        module.automatic_optimization = False
        if self._task is not None:
            steps = training.course.steps_per_epoch
            self._task.attach(trainer, self._logged, steps)
            training.data.watchers.append(self._task.reads)
        with warnings.catch_warnings():
            # of the loaders of its own that Lightning would make
            warnings.filterwarnings("ignore", module="pytorch_lightning|lightning")
            try:
                trainer.fit(module, train_dataloaders=loader)
            except Exception as error:
                self._name(error)
                raise
            finally:
                loader.close()
        return self._result or training.end(complete=self._complete)

    def _make_trainer(self, callbacks: list[pl.Callback]) -> pl.Trainer:
        context, course = self._context, self._training.course
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
                strategy=DtrainStrategy(self._training, ranks, self._step),
                use_distributed_sampler=False,
                max_epochs=course.total_epochs or -1,
                max_steps=course.total_steps or -1,
                enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
                num_sanity_val_steps=0,
                limit_val_batches=0,
                callbacks=[self, *callbacks],
                **given,
            )
        except TypeError as error:
            raise UsageError(f"lightning.trainer: {error}") from None

    # -- hooks -------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put Lightning's counters where training is, before anyone looks at them."""
        _look_at([each for each in trainer.callbacks if each is not self], self._context.ranks)
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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the evaluation that an interrupted attempt skipped."""
        self._complete = self._training.begin()
        if not self._complete or self._training.progress.stopped_early:
            self._end()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Metrics of the epoch, over all ranks; not of one that is left in the middle."""
        if self._complete:
            self._publish(self._logged.of_epoch())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End training inside of the fit, whose own end takes things apart."""
        if self._result is not None:
            return
        if trainer.should_stop and self._complete and not self._exhausted:
            self._training.progress.stopped_early = True  # by a callback of Lightning's
        self._result = self._training.end(complete=self._complete)

    def _name(self, error: Exception) -> None:
        """Let an error say in which of Lightning's callbacks it was, and in which method."""
        for frame, _ in traceback.walk_tb(error.__traceback__):
            owner = frame.f_locals.get("self")
            if isinstance(owner, pl.Callback) and owner is not self:
                error.add_note(f"in {frame.f_code.co_name}() of callback {type(owner).__name__}")
                return

    # -- in between --------------------------------------------------------------------------

    def _step(self) -> None:
        """Do a step; Lightning calls this for the module's training step."""
        assert self._loader.current is not None
        with self._logged.training(self._trainer.fit_loop.epoch_loop.batch_idx):
            self._complete = self._training.step(*self._loader.current)
        self._count()
        if not self._complete:  # saved before Lightning tells its callbacks of an epoch's end
            self._result = self._training.end(complete=False)
        if not self._complete or self._training.progress.stopped_early:
            self._end()

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
        steps = self._trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
        steps.ready = steps.completed = self._training.progress.step

    def evaluate(self, evaluate: Any) -> dict[str, float] | None:
        """Lightning's hooks around an evaluation, and what it knows of metrics."""
        trainer = self._trainer
        self._count()
        for hook in ("on_validation_start", "on_validation_epoch_start"):
            self._call(hook)
        with self._logged.evaluating():
            metrics: dict[str, float] | None = evaluate()
            if metrics is None:
                return None
            self._call("on_validation_epoch_end", callbacks=False)
            metrics |= self._logged.of_evaluation()
        self._publish(metrics)
        call._call_callback_hooks(trainer, "on_validation_epoch_end")
        self._call("on_validation_end")
        return metrics

    def _call(self, hook: str, *, callbacks: bool = True) -> None:
        if callbacks:
            call._call_callback_hooks(self._trainer, hook)
        call._call_lightning_module_hook(self._trainer, hook)

    def _publish(self, metrics: dict[str, float]) -> None:
        trainer, forked = self._trainer, self._logged.forked
        named = {forked.get(name, name): value for name, value in metrics.items()}
        known = {name: torch.tensor(value) for name, value in {**metrics, **named}.items()}
        trainer.callback_metrics.update(known)
        for each in trainer.loggers:
            each.log_metrics(named, step=trainer.global_step)


def _look_at(callbacks: list[pl.Callback], ranks: RankInfo) -> None:
    """Refuse what cannot be here, and say what is lost."""
    for each in callbacks:
        name = type(each).__name__
        if isinstance(each, pl.callbacks.StochasticWeightAveraging):
            raise UsageError(
                f"{name} has a schedule of its own, which dtrain's step does not follow; average "
                "with Lightning's WeightAveraging or EMAWeightAveraging, or with dtrain.EMA"
            )
        if is_overridden("on_save_checkpoint", each, pl.Callback) and ranks.is_rank_zero:
            logger.warning(
                "%s keeps something in Lightning's checkpoints that dtrain's do not have: a resume "
                "begins it anew",
                name,
            )


def _made(make: Any, kind: type, args: dict[str, Any]) -> Any:
    made = make(**args)
    if not isinstance(made, kind):
        raise DtrainError(
            f"lightning.data_module is a {type(made).__name__}, not a {kind.__name__} of {PACKAGE}"
        )
    return made
