"""Whether all ranks still hold the same, by a few integers that are compared at once.

Each rank brings one 64-bit word for each kind of thing (gradients, parameters, optimizer state,
buffers, numbers, collectives, what the task keeps). The largest of all ranks' words and of their
complements come back from one all-reduce of 112 bytes, whatever the size of the model or of the
world: a kind is the same everywhere exactly if its largest word is the smallest too. Only when it
is not, more is exchanged, by `locate`, to find who differs, in which tensor, in which element.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from dtrain.errors import BlamedError
from dtrain.train import collectives
from dtrain.train.checks import digest
from dtrain.train.checks.collective_trace import CHAIN, first_difference
from dtrain.train.checks.train_state import (
    BUFFERS,
    COLLECTIVES,
    GRADIENTS,
    KEPT,
    MOMENTS,
    NUMBERS,
    PARAMETERS,
    TrainState,
)
from dtrain.train.vote import Vote, vote

KINDS = (NUMBERS, COLLECTIVES, GRADIENTS, PARAMETERS, MOMENTS, BUFFERS, KEPT)
"""Causes before their consequences: another rate makes other parameters."""

_MAX_KINDS = 4


class ReplicaError(BlamedError):
    """The replicas are no longer one model."""

    code = "check.replicas-differ"


class Ledger:
    def __init__(self, subject: TrainState) -> None:
        self.subject = subject
        self._cut = subject.is_cut()

    def compare(self) -> Mismatch | None:
        """What differs between the ranks, if anything; called by all of them."""
        words = self.words()
        kinds = self.differing(words)
        return locate(self.subject, words, kinds) if kinds else None

    def words(self) -> list[int]:
        """This rank's word for each of `KINDS`; 0 for what ranks hold different parts of."""
        return [self._word(kind) for kind in KINDS]

    def differing(self, words: list[int]) -> list[str]:
        """The kinds that are not the same on all ranks; called by all of them."""
        if not collectives.in_group():
            return []
        mine = np.array(words, dtype=np.uint64)
        vector = torch.from_numpy(np.concatenate([mine, ~mine]).view(np.int64))
        dist.all_reduce(vector, op=dist.ReduceOp.MAX)
        largest, smallest = vector[: len(words)], ~vector[len(words) :]
        return [kind for kind, same in zip(KINDS, largest == smallest, strict=True) if not same]

    def _word(self, kind: str) -> int:
        if kind == COLLECTIVES:
            return CHAIN.value
        if kind == NUMBERS:
            return xxhash.xxh3_64_intdigest(repr(self.subject.counters()).encode())
        if kind == KEPT:
            facts = digest.of_leaves(self.subject.kept())
            return xxhash.xxh3_64_intdigest(repr(sorted(facts.items())).encode()) if facts else 0
        if self._cut and kind in (GRADIENTS, PARAMETERS, MOMENTS):
            return 0
        tensors = list(self.subject.tensors(kind).values())
        return digest.of_all(tensors) if tensors else 0


@dataclass(frozen=True)
class Mismatch:
    kinds: tuple[str, ...]
    culprits: tuple[int, ...]
    """The ranks that differ from the majority; empty when there is no majority."""
    text: str
    """For people; several lines."""


def locate(subject: TrainState, words: list[int], kinds: list[str]) -> Mismatch:
    """Find who differs, and where: slow, for a mismatch only, and called by all ranks together."""
    everyone = collectives.gather_to_all(words)
    lines = []
    first: Vote | None = None
    for kind in kinds[:_MAX_KINDS]:
        ballot = vote([theirs[KINDS.index(kind)] for theirs in everyone])
        first = first or ballot
        lines.append(f"{kind}: {_difference(subject, kind, ballot)}")
    assert first is not None
    return Mismatch(tuple(kinds), first.culprits, "\n".join([str(first), *lines]))


