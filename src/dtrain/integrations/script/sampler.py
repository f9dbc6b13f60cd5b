"""dtrain's placement of samples for a loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dtrain.errors import CheckpointError, UsageError
from dtrain.ranks import RankInfo
from dtrain.train.contract import check_dataset
from dtrain.train.data.order import in_turn, shuffled
from dtrain.train.data.placement import EpochPlan, GlobalBatch, Position


@dataclass(frozen=True)
class _Step:
    batch: GlobalBatch
    mine: range
    """Positions in the epoch."""


class Sampler(torch.utils.data.Sampler[list[int]]):
    """A batch sampler: each step's samples, and this process's part of them.

    Step s of an epoch is the same list of samples on any number of processes; each of them takes
    a part in turn. Nothing is padded, dropped or repeated. A pass over it (or over a `DataLoader`
    with `batch_sampler=`) is what is left of the current epoch, one batch a step.

    Call `step()` after every optimizer step: loaders read ahead, so only the loop knows how far
    training has come.

    Args:
        dataset: a map-style data set, or its length.
        global_batch_size: samples of one step over all processes, at least one for each. Where
            an epoch's last step would leave a process without a sample, its samples go to the
            step before.
        seed: decides the order, with the epoch.
        shuffle: a new order in each epoch; false: the data set's own.

    Raises:
        UsageError: there are more processes than samples in a step.
    """

    def __init__(
        self,
        dataset: Sized | int,
        global_batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        size = dataset if isinstance(dataset, int) else check_dataset(dataset, "the data set")
        self._ranks = RankInfo.from_env()
        if min(global_batch_size, size) < self._ranks.world_size:
            raise UsageError(
                f"{self._ranks.world_size} processes cannot share steps of "
                f"{min(global_batch_size, size)} samples; take a larger global_batch_size or fewer "
                "processes",
                code="data.too-few-samples",
            )
        self._order = shuffled(size, seed) if shuffle else in_turn(size)
        self._course = EpochPlan(
            size, global_batch_size, None, None, at_least=self._ranks.world_size
        )
        self._identity = {"num_samples": size, "seed": seed, "order": self._order.name}
        self._position = Position()
        self._handed_out: Position | None = None
        """Where a complete pass should have led."""

    @property
    def epoch(self) -> int:
        return self._position.epoch

    @property
    def scale(self) -> float:
        """What a mean loss over this process's batch is multiplied with before `backward`.

        DDP averages over processes, which is the mean over samples only where all have as many.
        """
        step = self._step(self._position)
        return self._ranks.world_size * len(step.mine) / step.batch.size

    def step(self) -> None:
        """Take note that the next batch has been trained on."""
        self._position = self._step(self._position).batch.after

    def __iter__(self) -> Iterator[list[int]]:
        """The sample ids of each batch of this process to the end of the epoch.

        Raises:
            UsageError: `step()` was not called after each batch of the pass before.
        """
        if self._handed_out not in (None, self._position):
            raise UsageError(
                "a whole epoch was read, but step() of the sampler was not called once after each "
                "optimizer step, so the sampler does not know how far training is",
                code="script.sampler-not-stepped",
            )
        position, epoch = self._position, self._position.epoch
        order = self._order.epoch(epoch)
        while position.epoch == epoch:
            step = self._step(position)
            yield order.at(np.arange(step.mine.start, step.mine.stop)).tolist()
            position = step.batch.after
        self._handed_out = position

    def __len__(self) -> int:
        """Steps to the end of the epoch."""
        assert self._course.num_samples is not None
        left = self._course.num_samples - self._position.consumed
        steps = replace(self._course, num_samples=left).steps_per_epoch
        assert steps is not None
        return steps

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the position, and what it is a position in."""
        position = {"epoch": self._position.epoch, "consumed": self._position.consumed}
        return {**position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was, on any number of processes.

        Raises:
            CheckpointError: the position was in other data, or in another order of it.
        """
        for name, value in self._identity.items():
            if state[name] != value:
                raise CheckpointError(
                    f"its samples are others: {name} was {state[name]}, is {value}",
                    code="checkpoint.other-data",
                )
        self._position = Position(state["epoch"], state["consumed"])
        self._handed_out = None

    def _step(self, position: Position) -> _Step:
        batch = next(self._course.batches(0, position))
        return _Step(batch, batch.part(self._ranks.rank, self._ranks.world_size))
