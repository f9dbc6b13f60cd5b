"""Proof, during the training, that every sample of an epoch was read exactly once.

Each rank adds up keyed sums of the ids that were really requested from its data set. At the end of
an epoch, and before every checkpoint, the ranks' sums are added up (one exchange of 112 bytes) and
compared with the expected sum. For a whole epoch of a permutation that is the sum of 0 … N-1, which
does not depend on the code that made the order. For anything else it is the sum of the order's own
ids, of which each rank computes an equal part. On a mismatch the ranks find the rank, the steps and
the sample, and the run stops: nothing is saved that was trained on other data.

The sums of an epoch are the same in any order. So each check also compares one range of steps with
the order itself, which detects the order of another epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dtrain.errors import BlamedError, DtrainError
from dtrain.ranks import RankInfo
from dtrain.train import collectives
from dtrain.train.data.checksum import NOTHING, KeyedSums, Tally
from dtrain.train.data.hashing import Words, keys
from dtrain.train.data.order import Order
from dtrain.train.data.permutation import Ids
from dtrain.train.data.placement import GlobalBatch, Position, shard
from dtrain.train.packed import exchanged

Split = Callable[[GlobalBatch], Sequence[range]]
"""Returns a rank's micro-batches of a global batch, as positions in the epoch."""

_BLOCK = 1 << 16
_MAX_LINES = 8

_SEARCH_LIMIT = 100_000_000
"""The largest number of ids that are tried to find a sample; 100 ns each."""

_MAX_SAMPLES = 1 << 24
"""The largest number of samples between two checks. The check before a checkpoint then takes at
most 2 s / world size, also when a job is asked to stop in the middle of an epoch of 1e10."""


class Segment:
    """The steps since the last check, all in one epoch."""

    def __init__(self, first: GlobalBatch, seed: int, split: Split) -> None:
        self.first = first
        self.last = first
        self._split = split
        self.sums = KeyedSums(seed, first.epoch)
        self.tally = Tally(self.sums, first.step)

    def complete(self, batch: GlobalBatch) -> bool:
        """Return whether the segment is complete without this batch, so that a check is needed."""
        return batch.epoch != self.first.epoch or batch.start - self.first.start >= _MAX_SAMPLES

    def batch(self, step: int) -> GlobalBatch:
        """Return the global batch of a step; only the last may be short."""
        if step == self.last.step:
            return self.last
        size = self.first.size
        start = self.first.start + (step - self.first.step) * size
        return GlobalBatch(step, self.first.epoch, start, start + size, room=self.first.room)

    def positions(self, steps: range) -> Ids:
        parts = [part for step in steps for part in self._split(self.batch(step))]
        arrays = [np.arange(part.start, part.stop, dtype=np.int64) for part in parts]
        return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])


