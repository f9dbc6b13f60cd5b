"""The tree has one shape, wherever its leaves are."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.train.strategies.exact.tree import Node, TreeSum, node_positions, tree_sum


def written(left: str, right: str) -> str:
    return f"({left}{right})"


def added_by(num_leaves: int, parts: list[range]) -> str:
    """The sum as it is written when each part is added up by itself first."""
    whole = TreeSum(written)
    for part in parts:
        local = TreeSum(written)
        for leaf in part:
            local.push_leaf(leaf, f" {leaf} ")
        nodes = local.pop_nodes()
        assert [(node.level, node.index) for node in nodes] == node_positions(part)
        for node in nodes:
            whole.push(node)
    assert sum(map(len, parts)) == num_leaves
    return whole.pop_total()


def test_neighbours_are_paired_and_the_odd_one_moves_up() -> None:
    assert added_by(4, [range(4)]) == "(( 0  1 )( 2  3 ))"
    assert added_by(5, [range(5)]) == "((( 0  1 )( 2  3 )) 4 )"
    assert added_by(7, [range(7)]) == "((( 0  1 )( 2  3 ))(( 4  5 ) 6 ))"
    assert added_by(1, [range(1)]) == " 0 "


@pytest.mark.parametrize("num_leaves", range(1, 33))
def test_every_world_size_that_divides_adds_the_same_pairs(num_leaves: int) -> None:
    alone = added_by(num_leaves, [range(num_leaves)])
    for world_size in (w for w in range(2, num_leaves + 1) if num_leaves % w == 0):
        size = num_leaves // world_size
        parts = [range(r * size, (r + 1) * size) for r in range(world_size)]
        assert added_by(num_leaves, parts) == alone


@given(st.integers(1, 200), st.sets(st.integers(1, 199)))
def test_any_cut_adds_the_same_pairs(num_leaves: int, cuts: set[int]) -> None:
    bounds = [0, *sorted(cut for cut in cuts if cut < num_leaves), num_leaves]
    parts = [range(*pair) for pair in itertools.pairwise(bounds)]
    assert added_by(num_leaves, parts) == added_by(num_leaves, [range(num_leaves)])


@given(st.integers(0, 100), st.integers(0, 8))
def test_an_aligned_power_of_two_is_one_node(block: int, level: int) -> None:
    size = 2**level
    assert node_positions(range(block * size, (block + 1) * size)) == [(level, block)]


def test_few_values_are_held() -> None:
    tree = TreeSum(written)
    most = 0
    for leaf in range(1024):
        tree.push_leaf(leaf, "")
        held = tree.pop_nodes()
        most = max(most, len(held))
        for node in held:
            tree.push(node)
    assert most <= 11


def test_numbers() -> None:
    values = [0.1 * k for k in range(13)]
    assert math.isclose(tree_sum(values), math.fsum(values), rel_tol=1e-15)
    assert tree_sum([1e16, 1.0, -1e16, 1.0]) == (1e16 + 1.0) + (-1e16 + 1.0)
    assert Node(0, 3, 1.5).value == 1.5


def test_a_left_sibling_can_be_added_to_by_hand() -> None:
    tree = TreeSum(written)
    assert tree.pop_left_of(0) is None
    tree.push_leaf(0, " 0 ")
    assert tree.pop_left_of(1) == " 0 "
    tree.push(Node(1, 0, "by hand"))
    tree.push_leaf(2, " 2 ")
    assert tree.pop_left_of(4) is None
    assert tree.pop_left_of(3) == " 2 "
    tree.push(Node(1, 1, "too"))
    assert tree.pop_total() == "(by handtoo)"
    tree.push_leaf(5, " 5 ")
    assert tree.pop_left_of(6) is None  # leaf 5 is a right one
