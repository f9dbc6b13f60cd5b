"""Who read the wrong samples, when, and which: told once the sums of an epoch do not agree.

Slow compared with the proof itself, and only ever run once, at the end of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dtrain.errors import BlamedError
from dtrain.train import collectives
from dtrain.train.data.checksum import KeyedSums
from dtrain.train.data.hashing import Words
from dtrain.train.data.permutation import Ids
from dtrain.train.packed import exchanged

if TYPE_CHECKING:
    from dtrain.train.data.proof import Proof, Segment

_SEARCH_LIMIT = 100_000_000
"""Ids that are tried to name a sample; 100 ns each."""

_BLOCK = 1 << 16
_MAX_LINES = 8


@exchanged
@dataclass(frozen=True)
class Fault:
    """What is wrong in one range of steps of one rank, or of all together."""

    rank: int | None
    """None: no rank did other than planned, but the plans do not add up."""
    steps: range
    what: str

    def __str__(self) -> str:
        first, last = self.steps.start + 1, self.steps.stop
        when = f"step {first}" if first == last else f"steps {first} to {last}"
        who = "all ranks together" if self.rank is None else f"rank {self.rank}"
        return f"  {who}, {when}: {self.what}"


def explain(proof: Proof, segment: Segment, num_read: int, num_expected: int) -> BlamedError:
    """The error; a collective, its message is the same on every rank.

    Args:
        proof: this rank's.
        segment: the steps since the last check.
        num_read: samples that all ranks have read in them.
        num_expected: samples that they should have read, in them or in the whole epoch.
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
            f"  every rank read what was planned in these steps, {num_read} samples in all; but "
            f"with what the checkpoint says of the steps before, the {num_expected} samples of the "
            "epoch were not read once each"
        )
    lines.append(
        "nothing of these steps was saved; a loader or data set that was changed to read other "
        "samples than it is asked for is the likely cause"
    )
    culprits = sorted({fault.rank for fault in faults if fault.rank is not None})
    return BlamedError("\n".join(lines), culprits, proof.ranks.rank)


def _own(proof: Proof, segment: Segment) -> list[Fault]:
    """Where this rank read something other than its own part of the order."""
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
    """Ranges whose planned parts do not add up to the order: ranks overlap or leave gaps."""
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
    """Whether a range is right in the order of another epoch."""
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
    """The one sample that explains a difference, if one does."""
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
    """Reading x instead of y differs by words(x) - words(y): look for all x among the y's."""
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
    """The ids whose words are the target."""
    words = sums.words(ids)
    matches: Ids = ids[(words[0] == target[0]) & (words[1] == target[1])]
    return matches


def _at(sample: int, planned: Ids, positions: Ids) -> str:
    (where,) = np.flatnonzero(planned == sample)[:1]
    return f"sample {sample} (position {positions[where]})"
