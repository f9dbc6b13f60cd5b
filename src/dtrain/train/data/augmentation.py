"""Random numbers that belong to a sample: a function of (seed, epoch, sample) and nothing else.

Augmentation must not depend on which process reads a sample, nor on what was read before it, or a
resume and another world size would train on other pixels. So before `dataset[i]` is called, the
global generators of Python, NumPy and torch are seeded with the sample's own words, and those of
the training are put back after the batch. Ordinary transforms need no change.

Seeding all three costs 10 µs a sample (Python 5.6, NumPy 2.6, torch 1.4). Only generators that the
data set draws from are seeded: the first batch tells which. One that begins to draw later is
noticed at the end of its batch, which is then undone and read again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from dtrain.errors import DtrainError
from dtrain.train.data.hashing import Words, keys, mix_all
from dtrain.train.data.permutation import Ids
from dtrain.train.data.rng_state import Generator, global_generators
from dtrain.train.data.unlike import note_samples
from dtrain.words import numbered

AUGMENTATION_VERSION = 1
"""Of the map (seed, epoch, sample) → words."""


def sample_words(purpose: str, seed: int, epoch: int, samples: Ids) -> Words:
    """64 random bits for each sample; shape as `samples`."""
    round_keys = keys(2, "dtrain", purpose, AUGMENTATION_VERSION, seed, epoch)
    return mix_all(samples.astype(np.uint64), round_keys)


def seed_for(purpose: str, seed: int, epoch: int, position: int) -> None:
    """Seed all global generators of this process for what is read at a position; 15 µs."""
    (word,) = sample_words(purpose, seed, epoch, np.array([position])).tolist()
    _seed(global_generators(), word, None)


class Now:
    """What is being read in this process; set by whoever reads."""

    key: tuple[int, int] | None = None
    """(seed, epoch); None outside a fetch."""
    sample: int | None = None
    """None while a data set's `__getitems__` reads several."""


def sample_seed(sample: int | None = None) -> int:
    """A 63-bit seed that belongs to the sample being read: for generators of your own.

    Args:
        sample: needed only in `__getitems__`, which reads several at once.

    Returns:
        The same number whenever this sample is read in this epoch; outside a training, a new one
        each time.
    """
    if Now.key is None:
        return int(np.random.SeedSequence().generate_state(1, np.uint64)[0] >> np.uint64(1))
    if sample is None:
        sample = Now.sample
    if sample is None:
        raise DtrainError(
            "sample_seed() is called in __getitems__, where it needs the sample's id: "
            "sample_seed(id)",
            code="data.sample-seed-needs-id",
        )
    (word,) = sample_words("sample_seed", *Now.key, np.array([sample])).tolist()
    return int(word >> 1)


def sample_rng(sample: int | None = None) -> np.random.Generator:
    """NumPy's generator for the sample being read, from `sample_seed`; about 20 µs."""
    return np.random.default_rng(sample_seed(sample))


