"""The placement of the samples of a user's loaders under Lightning's own loops.

A training loader becomes a sequence of micro-batches of dtrain's `Feed`. The order, the shares of
the processes, the proof and the position are those of every other trainer. A validation loader
keeps its own batch size. Each sample is read once, and all processes have equally many batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import default_collate

from dtrain.errors import UsageError
from dtrain.integrations.lightning.compat import set_sampler_epoch, sized_len
from dtrain.integrations.lightning.user_loaders import (
    described,
    evaluated_samples,
    makes_batches,
    order_of_loader,
)
from dtrain.task import Task
from dtrain.train.context import TrainContext
from dtrain.train.data.pipeline import Feed, MapFeed, Watch
from dtrain.train.data.placement import EpochPlan, GlobalBatch, Position, shard
from dtrain.train.loop.build import pins_memory
from dtrain.train.seeding import RandomState, derive_seed, seed_everything


def why_not_placed(loader: Any) -> str | None:
    """Return why dtrain cannot read a training loader; None if it can."""
    problem = _why_not_split(loader)
    if problem is None and makes_batches(loader):
        return f"batches made by a {described(loader.batch_sampler)}"
    return problem


def _why_not_split(loader: Any) -> str | None:
    if not isinstance(loader, DataLoader):
        return f"a {type(loader).__name__}"
    if type(loader).__iter__ is not DataLoader.__iter__:
        return f"a {type(loader).__name__} with an __iter__() of its own"
    if isinstance(loader.dataset, IterableDataset):
        return f"a stream, {type(loader.dataset).__name__}"
    if loader.batch_size is None and loader.batch_sampler is None:
        return "batch_size=None: its data set makes the batches"
    return None


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of this process."""

    batch: GlobalBatch
    samples: int
    """The number of this process's samples in it; always one or more."""
    index: int
    number: int
    """The number of micro-batches of the step, the same on every process."""

    @property
    def ends_step(self) -> bool:
        return self.index == self.number - 1


class _LoaderTask(Task):
    """A task for a feed, whose methods are answered by a loader."""

    def __init__(self, loader: Any, seed: int) -> None:
        if loader.collate_fn is not default_collate:
            self.collate = loader.collate_fn  # type: ignore[method-assign]
        self._weights, self._order = order_of_loader(loader, seed, "train_dataloader() has")

    def sample_weights(self) -> Any:
        return self._weights

    def sample_order(self, seed: int, epoch: int) -> Any:
        return None if self._order is None else self._order(seed, epoch)


