"""Streams that shard themselves (`data.stream: sharded`): every sample once, and their proof."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain import Callback, Task
from dtrain.errors import DtrainError, format_error
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.context import TrainContext
from dtrain.train.loop.native import NativeTrainer
from support.errors import assert_named, assert_shown

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Part(torch.utils.data.IterableDataset[Any]):
    """This rank's numbers, as torch's documentation teaches to deal them."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __iter__(self) -> Iterator[torch.Tensor]:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        numbers = torch.randperm(33).tolist() if "shuffled" in self.how else list(range(33))
        if self.how not in ("same", "shuffled copies"):
            numbers = numbers[rank::world_size]
        info = torch.utils.data.get_worker_info()
        if info is not None:
            numbers = numbers[info.id :: info.num_workers]
        if self.how == "ragged":  # rank 0 has the least
            numbers = numbers[: 2 + 3 * rank]
        if self.how == "one empty" and rank == 0:
            numbers = []
        if self.how == "all empty":
            numbers = []
        if self.how == "a few twice":
            numbers = [*numbers, 0]
        if self.how == "two values":
            numbers = [each % 2 for each in numbers]
        if self.how == "shuffled copies":
            numbers = list(range(120))
            random.Random(rank).shuffle(numbers)
        for each in numbers:
            yield each + 0.9 * torch.rand(1) if "noise" in self.how else torch.tensor([float(each)])


class Stateful(Part):
    """Goes on where it was; ends by beginning anew, as many do."""

    at = 0
    num_read = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        numbers = list(super().__iter__())
        first, self.at = self.at, 0
        for index in range(first, len(numbers)):
            self.at = index + 1
            Stateful.num_read += 1
            yield numbers[index] + 0.01 * torch.rand(1)
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Seen(Task):
    """Takes note of what it trains on."""

    def __init__(self, dataset: Any, stop_after: int | None) -> None:
        self.dataset, self.stop_after = dataset, stop_after
        self.seen: list[int] = []
        self.noise: list[float] = []

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.2), nn.Linear(4, 1))

    def train_dataset(self) -> Any:
        return self.dataset

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if any(p.requires_grad for p in model.parameters()) and torch.is_grad_enabled():
            self.seen += batch.flatten().int().tolist()
            self.noise += batch.flatten().frac().tolist()
        return (model(batch) - 1).square().mean()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=0.01)

    def callbacks(self) -> Any:
        return [] if self.stop_after is None else [_Leave(self)]


class _Leave(Callback):
    """Asks to leave after a step, as a preemption would."""

    context: TrainContext

    def __init__(self, task: Seen) -> None:
        self.task = task

    def on_step(self, session: Any, loss: float) -> None:
        """See `Callback`."""
        if session.step == self.task.stop_after:
            self.context.stop.reason = "preempted"


@dataclass
class Outcome:
    error: str | None
    seen: list[int]
    noise: list[float]
    steps: int
    digest: str | None
    logged: list[str]


def train(
    folder: Path,
    how: str = "right",
    *,
    stateful: bool = False,
    stop_after: int | None = None,
    epochs: int = 2,
    strategy: str = "ddp",
    batch: int = 6,
    stream: str = "sharded",
    **data: Any,
) -> Outcome:
    torch.set_num_threads(1)
    job = JobSpec.model_validate(
        {
            "name": "t",
            "task": "t:T",
            "strategy": strategy,
            "train": {"epochs": epochs, "global_batch_size": batch, "micro_batch_size": 2},
            "data": {"stream": stream, **data},
            "log": {"every_steps": 1},
        }
    )
    run = RunDir(folder)
    run.create()
    dataset = Stateful(how) if stateful else Part(how)
    task = Seen(list(range(9)) if how == "map-style" else dataset, stop_after)
    context = TrainContext(job, run, RankInfo.from_env(), 0, task, torch.device("cpu"))
    _Leave.context = context
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dtrain")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        result = NativeTrainer(context).run()
    except DtrainError as error:
        return Outcome(format_error(error), task.seen, task.noise, 0, None, logged)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return Outcome(None, task.seen, task.noise, result.steps, result.parameters_sha256, logged)


def each(folder: Path, calls: list[dict[str, Any]]) -> list[Outcome]:
    return [train(folder / str(index), **call) for index, call in enumerate(calls)]


def many(world_size: int, folder: Path, *calls: dict[str, Any]) -> list[list[Outcome]]:
    """For each call, the outcomes of all ranks, from one start of ranks."""
    return list(zip(*run_ranks(each, world_size, folder, list(calls)), strict=True))  # type: ignore[arg-type]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def test_every_sample_once_and_the_counts_are_logged(tmp_path: Path) -> None:
    calls = [
        {"strategy": strategy, "workers": workers}
        for strategy, workers in (("ddp", 0), ("ddp", 2), ("fsdp", 0))
    ]
    for index, outcomes in enumerate(many(2, tmp_path, *calls)):
        assert [outcome.error for outcome in outcomes] == [None, None]
        for rank, outcome in enumerate(outcomes):
            if calls[index]["strategy"] == "ddp":  # fsdp runs some again for nothing
                assert outcome.seen == 2 * list(range(rank, 33, 2))
            assert outcome.steps == 12  # 17 and 16 of 3 a step
        read = events(tmp_path / str(index), "epoch_read")
        assert [line["samples"] for line in read] == [[17, 16]] * 2
        (line,) = [text for text in outcomes[0].logged if text.startswith("epoch 0: 33 samples")]
        assert_named(line, ["rank 0 read 17", "rank 1 read 16"])


