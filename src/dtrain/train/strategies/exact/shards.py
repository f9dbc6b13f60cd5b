"""One rank's shards in one step: their losses, and their gradients on the way up the tree."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from dtrain.train.loss import in_fp64
from dtrain.train.strategies.exact.flat_buffer import Flat, Pool
from dtrain.train.strategies.exact.tree import Node, TreeSum


@dataclass
class Sums:
    gradients: Flat
    buffers: dict[int, torch.Tensor] = field(default_factory=dict)
    """Of the buffers that forwards changed, by index."""


class ShardStep:
    """A rank's part of one step, shard by shard.

    Args:
        number: optimizer steps before it.
        shards: this rank's.
        ahead: its micro-batches, as (shard, number in the shard, how many the shard has).
        pool: where gradients come from; what `finish` returns is the caller's to give back.
    """

    def __init__(
        self, number: int, shards: range, ahead: list[tuple[int, int, int]], pool: Pool
    ) -> None:
        self.number = number
        self.ahead = deque(ahead)
        self.shard: int | None = None
        """The one that is being computed."""
        self._shards = shards
        self._pool = pool
        self._next = shards.start
        self._tree: TreeSum[Sums | None] = TreeSum(self._add)
        self._current: Node[Sums] | None = None
        self._losses: dict[int, tuple[float | torch.Tensor, float | torch.Tensor]] = {}

    def begin(self, shard: int, *, alone: bool) -> Flat:
        """Begin with a shard; backward must add its gradients to what this returns.

        Args:
            shard: after the last one; those in between have no samples.
            alone: whether it has a single backward. Then that may add to its left sibling's
                gradients itself, which is the addition that the tree would do.
        """
        self._skip_to(shard)
        left = self._tree.pop_left_of(shard) if alone else None
        level = 0 if left is None else 1
        self._current = Node(level, shard >> level, left or Sums(self._pool.take()))
        self.shard = shard
        return self._current.value.gradients

    def tally(self, total: torch.Tensor, weight: float | torch.Tensor) -> None:
        """Add a micro-batch's loss and weight to its shard's, in fp64."""
        assert self.shard is not None
        losses, weights = self._losses.get(self.shard, (0.0, 0.0))
        self._losses[self.shard] = losses + in_fp64(total), weights + in_fp64(weight)

    def tallies(self) -> list[float | torch.Tensor]:
        return [x for shard in self._shards for x in self._losses.get(shard, (0.0, 0.0))]

    def end(self, buffers: dict[int, torch.Tensor]) -> None:
        assert self._current is not None
        _add_buffers(self._current.value.buffers, buffers)
        self._tree.push(Node(self._current.level, self._current.index, self._current.value))
        self._next += 1
        self.shard = self._current = None

    def finish(self) -> list[Node[Sums]]:
        """The tree's nodes over all of this rank's shards."""
        self._skip_to(self._shards.stop)
        return [
            Node(node.level, node.index, node.value or Sums(self._pool.take()))
            for node in self._tree.pop_nodes()
        ]

    def _skip_to(self, shard: int) -> None:
        for empty in range(self._next, shard):
            self._tree.push_leaf(empty, None)
        self._next = shard

    def _add(self, left: Sums | None, right: Sums | None) -> Sums | None:
        if left is None or right is None:
            return left or right
        left.gradients.add_(right.gradients)
        self._pool.give(right.gradients)
        _add_buffers(left.buffers, right.buffers)
        return left


def _add_buffers(left: dict[int, torch.Tensor], right: dict[int, torch.Tensor]) -> None:
    for index, value in right.items():
        if index in left:
            left[index].add_(value)
        else:
            left[index] = value
