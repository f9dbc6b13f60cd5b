"""Which samples several ranks have read: what is kept, and when ranks read the same."""

from __future__ import annotations

import numpy as np
import pytest

from dtrain.errors import BlamedError
from dtrain.ranks import RankInfo
from dtrain.train import collectives
from dtrain.train.data import overlap
from dtrain.train.data.overlap import Overlap
from support.errors import assert_named

RANDOM = np.random.default_rng(1)


def words(n: int) -> list[int]:
    return [int(word) for word in RANDOM.integers(1, 2**64 - 1, n, dtype=np.uint64)]


def compared(monkeypatch: pytest.MonkeyPatch, *ranks: list[int]) -> str:
    """The error for ranks that have read these: code, culprits, message.

    The ranks take turns in one process.
    """
    everyone = [Overlap(RankInfo(rank, len(ranks))) for rank in range(len(ranks))]
    for one, digests in zip(everyone, ranks, strict=True):
        one.add(dict(enumerate(digests)))
    kept = [each._everyone()[0] for each in everyone]
    modulus = max(each.modulus for each in kept)
    thinned = [each.thinned(modulus) for each in kept]
    findings = [overlap._finding(thinned, rank) for rank in range(len(ranks))]
    answers = [kept, findings]
    with monkeypatch.context() as patch:
        patch.setattr(collectives, "gather_to_all", lambda _: answers.pop(0))
        try:
            everyone[0].compare()
        except BlamedError as error:
            return f"{error.code} {error.culprits} {error}"
    return ""


def test_at_most_so_many_are_kept_and_they_are_the_same_everywhere() -> None:
    one, other = Overlap(RankInfo(0, 2)), Overlap(RankInfo(1, 2))
    common = words(200_000)
    one.add(dict(enumerate(common)))
    other.add(dict(enumerate([*reversed(common), *words(100_000)])))
    first, second = (each._everyone()[0] for each in (one, other))
    for kept in (first, second):
        assert 16_384 < len(kept.digests) <= 65_536
        assert not (kept.digests % np.uint64(kept.modulus)).any()
        assert kept.distinct
    modulus = max(first.modulus, second.modulus)
    assert set(first.thinned(modulus).digests) <= set(second.thinned(modulus).digests)


def test_ranks_that_read_the_same_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    eight, forty, long = words(8), words(40), words(300_000)
    code = "data.stream-not-sharded"
    assert_named(compared(monkeypatch, eight, eight), [code, "every rank", "16 of 16"])
    some = compared(monkeypatch, words(40), forty, forty[::-1])
    assert_named(some, [f"{code} [1, 2] data.stream", "ranks 1, 2 ", "80 of 80"])
    assert_named(compared(monkeypatch, long, long[::-1]), [code, "every rank"])


def test_what_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few, in another order; a few duplicates; samples that repeat; none, or none readable."""
    eight, forty = words(8), words(40)
    assert compared(monkeypatch, eight, eight[::-1]) == ""
    assert compared(monkeypatch, forty, [*forty[:5], *words(35)]) == ""
    assert compared(monkeypatch, [5] * 100, [5] * 100) == ""
    assert compared(monkeypatch, [], []) == ""
    assert compared(monkeypatch, [0] * 40, [0] * 40) == ""


@pytest.mark.parametrize("num_values", [2, 30, 100, 300, 1000])
@pytest.mark.parametrize("num_samples", [8, 32, 100, 400])
def test_data_of_few_values_raise_no_alarm(
    monkeypatch: pytest.MonkeyPatch, num_values: int, num_samples: int
) -> None:
    values = words(num_values)
    for _ in range(10):
        ranks = [[values[i] for i in RANDOM.integers(0, num_values, num_samples)] for _ in range(6)]
        assert compared(monkeypatch, *ranks) == ""
