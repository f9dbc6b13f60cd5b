"""dtrain's placement of samples for a script with its own loop."""

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
    """This process's positions in the epoch."""


class Sampler(torch.utils.data.Sampler[list[int]]):
    """A batch sampler that yields this process's part of each step's samples.

    Step s of an epoch is the same list of samples on any number of processes, and each process
    takes the next part of it. Nothing is padded, dropped or repeated. A pass over the sampler (or
    over a `DataLoader` with `batch_sampler=`) covers the rest of the current epoch, one batch per
    step.

    Call `step()` after every optimizer step: loaders read ahead, so only the loop knows which
    batches have been trained on.

    Args:
        dataset: a map-style data set, or its length.
        global_batch_size: the number of samples of one step over all processes, at least one for
            each. If an epoch's last step would leave a process without a sample, its samples go
            to the step before.
        seed: decides the order, together with the epoch.
        shuffle: True means a new order in each epoch, False the order of the data set.

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
        self._plan = EpochPlan(size, global_batch_size, None, None, at_least=self._ranks.world_size)
        self._identity = {"num_samples": size, "seed": seed, "order": self._order.name}
        self._position = Position()
        self._handed_out: Position | None = None
        """The position at the end of the last complete pass."""

    @property
    def epoch(self) -> int:
        return self._position.epoch

    @property
    def scale(self) -> float:
        """The factor for a mean loss over this process's batch; multiply before `backward`.

        DDP averages over processes. That is the mean over samples only if all processes have the
        same number of them.
        """
        step = self._step(self._position)
        return self._ranks.world_size * len(step.mine) / step.batch.size

    def step(self) -> None:
        """Record that the next batch has been trained on."""
        self._position = self._step(self._position).batch.after

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the sample ids of each batch of this process, to the end of the epoch.

        Raises:
            UsageError: `step()` was not called after each batch of the previous pass.
        """
        if self._handed_out not in (None, self._position):
            raise UsageError(
                "a whole epoch was read, but step() of the sampler was not called once after each "
                "optimizer step, so the sampler does not know the position of the training",
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
        """Return the number of steps to the end of the epoch."""
        assert self._plan.num_samples is not None
        left = self._plan.num_samples - self._position.consumed
        steps = replace(self._plan, num_samples=left).steps_per_epoch
        assert steps is not None
        return steps

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the identity of the data, as values for JSON."""
        position = {"epoch": self._position.epoch, "consumed": self._position.consumed}
        return {**position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of a `state_dict`, on any number of processes.

        Raises:
            CheckpointError: the position is in other data, or in another order of the data.
        """
        for name, value in self._identity.items():
            if state[name] != value:
                raise CheckpointError(
                    f"its samples are different: {name} was {state[name]}, is {value}",
                    code="checkpoint.other-data",
                )
        self._position = Position(state["epoch"], state["consumed"])
        self._handed_out = None

    def _step(self, position: Position) -> _Step:
        batch = next(self._plan.batches(0, position))
        return _Step(batch, batch.part(self._ranks.rank, self._ranks.world_size))
