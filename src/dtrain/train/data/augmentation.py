"""Random numbers that belong to a sample: a function of (seed, epoch, sample) and nothing else.

Augmentation must not depend on the process that reads a sample or on the samples read before it.
Otherwise a resume and another world size would train on other pixels. So before `dataset[i]` is
called, the global generators of Python, NumPy and torch are seeded with the sample's own words.
After the batch their states of the training are restored. Ordinary transforms need no change.

Seeding all three costs 10 µs a sample (Python 5.6, NumPy 2.6, torch 1.4). Only generators that the
data set draws from are seeded; they are found in the first batch. If a data set begins to draw from
another one later, this is detected at the end of the batch, which is then undone and read again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from dtrain.errors import DtrainError
from dtrain.train.data.hashing import Words, keys, mix_all
from dtrain.train.data.mismatch import note_samples
from dtrain.train.data.permutation import Ids
from dtrain.train.data.rng_state import Generator, global_generators
from dtrain.words import numbered

AUGMENTATION_VERSION = 1
"""The version of the map (seed, epoch, sample) → words."""


def sample_words(purpose: str, seed: int, epoch: int, samples: Ids) -> Words:
    """Return 64 random bits for each sample, in the shape of `samples`."""
    round_keys = keys(2, "dtrain", purpose, AUGMENTATION_VERSION, seed, epoch)
    return mix_all(samples.astype(np.uint64), round_keys)


def seed_for(purpose: str, seed: int, epoch: int, position: int) -> None:
    """Seed all global generators of this process for the sample at a position; it takes 15 µs."""
    (word,) = sample_words(purpose, seed, epoch, np.array([position])).tolist()
    _seed(global_generators(), word, None)


class Now:
    """The sample that this process is reading; the code that reads sets it."""

    key: tuple[int, int] | None = None
    """The seed and the epoch; None outside a fetch."""
    sample: int | None = None
    """The id of the sample; None while a data set's `__getitems__` reads several."""


def sample_seed(sample: int | None = None) -> int:
    """Return a 63-bit seed that belongs to the sample being read, for your own generators.

    Args:
        sample: the id of the sample. It is needed only in `__getitems__`, which reads several.

    Returns:
        The same number whenever this sample is read in this epoch. Outside a training it is a new
        number each time.
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
    """Return a NumPy generator for the sample being read, from `sample_seed`; about 20 µs."""
    return np.random.default_rng(sample_seed(sample))


class Augmentation:
    """Reads batches so that every sample has its own random numbers.

    Args:
        read: returns `dataset[i]`.
        read_several: returns the samples of a list of ids, if the data set can do that faster.
            It is for batches without random numbers.
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
        """Return one sample as it would be in a batch, and restore the generators."""
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
        """Seed all generators, and find out which are used."""
        everything = global_generators()
        if self._read_several is not None:  # it cannot be seeded for each sample
            self._drawn, self._quiet = [], everything
            return self._watched(epoch, samples)
        detector = _UseDetector(everything)
        batch = self._seeded(everything, epoch, samples, detector)
        self._drawn, self._quiet = detector.used_and_unused()
        return batch

    def _watched(self, epoch: int, samples: Ids) -> Any:
        """Seed the generators that are used, and make sure that the others are not used."""
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
        """Read samples one by one; `prepare` is called with the index of each before the read."""
        rows = []
        try:
            for index, sample in enumerate(ids):
                Now.sample = sample
                if prepare is not None:
                    prepare(index)
                rows.append(self._read_one(sample))
        except BaseException as error:  # a data set may also call sys.exit() in a loader process
            error.add_note(f"it was reading sample {Now.sample}")
            raise
        return rows

    def _seeded(
        self,
        generators: list[Generator],
        epoch: int,
        samples: Ids,
        detector: _UseDetector | None = None,
    ) -> Any:
        # nothing else uses the generators of a loader process; this saves 5 to 200 µs a batch
        in_rank = get_worker_info() is None
        outer = [generator.capture() for generator in generators] if in_rank else []
        words = sample_words("sample", self._seed, epoch, samples).tolist()
        rows = self._one_by_one(samples.tolist(), lambda k: _seed(generators, words[k], detector))
        # random numbers in collate belong to a micro-batch, identified by its first sample
        (word,) = sample_words("collate", self._seed, epoch, samples[:1]).tolist()
        _seed(generators, word, detector)
        batch = self._collated(rows, samples)
        if detector is not None:
            detector.record_used()
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


class _UseDetector:
    """Finds the generators that are drawn from between two seedings."""

    def __init__(self, generators: list[Generator]) -> None:
        self._generators = generators
        self._marks: list[Any] = []
        self._used: set[int] = set()

    def begin(self) -> None:
        self._marks = [generator.mark() for generator in self._generators]

    def record_used(self) -> None:
        for index, mark in enumerate(self._marks):
            if self._generators[index].mark() != mark:
                self._used.add(index)

    def used_and_unused(self) -> tuple[list[Generator], list[Generator]]:
        pairs = [(index in self._used, each) for index, each in enumerate(self._generators)]
        return [g for used, g in pairs if used], [g for used, g in pairs if not used]


def _seed(generators: list[Generator], word: int, detector: _UseDetector | None) -> None:
    if detector is not None:
        detector.record_used()
    for generator in generators:
        generator.seed(word)
    if detector is not None:
        detector.begin()
