"""Streams under the trainer: ranks that are given other streams, and what is said of the length."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning  # noqa: F401  before the ranks are forked; it takes each of them 3 s
import torch
from torch import nn

from dtrain import Task, catalog
from dtrain.errors import BlamedError, DtrainError, format_error
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.context import TrainContext
from support.errors import assert_shown

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Numbers(torch.utils.data.IterableDataset[Any]):
    """0 to 21, or what a mistake makes of it on this rank."""

    epoch = 0

    def __init__(self, how: str) -> None:
        self.how = how

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        numbers = list(range(22))
        info = torch.utils.data.get_worker_info()
        if self.how in ("by rank", "by both"):
            numbers = numbers[rank::world_size]
        if self.how in ("by loader process", "by both") and info is not None:
            numbers = numbers[info.id :: info.num_workers]
        if self.how == "shuffled by rank":
            random.Random(rank).shuffle(numbers)
        if self.how == "one late":
            numbers[20] += self.epoch * rank
        if self.how.startswith("longer") and rank == 1:
            numbers += range(22, 22 + int(self.how.split()[1]))
        if self.how == "none" and rank == 1:
            numbers = []
        noise = self.how == "noise"
        return (torch.tensor([each / 22 + noise * random.random()]) for each in numbers)


class Mean(Task):
    def __init__(self, how: str) -> None:
        self.how = how

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def train_dataset(self) -> Any:
        return Numbers(self.how)

    def eval_dataset(self) -> Any:
        return torch.utils.data.TensorDataset(torch.ones(3, 1))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        batch = batch[0] if isinstance(batch, list) else batch
        return (model(batch) - 1).square().mean()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)


Outcome = tuple[str | None, list[int], int | str]
"""An error and its culprits; steps, or the parameters' digest of a training that ended well."""


def train(
    folder: Path,
    how: str,
    strategy: str = "ddp",
    trainer: str = "native",
    steps: int | None = None,
    **data: Any,
) -> Outcome:
    torch.set_num_threads(1)
    job = JobSpec.model_validate(
        {
            "name": "t",
            "task": "t:T",
            "strategy": strategy,
            "trainer": trainer,
            "train": {
                "epochs": 2,
                "steps": steps,
                "global_batch_size": 6,
                "micro_batch_size": 2,
            },
            "data": data,
            "eval": {"every_epochs": 1},
            "log": {"every_steps": 1},
        }
    )
    run = RunDir(folder)
    run.create()
    context = TrainContext(job, run, RankInfo.from_env(), 0, Mean(how), torch.device("cpu"))
    try:
        return None, [], catalog.load("trainer", trainer)(context).run().steps
    except DtrainError as error:
        return format_error(error), error.culprits if isinstance(error, BlamedError) else [], 0


def each(folder: Path, calls: list[dict[str, Any]]) -> list[Outcome]:
    return [train(folder / str(index), **call) for index, call in enumerate(calls)]


def test_epochs_end_when_the_stream_ends(tmp_path: Path) -> None:
    assert run_ranks(train, 2, tmp_path, "right") == [(None, [], 8)] * 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "eval"] == [4, 8]
    assert [line["epoch"] for line in lines if line["split"] == "train"] == [0] * 4 + [1] * 4
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (started,) = (event for event in events if event["event"] == "training_started")
    assert (started["total_steps"], started["total_epochs"]) == (None, 2)


def test_equal_streams_raise_no_alarm(tmp_path: Path) -> None:
    """Noise from global generators is seeded, and the loader process is hidden."""
    calls = [
        {"how": how, "workers": workers}
        for how in ("right", "noise", "by loader process")
        for workers in (0, 2)
    ]
    assert run_ranks(each, 3, tmp_path, calls) == [[(None, [], 8)] * len(calls)] * 3
    assert run_ranks(train, 1, tmp_path / "alone", "by rank") == [(None, [], 8)]


def test_neither_does_a_resume(tmp_path: Path) -> None:
    """In the middle of an epoch, on another number of ranks, with loader processes."""
    assert run_ranks(train, 3, tmp_path, "noise", steps=3) == [(None, [], 3)] * 3
    assert run_ranks(train, 2, tmp_path, "noise", workers=2) == [(None, [], 8)] * 2


def test_trainer_lightning_compares_too(tmp_path: Path) -> None:
    calls = [{"how": how, "trainer": "lightning"} for how in ("right", "one late", "longer 1")]
    for right, late, longer in run_ranks(each, 2, tmp_path, calls):
        assert right == (None, [], 8)
        assert "seen in step 8" in str(late[0])
        assert "seen in step 4" in str(longer[0])


MISTAKES: list[tuple[str, list[str], list[int]]] = [
    ("by rank", ["step 1:  [", "ranks 1, 2 and rank 0 "], []),
    ("by both", ["position 0 of epoch 0 "], []),
    ("shuffled by rank", ["step 1:  [", "ranks 1, 2 and rank 0 "], []),
    ("one late", ["step 8:  [", "ranks 1, 2 and rank 0 "], []),
    ("longer 1", ["step 4:  [", "\nrank 1 ", "position 22 of epoch 0 ", "ends there on"], [1]),
    ("longer 4", ["ends there on rank 0", "on rank 1"], [1]),
    ("none", ["ends there on rank 1", "on rank 0"], [1]),
]


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 3), ("fsdp", 3), ("exact", 2)])
def test_every_difference_ends_with_one_error(
    tmp_path: Path, strategy: str, world_size: int
) -> None:
    """Nothing hangs, though ranks with other lengths have other numbers of forwards."""
    calls = [
        {"how": how, "strategy": strategy, "workers": 2 * (how == "by both")}
        for how, *_ in MISTAKES
    ]
    outcomes = run_ranks(each, world_size, tmp_path, calls)
    for index, (_, names, culprits) in enumerate(MISTAKES):
        (error,) = {rank[index][0] for rank in outcomes}  # the same on all ranks
        if world_size == 2:
            names, culprits = ["ranks 0 and 1 ", "no majority"], []
        assert_shown(str(error), "data.streams-differ", "data.stream: sharded", *names)
        assert [rank[index][1] for rank in outcomes] == [culprits] * world_size


def test_the_comparison_can_be_turned_off(tmp_path: Path) -> None:
    assert (
        run_ranks(train, 2, tmp_path, "shuffled by rank", exactly_once=False) == [(None, [], 8)] * 2
    )