class Augmentation:
    """Reads batches so that every sample has its own random numbers.

    Args:
        read: `dataset[i]`.
        read_several: the same for a list of ids, where that is quicker; for batches without
            random numbers.
        collate: makes a batch of the samples.
        seed: the job's seed.
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        read_several: Callable[[list[int]], list[Any]] | None,
        collate: Callable[[list[Any]], Any],
        seed: int,
    ) -> None:
        self._read_one = read
        self._read_several = read_several
        self._collate = collate
        self._seed = seed
        self._drawn: list[Generator] | None = None
        """The generators that the data set draws from; None before the first batch."""
        self._quiet: list[Generator] = []

    def batch(self, epoch: int, samples: Ids) -> Any:
        Now.key = self._seed, epoch
        try:
            if self._drawn is None:
                return self._first(epoch, samples)
            return self._watched(epoch, samples)
        finally:
            Now.key = None

    def sample(self, epoch: int, sample: int) -> Any:
        """One sample alone, as it would be in a batch; whatever was drawn, it is put back."""
        generators = global_generators()
        outer = [generator.capture() for generator in generators]
        (word,) = sample_words("sample", self._seed, epoch, np.array([sample])).tolist()
        Now.key = self._seed, epoch
        try:
            _seed(generators, word, None)
            return self._plain([sample])[0]
        finally:
            Now.key = None
            for generator, state in zip(generators, outer, strict=True):
                generator.restore(state)

    def _first(self, epoch: int, samples: Ids) -> Any:
        """Seed all generators, and see which are used."""
        everything = global_generators()
        if self._read_several is not None:  # it cannot be seeded for one sample after the other
            self._drawn, self._quiet = [], everything
            return self._watched(epoch, samples)
        spy = _Spy(everything)
        batch = self._seeded(everything, epoch, samples, spy)
        self._drawn, self._quiet = spy.verdict()
        return batch

    def _watched(self, epoch: int, samples: Ids) -> Any:
        """Seed the generators that are used, and make sure that the others are not."""
        assert self._drawn is not None
        before = [generator.mark() for generator in self._quiet]
        if self._drawn:
            batch = self._seeded(self._drawn, epoch, samples)
        else:
            batch = self._collated(self._plain(samples.tolist()), samples)
        moved = [
            (generator, mark)
            for generator, mark in zip(self._quiet, before, strict=True)
            if generator.mark() != mark
        ]
        if not moved:
            return batch
        for generator, mark in moved:
            generator.return_to(mark)
            self._quiet.remove(generator)
            self._drawn.append(generator)
        return self._watched(epoch, samples)

    def _plain(self, ids: list[int]) -> list[Any]:
        if self._read_several is not None:
            Now.sample = None
            try:
                rows = list(self._read_several(ids))
            except Exception as error:
                error.add_note(f"it was reading {numbered('sample', ids)}")
                raise
            if len(rows) != len(ids):
                raise DtrainError(
                    f"__getitems__() returned {len(rows)} samples for {numbered('sample', ids)}; "
                    "return one for each id",
                    code="data.wrong-number-of-samples",
                )
            return rows
        return self._one_by_one(ids)

    def _one_by_one(
        self, ids: list[int], prepare: Callable[[int], None] | None = None
    ) -> list[Any]:
        """Samples in order; `prepare` is called with the index of each before it is read."""
        rows = []
        try:
            for index, sample in enumerate(ids):
                Now.sample = sample
                if prepare is not None:
                    prepare(index)
                rows.append(self._read_one(sample))
        except BaseException as error:  # a loader process may be told to sys.exit(), too
            error.add_note(f"it was reading sample {Now.sample}")
            raise
        return rows

    def _seeded(
        self, generators: list[Generator], epoch: int, samples: Ids, spy: _Spy | None = None
    ) -> Any:
        # nothing else uses the generators of a loader process; here it saves 5 to 200 µs a batch
        ours = get_worker_info() is None
        outer = [generator.capture() for generator in generators] if ours else []
        words = sample_words("sample", self._seed, epoch, samples).tolist()
        rows = self._one_by_one(samples.tolist(), lambda k: _seed(generators, words[k], spy))
        # what collate draws can only belong to a micro-batch, here named by its first sample
        (word,) = sample_words("collate", self._seed, epoch, samples[:1]).tolist()
        _seed(generators, word, spy)
        batch = self._collated(rows, samples)
        if spy is not None:
            spy.look()
        for generator, state in zip(generators, outer, strict=False):
            generator.restore(state)
        return batch

    def _collated(self, rows: list[Any], samples: Ids) -> Any:
        try:
            return self._collate(rows)
        except Exception as error:
            ids = samples.tolist()
            error.add_note(f"it was making a batch of {numbered('sample', ids)}")
            note_samples(error, rows, [f"sample {each}" for each in ids])
            raise


class _Spy:
    """Finds out which generators are drawn from between one seeding and the next."""

    def __init__(self, generators: list[Generator]) -> None:
        self._generators = generators
        self._marks: list[Any] = []
        self._used: set[int] = set()

    def begin(self) -> None:
        self._marks = [generator.mark() for generator in self._generators]

    def look(self) -> None:
        for index, mark in enumerate(self._marks):
            if self._generators[index].mark() != mark:
                self._used.add(index)

    def verdict(self) -> tuple[list[Generator], list[Generator]]:
        pairs = [(index in self._used, each) for index, each in enumerate(self._generators)]
        return [g for used, g in pairs if used], [g for used, g in pairs if not used]


def _seed(generators: list[Generator], word: int, spy: _Spy | None) -> None:
    if spy is not None:
        spy.look()
    for generator in generators:
        generator.seed(word)
    if spy is not None:
        spy.begin()
