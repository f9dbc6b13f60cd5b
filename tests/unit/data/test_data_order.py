"""Orders of an epoch other than the shuffled one: in turn, weighted, custom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from dtrain import Task
from dtrain.job.spec import JobSpec
from dtrain.train.data.order import Order, order_of
from dtrain.train.seeding import RandomState
from support.errors import raises


def spec(**data: Any) -> JobSpec:
    train = {"epochs": 1, "global_batch_size": 4}
    return JobSpec(name="t", task="t:T", seed=5, train=train, data=data)  # type: ignore[arg-type]


class Given(Task):
    """Has weights or an order, if they are given."""

    def __init__(self, weights: Any = None, order: Any = None) -> None:
        self.weights, self.given = weights, order

    def sample_weights(self) -> Any:
        return self.weights

    def sample_order(self, seed: int, epoch: int) -> Any:
        return self.given(seed, epoch) if callable(self.given) else self.given


def order(n: int, weights: Any = None, given: Any = None, **data: Any) -> Order:
    return order_of(Given(weights, given), n, spec(**data))


def all_of(made: Order, epoch: int = 0) -> np.ndarray:
    return made.epoch(epoch).block(0, made.num_samples)


def test_in_turn_and_shuffled() -> None:
    in_turn = order(9, shuffle=False)
    assert all_of(in_turn, 3).tolist() == list(range(9))
    shuffled = order(9)
    assert sorted(all_of(shuffled).tolist()) == list(range(9))
    assert all_of(shuffled, 0).tolist() != all_of(shuffled, 1).tolist()
    assert in_turn.name != shuffled.name


# -- weighted ----------------------------------------------------------------------------------

GOLDEN = [859, 472, 684, 676, 233, 725]
WEIGHTS = [0, 1, 2, 0, 4, 0.5, 0]


def test_samples_are_drawn_in_proportion_to_their_weights() -> None:
    weights = np.tile(WEIGHTS, 10_000)
    made = order(70_000, weights)
    counts = np.zeros(7)
    for epoch in range(4):
        drawn = all_of(made, epoch)
        assert drawn.dtype == np.int64
        counts += np.bincount(drawn % 7, minlength=7)
    assert (counts[[0, 3, 6]] == 0).all()
    expected = 280_000 * np.array(WEIGHTS) / sum(WEIGHTS)
    some = expected > 0
    assert stats.chisquare(counts[some], expected[some]).pvalue > 1e-7
    # which of the 10,000 of one weight is drawn is uniform, and so are neighbouring draws
    assert stats.chisquare(np.bincount(drawn // 700, minlength=100)).pvalue > 1e-7
    pairs = drawn[:-1] // 7000 * 10 + drawn[1:] // 7000
    assert stats.chisquare(np.bincount(pairs, minlength=100)).pvalue > 1e-7


def test_a_draw_depends_on_seed_epoch_and_position_alone() -> None:
    made = order(1000, np.arange(1000))
    whole = all_of(made, 2)
    assert np.array_equal(made.epoch(2).block(400, 500), whole[400:500])
    scattered = np.array([[3, 999], [0, 3]])
    assert np.array_equal(made.epoch(2).at(scattered), whole[scattered])
    assert not np.array_equal(all_of(made, 1), whole)
    other = order_of(Given(np.arange(1000)), 1000, spec().model_copy(update={"seed": 6}))
    assert not np.array_equal(all_of(other, 2), whole)
    # version 1 for ever: otherwise a resume would continue with other draws
    assert whole[:6].tolist() == GOLDEN


def test_tensors_and_lists_are_weights_too_and_the_order_is_named_after_them() -> None:
    one = order(3, torch.tensor([1.0, 0.0, 1.0]))
    other = order(3, [1, 0, 1])
    assert one.name == other.name != order(3, [1, 0, 2]).name
    assert set(all_of(one).tolist()) <= {0, 2}
    assert all_of(order(5, [0, 0, 0, 0, 1e-300])).tolist() == [4] * 5


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ([1, 2], ["(2,)", "train_dataset()", "3 samples"]),
        ([1, -2, 3], ["-2 ", "sample 1"]),
        ([1, 2, float("nan")], ["nan ", "sample 2"]),
        ([0, 0, 0], ["zeros"]),
    ],
)
def test_weights_that_cannot_be_drawn_by(weights: Any, names: list[str]) -> None:
    with raises("data.bad-weights", "sample_weights()", *names):
        order(3, weights)


def test_weights_without_shuffling_contradict() -> None:
    with raises("data.weights-without-shuffle", "data.shuffle", "sample_weights()"):
        order(3, [1, 1, 1], shuffle=False)


# -- custom ------------------------------------------------------------------------------------


class Computed:
    """Every third sample, computed."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.blocks: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.n

    def block(self, start: int, stop: int) -> list[int]:
        self.blocks.append((start, stop))
        return list(range(3 * start, 3 * stop, 3))


@pytest.mark.parametrize(
    "given",
    [[4, 4, 0], (4, 4, 0), np.array([4, 4, 0], dtype=np.int32), torch.tensor([4, 4, 0])],
)
def test_a_sequence_is_an_order(given: Any) -> None:
    made = order(5, given=given)
    assert made.num_samples == 3
    assert all_of(made).tolist() == [4, 4, 0]
    assert made.epoch(0).at(np.array([2, 0])).tolist() == [0, 4]


def test_a_range_is_an_order() -> None:
    assert all_of(order(10, given=range(8, 0, -2))).tolist() == [8, 6, 4, 2]


def test_an_order_may_be_computed_in_blocks() -> None:
    computed = Computed(30)
    made = order(90, given=computed)
    computed.blocks.clear()
    assert made.epoch(0).at(np.array([4, 5, 6, 20, 21])).tolist() == [12, 15, 18, 60, 63]
    assert computed.blocks == [(4, 7), (20, 22)]


def test_an_order_may_change_with_the_epoch_and_draw_random_numbers() -> None:
    def drawn(seed: int, epoch: int) -> Any:
        return np.random.permutation(50) if epoch else torch.randperm(50)

    before = RandomState.capture()
    orders = [[all_of(order(50, given=drawn), epoch).tolist() for epoch in (1, 0)] for _ in "ab"]
    assert before.unchanged()
    assert orders[0] == orders[1]
    assert sorted(orders[0][0]) == sorted(orders[0][1]) == list(range(50))


@pytest.mark.parametrize(
    ("given", "code", "names"),
    [
        ([], "data.bad-order", ["no ids"]),
        ([1, 9], "data.bad-order", ["sample 9", "position 1", "0 to 4"]),
        ([-1], "data.bad-order", ["sample -1", "position 0", "0 to 4"]),
        ([0.5], "data.bad-order", ["float64"]),
        ([[1, 2]], "data.bad-order", ["(1, 2)"]),
        ("12", "data.bad-order", ["str"]),
        (lambda _, epoch: [0] * (epoch + 1), "data.order-length-changes", ["2 ids", " 1 "]),
    ],
)
def test_orders_that_cannot_be_followed(given: Any, code: str, names: list[str]) -> None:
    with raises(code, "sample_order()", *names):
        all_of(order(5, given=given), epoch=1)


def test_blocks_of_another_length_are_refused() -> None:
    short = Computed(4)
    short.block = lambda start, stop: [0]  # type: ignore[method-assign]
    with raises("data.bad-order", "block(0, 4)", "sample_order()", "1 ids", "not 4"):
        order(90, given=short)


def test_an_order_and_weights_contradict() -> None:
    with raises("data.two-orders", "sample_order()", "sample_weights()"):
        order(2, [1, 1], [0, 1])
