"""The comparison of all ranks' state by a few integers.

Each rank computes one 64-bit word for each kind of state (gradients, parameters, optimizer state,
buffers, numbers, collectives, state of the task). One all-reduce of 112 bytes, for any model and
world size, returns the largest of all ranks' words and of their complements. A kind is the same on
all ranks exactly if its largest word is also the smallest. Only if it is not, `locate` exchanges
more, to find the rank that differs, the tensor and the element.
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
from dtrain.train import collectives, digest
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
"""The kinds in the order of causes and consequences: another rate leads to other parameters."""

_MAX_KINDS = 4


class ReplicaError(BlamedError):
    """The replicas are no longer one model."""

    code = "check.replicas-differ"


class Ledger:
    """Compares the state of a training between ranks, kind by kind."""

    def __init__(self, subject: TrainState) -> None:
        self.subject = subject
        self._cut = subject.is_cut()

    def compare(self) -> Mismatch | None:
        """Return what differs between the ranks, if anything. All ranks must call it."""
        words = self.words()
        kinds = self.differing(words)
        return locate(self.subject, words, kinds) if kinds else None

    def words(self) -> list[int]:
        """Return this rank's word for each of `KINDS`; 0 for sharded state."""
        return [self._word(kind) for kind in KINDS]

    def differing(self, words: list[int]) -> list[str]:
        """Return the kinds that are not the same on all ranks. All ranks must call it."""
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
    """The ranks that differ from the majority; empty if there is no majority."""
    text: str
    """The difference as a text of several lines."""


def locate(subject: TrainState, words: list[int], kinds: list[str]) -> Mismatch:
    """Find the ranks that differ, and where. It is slow, and all ranks must call it together."""
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
    "\nthe state of a task must be the same on all ranks: change it once a step (in on_step of a "
    "dtrain.Callback). Ranks call loss() on different samples, and not equally often"
)


def _leaf(leaves: Mapping[str, Any], what: str, reference: int, suspect: int) -> str:
    """Describe the first leaf that differs, with both values, and the number of others."""
    everyone = collectives.gather_to_all(digest.of_leaves(leaves))
    expected, found = everyone[reference], everyone[suspect]
    missing = [*(expected.keys() - found.keys()), *(found.keys() - expected.keys())]
    if missing:
        name = min(missing)
        has, lacks = (reference, suspect) if name in expected else (suspect, reference)
        return f"{name} exists on rank {has} and not on rank {lacks}"
    names = [name for name in expected if expected[name] != found[name]]
    if not names:
        return "the ranks are the same again"
    name = names[0]
    more = f", and in {len(names) - 1} more {what}" if len(names) > 1 else ""
    kinds = {each[name][0] if name in each else None for each in everyone}
    if len(kinds) == 1 and isinstance(leaves[name], torch.Tensor):
        return element_difference(name, leaves[name], reference, suspect) + more
    return _values(name, found[name], suspect, expected[name], reference) + more


def _values(
    name: str, found: tuple[str, str], suspect: int, expected: tuple[str, str], reference: int
) -> str:
    """Describe two values, or their types if these differ."""
    part = 1 if found[0] == expected[0] else 0
    return f"{name} is {found[part]} on rank {suspect} and {expected[part]} on rank {reference}"


def _numbers(subject: TrainState, reference: int, suspect: int) -> str:
    everyone = collectives.gather_to_all(subject.counters())
    expected, found = everyone[reference], everyone[suspect]
    values = {name: (found.get(name), expected.get(name)) for name in {**expected, **found}}
    return "; ".join(
        f"{name} is {here} on rank {suspect} and {there} on rank {reference}"
        for name, (here, there) in values.items()
        if here != there
    )


def element_difference(name: str, tensor: torch.Tensor, reference: int, suspect: int) -> str:
    """Describe the first element of a tensor that differs between two ranks, with both values.

    All ranks must call it.
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
    positions = (digest.as_integers(mine) != digest.as_integers(other)).nonzero().flatten()
    first = int(positions[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(first), mine.shape)]
    here, there = mine.reshape(-1)[first], other.reshape(-1)[first]
    left, right = _shown(here), _shown(there)
    if left == right:  # for example NaNs with other bits
        left += f" (bits {int(digest.as_integers(here)):#x})"
        right += f" (bits {int(digest.as_integers(there)):#x})"
    element = f"{name}{index}" if index else name
    return (
        f"{element} is {left} on rank {suspect} and {right} on rank {reference} "
        f"({len(positions):,} of {mine.numel():,} elements)"
    )


def _shown(value: torch.Tensor) -> str:
    if value.is_floating_point():
        digits = {torch.float64: 17, torch.float32: 9}.get(value.dtype, 5)
        return f"{value.item():.{digits}g}"
    return str(value.item())