class PlacedLoader:
    """Replaces a training loader; dtrain reads and distributes the samples.

    A pass over it covers the rest of the current epoch. Attributes are the loader's.

    Args:
        loader: the user's loader.
        context: the context of the training.
        step: the number of steps that are done.
        position: the position to start at.
    """

    def __init__(self, loader: Any, context: TrainContext, step: int, position: Position) -> None:
        self._loader = loader
        self._world_size = context.ranks.world_size
        self._rank = context.ranks.rank
        spec = context.spec
        task = _LoaderTask(loader, spec.seed)
        pin = pins_memory(context) or bool(loader.pin_memory)
        if not spec.data.workers and loader.num_workers:
            data = spec.data.model_copy(update={"workers": loader.num_workers})
            spec = spec.model_copy(update={"data": data})
        dataset, recorder = loader.dataset, context.recorder
        if recorder is not None:
            dataset = recorder.shortened(dataset, task)
        self.feed: Feed = MapFeed(dataset, task, spec, context.ranks, pin_memory=pin)
        size, batch = self.feed.order.num_samples, spec.train.global_batch_size
        if min(size, batch) < self._world_size:
            raise UsageError(
                f"{self._world_size} processes cannot share steps of {min(size, batch)} samples; "
                "take a larger train.global_batch_size or fewer processes",
                code="data.too-few-samples",
            )
        # Lightning ends the training after epochs or optimizer steps, of which one step of dtrain
        # may contain several. Every process needs a sample in each step.
        self.feed.course = EpochPlan(
            size, batch, spec.train.epochs, None, at_least=self._world_size
        )
        self.accumulated = self._micro_batches(batch)
        """The number of micro-batches of every step; an epoch's last step may have fewer."""
        self.current: MicroBatch | None = None
        self._position = position
        self._step = step
        self._watch: Watch = iter
        self._steps: Iterator[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        steps = self.feed.course.steps_per_epoch
        assert steps is not None
        last = next(self.feed.course.batches(0, Position(0, self._start_of_last(steps))))
        return (steps - 1) * self.accumulated + self._micro_batches(last.size)

    def __iter__(self) -> Iterator[Any]:
        epoch = self._position.epoch
        while self._position.epoch == epoch:
            if self._steps is None:
                self._steps = self.feed.batches(self._step, self._position, self.split, self._watch)
            batch, micro_batches, number = next(self._steps)
            for index, (samples, micro_batch) in enumerate(micro_batches):
                self.current = MicroBatch(batch, samples, index, number)
                yield micro_batch
            self._step, self._position = batch.step + 1, batch.after

    def watch(self, watch: Watch) -> None:
        """Set a function that sees, or changes, the requests for samples; before the first pass."""
        self._watch = watch

    def skip_to_epoch(self, epoch: int) -> None:
        """Continue at the start of an epoch, even if the previous one was not read to its end."""
        if self._position != Position(epoch, 0):
            self._position = Position(epoch, 0)
            self._steps = None
            self.feed.proof = None  # not all samples were read

    def split(self, batch: GlobalBatch) -> list[range]:
        """Return this process's micro-batches of a step, in positions of the epoch."""
        mine = batch.part(self._rank, self._world_size)
        number = self._micro_batches(batch.size)
        parts = (shard(len(mine), index, number) for index in range(number))
        return [range(mine.start + part.start, mine.start + part.stop) for part in parts]

    def scale(self) -> float:
        """Return the factor for a mean loss that gives all samples of the step the same weight.

        Lightning then divides the loss by the number of micro-batches, and DDP by that of the
        processes.
        """
        current = self.current
        if current is None:
            return 1.0
        return current.samples * self._world_size * self.accumulated / current.batch.size

    def _micro_batches(self, size: int) -> int:
        largest = self.feed.spec.train.micro_batch_size
        if largest is None:
            return 1
        share = -(-size // self._world_size)
        return min(-(-share // largest), size // self._world_size)

    def _start_of_last(self, steps: int) -> int:
        return (steps - 1) * self.feed.course.global_batch_size

    def close(self) -> None:
        """End the loader processes."""
        self._steps = None
        self.feed.close()


class SeededLoader:
    """Replaces a training loader that dtrain cannot read; attributes are the loader's.

    Each pass starts with random generators seeded by (seed, epoch, pass). So a sampler that draws
    from the global generators at its start draws the same after a resume. A resume in the middle
    of an epoch reads the batches that are done, and drops them.

    Args:
        loader: the user's loader, or the one that Lightning made of it for several processes.
        seed: the job's seed.
        epoch: returns the current epoch.
        done: the number of the epoch's batches that are done.
    """

    def __init__(self, loader: Any, seed: int, epoch: Callable[[], int], done: int) -> None:
        self._loader = loader
        self._seed, self._epoch, self._done = seed, epoch, done
        self._last_epoch, self._passes = -1, 0
        """The epoch of the last pass, and the number of passes in it. Of several loaders, the
        shorter ones start again within an epoch."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        epoch = self._epoch()
        if epoch != self._last_epoch:
            self._last_epoch, self._passes = epoch, 0
        skipped, self._done = self._done, 0
        if skipped and sized_len(self._loader):
            self._passes, skipped = divmod(skipped, len(self._loader))
        outer = RandomState.capture()
        set_sampler_epoch(self._loader, epoch)
        seed_everything(derive_seed("order", self._seed, epoch, self._passes))
        self._passes += 1
        batches = iter(self._loader)
        first = list(itertools.islice(batches, skipped + 1))[skipped:]
        outer.restore()
        return itertools.chain(first, batches)


def placed_evaluation(loader: Any, context: TrainContext) -> Any | None:
    """Return a loader of the same data that reads each sample once over all processes.

    Returns:
        The loader; None if dtrain cannot split its batches, or its sampler leaves samples out.

    Raises:
        UsageError: there are fewer samples than processes.
    """
    can_split = _why_not_split(loader) is None and not makes_batches(loader)
    dataset = evaluated_samples(loader) if can_split else None
    if dataset is None:
        return None
    if context.recorder is not None:
        dataset = context.recorder.evaluated(dataset)
    ranks, size = context.ranks, len(dataset)
    if size < ranks.world_size:
        raise UsageError(
            f"{ranks.world_size} processes cannot share {size} validation samples; use fewer "
            "processes",
            code="data.too-few-samples",
        )
    each = context.spec.eval.batch_size or loader.batch_size or 1
    course = EpochPlan(size, each * ranks.world_size, 1, None, at_least=ranks.world_size)
    parts = [
        list(batch.part(ranks.rank, ranks.world_size)) for batch in course.batches(0, Position())
    ]
    workers = context.spec.data.workers or loader.num_workers
    forked = {
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        "multiprocessing_context": loader.multiprocessing_context,
    }
    return DataLoader(
        dataset,
        batch_sampler=parts,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        # without its own generator, each pass would use the random numbers of the training
        generator=loader.generator or torch.Generator().manual_seed(context.spec.seed),
        **(forked if workers and loader.num_workers else {}),
    )
