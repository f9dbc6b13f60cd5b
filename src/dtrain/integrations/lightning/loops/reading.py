"""The reading of one fit's loaders: by dtrain if it can, otherwise by Lightning."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from dtrain.errors import UsageError
from dtrain.integrations.lightning.compat import pl
from dtrain.integrations.lightning.loops.placement import (
    PlacedLoader,
    SeededLoader,
    placed_evaluation,
    why_not_placed,
)
from dtrain.integrations.lightning.user_loaders import flat, seeded_by_job
from dtrain.train.checkpoint.store import Loaded
from dtrain.train.context import TrainContext
from dtrain.train.faults import Injector
from dtrain.train.loop.progress import Progress, data_identity
from dtrain.train.metrics.events import Events

logger = logging.getLogger(__name__)


class Reading:
    """Replaces Lightning's preparation of a module's loaders.

    Args:
        context: the context of the training.
        events: the events of the run.
        injector: makes the requested faults.
        module: the module with the loaders.
        progress: the progress of the training, which changes during the training.
        loaded: the checkpoint to continue from.
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
        """True if the loader that is being prepared is one of several."""
        self._warned: set[str] = set()
        self.placed: PlacedLoader | None = None
        """The training loader if dtrain reads it."""
        self.identity: dict[str, Any] = {}
        """The identity of the training data; empty if dtrain does not read them."""
        self.validation_is_placed = True
        """True if all processes have the same number of batches to validate."""
        self.begun = False
        """True if a first batch was read; a loader that is made later belongs to a new epoch."""

    def join(self, trainer: pl.Trainer) -> None:
        """Insert this between a Trainer and the loaders; call it before the fit."""
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
        if self.placed is not None:
            self.placed.close()

    def _requested(self, method: str, request: Callable[[], Any]) -> Any:
        with seeded_by_job(method, self._context.spec.seed):
            loaders = request()
        self._several = len(flat(loaders)) > 1
        return loaders

    def _read(self, loader: Any, stage: str, by_lightning: Callable[[], Any]) -> Any:
        """Return the loader to read in place of a user's in a stage, for example `train`."""
        if self._trainer.overfit_batches > 0 or stage == "predict":
            return by_lightning()
        if stage != "train":
            evaluation = placed_evaluation(loader, self._context)
            if evaluation is None:
                self.validation_is_placed = False
                method = "test_dataloader" if stage == "test" else "val_dataloader"
                self._warn(method, "is not read by dtrain: Lightning assigns the samples to ranks")
            return by_lightning() if evaluation is None else evaluation
        why = "several loaders" if self._several else why_not_placed(loader)
        if why is None:
            return self._place(loader)
        self._warn(
            "train_dataloader",
            f"has {why}: Lightning assigns the samples to ranks, and dtrain cannot prove that each "
            "is read once. A resume in mid-epoch reads the batches before it again, and drops them",
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
        return SeededLoader(read, seed, lambda: trainer.current_epoch, done)

    def _place(self, loader: Any) -> PlacedLoader:
        """Return a loader whose samples dtrain distributes."""
        self.close()
        progress, spec = self._progress, self._context.spec
        placed = PlacedLoader(loader, self._context, progress.step, progress.position)
        self.placed = placed
        feed = placed.feed
        self.identity = data_identity(spec, feed.dataset, feed.order.num_samples, feed.order.name)
        if self._loaded is not None and not self.begun:
            Progress.from_saved(self._loaded.progress, self.identity)  # refuses other data
            feed.load_state_dict(progress.feed)
        if placed.accumulated > 1:
            self._accumulate(placed.accumulated)
        recorder = self._context.recorder
        if recorder is not None:
            feed.note_contents()
            feed.watchers.append(lambda each: recorder.read(each.samples, each.contents))
        faults = self._injector.requests(feed, progress.step, progress.position, placed.split)
        placed.watch(faults)
        return placed

    def _accumulate(self, number: int) -> None:
        if not self._module.automatic_optimization:
            raise UsageError(
                "train.micro_batch_size: with automatic_optimization = False the module makes "
                "its own steps, and Lightning does not accumulate gradients; leave it out",
                code="lightning.manual-optimization",
            )
        self._trainer.accumulate_grad_batches = number
        every = self._context.spec.eval.every_steps
        if every is not None:
            self._trainer.val_check_interval = every * number

    def _warn(self, method: str, what: str) -> None:
        """Warn once, on rank 0, of a guarantee that does not hold for a loader."""
        if method not in self._warned and self._context.ranks.is_rank_zero:
            logger.warning("%s() of %s %s", method, type(self._module).__name__, what)
            self._events.write("own_loader", method=method, detail=what)
        self._warned.add(method)
