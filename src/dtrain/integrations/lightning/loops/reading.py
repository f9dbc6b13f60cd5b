"""How the loaders of one fit are read: by dtrain where it can, else by Lightning."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from dtrain.errors import UsageError
from dtrain.integrations.lightning.compat import pl
from dtrain.integrations.lightning.loops.placement import (
    OwnReading,
    Turns,
    placed_evaluation,
    why_not_placed,
)
from dtrain.integrations.lightning.user_loaders import drawing_alike, flat
from dtrain.train.checkpoint.store import Loaded
from dtrain.train.context import TrainContext
from dtrain.train.faults import Injector
from dtrain.train.loop.progress import Progress, data_identity
from dtrain.train.metrics.events import Events

logger = logging.getLogger(__name__)


class Reading:
    """Takes the place of what Lightning does with the loaders of a module.

    Args:
        context: of the training.
        events: of the run.
        injector: makes the faults that are asked for.
        module: whose loaders.
        progress: of the training, also while it goes on.
        loaded: the checkpoint that it goes on from.
    """

    def __init__(
        self,
        context: TrainContext,
        events: Events,
        injector: Injector,
        module: pl.LightningModule,
        progress: Progress,
        loaded: Loaded | None,
    ) -> None:
        self._context, self._events, self._injector = context, events, injector
        self._module, self._progress, self._loaded = module, progress, loaded
        self._several = False
        """Whether there are several loaders, of which one is just asked about."""
        self._told: set[str] = set()
        self.turns: Turns | None = None
        """The training loader, where dtrain reads it."""
        self.identity: dict[str, Any] = {}
        """Of its data; empty where dtrain does not."""
        self.validation_is_placed = True
        """Whether all processes have as many batches to validate."""
        self.begun = False
        """Whether a first batch was read; a loader that is made later is one of a new epoch."""

    def join(self, trainer: pl.Trainer) -> None:
        """Before its fit: stand between a Trainer and the loaders."""
        self._trainer = trainer
        data: Any = trainer._data_connector
        fit: Any = trainer.fit_loop
        prepare = data._prepare_dataloader
        for source in (fit._data_source, fit.epoch_loop.val_loop._data_source):
            source.dataloader = functools.partial(self._requested, source.name, source.dataloader)
        data._prepare_dataloader = lambda loader, shuffle, mode: self._read(
            loader, str(mode.value), lambda: prepare(loader, shuffle, mode)
        )

    def close(self) -> None:
        """End the loader processes that dtrain started."""
        if self.turns is not None:
            self.turns.close()

    def _requested(self, method: str, request: Callable[[], Any]) -> Any:
        with drawing_alike(method, self._context.spec.seed):
            loaders = request()
        self._several = len(flat(loaders)) > 1
        return loaders

    def _read(self, loader: Any, stage: str, by_lightning: Callable[[], Any]) -> Any:
        """A user's loader as it is read in a stage, `train` or another of Lightning's."""
        if self._trainer.overfit_batches > 0 or stage == "predict":
            return by_lightning()
        if stage != "train":
            evaluation = placed_evaluation(loader, self._context)
            if evaluation is None:
                self.validation_is_placed = False
                method = "test_dataloader" if stage == "test" else "val_dataloader"
                self._tell(method, "is not read by dtrain: Lightning says who reads what")
            return by_lightning() if evaluation is None else evaluation
        why = "several loaders" if self._several else why_not_placed(loader)
        if why is None:
            return self._dealt_out(loader)
        self._tell(
            "train_dataloader",
            f"has {why}: Lightning says who reads what, and that all samples are read once is not "
            "proven. A resume in mid-epoch reads the batches before it again, and drops them",
        )
        done = 0
        if self._progress.position.consumed and not self.begun:
            done = self._trainer.fit_loop.epoch_loop.batch_progress.current.completed
        try:
            read = by_lightning()
        except TypeError as error:
            raise UsageError(
                f"train_dataloader() of {type(self._module).__name__}: {error}\nset in the job: "
                "lightning.trainer: {use_distributed_sampler: false}",
                code="lightning.sampler-not-replaceable",
            ) from None
        seed, trainer = self._context.spec.seed, self._trainer
        return OwnReading(read, seed, lambda: trainer.current_epoch, done)

    def _dealt_out(self, loader: Any) -> Turns:
        """The loader of which dtrain deals out the samples."""
        self.close()
        progress, spec = self._progress, self._context.spec
        self.turns = turns = Turns(loader, self._context, progress.step, progress.position)
        feed = turns.feed
        self.identity = data_identity(spec, feed.dataset, feed.order.num_samples, feed.order.name)
        if self._loaded is not None and not self.begun:
            Progress.from_saved(self._loaded.progress, self.identity)  # of the same data
            feed.load_state_dict(progress.feed)
        if turns.accumulated > 1:
            self._accumulate(turns.accumulated)
        recorder = self._context.recorder
        if recorder is not None:
            feed.note_contents()
            feed.watchers.append(lambda each: recorder.read(each.samples, each.contents))
        turns.watched(self._injector.requests(feed, progress.step, progress.position, turns.split))
        return turns

    def _accumulate(self, number: int) -> None:
        if not self._module.automatic_optimization:
            raise UsageError(
                "train.micro_batch_size: with automatic_optimization = False a step is the "
                "module's own, and Lightning does not accumulate; leave it out",
                code="lightning.manual-optimization",
            )
        self._trainer.accumulate_grad_batches = number
        every = self._context.spec.eval.every_steps
        if every is not None:
            self._trainer.val_check_interval = every * number

    def _tell(self, method: str, what: str) -> None:
        """Say once, on rank 0, what of a loader does not hold."""
        if method not in self._told and self._context.ranks.is_rank_zero:
            logger.warning("%s() of %s %s", method, type(self._module).__name__, what)
            self._events.write("own_loader", method=method, detail=what)
        self._told.add(method)
