"""A vote between ranks: finds the ranks that differ from the majority."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from dtrain.words import numbered


@dataclass(frozen=True)
class Vote:
    reference: int
    """A rank of the majority, or rank 0 without a majority."""
    others: tuple[int, ...]
    """The ranks whose value differs from the reference."""
    decided: bool
    """Whether there is a majority."""
    world_size: int

    @property
    def culprits(self) -> tuple[int, ...]:
        """Return the ranks that differ from the majority; empty if there is no majority."""
        return self.others if self.decided else ()

    @property
    def where(self) -> str:
        """Return, in words, the ranks on which the value differs."""
        if self.decided:
            return f"on {numbered('rank', self.others)}"
        return "between ranks 0 and 1" if self.world_size == 2 else "between the ranks"

    def sides(self, suspects: str, references: str) -> str:
        """Return, in words, the value on the first rank that differs and on the reference."""
        alone = self.decided and len(self.others) == 1
        there = "there" if alone else f"on rank {self.others[0]}"
        return f"{suspects} {there} and {references} on rank {self.reference}"

    def __str__(self) -> str:
        ranks = numbered("rank", self.others)
        if self.decided:
            return f"{ranks} {'differ' if len(self.others) > 1 else 'differs'} from the others"
        if self.world_size == 2:
            return "ranks 0 and 1 differ; with two ranks there is no majority"
        return f"{ranks} and rank 0 differ; there is no majority"


def vote(values: Sequence[Hashable]) -> Vote:
    (value, votes), *_ = Counter(values).most_common()
    decided = 2 * votes > len(values)
    reference = values.index(value) if decided else 0
    others = tuple(rank for rank, theirs in enumerate(values) if theirs != values[reference])
    return Vote(reference, others, decided, len(values))