def _difference(subject: TrainState, kind: str, ballot: Vote) -> str:
    suspect = ballot.others[0]
    if kind == COLLECTIVES:
        return first_difference(ballot.reference, suspect)
    if kind == NUMBERS:
        return _numbers(subject, ballot.reference, suspect)
    if kind == KEPT:
        return _leaf(subject.kept(), "entries", ballot.reference, suspect) + _COUNT_STEPS
    return _leaf(subject.tensors(kind), "tensors", ballot.reference, suspect)


_COUNT_STEPS = (
    "\nwhat a task keeps is to be the same on all ranks: change it once a step (in on_step of a "
    "dtrain.Callback), since ranks call loss() on samples of their own, and not equally often"
)


def _leaf(leaves: Mapping[str, Any], what: str, reference: int, suspect: int) -> str:
    """The first that differs, with both values, and how many more."""
    everyone = collectives.gather_to_all(digest.of_leaves(leaves))
    ours, theirs = everyone[reference], everyone[suspect]
    lacking = [*(ours.keys() - theirs.keys()), *(theirs.keys() - ours.keys())]
    if lacking:
        name = min(lacking)
        has, lacks = (reference, suspect) if name in ours else (suspect, reference)
        return f"{name} is there on rank {has} and not on rank {lacks}"
    names = [name for name in ours if ours[name] != theirs[name]]
    if not names:
        return "the same by now"
    name = names[0]
    more = f", and in {len(names) - 1} more {what}" if len(names) > 1 else ""
    kinds = {each[name][0] if name in each else None for each in everyone}
    if len(kinds) == 1 and isinstance(leaves[name], torch.Tensor):
        return element_difference(name, leaves[name], reference, suspect) + more
    return _values(name, theirs[name], suspect, ours[name], reference) + more


def _values(
    name: str, theirs: tuple[str, str], suspect: int, ours: tuple[str, str], reference: int
) -> str:
    """Two values, or the types of them where those differ."""
    part = 1 if theirs[0] == ours[0] else 0
    return f"{name} is {theirs[part]} on rank {suspect} and {ours[part]} on rank {reference}"


def _numbers(subject: TrainState, reference: int, suspect: int) -> str:
    everyone = collectives.gather_to_all(subject.counters())
    ours, theirs = everyone[reference], everyone[suspect]
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return "; ".join(
        f"{name} is {theirs.get(name)} on rank {suspect} and {ours.get(name)} on rank {reference}"
        for name in names
    )


def element_difference(name: str, tensor: torch.Tensor, reference: int, suspect: int) -> str:
    """The first element of a tensor that differs between two ranks, with both values.

    Called by all ranks.
    """
    mine = digest.local(tensor).contiguous()
    other = mine.clone()
    dist.broadcast(other, src=reference)
    found = None
    if dist.get_rank() == suspect:
        found = _first_element(name, mine, other, reference, suspect)
    return collectives.gather_to_all(found)[suspect] or ""


def _first_element(
    name: str, mine: torch.Tensor, other: torch.Tensor, reference: int, suspect: int
) -> str:
    places = (digest.as_integers(mine) != digest.as_integers(other)).nonzero().flatten()
    first = int(places[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(first), mine.shape)]
    here, there = mine.reshape(-1)[first], other.reshape(-1)[first]
    left, right = _shown(here), _shown(there)
    if left == right:  # NaNs of other bits, say
        left += f" (bits {int(digest.as_integers(here)):#x})"
        right += f" (bits {int(digest.as_integers(there)):#x})"
    place = f"{name}{index}" if index else name
    return (
        f"{place} is {left} on rank {suspect} and {right} on rank {reference} "
        f"({len(places):,} of {mine.numel():,} elements)"
    )


def _shown(value: torch.Tensor) -> str:
    if value.is_floating_point():
        digits = {torch.float64: 17, torch.float32: 9}.get(value.dtype, 5)
        return f"{value.item():.{digits}g}"
    return str(value.item())
