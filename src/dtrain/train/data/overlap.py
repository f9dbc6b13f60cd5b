"""The check that streams which shard themselves are disjoint, by the content of their samples.

Each rank keeps at most 65,536 digests of the samples that it has read: those that are divisible by
2**k, for a k that grows as needed. All ranks keep the same ones, so a sample that two ranks have
read is found for any order. Data may contain duplicates: a few are reported as a warning, and only
ranks that read mostly the same samples are an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtrain.errors import BlamedError
from dtrain.ranks import RankInfo
from dtrain.train import collectives
from dtrain.train.packed import exchanged
from dtrain.words import numbered

logger = logging.getLogger(__name__)

_MAX_KEPT = 65_536
_MAX_GATHERED = 1 << 22
"""The number of digests of all ranks together; 16 bytes each, on every rank."""
_MIN_IN_ORDER = 8
"""The number of samples, all different, that two ranks do not read in the same order by chance."""
_MIN_SHARED = 32
"""The number of common samples that are significant in another order."""
_DISTINCT = 0.9
"""The part of a rank's samples that must be different; otherwise content cannot distinguish
streams. With V possible values a rank then has V/5 samples at most, and another has a fifth of
them."""


@exchanged
@dataclass(frozen=True)
class Kept:
    modulus: int
    num_seen: int
    """The number of samples whose digests are divisible by the modulus."""
    digests: NDArray[np.uint64]
    positions: NDArray[np.int64]
    """The first position of each in the rank's own stream, ascending."""

    def thinned(self, modulus: int) -> Kept:
        if modulus == self.modulus:
            return self
        left = self.digests % np.uint64(modulus) == 0
        seen = round(self.num_seen * left.mean()) if len(left) else 0
        return Kept(modulus, seen, self.digests[left], self.positions[left])

    @property
    def distinct(self) -> bool:
        """Whether most of the samples are different."""
        return len(self.digests) >= max(_MIN_IN_ORDER, _DISTINCT * self.num_seen)


@exchanged
@dataclass(frozen=True)
class Finding:
    num_shared: int
    """The number of kept samples that another rank has read too."""
    num_compared: int
    example: tuple[int, int, int] | None
    """A position, another rank, and the position there of the same sample."""
    twins: tuple[int, ...]
    """The ranks that read mostly the same samples."""


class Overlap:
    """Finds samples that several ranks have read."""

    def __init__(self, ranks: RankInfo) -> None:
        self._ranks = ranks
        self._most = min(_MAX_KEPT, _MAX_GATHERED // ranks.world_size)
        self._warned = False
        self.clear()

    def clear(self) -> None:
        self._modulus = 1
        self._num_seen = 0
        self._first: dict[int, int] = {}
        """The first position of each digest."""

    def add(self, contents: Mapping[int, int]) -> None:
        """Record the digests of samples by position; samples that cannot be read are skipped."""
        for position, word in contents.items():
            if word and word % self._modulus == 0:
                self._num_seen += 1
                self._first.setdefault(word, position)
        while len(self._first) > self._most:
            self._modulus *= 2
            before = len(self._first)
            self._first = {w: p for w, p in self._first.items() if w % self._modulus == 0}
            self._num_seen = round(self._num_seen * len(self._first) / before)

    def compare(self) -> None:
        """Find samples that several ranks have read. All ranks must call it.

        Raises:
            BlamedError: two ranks or more read mostly the same samples.
        """
        everyone = self._everyone()
        findings = collectives.gather_to_all(_finding(everyone, self._ranks.rank))
        twins = [rank for rank, finding in enumerate(findings) if finding.twins]
        shared = sum(finding.num_shared for finding in findings)
        compared = sum(finding.num_compared for finding in findings)
        if twins:
            some = f"{numbered('rank', twins)} read"
            readers = "every rank reads" if len(twins) == len(findings) else some
            num_twins = sum(findings[rank].num_shared for rank in twins)
            num_theirs = sum(findings[rank].num_compared for rank in twins)
            raise BlamedError(
                f"data.stream is sharded, but {readers} the same samples: {num_twins} of "
                f"{num_theirs} compared are on another rank too\nremove data.stream: sharded, so "
                "that dtrain distributes the samples, or let the stream shard itself",
                [] if len(twins) == len(findings) else twins,
                self._ranks.rank,
                code="data.stream-not-sharded",
            )
        distinct = all(each.distinct for each in everyone if each.num_seen)
        if shared and distinct and not self._warned and self._ranks.is_rank_zero:
            self._warned = True
            first = next(rank for rank, finding in enumerate(findings) if finding.example)
            here, other, there = findings[first].example  # type: ignore[misc]
            logger.warning(
                "data.stream is sharded, but %d of %d samples compared are on several ranks: "
                "sample %d of rank %d is also sample %d of rank %d; does the data have duplicates?",
                shared, compared, here, first, there, other,
            )  # fmt: skip

    def _everyone(self) -> list[Kept]:
        digests = np.array(list(self._first), dtype=np.uint64)
        positions = np.array(list(self._first.values()), dtype=np.int64)
        everyone = collectives.gather_to_all(
            Kept(self._modulus, self._num_seen, digests, positions)
        )
        modulus = max(each.modulus for each in everyone)
        return [each.thinned(modulus) for each in everyone]


def _finding(everyone: list[Kept], rank: int) -> Finding:
    mine = everyone[rank]
    shared = np.zeros(len(mine.digests), dtype=bool)
    example = None
    twins = []
    for other, theirs in enumerate(everyone):
        if other == rank:
            continue
        common, here, there = np.intersect1d(mine.digests, theirs.digests, return_indices=True)
        shared[here] = True
        if example is None and len(common):
            at = int(np.argmin(here))
            example = int(mine.positions[here[at]]), other, int(theirs.positions[there[at]])
        if _mostly(mine, theirs, len(common)):
            twins.append(other)
    return Finding(int(shared.sum()), len(shared), example, tuple(twins))


def _mostly(mine: Kept, theirs: Kept, num_common: int) -> bool:
    """Return whether two ranks read the same: in the same order, or most samples in any order."""
    if not (mine.distinct and theirs.distinct):
        return False
    length = min(len(mine.digests), len(theirs.digests))
    if np.array_equal(mine.digests[:length], theirs.digests[:length]) and np.array_equal(
        mine.positions[:length], theirs.positions[:length]
    ):
        return True
    return length >= _MIN_SHARED and 2 * num_common > length