class Proof:
    """Proves on all ranks together that every sample of an epoch was read exactly once."""

    def __init__(self, order: Order, ranks: RankInfo, seed: int) -> None:
        self.order = order
        self.ranks = ranks
        self._seed = seed
        self._next: Position | None = None
        """The position at which the next batch begins; None before the first batch."""
        self._segment: Segment | None = None
        self._proven: Words | None = NOTHING
        """The sums of this epoch over all ranks up to the last check. None means unknown."""

    def begin(self, batch: GlobalBatch, split: Split) -> None:
        """Begin a step before anything of it is read, on every rank; it takes 2 µs.

        Raises:
            DtrainError: the step does not begin where the previous one ended.
        """
        if self._next is not None and (batch.epoch, batch.start) != (
            self._next.epoch,
            self._next.consumed,
        ):
            raise DtrainError(
                f"step {batch.step + 1} begins at position {batch.start} of epoch {batch.epoch}, "
                f"but training has consumed epoch {self._next.epoch} up to {self._next.consumed}: "
                "samples would be read twice or not at all",
                code="data.not-exactly-once",
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
        """Add the requested ids of a micro-batch of this step; 0.3 µs and 20 ns an id."""
        assert self._segment is not None
        self._segment.tally.add(ids)

    def check(self) -> None:
        """Check what all ranks have read since the last check. All ranks must call it.

        It costs one exchange. At the end of an epoch it takes 20 ns for each of its samples. In
        the middle it takes 60 to 150 ns for each sample since the last check. Both are divided by
        the number of ranks.

        Raises:
            DtrainError: wrong samples were read. All ranks raise it; it names the ranks, steps
                and samples.
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
            raise _explained(self, segment, int(total[2]), int(total[5]))
        self._proven = NOTHING if segment.last.ends_epoch else proven
        self._segment = None

    def state_dict(self) -> dict[str, Any]:
        assert self._segment is None, "check() comes before state_dict()"
        known = None if self._proven is None else [int(word) for word in self._proven]
        position = None if self._next is None else [self._next.epoch, self._next.consumed]
        return {"position": position, "sums": known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        position, sums = state.get("position"), state.get("sums")
        self._next = None if position is None else Position(*position)
        self._proven = None if sums is None else np.array(sums, dtype=np.uint64)

    def _whole_share(self, segment: Segment) -> Words:
        """Return this rank's part of the sum over all samples of the epoch, 0 … N-1."""
        number = self.order.num_ids or segment.last.stop
        share = shard(number, self.ranks.rank, self.ranks.world_size)
        total = NOTHING.copy()
        for start in range(share.start, share.stop, _BLOCK):
            total += segment.sums.total(np.arange(start, min(start + _BLOCK, share.stop)))
        return total

    def _order_share(self, segment: Segment) -> Words:
        """Return this rank's part of the sum over the order's ids since the last check."""
        begin, end = segment.first.start, segment.last.stop
        share = shard(end - begin, self.ranks.rank, self.ranks.world_size)
        order = self.order.epoch(segment.first.epoch)
        total = NOTHING.copy()
        for start in range(begin + share.start, begin + share.stop, _BLOCK):
            stop = min(start + _BLOCK, begin + share.stop)
            total += segment.sums.total(order.block(start, stop))
        return total

    def _misplaced(self, segment: Segment) -> bool:
        """Return whether one range of steps is not this rank's part of the order.

        Each call checks another range.
        """
        ranges = segment.tally.ranges()
        index = int(keys(1, segment.first.epoch, segment.last.stop)[0]) % len(ranges)
        planned = segment.positions(segment.tally.steps(index))
        ids = self.order.epoch(segment.first.epoch).at(planned)
        return not np.array_equal(segment.sums.total(ids), ranges[index])


@exchanged
@dataclass(frozen=True)
class Fault:
    """An error in one range of steps, of one rank or of all ranks together."""

    rank: int | None
    """The rank; None means that each rank followed its plan, but the plans do not add up."""
    steps: range
    what: str

    def __str__(self) -> str:
        first, last = self.steps.start + 1, self.steps.stop
        when = f"step {first}" if first == last else f"steps {first} to {last}"
        ranks = "all ranks together" if self.rank is None else f"rank {self.rank}"
        return f"  {ranks}, {when}: {self.what}"


def _explained(proof: Proof, segment: Segment, num_read: int, num_expected: int) -> BlamedError:
    """Find the ranks that read wrong samples, the steps and the samples. All ranks must call it.

    It is slow compared with the proof itself, but runs only once, at the end of a run.
    """
    faults = [each for rank in collectives.gather_to_all(_own(proof, segment)) for each in rank]
    if not faults:
        faults = _together(proof, segment)
    first, last = segment.first, segment.last
    lines = [
        f"the samples read in epoch {first.epoch} up to step {last.step + 1} (positions "
        f"{first.start} to {last.stop - 1}) are not those of its order:",
        *map(str, faults[:_MAX_LINES]),
    ]
    if len(faults) > _MAX_LINES:
        ranks = sorted({fault.rank for fault in faults if fault.rank is not None})
        lines.append(f"  and {len(faults) - _MAX_LINES} more, on ranks {ranks}")
    if not faults:
        lines.append(
            f"  every rank read the planned samples in these steps, {num_read} in all. But "
            f"together with the earlier steps in the checkpoint, the {num_expected} samples of the "
            "epoch were not read once each"
        )
    lines.append(
        "no checkpoint contains these steps; the likely cause is a changed loader or data set that "
        "reads other samples than those requested"
    )
    culprits = sorted({fault.rank for fault in faults if fault.rank is not None})
    return BlamedError("\n".join(lines), culprits, proof.ranks.rank, code="data.not-exactly-once")


def _own(proof: Proof, segment: Segment) -> list[Fault]:
    """Return the ranges in which this rank did not read its own part of the order."""
    faults = []
    order = proof.order.epoch(segment.first.epoch)
    universe = proof.order.num_ids or segment.last.stop
    for index, read in enumerate(segment.tally.ranges()):
        steps = segment.tally.steps(index)
        positions = segment.positions(steps)
        planned = order.at(positions)
        difference = read - segment.sums.total(planned)
        if not difference.any():
            continue
        what = _named(segment.sums, difference, planned, positions, universe)
        if what is None:
            what = _other_epoch(proof, segment, read, positions)
        if what is None:
            what = f"read {int(read[2])} samples, {len(planned)} were planned, several are wrong"
        faults.append(Fault(proof.ranks.rank, steps, what))
    return faults


def _together(proof: Proof, segment: Segment) -> list[Fault]:
    """Return ranges whose planned parts do not add up to the order: they overlap or leave gaps."""
    everyone = collectives.gather_to_all(segment.tally.ranges().tolist())
    order = proof.order.epoch(segment.first.epoch)
    faults = []
    for index, rows in enumerate(zip(*everyone, strict=True)):
        steps = segment.tally.steps(index)
        start, stop = segment.batch(steps[0]).start, segment.batch(steps[-1]).stop
        read = np.array(rows, dtype=np.uint64).sum(axis=0, dtype=np.uint64)
        if not np.array_equal(read, segment.sums.total(order.block(start, stop))):
            what = (
                f"the ranks' parts of positions {start} to {stop - 1} overlap or leave gaps "
                f"({int(read[2])} samples read, {stop - start} there)"
            )
            faults.append(Fault(None, steps, what))
    return faults


def _other_epoch(proof: Proof, segment: Segment, read: Words, positions: Ids) -> str | None:
    """Return a text if a range is correct in the order of another epoch, else None."""
    epoch = segment.first.epoch
    for other in dict.fromkeys((epoch - 1, epoch + 1, 0)):
        if other in (epoch, -1):
            continue
        ids = proof.order.epoch(other).at(positions)
        if np.array_equal(segment.sums.total(ids), read):
            return f"read the samples of epoch {other} instead of epoch {epoch}"
    return None


def _named(
    sums: KeyedSums, difference: Words, planned: Ids, positions: Ids, num_ids: int
) -> str | None:
    """Describe the single sample that explains a difference, if there is one."""
    surplus = int(difference[2].astype(np.int64))
    if surplus == -1:
        missing = _matches(sums, planned, -difference[:2])
        if missing.size:
            return f"did not read {_at(missing[0], planned, positions)}"
    if num_ids > _SEARCH_LIMIT:
        return None
    if surplus == 1:
        return _extra(sums, difference, num_ids)
    return _swapped(sums, difference, planned, positions, num_ids) if surplus == 0 else None


def _extra(sums: KeyedSums, difference: Words, num_ids: int) -> str | None:
    for start in range(0, num_ids, _BLOCK):
        ids = np.arange(start, min(start + _BLOCK, num_ids))
        found = _matches(sums, ids, difference[:2])
        if found.size:
            return f"read sample {found[0]} once too often"
    return None


def _swapped(
    sums: KeyedSums, difference: Words, planned: Ids, positions: Ids, num_ids: int
) -> str | None:
    """Find the sample x that was read instead of y: the sums differ by words(x) - words(y)."""
    wanted = sums.words(planned) + difference[:2, None]
    order = np.argsort(wanted[0])
    wanted = wanted[:, order]
    for start in range(0, num_ids, _BLOCK):
        ids = np.arange(start, min(start + _BLOCK, num_ids))
        words = sums.words(ids)
        where = np.minimum(np.searchsorted(wanted[0], words[0]), len(planned) - 1)
        for found in np.flatnonzero((wanted[:, where] == words).all(axis=0)):
            right = _at(planned[order[where[found]]], planned, positions)
            return f"read sample {ids[found]} instead of {right}"
    return None


def _matches(sums: KeyedSums, ids: Ids, target: Words) -> Ids:
    words = sums.words(ids)
    matches: Ids = ids[(words[0] == target[0]) & (words[1] == target[1])]
    return matches


def _at(sample: int, planned: Ids, positions: Ids) -> str:
    (where,) = np.flatnonzero(planned == sample)[:1]
    return f"sample {sample} (position {positions[where]})"
