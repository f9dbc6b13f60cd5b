"""Feeds: the ranks' parts, one after the other, are the ordered global batch, for any layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain import Task
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.train.data.iterable_pipeline import StreamFeed
from dtrain.train.data.order import shuffled
from dtrain.train.data.pipeline import Feed, MapFeed
from dtrain.train.data.placement import GlobalBatch, Position
from dtrain.train.data.stream import is_stream
from support.errors import raises

Steps = list[list[int]]


class Plain(Task):
    """Samples are their own ids."""

    def collate(self, samples: list[int]) -> list[int]:
        return samples


class Stream(torch.utils.data.IterableDataset[int]):
    """0 … n-1; epochs of other lengths if asked for."""

    def __init__(self, n: int, *, grows: bool = False) -> None:
        self.n, self.grows, self.epoch = n, grows, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n + self.grows * self.epoch))


class Stateful(Stream):
    """A stream that can begin anywhere."""

    read = 0
    at = 0

    def __iter__(self) -> Iterator[int]:
        first, self.at = self.at, 0
        for i in range(first, self.n):
            self.at = i
            Stateful.read += 1
            yield i

    def state_dict(self) -> dict[str, Any]:
        return {"next": (self.at + 1, torch.tensor(self.at))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["next"][0]


def spec(batch: int, *, workers: int = 0, **train: Any) -> JobSpec:
    train = {"epochs": 2, "global_batch_size": batch, **train}
    data = {"workers": workers, "exactly_once": False}
    return JobSpec(name="t", task="t:T", seed=5, train=train, data=data)  # type: ignore[arg-type]


def make(dataset: Any, job: JobSpec, rank: int, world_size: int, task: Task | None = None) -> Feed:
    kind = StreamFeed if is_stream(dataset) else MapFeed
    ranks = RankInfo(rank, world_size)
    return kind(dataset, task or Plain(), job, ranks, pin_memory=False)


def consume(
    feed: Feed, step: int, position: Position, micro: int | None, steps: int | None = None
) -> tuple[Steps, int, Position]:
    """A rank's samples of each step, and where it stands then."""
    ranks = feed.ranks

    def split(batch: GlobalBatch) -> tuple[range, ...]:
        return batch.micro_batches(ranks.rank, ranks.world_size, micro)

    seen = []
    for batch, micro_batches, number in itertools.islice(
        feed.batches(step, position, split), steps
    ):
        parts = list(micro_batches)
        assert [size for size, _ in parts] == [len(part) for _, part in parts]
        assert len(parts) == number == len(split(batch))
        assert batch.step == step
        seen.append([sample for _, part in parts for sample in part])
        step, position = step + 1, batch.after
    return seen, step, position


def together(ranks: list[Steps]) -> Steps:
    return [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]


sizes = st.integers(1, 60)
worlds = st.integers(1, 9)
micros = st.one_of(st.none(), st.integers(1, 20))


