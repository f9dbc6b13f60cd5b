"""The placement of a step's samples on ranks and micro-batches, by pure arithmetic.

Nothing is padded, dropped or repeated, for any number of samples, batch size and world size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import xxhash


def shard(n: int, rank: int, world_size: int) -> range:
    """Return a rank's contiguous part of `range(n)`; sizes differ by at most one.

    The boundary before rank r is ceil(r·n / world_size). So rank 0 has a sample whenever any rank
    has one, and the boundaries of a world size are among those of its multiples.
    """
    return range(-(-rank * n // world_size), -(-(rank + 1) * n // world_size))


def pieces(part: range, size: int | None) -> tuple[range, ...]:
    """Cut a contiguous part into pieces of `size` samples. The last may be shorter."""
    if not part:
        return ()
    if size is None:
        return (part,)
    return tuple(part[i : i + size] for i in range(0, len(part), size))


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step: positions start … stop-1 of the order of `epoch`."""

    step: int
    """The number of optimizer steps before this one, over the whole training."""
    epoch: int
    start: int
    stop: int
    ends_epoch: bool = False
    """Whether it is the last batch of the epoch."""
    room: int | None = None
    """The size from which shares are cut. None means the size of the batch. A stream's last batch
    is distributed like a full one without its end, because its size is unknown until it is read."""
    shares: tuple[int, ...] | None = None
    """The number of samples of each rank, if every rank reads its own. None means equal shares."""
    content: int = 0
    """A digest of the samples' content; 0 if it is unknown."""

    @property
    def size(self) -> int:
        return self.stop - self.start

    def part(self, rank: int, world_size: int) -> range:
        """Return the positions (in the epoch) of a rank; empty for an idle rank."""
        if self.shares is not None:
            start = self.start + sum(self.shares[:rank])
            return range(start, start + self.shares[rank])
        mine = shard(self.room or self.size, rank, world_size)
        start = min(self.start + mine.start, self.stop)
        return range(start, min(self.start + mine.stop, self.stop))

    def micro_batches(
        self, rank: int, world_size: int, micro_batch_size: int | None
    ) -> tuple[range, ...]:
        """Return the positions (in the epoch) of each micro-batch of a rank; none if it is idle."""
        return pieces(self.part(rank, world_size), micro_batch_size)

    @property
    def fingerprint(self) -> float:
        """A number that identifies the batch; sums of 2**21 of them are exact in fp64.

        It is a hash. So the mean over ranks with different batches is not the number of one of
        them.
        """
        facts = (self.epoch, self.start, self.stop, self.ends_epoch, self.content)
        return float(xxhash.xxh32_intdigest(repr(facts).encode()))

    def fullest(self) -> int:
        """Return a rank that has the largest number of samples in this step."""
        return 0 if self.shares is None else self.shares.index(max(self.shares))

    def reaches_every_rank(self, world_size: int) -> bool:
        """Return whether every rank has a sample in this step; the last rank runs out first."""
        if self.shares is not None:
            return min(self.shares) > 0
        return bool(self.part(world_size - 1, world_size))

    @property
    def after(self) -> Position:
        return Position(self.epoch + 1, 0) if self.ends_epoch else Position(self.epoch, self.stop)


@dataclass(frozen=True)
class Position:
    """The position up to which the data was consumed. A resume needs nothing else."""

    epoch: int = 0
    consumed: int = 0
    """The number of samples of this epoch that were consumed, always less than all samples."""


@dataclass(frozen=True)
class EpochPlan:
    """All global batches of a training, from any position on.

    The attributes are plain numbers: samples per epoch (None for a stream, whose length is
    unknown), samples per step, and the end of the training. One of `epochs` and `steps` may be
    None; with both, the training ends at the first.
    """

    num_samples: int | None
    global_batch_size: int
    epochs: int | None
    steps: int | None
    at_least: int = 1
    """The smallest number of samples of an epoch's last step. If fewer are left, the previous step
    takes them."""

    @property
    def steps_per_epoch(self) -> int | None:
        """The number of steps in one epoch; the last may have fewer samples. None means unknown."""
        if self.num_samples is None:
            return None
        steps, rest = divmod(self.num_samples, self.global_batch_size)
        return max(1, steps + (rest >= self.at_least))

    @property
    def total_steps(self) -> int | None:
        """The number of steps of the training unless it stops early. None means unknown."""
        ends = [] if self.steps is None else [self.steps]
        if self.epochs is not None and self.steps_per_epoch is not None:
            ends.append(self.epochs * self.steps_per_epoch)
        return min(ends, default=None)

    @property
    def total_epochs(self) -> int | None:
        """The number of epochs begun in the training unless it stops early. None means unknown."""
        per_epoch, steps = self.steps_per_epoch, self.total_steps
        if per_epoch is None or steps is None:
            return self.epochs
        return -(-steps // per_epoch)

    def over(self, step: int, epoch: int) -> bool:
        """Return whether the training is complete after `step` steps, before epoch `epoch`."""
        return (self.steps is not None and step >= self.steps) or (
            self.epochs is not None and epoch >= self.epochs
        )

    def batches(self, step: int, position: Position) -> Iterator[GlobalBatch]:
        """Yield the global batches after `step` steps and a position; not for a stream."""
        assert self.num_samples is not None
        epoch, start = position.epoch, position.consumed
        while not self.over(step, epoch):
            stop = min(start + self.global_batch_size, self.num_samples)
            if self.num_samples - stop < self.at_least:
                stop = self.num_samples
            ends_epoch = stop == self.num_samples
            yield GlobalBatch(step, epoch, start, stop, ends_epoch)
            step += 1
            epoch, start = (epoch + 1, 0) if ends_epoch else (epoch, stop)
