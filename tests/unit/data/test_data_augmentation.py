"""Random numbers that belong to a sample, and what they cost."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from dtrain import Task
from dtrain.train.data import sample_rng, sample_seed
from dtrain.train.data.augmentation import sample_words
from dtrain.train.data.fetch import Fetcher, Request
from dtrain.train.data.rng_state import Generator, global_generators
from dtrain.train.seeding import RandomState, seed_everything
from support.errors import raises


class Listing(Task):
    def collate(self, samples: list[Any]) -> list[Any]:
        return samples


class Drawing:
    """Sample i: what `draw(i)` gives."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.reads = 0

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        return self.draw(i)


def fetch(fetcher: Fetcher, *samples: int, epoch: int = 0) -> list[Any]:
    return list(fetcher(Request(epoch, np.array(samples))))


DRAWS: dict[str, Any] = {
    "python": random.random,
    "gauss": lambda: (random.gauss(0, 1), random.gauss(0, 1), random.gauss(0, 1)),
    "numpy": np.random.rand,
    "randn": np.random.randn,
    "torch": lambda: torch.rand(()).item(),
}


@pytest.fixture(autouse=True)
def _keep_generators() -> Any:
    before = RandomState.capture()
    yield
    before.restore()


@pytest.mark.parametrize("kind", DRAWS)
def test_only_generators_that_are_used_are_seeded(kind: str) -> None:
    fetcher = Fetcher(Drawing(lambda i: DRAWS[kind]()), Listing(), 1)
    first = fetch(fetcher, 0, 1, 2)
    assert len(fetcher._augmentation._drawn or []) == 1
    assert len(fetcher._augmentation._quiet) == 2
    assert fetch(fetcher, 2, 0)[0] == first[2]
    assert fetch(fetcher, 2, epoch=1)[0] != first[2]


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("rare", [True, False])
def test_the_training_goes_on_as_if_nothing_had_been_drawn(kind: str, rare: bool) -> None:
    """Cached halves of Gaussian pairs included, which are no part of a generator's words."""

    def after(with_fetches: bool) -> list[float]:
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        random.gauss(0, 1)
        if not (rare and kind in ("numpy", "randn")):  # see return_to of NumPy's generator
            np.random.randn()
        if with_fetches:
            draw = Drawing(lambda i: DRAWS[kind]() if i % 10 == 9 or not rare else i)
            fetcher = Fetcher(draw, Listing(), 1)
            for start in (0, 5, 15):
                fetch(fetcher, *range(start, start + 5))
            assert draw.reads == 15 + 5 * rare  # the batch that began to draw is read again
        return [np.random.randn(), random.gauss(0, 1), np.random.rand(), torch.rand(()).item()]

    assert after(True) == after(False)


def test_generators_go_back_where_they_were() -> None:
    for generator in global_generators():
        _check(generator)


def _check(generator: Generator) -> None:
    generator.seed(2**64 - 1)
    mark, state = generator.mark(), generator.capture()
    assert generator.mark() == mark
    everything = [draw() for draw in DRAWS.values()]
    assert generator.mark() != mark
    generator.return_to(mark)
    assert generator.mark() == mark
    generator.seed(5)
    generator.restore(state)
    assert generator.mark() == mark
    again = [draw() for draw in DRAWS.values()]
    assert any(one == other for one, other in zip(everything, again, strict=True))


def test_numpy_and_torch_do_not_draw_the_same_words() -> None:
    """One seed makes both the same Mersenne Twister: their numbers would go together."""
    fetcher = Fetcher(Drawing(lambda i: (np.random.rand(), torch.rand(()).item())), Listing(), 1)
    pairs = np.array(fetch(fetcher, *range(1000)))
    words = Fetcher(
        Drawing(
            lambda i: (
                np.random.randint(0, 2**32, size=4, dtype=np.uint64).tolist(),
                torch.randint(0, 2**32, (8,)).tolist(),
            )
        ),
        Listing(),
        1,
    )
    for of_numpy, of_torch in fetch(words, 1, 2, 3):
        assert not set(of_numpy) & set(of_torch)
    assert stats.pearsonr(*pairs.T).pvalue > 1e-7
    for column in pairs.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-7
        assert stats.pearsonr(column[:-1], column[1:]).pvalue > 1e-7


def test_own_generators_are_seeded_by_sample() -> None:
    fetcher = Fetcher(Drawing(lambda i: (sample_seed(), sample_rng().random())), Listing(), 1)
    one = dict(zip(range(10), fetch(fetcher, *range(10)), strict=True))
    assert fetch(fetcher, 7, 3) == [one[7], one[3]]
    assert len(set(one.values())) == 10
    assert fetch(fetcher, 7, epoch=1) != [one[7]]
    assert all(0 <= seed < 2**63 for seed, _ in one.values())
    assert not fetcher._augmentation._drawn  # nothing needed seeding


def test_own_generators_of_several_samples_need_their_ids() -> None:
    class Several(Drawing):
        def __getitems__(self, ids: list[int]) -> list[Any]:
            return [self.draw(i) for i in ids]

    one = fetch(Fetcher(Drawing(lambda i: sample_seed()), Listing(), 1), 4, 5)
    assert fetch(Fetcher(Several(sample_seed), Listing(), 1), 4, 5) == one
    with raises("data.sample-seed-needs-id", "__getitems__", "sample_seed(id)"):
        fetch(Fetcher(Several(lambda i: sample_seed()), Listing(), 1), 4, 5)


def test_outside_of_a_training_seeds_are_fresh() -> None:
    assert sample_seed() != sample_seed()
    assert sample_rng(3).random() != sample_rng(3).random()


WORDS = [14402255923173221322, 17915319555002544536, 10567710495423352077]


def test_version_1_of_the_words_is_this_for_ever() -> None:
    # augmented pixels would change within a run that is resumed
    assert sample_words("sample", 3, 1, np.array([0, 1, 2**62])).tolist() == WORDS


def test_neither_do_they_in_the_training() -> None:
    seed_everything(7)
    of_numpy = np.random.randint(0, 2**32, size=8, dtype=np.uint64).tolist()
    assert not set(of_numpy) & set(torch.randint(0, 2**32, (16,)).tolist())
