"""The ledger: a few integers that say whether all ranks still hold the same, compared at once.

Each rank brings one 64-bit word for each kind of thing (gradients, parameters, optimizer state,
buffers, numbers, collectives, what the task keeps). The largest of all ranks' words and of their
complements come back from one all-reduce of 112 bytes, whatever the size of the model or of the
world: a kind is the same everywhere exactly if its largest word is the smallest too. Only when it
is not, more is exchanged, see `locate`.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from dtrain.train import collectives
from dtrain.train.checks import digest
from dtrain.train.checks.collective_trace import CHAIN
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

KINDS = (NUMBERS, COLLECTIVES, GRADIENTS, PARAMETERS, MOMENTS, BUFFERS, KEPT)
"""Causes before their consequences: another rate makes other parameters."""


class Ledger:
    """Compares one subject between the ranks of the process group."""

    def __init__(self, subject: TrainState) -> None:
        self.subject = subject
        self._cut = subject.is_cut()

    def words(self) -> list[int]:
        """This rank's word for each of `KINDS`; 0 for what ranks hold different parts of."""
        return [self._word(kind) for kind in KINDS]

    def differing(self, words: list[int]) -> list[str]:
        """The kinds that are not the same on all ranks; called by all of them.

        Args:
            words: this rank's.
        """
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
