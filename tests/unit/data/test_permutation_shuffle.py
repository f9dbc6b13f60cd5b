"""The permutation is a bijection for every N, and as good as a shuffle.

Each statistical test computes a p-value whose false-alarm rate is 1e-6 or less over the whole
file; seeds are fixed, so a test that passes today passes always, until the algorithm changes.
"""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from dtrain.train.data.permutation import MAX_SAMPLES, Permutation

ALARM = 1e-8  # per p-value; about 90 of them are computed here
LARGE = (65_537, 100_003, 131_072, 1_048_577)
"""Just above the table, odd, a power of two, and one more than one (half of all walks)."""

sizes = st.one_of(
    st.integers(1, 200_000),
    st.integers(2, 63).flatmap(lambda b: st.integers(2**b - 1, min(2**b + 1, MAX_SAMPLES))),
    st.integers(1, MAX_SAMPLES),
)


def order(n: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return Permutation(n, seed, epoch).block(0, n)


# -- a bijection -------------------------------------------------------------------------------


def test_every_small_n_is_a_permutation() -> None:
    for n in range(1, 3001):
        assert np.array_equal(np.sort(order(n, epoch=n)), np.arange(n)), n


@pytest.mark.parametrize("n", [65_535, 65_536, *LARGE])
def test_whole_orders_around_the_end_of_the_table(n: int) -> None:
    assert np.array_equal(np.sort(order(n, seed=5)), np.arange(n))


@given(
    n=sizes,
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 2**40),
    where=st.integers(0, MAX_SAMPLES - 1),
)
@example(n=MAX_SAMPLES, seed=0, epoch=0, where=MAX_SAMPLES - 1)
@example(n=MAX_SAMPLES, seed=0, epoch=0, where=MAX_SAMPLES - 300)
def test_any_n_has_distinct_samples(n: int, seed: int, epoch: int, where: int) -> None:
    permutation = Permutation(n, seed, epoch)
    start = where % n
    # not arange(start, stop): that is of float64 where stop is 2**63
    positions = start + np.arange(min(300, n - start), dtype=np.int64)
    samples = permutation.block(start, min(start + 300, n))
    assert samples.dtype == np.int64
    assert len(np.unique(samples)) == len(positions)
    assert samples.min() >= 0
    assert samples.max() < n
    scattered = positions[::-7].reshape(1, -1)
    assert np.array_equal(permutation.at(scattered), samples[::-7].reshape(1, -1))


def test_temporaries_of_long_blocks_are_those_of_one_chunk() -> None:
    Permutation(MAX_SAMPLES, 0, 0).block(0, 10)
    tracemalloc.start()
    Permutation(MAX_SAMPLES, 1, 1).block(2**62, 2**62 + 1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2_000_000 + 3_000_000  # positions and samples, and the chunk's


# -- as good as a shuffle ----------------------------------------------------------------------


def even(values: np.ndarray, bins: int) -> float:
    """The p-value that integers 0 … bins-1 are uniform (Pearson's chi-square)."""
    return float(stats.chisquare(np.bincount(values, minlength=bins)).pvalue)


@pytest.mark.parametrize("n", [1000, *LARGE])
def test_where_samples_go_is_uniform_over_epochs_and_seeds(n: int) -> None:
    """The samples at two neighbouring positions, over 3,000 orders: cells and low bits."""
    probes = np.array([0, 1])
    for seeds, epochs in (([7], range(3000)), (range(3000), [2])):
        found = np.array([Permutation(n, s, e).at(probes) for s in seeds for e in epochs])
        cells = found * 12 // n
        assert even(cells[:, 0] * 12 + cells[:, 1], 144) > ALARM
        low = found % 8
        assert even(low[:, 0] * 8 + low[:, 1], 64) > ALARM


@pytest.mark.parametrize("n", LARGE)
@pytest.mark.parametrize("lag", [1, 2, 256, 1024])
def test_neighbouring_pairs_are_uniform(n: int, lag: int) -> None:
    """Differences of samples `lag` positions apart; 256 is one half-width of the cipher."""
    samples = order(n, seed=3)
    assert even((samples[lag:] - samples[:-lag]) % n * 128 // n, 128) > ALARM
    assert even(samples[:-lag] % 32 * 32 + samples[lag:] % 32, 1024) > ALARM


@pytest.mark.parametrize("n", LARGE)
def test_epochs_and_seeds_are_not_correlated(n: int) -> None:
    first = order(n, seed=4, epoch=0)
    for other in (order(n, seed=4, epoch=1), order(n, seed=5, epoch=0)):
        assert even((other - first) % n * 128 // n, 128) > ALARM
        r = np.corrcoef(first, other)[0, 1]
        assert 2 * stats.norm.sf(abs(r) * np.sqrt(n)) > ALARM
        # samples that kept their position: Poisson with mean 1
        assert stats.poisson.sf(np.count_nonzero(first == other) - 1, 1) > ALARM


@pytest.mark.parametrize("n", LARGE)
def test_batches_are_drawn_like_from_an_urn(n: int) -> None:
    """How many of a batch of 256 are of the first half: the variance of the hypergeometric."""
    samples = order(n, seed=6)[: n // 256 * 256].reshape(-1, 256)
    counts = (samples < n // 2).sum(axis=1)
    num_batches = len(counts)
    expected = 256 * 0.25 * (1 - 256 / n)
    statistic = num_batches * counts.var() / expected
    both = 2 * min(stats.chi2.cdf(statistic, num_batches), stats.chi2.sf(statistic, num_batches))
    assert both > ALARM
