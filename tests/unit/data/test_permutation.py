"""The order of an epoch: a permutation for any n, the same for ever, and random enough."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.train.data.permutation import MAX_SAMPLES, PERMUTATION_VERSION, Permutation

TABLE = 1 << 16


@pytest.mark.parametrize(
    "n", [1, 2, 3, 5, 64, 1000, TABLE - 1, TABLE, TABLE + 1, 100_003, 1 << 17, (1 << 17) + 1]
)
def test_every_sample_once(n: int) -> None:
    assert np.array_equal(np.sort(Permutation(n, 1, 2).block(0, n)), np.arange(n))


@given(
    n=st.integers(1, MAX_SAMPLES),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 10**6),
    data=st.data(),
)
def test_any_window_of_any_size(n: int, seed: int, epoch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, n - 1))
    stop = min(n, start + data.draw(st.integers(1, 100)))
    permutation = Permutation(n, seed, epoch)
    block = permutation.block(start, stop)
    assert block.dtype == np.int64
    assert len(set(block.tolist())) == stop - start
    assert 0 <= block.min() <= block.max() < n
    middle = start + (stop - start) // 2
    assert np.array_equal(permutation.block(middle, stop), block[middle - start :])
    positions = np.arange(start, stop)[::-1]
    assert np.array_equal(permutation.at(positions), block[::-1])


def test_version_1_is_this_order_for_ever() -> None:
    # a checkpoint's position means nothing in another order: change the version with these
    assert PERMUTATION_VERSION == 1
    golden = {
        (10, 0, 0): [0, 2, 4, 3, 1],
        (100_000, 0, 0): [48972, 79860, 11972, 37020, 72356],
        (65_536, 1, 0): [21122, 56939, 12421, 63179, 29214],
        (65_537, 1, 0): [39198, 54221, 44644, 14743, 36870],
        (10**12, 2**63 - 1, 10**6): [
            346024293737,
            698307591964,
            163549165200,
            39873684596,
            471778744833,
        ],
        (2**63, 7, 3): [
            4890330861396570832,
            6562300039399591502,
            4402023315665608237,
            2953491708579363131,
            4350384551234364663,
        ],
    }
    for (n, seed, epoch), expected in golden.items():
        assert Permutation(n, seed, epoch).block(0, 5).tolist() == expected


@pytest.mark.parametrize("n", [97, 70_001])
def test_seeds_and_epochs_never_meet(n: int) -> None:
    orders = {
        Permutation(n, seed, epoch).block(0, 20).tobytes()
        for seed, epoch in itertools.product(range(6), range(6))
    }
    assert len(orders) == 36


@pytest.mark.parametrize("n", [1000, 70_000, (1 << 17) + 1])
def test_places_and_neighbours_look_random(n: int) -> None:
    cells = np.zeros((16, 16))
    steps = []
    for seed in range(40):
        window = Permutation(n, seed, 0).block(0, 1000)
        cells += np.histogram2d(np.arange(1000), window, bins=16, range=[[0, 1000], [0, n]])[0]
        steps.append(np.corrcoef(window[:-1], window[1:])[0, 1])
    expected = cells.sum() / 256
    chi2 = ((cells - expected) ** 2 / expected).sum()
    assert chi2 < 340  # 255 degrees of freedom: 1 in 10,000 for a true permutation
    assert abs(np.mean(steps)) < 0.02


def test_all_orders_of_four_are_equally_frequent() -> None:
    counts: dict[bytes, int] = {}
    for seed in range(2400):
        key = Permutation(4, seed, 0).block(0, 4).tobytes()
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 24
    chi2 = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi2 < 55  # 23 degrees of freedom: 1 in 5,000


def test_memory_does_not_grow_with_n() -> None:
    tracemalloc.start()
    Permutation(10**12, 0, 0).block(5 * 10**11, 5 * 10**11 + 4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_without_shuffling_it_is_the_identity() -> None:
    assert Permutation(10**12, 0, 0, shuffle=False).block(7, 10).tolist() == [7, 8, 9]


def test_what_cannot_be_permuted() -> None:
    with pytest.raises(ValueError, match="not 0"):
        Permutation(0, 0, 0)
    with pytest.raises(ValueError, match="not within"):
        Permutation(5, 0, 0).block(3, 6)
