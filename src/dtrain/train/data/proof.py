"""Proof, while training, that every sample of an epoch was read exactly once.

Each rank adds up keyed sums of the ids that its data set was really asked for. At the end of an
epoch, and before every checkpoint, the ranks' sums are added up (one exchange of 112 bytes) and
compared with what they should be: for a whole epoch of a permutation the sum of 0 … N-1, which
owes nothing to the code that made the order; for anything else the sum of the order's own ids,
each rank computing an equal part. On a mismatch the ranks find out who, when and which sample,
and the run stops: nothing is saved that was trained on other data.

The sums of an epoch are the same in any order, so one range of steps is compared with the order
itself each time: it would be wrong if the order were another epoch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtrain.errors import DtrainError
from dtrain.ranks import RankInfo
from dtrain.train import collectives
from dtrain.train.data.checksum import NOTHING, KeyedSums, Tally
from dtrain.train.data.hashing import Words, keys
from dtrain.train.data.order import Order
from dtrain.train.data.permutation import Ids
from dtrain.train.data.placement import GlobalBatch, Position, shard

Split = Callable[[GlobalBatch], Sequence[range]]
"""A rank's micro-batches of a global batch, as positions in the epoch."""

_BLOCK = 1 << 16

_MAX_SAMPLES = 1 << 24
"""Checked after so many samples at the latest: the check before a checkpoint then takes 2 s / world
size at most, also when a job is told to leave in the middle of an epoch of 1e10."""


class Segment:
    """The steps since the last check; all of one epoch."""

    def __init__(self, first: GlobalBatch, seed: int, split: Split) -> None:
        self.first = first
        self.last = first
        self._split = split
        self.sums = KeyedSums(seed, first.epoch)
        self.tally = Tally(self.sums, first.step)

    def complete(self, batch: GlobalBatch) -> bool:
        """Whether this batch is not to be part of it: the trainer has not asked for a check."""
        return batch.epoch != self.first.epoch or batch.start - self.first.start >= _MAX_SAMPLES

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step; only the last may be short."""
        if step == self.last.step:
            return self.last
        size = self.first.size
        start = self.first.start + (step - self.first.step) * size
        return GlobalBatch(step, self.first.epoch, start, start + size, room=self.first.room)

    def positions(self, steps: range) -> Ids:
        """The positions that this rank takes in these steps, in order."""
        parts = [part for step in steps for part in self._split(self.batch(step))]
        arrays = [np.arange(part.start, part.stop, dtype=np.int64) for part in parts]
        return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])


class Proof:
    """One rank's part of the proof.

    Args:
        order: of the training; its ids are looked up again, by another way.
        ranks: the place of this process.
        seed: the job's seed, a key of the sums.
    """

    def __init__(self, order: Order, ranks: RankInfo, seed: int) -> None:
        self.order = order
        self.ranks = ranks
        self._seed = seed
        self._next: Position | None = None
        """Where the next batch begins; None before the first of all."""
        self._segment: Segment | None = None
        self._proven: Words | None = NOTHING
        """The sums of this epoch over all ranks up to the last check; None: not known."""

    def begin(self, batch: GlobalBatch, split: Split) -> None:
        """Before anything of a step is read, on every rank; 2 µs.

        Args:
            batch: what the step trains on.
            split: this rank's micro-batches of any global batch.

        Raises:
            DtrainError: the step does not begin where the one before ended.
        """
        if self._next is not None and (batch.epoch, batch.start) != (
            self._next.epoch,
            self._next.consumed,
        ):
            raise DtrainError(
                f"step {batch.step + 1} begins at position {batch.start} of epoch {batch.epoch}, "
                f"but training has consumed epoch {self._next.epoch} up to {self._next.consumed}: "
                "samples would be read twice or not at all"
            )
        if self._segment is not None and self._segment.complete(batch):
            self.check()
        if self._segment is None:
            self._segment = Segment(batch, self._seed, split)
            if batch.start > 0 and self._next is None:
                self._proven = None
        self._segment.last = batch
        self._segment.tally.begin(batch.step)
        self._next = batch.after

    def read(self, ids: Ids) -> None:
        """After the ids of a micro-batch of this step were asked for; 0.3 µs and 20 ns an id."""
        assert self._segment is not None
        self._segment.tally.add(ids)

    def check(self) -> None:
        """Compare what all ranks have read since the last check; called by all ranks.

        Costs 20 ns a sample of the epoch at its end, 60 to 150 ns a sample since the last check
        in its middle, divided by the number of ranks; and one exchange.

        Raises:
            DtrainError: on all ranks, with the ranks, steps and samples that are wrong.
        """
        segment = self._segment
        if segment is None:
            return
        whole = segment.last.ends_epoch and self.order.once and self._proven is not None
        mine = segment.tally.total()
        expected = self._whole_share(segment) if whole else self._order_share(segment)
        misplaced = np.array([whole and self._misplaced(segment)], dtype=np.uint64)
        total = collectives.sum_words(np.concatenate([mine, expected, misplaced]))
        read = total[:3]
        proven = None if self._proven is None else self._proven + read
        agreed = np.array_equal(proven if whole else read, total[3:6])  # type: ignore[arg-type]
        if not agreed or total[6]:
            from dtrain.train.data.findings import explain

            raise explain(self, segment, int(total[2]), int(total[5]))
        self._proven = NOTHING if segment.last.ends_epoch else proven
        self._segment = None

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state at the last check."""
        assert self._segment is None, "check() comes before state_dict()"
        known = None if self._proven is None else [int(word) for word in self._proven]
        position = None if self._next is None else [self._next.epoch, self._next.consumed]
        return {"position": position, "sums": known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, on any number of ranks."""
        position, sums = state.get("position"), state.get("sums")
        self._next = None if position is None else Position(*position)
        self._proven = None if sums is None else np.array(sums, dtype=np.uint64)

    def _whole_share(self, segment: Segment) -> Words:
        """This rank's part of the sum over all samples of the epoch, 0 … N-1."""
        number = self.order.num_ids or segment.last.stop
        share = shard(number, self.ranks.rank, self.ranks.world_size)
        total = NOTHING.copy()
        for start in range(share.start, share.stop, _BLOCK):
            total += segment.sums.total(np.arange(start, min(start + _BLOCK, share.stop)))
        return total

    def _order_share(self, segment: Segment) -> Words:
        """This rank's part of the sum over the order's ids since the last check."""
        begin, end = segment.first.start, segment.last.stop
        share = shard(end - begin, self.ranks.rank, self.ranks.world_size)
        order = self.order.epoch(segment.first.epoch)
        total = NOTHING.copy()
        for start in range(begin + share.start, begin + share.stop, _BLOCK):
            stop = min(start + _BLOCK, begin + share.stop)
            total += segment.sums.total(order.block(start, stop))
        return total

    def _misplaced(self, segment: Segment) -> bool:
        """Whether one range of steps, another each time, is not this rank's part of the order."""
        ranges = segment.tally.ranges()
        index = int(keys(1, segment.first.epoch, segment.last.stop)[0]) % len(ranges)
        planned = segment.positions(segment.tally.steps(index))
        ids = self.order.epoch(segment.first.epoch).at(planned)
        return not np.array_equal(segment.sums.total(ids), ranges[index])
