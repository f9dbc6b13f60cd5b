"""The data pipeline of a trainer for streams (iterable data sets)."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch

from dtrain.errors import DtrainError
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.task import Task
from dtrain.train import collectives
from dtrain.train.checkpoint.leaves import read, refuse_unreadable
from dtrain.train.data import out_of_step
from dtrain.train.data.augmentation import sample_words
from dtrain.train.data.content import hash_of
from dtrain.train.data.exactly_once import Split
from dtrain.train.data.fetch import Fetched, Request
from dtrain.train.data.loader import Loader
from dtrain.train.data.order import Order, of_stream
from dtrain.train.data.pipeline import Feed, Step, Watch
from dtrain.train.data.placement import EpochPlan, GlobalBatch, Position
from dtrain.train.data.stream import Block, BlockRequest, Resume, StreamFetcher

logger = logging.getLogger(__name__)


_WHOLE_BLOCKS = 4
"""The number of blocks at the start of a run of which all samples are compared."""

_KEYED = 4
"""The number of positions of later blocks that are compared; 10 µs each for a small image."""


class StreamFeed(Feed):
    """The feed of an iterable data set, in which the id of a sample is its position in the stream.

    The length of an epoch is unknown before its end. Requests run ahead of it, and those after the
    end return empty blocks.

    Every step checks that all ranks read the same stream. Each rank digests the same samples of the
    block, and the digest is a part of the batch's fingerprint (see `agree`). The ranks also compare
    before the first step and before the first step of each epoch. So most mistakes are reported
    before anything is trained on them. With a strategy whose ranks exchange data in the forward,
    they compare before every step: blocks of different sizes would make it hang.
    """

    def __init__(
        self, dataset: Any, task: Task, spec: JobSpec, ranks: RankInfo, *, pin_memory: bool
    ) -> None:
        _refuse_order(task, spec.seed)
        train = spec.train
        course = EpochPlan(None, train.global_batch_size, train.epochs, train.steps)
        super().__init__(dataset, spec, ranks, self._order(), course)
        self._fetcher = StreamFetcher(dataset, task, spec.seed, self._own_seed())
        self._loader = Loader(self._fetcher, spec.data, spec.seed, pin_memory=pin_memory)
        self._compares = spec.data.exactly_once and collectives.in_group()
        self._epoch = 0
        """The epoch to request."""
        self._begun_at = Position()
        self._block: Block | None = None
        """The last block that was used."""
        self._state: Any = None
        """The data set's own state after that block; kept on rank 0."""
        self._loaded: Any = None

    def batches(
        self, step: int, position: Position, split: Split, watch: Watch = iter
    ) -> Iterator[Step]:
        if self.course.over(step, position.epoch):
            return
        self._resume(position)
        watcher = _Watcher(watch)
        for block in self._loader.fetched(self._requests(position, split)):
            if block.epoch != self._epoch:  # requested before the end of the last epoch was known
                continue
            batch = self._batch(step, block)
            if batch.size > 0:
                self._begin(batch, split)
                yield batch, self._take(block.epoch, block.parts, watcher), len(block.parts)
                step += 1
            elif batch.start == 0:
                raise DtrainError(
                    f"train_dataset() gave no samples in epoch {batch.epoch}", code="data.empty"
                )
            self._epoch += batch.ends_epoch
            if self.course.over(step, self._epoch):
                return

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "stream": encoded(self._state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._loaded = decoded(state.get("stream"))

    def note_contents(self) -> None:
        self._fetcher.collate.notes = True

    def close(self) -> None:
        self._loader.close()

    # -- overridden for streams that shard themselves ------------------------------------------

    def _order(self) -> Order:
        return of_stream()

    def _own_seed(self) -> int | None:
        """Return the seed of the random numbers that must differ by rank."""
        return None

    def _where(self, position: Position) -> Resume:
        return Resume(position.epoch, position.consumed, self._loaded)

    def _share(self, split: Split) -> tuple[int, tuple[range, ...]]:
        """Return the number of samples of a step, and this rank's micro-batches counted from 0."""
        size = self.course.global_batch_size
        return size, tuple(split(GlobalBatch(0, 0, 0, size, room=size)))

    def _batch(self, step: int, block: Block) -> GlobalBatch:
        """Return the global batch that a block is part of. All ranks must call it."""
        met = self._block is not None and block.start > 0
        self._block, self._state = block, block.state
        content = hash_of(block.contents) if self._compares else 0
        batch = GlobalBatch(
            step, block.epoch, block.start, block.stop,
            ends_epoch=block.ends_epoch, room=self.course.global_batch_size, content=content,
        )  # fmt: skip
        if self._compares and (self.meets or not met):
            everyone = collectives.gather_numbers(int(batch.fingerprint))
            if len(set(everyone)) > 1:
                raise self._out_of_step(batch)
        return batch

    def _compared(self, epoch: int, start: int, size: int) -> Collection[int]:
        """Return the positions of a block that all ranks digest, also of other ranks' samples."""
        if not self._compares:
            return ()
        begun = self._begun_at
        if epoch == begun.epoch and start - begun.consumed < _WHOLE_BLOCKS * size:
            return range(start, start + size)
        some = np.arange(start, start + _KEYED)
        words = sample_words("compared", self.spec.seed, epoch, some) % np.uint64(size)
        return {start + int(word) for word in words}

    def _out_of_step(self, batch: GlobalBatch) -> DtrainError:
        assert self._block is not None
        return out_of_step.explain(batch, self._block, self.ranks.rank)

    # -- requests and results ------------------------------------------------------------------

    def _resume(self, position: Position) -> None:
        self._epoch, self._begun_at = position.epoch, position
        if position.consumed == 0:
            return
        resume = self._fetcher.resume = self._where(position)
        if not resume.begins_there and self.ranks.is_rank_zero:
            logger.warning(
                "the stream of epoch %d is read from its beginning to sample %d, where training "
                "stopped; with state_dict() and load_state_dict() the data set could start there",
                position.epoch, resume.position,
            )  # fmt: skip

    def _requests(self, position: Position, split: Split) -> Iterator[BlockRequest]:
        """Yield requests without end, of the next epoch as soon as this one is known to end."""
        resume = self._fetcher.resume
        epoch, start = position.epoch, 0 if resume is None else resume.position
        size, parts = self._share(split)
        while True:
            if epoch != self._epoch:
                epoch, start = self._epoch, 0
            yield BlockRequest(
                epoch, start, size,
                tuple(range(start + part.start, start + part.stop) for part in parts),
                with_state=self._keeps_state, compared=self._compared(epoch, start, size),
            )  # fmt: skip
            start += size

    @property
    def _keeps_state(self) -> bool:
        return self.ranks.is_rank_zero

    def _take(
        self, epoch: int, parts: list[Fetched], watcher: _Watcher
    ) -> Iterator[tuple[int, Any]]:
        for fetched in parts:
            watcher.show(Request(epoch, fetched.samples))
            yield self._handed_on(fetched)


class _Watcher:
    """Passes single requests to a watcher that expects a sequence of them."""

    def __init__(self, watch: Watch) -> None:
        self._queue: deque[Request] = deque()
        self._watched = watch(self._drained())

    def show(self, request: Request) -> None:
        self._queue.append(request)
        next(self._watched)

    def _drained(self) -> Iterator[Request]:
        while True:
            yield self._queue.popleft()


def _refuse_order(task: Task, seed: int) -> None:
    for name, given in (
        ("sample_order", task.sample_order(seed, 0)),
        ("sample_weights", task.sample_weights()),
    ):
        if given is not None:
            raise DtrainError(
                f"the task has {name}(), but train_dataset() can only be iterated; for an order "
                "it must have __len__ and __getitem__",
                code="data.order-of-stream",
            )


def encoded(state: Any) -> Any:
    """Return a data set's state as JSON; state that JSON would change is saved by torch.save."""
    try:
        if json.loads(json.dumps(state, allow_nan=False)) == state:
            return {"json": state}
    except (TypeError, ValueError):
        pass
    refuse_unreadable(state, "state_dict() of the data set")
    file = io.BytesIO()
    torch.save(state, file)
    return {"torch": base64.b64encode(file.getvalue()).decode()}


def decoded(saved: Any) -> Any:
    if saved is None or "json" in saved:
        return None if saved is None else saved["json"]
    return read(io.BytesIO(base64.b64decode(saved["torch"])))
