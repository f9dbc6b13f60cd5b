"""Where the samples of a step go: which rank, which micro-batch. Pure arithmetic.

Nothing is padded, dropped or repeated, for any number of samples, batch size and world size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import xxhash


def shard(n: int, rank: int, world_size: int) -> range:
    """The contiguous part of `range(n)` that falls to a rank; sizes differ by at most one.

    The boundary before rank r is ceil(r·n / world_size): rank 0 has a sample whenever anybody
    has, and the boundaries of a world size are among those of its multiples.
    """
    return range(-(-rank * n // world_size), -(-(rank + 1) * n // world_size))


def pieces(part: range, size: int | None) -> tuple[range, ...]:
    """A contiguous part cut into pieces of `size` samples, the last one shorter; none if empty."""
    if not part:
        return ()
    if size is None:
        return (part,)
    return tuple(part[i : i + size] for i in range(0, len(part), size))


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step: positions start … stop-1 of the order of `epoch`."""

    step: int
    """Optimizer steps before this one, over the whole training."""
    epoch: int
    start: int
    stop: int
    ends_epoch: bool = False
    """Whether nothing of the epoch comes after."""
    room: int | None = None
    """The size from which shares are cut; None: that of the batch. A stream's last batch is dealt
    like a full one with its end missing: that it is short shows only when it has been read."""
    shares: tuple[int, ...] | None = None
    """Samples of each rank, where every rank brings its own; None: the shares are cut alike."""
    content: int = 0
    """A digest of what the samples hold, where that is known."""

    @property
    def size(self) -> int:
        return self.stop - self.start

    def part(self, rank: int, world_size: int) -> range:
        """The positions (in the epoch) of a rank; empty for an idle one."""
        if self.shares is not None:
            start = self.start + sum(self.shares[:rank])
            return range(start, start + self.shares[rank])
        mine = shard(self.room or self.size, rank, world_size)
        start = min(self.start + mine.start, self.stop)
        return range(start, min(self.start + mine.stop, self.stop))

    def micro_batches(
        self, rank: int, world_size: int, micro_batch_size: int | None
    ) -> tuple[range, ...]:
        """The positions (in the epoch) of each micro-batch of a rank; none for an idle rank."""
        return pieces(self.part(rank, world_size), micro_batch_size)

    @property
    def fingerprint(self) -> float:
        """A number that other batches hardly have; sums of 2**21 of them are exact in fp64.

        It is a hash, so that ranks with several others cannot have one of them for their mean.
        """
        told = (self.epoch, self.start, self.stop, self.ends_epoch, self.content)
        return float(xxhash.xxh32_intdigest(repr(told).encode()))

    def fullest(self) -> int:
        """A rank that has as many samples of this step as any."""
        return 0 if self.shares is None else self.shares.index(max(self.shares))

    def reaches_every_rank(self, world_size: int) -> bool:
        """Whether every rank has at least one sample of this step; the last is short first."""
        if self.shares is not None:
            return min(self.shares) > 0
        return bool(self.part(world_size - 1, world_size))

    @property
    def after(self) -> Position:
        return Position(self.epoch + 1, 0) if self.ends_epoch else Position(self.epoch, self.stop)


@dataclass(frozen=True)
class Position:
    """How far the data has been consumed: all that a resume needs to know."""

    epoch: int = 0
    consumed: int = 0
    """Samples of this epoch that training has consumed; always below the number of samples."""


@dataclass(frozen=True)
class EpochPlan:
    """All global batches of a training, from any position on.

    Attributes are plain numbers: samples per epoch (None: a stream, which ends when it ends),
    samples per step, and where to end (one of `epochs` and `steps` may be None; with both,
    whichever comes first).
    """

    num_samples: int | None
    global_batch_size: int
    epochs: int | None
    steps: int | None
    at_least: int = 1
    """Samples that an epoch's last step has; where fewer are left, the step before takes them."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one epoch, the last may have fewer samples; None: nobody knows."""
        if self.num_samples is None:
            return None
        steps, rest = divmod(self.num_samples, self.global_batch_size)
        return max(1, steps + (rest >= self.at_least))

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps in the whole training unless it stops early; None: nobody knows."""
        ends = [] if self.steps is None else [self.steps]
        if self.epochs is not None and self.steps_per_epoch is not None:
            ends.append(self.epochs * self.steps_per_epoch)
        return min(ends, default=None)

    @property
    def total_epochs(self) -> int | None:
        """Epochs begun in the whole training unless it stops early; None: nobody knows."""
        per_epoch, steps = self.steps_per_epoch, self.total_steps
        if per_epoch is None or steps is None:
            return self.epochs
        return -(-steps // per_epoch)

    def over(self, step: int, epoch: int) -> bool:
        """Whether training is complete after `step` steps, with `epoch` to come next."""
        return (self.steps is not None and step >= self.steps) or (
            self.epochs is not None and epoch >= self.epochs
        )

    def batches(self, step: int, position: Position) -> Iterator[GlobalBatch]:
        """The global batches that follow `step` done steps and a position; not of a stream."""
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