def test_streams_end_when_they_end(tmp_path: Path) -> None:
    """Rank 0 is idle first, then rank 1; under fsdp others lend it what it computes."""
    calls = [
        {"how": how, "strategy": strategy, "epochs": 1}
        for how in ("ragged", "one empty")
        for strategy in ("ddp", "fsdp")
    ]
    ragged, ragged_fsdp, empty, empty_fsdp = many(3, tmp_path, *calls)
    for outcomes, sizes in ((ragged, [2, 5, 8]), (empty, [0, 11, 11])):
        for rank, outcome in enumerate(outcomes):
            assert outcome.seen == list(range(rank, 33, 3))[: sizes[rank]]
    assert [outcome.steps for outcome in (*ragged, *ragged_fsdp)] == [4] * 6
    assert [outcome.error for outcome in (*empty, *empty_fsdp)] == [None] * 6
    for ddp, fsdp, sizes in ((0, 1, [2, 5, 8]), (2, 3, [0, 11, 11])):
        for index in (ddp, fsdp):
            (read,) = events(tmp_path / str(index), "epoch_read")
            assert read["samples"] == sizes
        assert losses(tmp_path / str(fsdp)) == pytest.approx(losses(tmp_path / str(ddp)), rel=1e-5)
    (nothing,) = many(2, tmp_path / "nothing", {"how": "all empty"})
    assert_shown(str(nothing[0].error), "data.empty", "train_dataset()", "epoch 0")


@pytest.mark.parametrize("how", ["right", "ragged"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_is_the_unbroken_run_to_the_bit(tmp_path: Path, how: str, workers: int) -> None:
    """Also where a rank's stream has ended, whose state would begin it anew."""
    for stateful in (False, True):
        call = {"how": how, "stateful": stateful, "workers": workers}
        (whole,) = many(2, tmp_path / f"whole{stateful}", call)
        folder = tmp_path / f"broken{stateful}"
        (first,) = many(2, folder, {**call, "stop_after": 1 if how == "ragged" else 8})
        (rest,) = many(2, folder, call)
        for one, before, after in zip(whole, first, rest, strict=True):
            assert (one.error, before.error, after.error) == (None, None, None)
            assert before.digest is None
            assert before.seen + after.seen == one.seen
            assert after.digest == one.digest
        if how == "right":  # else rank 0's stream is at its end
            assert stateful != any("is read from its beginning" in text for text in rest[0].logged)
    (other,) = many(3, folder, call)
    for outcome in other:
        assert_shown(str(outcome.error), "checkpoint.none-loads", "2 ranks", "3 ranks")


def test_a_shuffle_is_common_and_noise_is_each_ranks_own(tmp_path: Path) -> None:
    (first, second) = run_ranks(train, 2, tmp_path, "shuffled with noise", epochs=1)
    assert sorted(first.seen + second.seen) == list(range(33)) != first.seen + second.seen
    assert len({round(each, 4) for each in first.noise[1:] + second.noise[1:]}) > 28


def test_ranks_that_read_the_same_are_reported(tmp_path: Path) -> None:
    """In one order at once, in another at the end of the epoch; duplicates are no mistake."""
    calls = [
        {"how": how, "batch": batch}
        for how, batch in (
            ("same", 18), ("shuffled copies", 6), ("a few twice", 6), ("two values", 6),
            ("right", 6),
        )
    ]  # fmt: skip
    same, copies, few, values, right = many(2, tmp_path, *calls)
    for outcomes in (same, copies):
        (error,) = {outcome.error for outcome in outcomes}
        names = ("every rank", "data.stream: sharded")
        assert_shown(str(error), "data.stream-not-sharded", *names)
    assert "18 of 18 " in str(same[0].error)
    assert same[0].seen == []
    assert len(copies[0].seen) == 120
    assert [outcome.error for outcome in (*few, *values, *right)] == [None] * 6
    (warning,) = [text for text in few[0].logged if "data.stream" in text]
    assert_named(warning, ["2 of 34 samples", "sample 0 of rank 0"])
    assert not any("data.stream" in text for text in (*values[0].logged, *right[0].logged))


def test_what_cannot_be(tmp_path: Path) -> None:
    exact, small, listed = many(
        2, tmp_path, {"strategy": "exact"}, {"batch": 2, "epochs": 1}, {"how": "map-style"}
    )
    assert_shown(str(exact[0].error), "plan.sharded-stream", "'exact'", "data.stream: sharded")
    assert small[0].error is None
    error = str(listed[0].error)
    assert_shown(
        error, "data.stream-of-map-style", "data.stream: sharded", "train_dataset()", "list"
    )
    (small,) = many(3, tmp_path / "more", {"batch": 2})
    names = ("train.global_batch_size is 2", "3 processes")
    assert_shown(str(small[0].error), "plan.sharded-stream", *names)
