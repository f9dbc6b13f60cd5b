"""The training data as a trainer sees it, when it is a stream."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from dtrain.errors import DtrainError
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.task import Task
from dtrain.train.data.feed import Feed, Step, Watch
from dtrain.train.data.fetch import Fetched, Request
from dtrain.train.data.loader import Loader
from dtrain.train.data.order import of_stream
from dtrain.train.data.placement import Course, GlobalBatch, Position
from dtrain.train.data.proof import Split
from dtrain.train.data.stream import Block, BlockRequest, Resume, StreamFetcher, check_stream

logger = logging.getLogger(__name__)


class StreamFeed(Feed):
    """Of an iterable data set: a sample's number is its place in the stream.

    Nobody knows how long an epoch is before its end. Requests run ahead of it, and what was
    asked for beyond it comes back empty.
    """

    def __init__(
        self, dataset: Any, task: Task, spec: JobSpec, ranks: RankInfo, *, pin_memory: bool
    ) -> None:
        check_stream(dataset)
        _refuse_order(task, spec.seed)
        train = spec.train
        course = Course(None, train.global_batch_size, train.epochs, train.steps)
        super().__init__(dataset, spec, ranks, of_stream(), course)
        self._fetcher = StreamFetcher(dataset, task, spec.seed)
        self._loader = Loader(self._fetcher, spec.data, spec.seed, pin_memory=pin_memory)
        self._epoch = 0
        """The epoch to ask for."""
        self._state: Any = None
        """The data set's own, after the batch handed out last; kept on rank 0."""
        self._loaded: Any = None

    def batches(
        self, step: int, position: Position, split: Split, watch: Watch = iter
    ) -> Iterator[Step]:
        """See `Feed`."""
        if self.course.over(step, position.epoch):
            return
        self._resume(position)
        shown = _Shown(watch)
        for block in self._loader.fetched(self._requests(position, split)):
            if block.epoch != self._epoch:  # asked for before the end of its epoch was known
                continue
            if block.stop > block.start:
                yield self._begun(step, block, split, shown)
                step += 1
            elif block.start == 0:
                raise DtrainError(f"train_dataset() gave no samples in epoch {block.epoch}")
            self._epoch += block.ends_epoch
            if self.course.over(step, self._epoch):
                return

    def state_dict(self) -> dict[str, Any]:
        """See `Feed`."""
        return {**super().state_dict(), "stream": _encoded(self._state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Feed`."""
        super().load_state_dict(state)
        self._loaded = _decoded(state.get("stream"))

    def close(self) -> None:
        """See `Feed`."""
        self._loader.close()

    def _resume(self, position: Position) -> None:
        self._epoch = position.epoch
        if position.consumed == 0:
            return
        self._fetcher.resume = Resume(position.epoch, position.consumed, self._loaded)
        if self._loaded is None and self.ranks.is_rank_zero:
            logger.warning(
                "the stream of epoch %d is read through %d samples to get to where training was; "
                "with state_dict() and load_state_dict() the data set would begin there at once",
                position.epoch, position.consumed,
            )  # fmt: skip

    def _requests(self, position: Position, split: Split) -> Iterator[BlockRequest]:
        """Blocks without end; the next epoch's as soon as it is known that this one has ended."""
        epoch, start = position.epoch, position.consumed
        size = self.course.global_batch_size
        while True:
            if epoch != self._epoch:
                epoch, start = self._epoch, 0
            full = GlobalBatch(0, epoch, start, start + size, room=size)
            parts = tuple(split(full))
            yield BlockRequest(epoch, start, size, parts, self.ranks.is_rank_zero)
            start += size

    def _begun(self, step: int, block: Block, split: Split, shown: _Shown) -> Step:
        batch = GlobalBatch(
            step, block.epoch, block.start, block.stop,
            ends_epoch=block.ends_epoch, room=self.course.global_batch_size,
        )  # fmt: skip
        self._begin(batch, split)
        self._state = block.state
        return batch, self._take(block.epoch, block.parts, shown), len(block.parts)

    def _take(self, epoch: int, parts: list[Fetched], shown: _Shown) -> Iterator[tuple[int, Any]]:
        for fetched in parts:
            shown.show(Request(epoch, fetched.samples))
            yield self._handed_on(fetched)


class _Shown:
    """Shows one request at a time to somebody who wants to see a sequence of them."""

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
                f"the task has {name}(), but train_dataset() can only be iterated; an order "
                "needs a data set with __len__ and __getitem__"
            )


def _encoded(state: Any) -> Any:
    """A data set's state as JSON; what JSON would change goes as text of torch.save's bytes."""
    try:
        if json.loads(json.dumps(state)) == state:
            return {"json": state}
    except (TypeError, ValueError):
        pass
    file = io.BytesIO()
    torch.save(state, file)
    return {"torch": base64.b64encode(file.getvalue()).decode()}


def _decoded(saved: Any) -> Any:
    if saved is None or "json" in saved:
        return None if saved is None else saved["json"]
    file = io.BytesIO(base64.b64decode(saved["torch"]))
    return torch.load(file, weights_only=True)
