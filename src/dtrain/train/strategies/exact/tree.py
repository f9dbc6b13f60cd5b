"""A binary tree over the virtual shards, whose shape does not depend on where the shards are.

Addition of floating-point numbers is commutative but not associative, so a sum is the same to the
last bit only if the same pairs are added. The tree pairs neighbours, level by level. A node
without a neighbour moves up unchanged. Inner nodes are the aligned blocks of 2^level leaves; the
last one of a level may be shorter. So any contiguous part of the leaves consists of a few whole
nodes: exactly one per rank if both counts are powers of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Node(Generic[Value]):
    """The sum over the leaves index * 2^level … (index + 1) * 2^level - 1."""

    level: int
    index: int
    value: Value


class TreeSum(Generic[Value]):
    """Adds values in the tree. They arrive in the order of the leaves.

    At any time it holds at most 2 * log2(number of leaves) values.

    Args:
        add: returns left + right. It may change and return either, because both are not used
            afterwards.
    """

    def __init__(self, add: Callable[[Value, Value], Value]) -> None:
        self._add = add
        self._nodes: list[Node[Value]] = []

    def push(self, node: Node[Value]) -> None:
        """Add the next node to the right. The first node may be any node."""
        while self._nodes and node.index % 2:
            left = self._nodes[-1]
            if (left.level, left.index) != (node.level, node.index - 1):
                break
            self._nodes.pop()
            node = Node(node.level + 1, node.index // 2, self._add(left.value, node.value))
        self._nodes.append(node)

    def push_leaf(self, leaf: int, value: Value) -> None:
        self.push(Node(0, leaf, value))

    def pop_left_of(self, leaf: int) -> Value | None:
        """Remove and return the value of the next leaf's left sibling, for the caller to add to.

        The caller then pushes both as one node, Node(1, leaf // 2, …). If the next leaf is a left
        one, or its sibling is not in the sum or has the value None, nothing is removed and None is
        returned.
        """
        left = self._nodes[-1] if self._nodes else None
        if left is None or left.value is None or (left.level, left.index + 1) != (0, leaf):
            return None
        return self._nodes.pop().value if leaf % 2 else None

    def pop_nodes(self) -> list[Node[Value]]:
        """Remove and return the nodes that the pushed values add up to, from left to right."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def pop_total(self) -> Value:
        """Remove and return the sum of all leaves, once all were pushed."""
        *others, last = self.pop_nodes()
        total = last.value
        for node in reversed(others):  # nodes without a neighbour, smallest blocks first
            total = self._add(node.value, total)
        return total


def node_positions(leaves: range) -> list[tuple[int, int]]:
    """Return (level, index) of the nodes that a contiguous part of the leaves adds up to."""
    tree: TreeSum[None] = TreeSum(lambda left, right: None)
    for leaf in leaves:
        tree.push_leaf(leaf, None)
    return [(node.level, node.index) for node in tree.pop_nodes()]


def tree_sum(values: Iterable[float]) -> float:
    """Return the sum of the numbers of all leaves in the tree, in fp64. It needs at least one."""
    tree: TreeSum[float] = TreeSum(lambda left, right: left + right)
    for leaf, value in enumerate(values):
        tree.push_leaf(leaf, value)
    return tree.pop_total()
