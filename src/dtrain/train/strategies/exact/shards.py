"""The shards of one rank in one step: their losses, and their gradients in the tree."""

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
    """The sums of the buffers that forwards changed, by index."""


class ShardStep:
    """A rank's part of one step, shard by shard.

    Args:
        number: the number of optimizer steps before it.
        shards: the shards of this rank.
        ahead: the micro-batches of this rank, each as (shard, number in the shard, number of
            micro-batches of the shard).
        pool: provides memory for gradients. The caller returns the memory that `finish` returns.
    """

    def __init__(
        self, number: int, shards: range, ahead: list[tuple[int, int, int]], pool: Pool
    ) -> None:
        self.number = number
        self.ahead = deque(ahead)
        self.shard: int | None = None
        """The shard that is being computed."""
        self._shards = shards
        self._pool = pool
        self._next = shards.start
        self._tree: TreeSum[Sums | None] = TreeSum(self._add)
        self._current: Node[Sums] | None = None
        self._losses: dict[int, tuple[float | torch.Tensor, float | torch.Tensor]] = {}

    def begin(self, shard: int, *, alone: bool) -> Flat:
        """Begin a shard, and return the buffer to which backward must add its gradients.

        Args:
            shard: the number of the shard. Shards between the last one and it have no samples.
            alone: whether the shard has a single backward. That backward may then add to the
                gradients of the left sibling, which is the addition that the tree would do.
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
        """Return the tree's nodes over all shards of this rank."""
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
