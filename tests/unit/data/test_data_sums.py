"""Keyed sums: equal for equal multisets and for nothing else; ranges that grow."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.train.data.checksum import KeyedSums, Tally

SUMS = KeyedSums(seed=1, epoch=2)


def total(ids: list[int]) -> tuple[int, ...]:
    return tuple(SUMS.total(np.array(ids, dtype=np.int64)).tolist())


@given(st.lists(st.integers(0, 2**63 - 1), max_size=30), st.randoms(), st.integers(0, 30))
def test_order_and_split_do_not_matter(ids: list[int], random: object, cut: int) -> None:
    shuffled = list(ids)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    parts = [np.array(part, dtype=np.int64) for part in (shuffled[:cut], shuffled[cut:])]
    assert total(ids) == tuple((SUMS.total(parts[0]) + SUMS.total(parts[1])).tolist())
    if parts := [part for part in parts if len(part)]:
        assert tuple(SUMS.totals(parts).sum(axis=0, dtype=np.uint64).tolist()) == total(ids)


def test_small_multisets_never_meet() -> None:
    """Every multiset of up to 4 of 16 neighbours: sums of the ids themselves meet all the time."""
    ids = [*range(8), *range(2**40, 2**40 + 8)]
    seen: set[tuple[int, ...]] = set()
    words: tuple[set[int], set[int]] = (set(), set())
    count = 0
    for size in range(5):
        for chosen in itertools.combinations_with_replacement(ids, size):
            found = total(list(chosen))
            seen.add(found)
            for kind, word in zip(words, found, strict=False):
                kind.add(word)
            count += 1
    assert len(seen) == len(words[0]) == len(words[1]) == count


def test_every_epoch_and_seed_has_its_own_key() -> None:
    ids = np.arange(100)
    sums = {KeyedSums(seed, epoch).total(ids).tobytes() for seed in range(4) for epoch in range(4)}
    assert len(sums) == 16


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=400),
    first=st.integers(0, 10**9),
    idle_every=st.integers(1, 5),
)
@settings(max_examples=60)
def test_ranges_are_those_of_their_steps(sizes: list[int], first: int, idle_every: int) -> None:
    tally = Tally(SUMS, first)
    tally._FOLD = 50  # type: ignore[misc]
    steps: list[list[int]] = []
    for step, size in enumerate(sizes):
        tally.begin(first + step)
        steps.append([])
        for micro in range(step % idle_every):
            ids = list(range(1000 * step + 10 * micro, 1000 * step + 10 * micro + size))
            tally.add(np.array(ids, dtype=np.int64))
            steps[-1] += ids
    ranges = tally.ranges()
    assert len(ranges) <= Tally.MAX_RANGES
    assert tally.width <= max(1, len(sizes) / 32)
    covered = []
    for index, words in enumerate(ranges):
        covered += list(tally.steps(index))
        ids = [i for step in tally.steps(index) for i in steps[step - first]]
        assert tuple(words.tolist()) == total(ids)
    assert covered == list(range(first, first + len(sizes)))
    assert tuple(tally.total().tolist()) == total([i for step in steps for i in step])
