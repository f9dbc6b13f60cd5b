"""Batches from data sets of all kinds, and random numbers that belong to the sample."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dtrain import Task
from dtrain.train.contract import check_dataset
from dtrain.train.data.fetch import Fetcher, Request
from dtrain.train.seeding import RandomState, derive_seed, seed_everything
from support.errors import raises


class Noisy(torch.utils.data.Dataset[Any]):
    def __init__(self, kind: str, from_sample: int = 0) -> None:
        self.kind, self.from_sample = kind, from_sample

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> Any:
        if i < self.from_sample:
            return i, 0.0
        draws = {
            "torch": lambda: torch.rand(()).item(),
            "numpy": np.random.rand,
            "python": random.random,
        }
        return i, float(draws[self.kind]())


class Shuffling(Task):
    def collate(self, samples: list[Any]) -> Any:
        return random.sample(samples, len(samples))


def request(*samples: int, epoch: int = 0) -> Request:
    return Request(epoch, np.array(samples, dtype=np.int64))


def rows(batch: Any) -> dict[int, float]:
    return dict(zip(batch[0].tolist(), batch[1].tolist(), strict=True))


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
def test_noise_belongs_to_seed_epoch_and_sample(kind: str) -> None:
    all_at_once = rows(Fetcher(Noisy(kind), Task(), 1)(request(0, 1, 2, 3)))
    fetch = Fetcher(Noisy(kind), Task(), 1)
    one_by_one = {k: v for i in (3, 1, 0, 2) for k, v in rows(fetch(request(i))).items()}
    assert all_at_once == one_by_one
    assert len(set(all_at_once.values())) == 4
    assert rows(fetch(request(0, 1, 2, 3, epoch=1))) != all_at_once
    assert rows(Fetcher(Noisy(kind), Task(), 2)(request(0, 1, 2, 3))) != all_at_once


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
def test_noise_that_begins_late_is_the_same_noise(kind: str) -> None:
    fetch = Fetcher(Noisy(kind, from_sample=2), Task(), 1)
    fetch(request(0, 1))
    assert rows(fetch(request(1, 2))) == rows(Fetcher(Noisy(kind, 2), Task(), 1)(request(1, 2)))


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
def test_the_generators_of_the_training_are_left_alone(kind: str) -> None:
    fetch = Fetcher(Noisy(kind), Task(), 1)
    before = RandomState.capture()
    for samples in ((0, 1), (2, 3)):
        fetch(request(*samples))
        assert before.unchanged()


def test_a_random_collate_is_the_same_each_time() -> None:
    batches = [Fetcher(range(20), Shuffling(), 1)(request(*range(8))) for _ in range(2)]
    assert batches[0] == batches[1] != list(range(8))


def test_tensor_data_sets_are_indexed_at_once_and_look_collated() -> None:
    data = TensorDataset(torch.arange(40).reshape(10, 4), torch.arange(10))
    expected = next(iter(DataLoader(data, batch_size=3)))
    fast = Fetcher(data, Task(), 0)(request(0, 1, 2))
    assert type(fast) is type(expected)
    for one, other in zip(fast, expected, strict=True):
        assert torch.equal(one, other)


def test_a_data_set_may_fetch_many_samples_at_once() -> None:
    class Batched(Noisy):
        def __getitem__(self, i: int) -> Any:
            raise AssertionError("one at a time")

        def __getitems__(self, samples: list[int]) -> list[int]:
            return [10 * i for i in samples]

    assert Fetcher(Batched("torch"), Task(), 0)(request(3, 1)).tolist() == [30, 10]


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([torch.ones(3), torch.ones(3), None], "sample 12 is None, and sample 10 torch.float32[3]"),
        ([None, None, None], "sample 10 is None: does the data set return"),
        (
            [torch.ones(2), torch.ones(3), torch.ones(3)],
            "sample 10 is torch.float32[2], and sample 11 torch.float32[3]",
        ),
        (
            [{"x": np.ones(2), "y": 1}, {"x": np.ones(2), "y": 1}, {"x": np.ones(4), "y": 2}],
            "sample 12 has float64[4] at ['x'], and sample 10 float64[2]",
        ),
        ([{"x": 1}, {"y": 1}, {"x": 2}], "sample 11 is the key 'y', and sample 10 the key 'x'"),
        (
            [(1, 2.0), (1, 2.0), (1, "a")],
            "sample 12 is tuple of 2, and sample 10 tuple of 2 numbers",
        ),
        ([["a"], ["a", "b"], ["c"]], "sample 11 is list of 2, and sample 10 list of 1"),
    ],
)
def test_samples_that_make_no_batch_are_named(samples: list[Any], words: str) -> None:
    with pytest.raises((TypeError, RuntimeError, KeyError)) as caught:
        Fetcher([0] * 10 + samples, Task(), 0)(request(10, 11, 12))
    notes = "\n".join(caught.value.__notes__)
    assert "a batch of samples 10, 11, 12" in notes
    assert words in notes


def test_a_collate_of_ones_own_that_fails_is_not_explained_by_unlike_samples() -> None:
    class Pads(Task):
        def collate(self, samples: list[Any]) -> Any:
            raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own") as caught:
        Fetcher([torch.ones(2), torch.ones(3)], Pads(), 0)(request(0, 1))
    assert caught.value.__notes__ == ["it was making a batch of samples 0, 1"]


def test_a_data_set_that_fetches_too_few_samples_at_once() -> None:
    class Short(Noisy):
        def __getitems__(self, samples: list[int]) -> list[int]:
            return samples[1:]

    with raises("data.wrong-number-of-samples", "__getitems__()", "1 samples", "samples 3, 4"):
        Fetcher(Short("torch"), Task(), 0)(request(3, 4))


def test_data_sets_that_have_no_positions() -> None:
    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    with raises("data.no-positions", "train_dataset()", "Stream", "__len__"):
        check_dataset(Stream(), "train_dataset()")
    with raises("data.empty", "eval_dataset()"):
        check_dataset([], "eval_dataset()")
    assert check_dataset([1, 2], "eval_dataset()") == 2


def test_seeds_are_hashed_not_added() -> None:
    seeds = {derive_seed("x", seed, epoch) for seed in range(30) for epoch in range(30)}
    assert len(seeds) == 900
    assert derive_seed("a", 1) != derive_seed("a", "1")
    assert derive_seed(11, 1) != derive_seed(1, 11)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_state_of_all_generators_survives_a_file(tmp_path: Any) -> None:
    before = RandomState.capture()
    try:
        seed_everything(5)
        random.gauss(0, 1), np.random.randn()  # each keeps a second number for the next call
        torch.save(RandomState.capture().to_saved(), tmp_path / "state.pt")
        drawn = [random.gauss(0, 1), np.random.randn(), torch.rand(()).item()]
        seed_everything(6)
        RandomState.from_saved(torch.load(tmp_path / "state.pt", weights_only=True)).restore()
        assert [random.gauss(0, 1), np.random.randn(), torch.rand(()).item()] == drawn
    finally:
        before.restore()