@given(
    n=sizes, batch=sizes, worlds=st.tuples(worlds, worlds), micros=st.tuples(micros, micros),
    data=st.data(), kind=st.sampled_from(["shuffled", "in turn", "stream", "growing stream"]),
)  # fmt: skip
@settings(max_examples=150)
def test_any_layout_and_any_resume_is_the_order_of_one_process(
    n: int, batch: int, worlds: tuple[int, int], micros: tuple[int | None, int | None],
    data: st.DataObject, kind: str,
) -> None:  # fmt: skip
    """Nothing padded, dropped or repeated; n < batch and more ranks than samples included."""
    job = spec(batch)
    if kind == "in turn":
        job = job.model_copy(update={"data": job.data.model_copy(update={"shuffle": False})})

    def dataset() -> Any:
        return Stream(n, grows=kind == "growing stream") if "stream" in kind else range(n)

    expected: Steps = []
    for epoch in range(2):
        length = n + epoch * (kind == "growing stream")
        order = shuffled(n, 5).epoch(epoch).block(0, n) if kind == "shuffled" else range(length)
        expected += [list(order[i : i + batch]) for i in range(0, length, batch)]
    stop = data.draw(st.integers(0, len(expected)))
    seen: Steps = []
    step, position = 0, Position()
    for world_size, micro, count in zip(worlds, micros, (stop, None), strict=True):
        feeds = [make(dataset(), job, rank, world_size) for rank in range(world_size)]
        results = [consume(feed, step, position, micro, count) for feed in feeds]
        assert len({str(result[1:]) for result in results}) == 1
        seen += together([result[0] for result in results])
        step, position = results[0][1:]
    assert seen == expected
    assert position == Position(2, 0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dataset", [range(23), Stream(23)])
def test_loader_processes_change_nothing(dataset: Any, workers: int) -> None:
    alone = consume(make(dataset, spec(8), 0, 1), 0, Position(), 3)
    ranks = [
        consume(make(dataset, spec(8, workers=workers), rank, 2), 0, Position(), 3)
        for rank in range(2)
    ]
    assert together([ranks[0][0], ranks[1][0]]) == alone[0]


def test_a_stream_is_not_told_which_loader_process_reads_it() -> None:
    class Dealing(Stream):
        def __iter__(self) -> Iterator[int]:
            info = torch.utils.data.get_worker_info()
            step = 1 if info is None else info.num_workers
            return iter(range(0, self.n, step))

    assert consume(make(Dealing(10), spec(4, workers=2, epochs=1), 0, 1), 0, Position(), None)[
        0
    ] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_number_of_steps_ends_a_stream() -> None:
    endless = Stream(10**18)
    for workers in (0, 2):
        job = spec(4, workers=workers, epochs=None, steps=3)
        seen, step, position = consume(make(endless, job, 0, 1), 0, Position(), None)
        assert (len(seen), step, position) == (3, 3, Position(0, 12))


def test_a_stateful_stream_resumes_without_reading(caplog: pytest.LogCaptureFixture) -> None:
    dataset = Stateful(1000)
    feed = make(dataset, spec(8), 0, 1)
    step, position = consume(feed, 0, Position(), None, 100)[1:]
    state = feed.state_dict()
    for workers in (0, 2):
        Stateful.read = 0
        again = make(Stateful(1000), spec(8, workers=workers), 1, 2)
        again.load_state_dict(state)
        rest = consume(again, step, position, None, 2)[0]
        assert rest == [[804, 805, 806, 807], [812, 813, 814, 815]]
        assert Stateful.read <= 17
    assert "sample 800" not in caplog.text


def test_any_other_stream_is_read_from_its_beginning_and_this_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    feed = make(Stream(1000), spec(8), 0, 1)
    step, position = consume(feed, 0, Position(), None, 100)[1:]
    again = make(Stream(1000), spec(8), 0, 1)
    again.load_state_dict(feed.state_dict())
    assert consume(again, step, position, None, 1)[0] == [list(range(800, 808))]
    assert "sample 800" in caplog.text


def test_streams_draw_the_same_on_every_rank_and_after_a_resume() -> None:
    class Shuffling(Stream):
        """Keeps four samples, gives one of them by chance, with noise."""

        def __iter__(self) -> Iterator[Any]:
            kept: list[int] = []
            for i in range(self.n):
                kept.append(i)
                if len(kept) == 4:
                    yield kept.pop(np.random.randint(4)), torch.rand(()).item()
            yield from ((i, torch.rand(()).item()) for i in kept)

    dataset = Shuffling(50)
    alone = consume(make(dataset, spec(8), 0, 1), 0, Position(), None)[0]
    assert sorted(i for step in alone[:7] for i, _ in step) == list(range(50))  # type: ignore[misc]
    assert alone[:7] != alone[7:]
    for workers in (0, 2):
        job = spec(8, workers=workers)
        ranks = [consume(make(dataset, job, rank, 3), 0, Position(), 2)[0] for rank in range(3)]
        assert together(ranks) == alone
    torch.rand(3)
    feed = make(dataset, spec(8), 0, 1)
    assert consume(feed, 5, Position(0, 40), None)[0] == alone[5:]


def test_what_cannot_be_a_stream() -> None:
    with raises("data.empty", "train_dataset()", "epoch 0"):
        consume(make(Stream(0), spec(2), 0, 1), 0, Position(), None)

    class Weighted(Plain):
        def sample_weights(self) -> Any:
            return [1.0]

    with raises("data.order-of-stream", "sample_weights()", "train_dataset()"):
        make(Stream(3), spec(2), 0, 1, Weighted())
