"""Iterable data sets: every sample of the stream once, on any number of ranks and loader processes.

Every process reads the whole stream in blocks of one global batch, and keeps its own share. Rank r
takes its part of each block; loader process w of K takes the blocks w, w + K, and so on. So the
global order is the stream's order in every layout, if the data set gives every process the same
stream. It must not depend on the rank (the samples are compared, see `iterable_pipeline`). It
cannot depend on the loader process, which is hidden from it. The global generators are seeded at
every block, with the same seeds everywhere.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset

from dtrain.task import Task
from dtrain.train.data.augmentation import Now, seed_for
from dtrain.train.data.content import digest
from dtrain.train.data.fetch import Fetched, NotingCollate
from dtrain.train.data.mismatch import note_samples
from dtrain.train.data.rng_state import global_generators


def is_stream(dataset: Any) -> bool:
    """Return whether a data set can only be iterated, so that samples have no ids."""
    if isinstance(dataset, IterableDataset):
        return True
    return hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")


@dataclass(frozen=True)
class Resume:
    epoch: int
    position: int
    """The number of samples of the epoch that were consumed."""
    state: Any
    """The data set's own state at that position. None means to read all samples before it again."""
    ended: bool = False
    """Whether the stream ends there; the data set's own state may not include that."""

    @property
    def begins_there(self) -> bool:
        """Whether no samples must be read again."""
        return self.ended or self.state is not None


@dataclass(frozen=True)
class BlockRequest:
    epoch: int
    start: int
    """The position in the epoch of the block's first sample."""
    size: int
    parts: tuple[range, ...]
    """The positions of this rank's micro-batches, contiguous; the stream may end before them."""
    with_state: bool
    compared: Collection[int]
    """The positions whose samples are digested."""

    def __str__(self) -> str:
        last = self.start + self.size - 1
        return f"positions {self.start} to {last} of the stream in epoch {self.epoch}"


class Block(NamedTuple):
    epoch: int
    start: int
    stop: int
    """The position at which the block really ended."""
    ends_epoch: bool
    parts: list[Fetched]
    state: Any
    """The data set's own state at `stop`, if it was requested and if there is one."""
    contents: dict[int, int]
    """The requested digests, by position."""

    @property
    def size(self) -> int:
        return max(0, self.stop - self.start)


class StreamFetcher:
    """Reads one process's blocks of a stream. Requests must have ascending positions.

    Args:
        dataset: an iterable data set.
        task: the task, whose `collate` makes the batches.
        seed: the job's seed.
        own_seed: the seed after an epoch's first sample, if random numbers must differ by rank.
    """

    def __init__(self, dataset: Any, task: Task, seed: int, own_seed: int | None = None) -> None:
        self.resume: Resume | None = None
        """The position to begin at; it is set before the first request."""
        self._dataset = dataset
        self.collate = NotingCollate(task.collate)
        self._seeds = seed, seed if own_seed is None else own_seed
        self._pid = os.getpid()
        self._reader: _Reader | None = None

    def fetch(self, request: BlockRequest) -> Block:
        """Read up to the end of the block, and collate this rank's part of it."""
        generators = global_generators()
        if os.getpid() == self._pid:
            outer = [generator.capture() for generator in generators]
        else:  # a data set that shards itself over loader processes would be sharded twice
            outer = []
            torch.utils.data._utils.worker._worker_info = None
        try:
            return self._read(request)
        finally:
            Now.key = None
            for generator, state in zip(generators, outer, strict=False):
                generator.restore(state)

    def _read(self, request: BlockRequest) -> Block:
        reader = self._reader_at(request)
        rows, contents = reader.rows(request.size, request.parts, request.compared)
        state = reader.state() if request.with_state else None
        ends = reader.ends()
        parts = []
        for part in request.parts:
            ids = np.arange(part.start, min(part.stop, reader.position))
            if len(ids):
                seed_for("collate", self._seeds[1], request.epoch, part.start)
                samples = [rows.pop(position) for position in ids.tolist()]
                try:
                    batch = self.collate(samples)
                except Exception as error:
                    error.add_note(f"it was making a batch of positions {ids[0]} to {ids[-1]}")
                    note_samples(error, samples, [f"position {each}" for each in ids])
                    raise
                parts.append(Fetched(ids, batch, self.collate.contents))
        return Block(request.epoch, request.start, reader.position, ends, parts, state, contents)

    def _reader_at(self, request: BlockRequest) -> _Reader:
        """Return a reader at the beginning of the block, or at the end of a shorter stream."""
        reader, resume = self._reader, self.resume
        if reader is None or reader.epoch != request.epoch or reader.position > request.start:
            if resume is None or resume.epoch != request.epoch or not resume.begins_there:
                resume = Resume(request.epoch, 0, None)
            reader = self._reader = _Reader(self._dataset, self._seeds, resume)
        while reader.position < request.start and not reader.ends():
            reader.rows(min(request.size, request.start - reader.position))
        return reader


