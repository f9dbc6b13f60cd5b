"""The training data as a trainer sees it: global batches, this rank's parts of them, the proof."""

from __future__ import annotations

import abc
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import TensorDataset

from dtrain.errors import DtrainError
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.task import Task
from dtrain.train.contract import check_dataset, named
from dtrain.train.data import samples, shared_files
from dtrain.train.data.augmentation import sample_words
from dtrain.train.data.exactly_once import Proof, Split
from dtrain.train.data.fetch import Fetched, Fetcher, Probe, Request
from dtrain.train.data.loader import Loader, train_requests
from dtrain.train.data.order import Order, order_of
from dtrain.train.data.permutation import Ids
from dtrain.train.data.placement import EpochPlan, GlobalBatch, Position

logger = logging.getLogger(__name__)

Step = tuple[GlobalBatch, Iterator[tuple[int, Any]], int]
"""A global batch; this rank's micro-batches of it, as (samples, batch); how many there are."""

_NUM_PROBED = 3
"""Samples that are read before the first step, to be compared."""

Watch = Callable[[Iterable[Request]], Iterator[Request]]
"""Passes on requests in order; for whoever wants to see them."""


class Feed(abc.ABC):
    """A training's data on one rank: its course through the epochs, its order, its proof."""

    def __init__(
        self, dataset: Any, spec: JobSpec, ranks: RankInfo, order: Order, course: EpochPlan
    ) -> None:
        self.dataset = dataset
        self.spec = spec
        self.ranks = ranks
        self.order = order
        self.course = course
        self.proof = Proof(order, ranks, spec.seed) if spec.data.exactly_once else None
        self.watchers: list[Callable[[Fetched], None]] = []
        """Told of each micro-batch that was read, with the ids that the data set was asked for."""
        self.meets = False
        """Whether ranks are to agree on a step before it begins, not in it: those of a strategy
        that meets in its forwards."""

    @abc.abstractmethod
    def batches(
        self, step: int, position: Position, split: Split, watch: Watch = iter
    ) -> Iterator[Step]:
        """The steps that follow `step` done steps and a position.

        Args:
            step: optimizer steps done.
            position: how far the data has been consumed.
            split: this rank's micro-batches of a global batch.
            watch: is shown the requests for this rank's micro-batches.
        """

    def agree(self, batch: GlobalBatch, total: float) -> None:
        """Make sure that all ranks did the same step."""
        if total != self.ranks.world_size * batch.fingerprint:
            raise self._parted(batch)

    def _parted(self, batch: GlobalBatch) -> DtrainError:
        """What to say when ranks did not do the same step; called by all ranks."""
        return DtrainError(
            f"step {batch.step + 1}: other ranks are not at positions {batch.start} to "
            f"{batch.stop - 1} of epoch {batch.epoch}, where rank {self.ranks.rank} is",
            code="data.ranks-out-of-step",
        )

    def samples_read(self) -> list[int] | None:
        """After the last step of an epoch: how many samples each rank brought; None: it did not
        bring its own."""
        return None

    def check(self) -> None:
        """Prove what was read since the last check; called by all ranks, at step boundaries.

        Raises:
            DtrainError: samples were read twice, not at all, or in another epoch's order.
        """
        if self.proof is not None:
            self.proof.check()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state at the last step boundary, beyond step and position; after `check`."""
        return {} if self.proof is None else {"proof": self.proof.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.proof is not None:
            self.proof.load_state_dict(state.get("proof", {}))

    @abc.abstractmethod
    def note_contents(self) -> None:
        """Let watchers know what samples hold. Called before the first is read."""

    rereadable = False
    """Whether `again` works: samples have numbers."""

    def again(self, epoch: int, ids: Ids) -> Any:
        raise NotImplementedError

    @abc.abstractmethod
    def close(self) -> None:
        """End the loader processes."""

    def _begin(self, batch: GlobalBatch, split: Split) -> None:
        if self.proof is not None:
            self.proof.begin(batch, split)

    def _handed_on(self, fetched: Fetched) -> tuple[int, Any]:
        if self.proof is not None:
            self.proof.read(fetched.samples)
        for watcher in self.watchers:
            watcher(fetched)
        return len(fetched.samples), fetched.batch


class MapFeed(Feed):
    rereadable = True

    def __init__(
        self, dataset: Any, task: Task, spec: JobSpec, ranks: RankInfo, *, pin_memory: bool
    ) -> None:
        order = order_of(task, check_dataset(dataset, named(task, "train_dataset")), spec)
        train = spec.train
        course = EpochPlan(order.num_samples, train.global_batch_size, train.epochs, train.steps)
        super().__init__(dataset, spec, ranks, order, course)
        if order.remark and ranks.is_rank_zero:
            logger.warning("%s", order.remark)
        self._fetcher = Fetcher(dataset, task, spec.seed)
        self._loader = Loader(self._fetcher, spec.data, spec.seed, pin_memory=pin_memory)

    def batches(
        self, step: int, position: Position, split: Split, watch: Watch = iter
    ) -> Iterator[Step]:
        requests = train_requests(self.course.batches(step, position), self.order, split)
        probes = self._probes(step, position)
        opened = shared_files.places() if probes and self.spec.data.workers > 1 else {}
        # the first to be asked for, and so read where all samples are: a data set may open its
        # files when it is read first, and must not have done so before loader processes are forked
        fetched = self._loader.fetched(itertools.chain(probes, watch(requests)))
        for probe in probes:
            mine = next(fetched).batch
            moved = shared_files.moved(opened, self.dataset)
            shared_files.refuse(moved, self.spec.data.workers, self.ranks)
            samples.compare(probe, mine, self._fetcher.sample, self.ranks)
        for batch in self.course.batches(step, position):
            num_micro_batches = len(split(batch))
            self._begin(batch, split)
            yield batch, self._take(fetched, num_micro_batches), num_micro_batches

    def again(self, epoch: int, ids: Ids) -> Any:
        return self._fetcher(Request(epoch, ids))

    def note_contents(self) -> None:
        self._fetcher.collate.notes = True

    def close(self) -> None:
        self._loader.close()

    def _probes(self, step: int, position: Position) -> list[Probe]:
        """The samples that are compared before the first step, if any."""
        if not self.spec.data.exactly_once or type(self.dataset) is TensorDataset:
            return []  # all of the latter's content is part of its fingerprint
        course, begin = self.course, position.consumed
        left = (course.total_steps or 0) - step
        end = min(self.order.num_samples, begin + left * course.global_batch_size)
        if end <= begin:
            return []
        words = sample_words("probe", self.spec.seed, step, np.arange(_NUM_PROBED))
        places = begin + (words % np.uint64(end - begin)).astype(np.int64)
        ids = self.order.epoch(position.epoch).at(np.unique(places))
        return [Probe(position.epoch, ids)]

    def _take(self, fetched: Iterator[Fetched], number: int) -> Iterator[tuple[int, Any]]:
        for _ in range(number):
            yield self._handed_on(next(fetched))
