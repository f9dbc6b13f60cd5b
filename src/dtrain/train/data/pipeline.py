"""The data pipeline of a trainer: global batches, this rank's parts of them, and the proof."""

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
"""A global batch; this rank's micro-batches of it, as (samples, batch); and their number."""

_NUM_PROBED = 3
"""The number of samples that are read and compared before the first step."""

Watch = Callable[[Iterable[Request]], Iterator[Request]]
"""Yields the same requests in the same order, and may watch them."""


class Feed(abc.ABC):
    """The data of a training on one rank: its epoch plan, its order and its proof."""

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
        """Functions that are called with each micro-batch that was read, and its requested ids."""
        self.meets = False
        """Whether ranks must agree on a step before it begins, not in it. This is for a strategy
        whose ranks exchange data in the forward."""

    @abc.abstractmethod
    def batches(
        self, step: int, position: Position, split: Split, watch: Watch = iter
    ) -> Iterator[Step]:
        """Yield the steps that follow.

        Args:
            step: the number of optimizer steps done.
            position: the position up to which the data was consumed.
            split: returns this rank's micro-batches of a global batch.
            watch: receives the requests for this rank's micro-batches, and yields them.
        """

    def agree(self, batch: GlobalBatch, total: float) -> None:
        """Make sure that all ranks did the same step."""
        if total != self.ranks.world_size * batch.fingerprint:
            raise self._out_of_step(batch)

    def _out_of_step(self, batch: GlobalBatch) -> DtrainError:
        """Return the error for ranks that did not do the same step. All ranks must call it."""
        return DtrainError(
            f"step {batch.step + 1}: other ranks are not at positions {batch.start} to "
            f"{batch.stop - 1} of epoch {batch.epoch}, where rank {self.ranks.rank} is",
            code="data.ranks-out-of-step",
        )

    def samples_read(self) -> list[int] | None:
        """Return the number of samples that each rank has read, after the last step of an epoch.

        None means that ranks have no samples of their own.
        """
        return None

    def check(self) -> None:
        """Check what was read since the last check. All ranks must call it, at a step boundary.

        Raises:
            DtrainError: samples were read twice, not at all, or in another epoch's order.
        """
        if self.proof is not None:
            self.proof.check()

    def state_dict(self) -> dict[str, Any]:
        """Return JSON-able state at the last step boundary. Call it after `check`.

        It holds neither the step nor the position.
        """
        return {} if self.proof is None else {"proof": self.proof.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.proof is not None:
            self.proof.load_state_dict(state.get("proof", {}))

    @abc.abstractmethod
    def note_contents(self) -> None:
        """Record the content of samples for watchers. Call it before the first sample is read."""

    rereadable = False
    """Whether `again` works, because samples have ids."""

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
    """The feed of a map-style data set."""

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
        opened = shared_files.open_files() if probes and self.spec.data.workers > 1 else {}
        # the probes are the first requests, and are read where all samples are read: a data set may
        # open its files at its first read, which must not happen before loader processes are forked
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
        """Return requests for the samples that are compared before the first step, if any."""
        if not self.spec.data.exactly_once or type(self.dataset) is TensorDataset:
            return []  # the fingerprint of a TensorDataset includes its whole content
        course, begin = self.course, position.consumed
        left = (course.total_steps or 0) - step
        end = min(self.order.num_samples, begin + left * course.global_batch_size)
        if end <= begin:
            return []
        words = sample_words("probe", self.spec.seed, step, np.arange(_NUM_PROBED))
        positions = begin + (words % np.uint64(end - begin)).astype(np.int64)
        ids = self.order.epoch(position.epoch).at(np.unique(positions))
        return [Probe(position.epoch, ids)]

    def _take(self, fetched: Iterator[Fetched], number: int) -> Iterator[tuple[int, Any]]:
        for _ in range(number):
            yield self._handed_on(next(fetched))