class _Reader:
    """One pass over the stream.

    The generators are seeded by position before the first sample of a block and again after it.
    This sample is read at the end of the previous block, to find out whether the stream ends.

    Args:
        dataset: an iterable data set.
        seeds: two seeds. The first is for the beginning of an epoch, where a stream may be shuffled
            before it shards itself by rank. The second is for all later samples.
        resume: the position to begin at.
    """

    def __init__(self, dataset: Any, seeds: tuple[int, int], resume: Resume) -> None:
        self.epoch = resume.epoch
        self.position = resume.position
        self._dataset = dataset
        self._seeds = seeds
        self._ahead: list[Any] = []
        """The sample at `position`, if it has been read."""
        self._ended = resume.ended
        self._iterator: Any = None if resume.ended else self._begin(resume.state or {})

    def rows(
        self, size: int, parts: tuple[range, ...] = (), compared: Collection[int] = ()
    ) -> tuple[dict[int, Any], dict[int, int]]:
        """Read up to `size` more samples.

        Returns:
            The samples of the parts and the digests of the samples to compare, both by position.
        """
        wanted = range(parts[0].start, parts[-1].stop) if parts else range(0)
        rows, contents = {}, {}
        for index in range(size):
            if self.ends():
                break
            if self.position in wanted:
                rows[self.position] = self._ahead[0]
            if self.position in compared:
                contents[self.position] = digest(self._ahead[0])
            self._ahead = []
            self.position += 1
            if index == 0:
                self._reseed()
            if index < size - 1:
                self._ahead = self._next()
        return rows, contents

    def ends(self) -> bool:
        if not self._ahead and not self._ended:
            self._reseed()
            self._ahead = self._next()
        return not self._ahead

    def state(self) -> dict[str, Any] | None:
        """Return the state of the iterator or the data set; None if neither has one."""
        for name, holder in (("iterator", self._iterator), ("dataset", self._dataset)):
            if hasattr(holder, "state_dict") and hasattr(holder, "load_state_dict"):
                return {name: copy.deepcopy(holder.state_dict())}
        return None

    def _begin(self, state: dict[str, Any]) -> Any:
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(self.epoch)
        self._reseed()
        if "dataset" in state:
            self._dataset.load_state_dict(state["dataset"])
        iterator = iter(self._dataset)
        if "iterator" in state:
            iterator.load_state_dict(state["iterator"])
        return iterator

    def _next(self) -> list[Any]:
        Now.key, Now.sample = (self._seeds[1], self.epoch), self.position
        try:
            return [next(self._iterator)]
        except StopIteration:
            self._ended = True
            return []
        except Exception as error:
            error.add_note(f"it was reading position {self.position} of epoch {self.epoch}")
            raise

    def _reseed(self) -> None:
        seed_for("stream", self._seeds[self.position > 0], self.epoch, self.position)
