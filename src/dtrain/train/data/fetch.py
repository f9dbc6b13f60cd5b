"""Making one batch of a list of samples, together with the ids of these samples."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import TensorDataset

from dtrain.task import Task
from dtrain.train.data.augmentation import Augmentation
from dtrain.train.data.content import by_leaf, digest
from dtrain.train.data.permutation import Ids
from dtrain.train.data.rng_state import drawn_from
from dtrain.train.packed import exchanged
from dtrain.words import numbered

EVALUATION_EPOCH = -1
"""The epoch in the seeds of evaluation samples, the same at every evaluation."""

Collate = Callable[[list[Any]], Any]


class NotingCollate:
    """A task's `collate` that can record the content of the samples."""

    def __init__(self, collate: Collate) -> None:
        self._collate = collate
        self.notes = False
        self.contents: Contents | None = None
        """The content of the last batch, if it is recorded."""

    def __call__(self, rows: list[Any]) -> Any:
        if self.notes:
            self.contents = [by_leaf(row) for row in rows]
        return self._collate(rows)


@dataclass(frozen=True)
class Request:
    """One batch to make: these samples, in this order, of this epoch."""

    epoch: int
    samples: Ids

    def __str__(self) -> str:
        return numbered("sample", self.samples.tolist())


@dataclass(frozen=True)
class Probe(Request):
    """A request to read a few samples twice, each alone; the answer is a `Probed`."""


@exchanged
class Probed(NamedTuple):
    """The content of the samples of a probe."""

    first: tuple[int, ...]
    """The digest of each sample from the first read."""
    second: tuple[int, ...]
    """The digest of each sample from the second read."""
    generators: tuple[str, ...]
    """The attributes of the data set that hold generators which it draws from."""


Contents = list[dict[str, str]]
"""The digests of the leaves of each sample of a batch, by path."""


class Fetched(NamedTuple):
    """A batch, and the ids of the samples that were requested from the data set for it."""

    samples: Ids
    batch: Any
    contents: Contents | None = None
    """The content of the samples, if it is recorded."""


class Fetcher:
    """Makes batches of one data set. It is picklable for loader processes."""

    def __init__(self, dataset: Any, task: Task, seed: int) -> None:
        self._columns: tuple[torch.Tensor, ...] | None = None
        own_collate = getattr(type(task), "collate", None) is not Task.collate
        if type(dataset) is TensorDataset and not own_collate and "collate" not in vars(task):
            self._columns = dataset.tensors
        read = functools.partial(operator.getitem, dataset)
        several = getattr(dataset, "__getitems__", None)
        self._dataset = dataset
        self.collate = NotingCollate(task.collate)
        self._augmentation = Augmentation(read, several, self.collate, seed)

    def __call__(self, request: Request) -> Any:
        """Return the batch for a request, on the CPU."""
        return self.fetch(request).batch

    def fetch(self, request: Request) -> Fetched:
        asked = request.samples
        if isinstance(request, Probe):
            return Fetched(asked, self._probed(request))
        if self._columns is not None:  # the same as default_collate of the rows, 30 times faster
            rows = torch.from_numpy(asked)
            batch = [column.index_select(0, rows) for column in self._columns]
            notes = self.collate.notes
            contents = [by_leaf(row) for row in zip(*batch, strict=True)] if notes else None
            return Fetched(asked, batch, contents)
        batch = self._augmentation.batch(request.epoch, asked)
        return Fetched(asked, batch, self.collate.contents)

    def sample(self, epoch: int, sample: int) -> Any:
        return self._augmentation.sample(epoch, sample)

    def _probed(self, request: Request) -> Probed:
        def read() -> tuple[int, ...]:
            return tuple(digest(self.sample(request.epoch, i)) for i in request.samples.tolist())

        first, second = read(), read()
        names = () if first == second else tuple(drawn_from(self._dataset, read))
        return Probed(first, second, names)
