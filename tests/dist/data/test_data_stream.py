"""Streams under the trainer: ranks that come apart, and what is said about an unknown length."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtrain import Task
from dtrain.errors import DtrainError
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.context import TrainContext
from dtrain.train.trainers.native import NativeTrainer


class Numbers(torch.utils.data.IterableDataset[Any]):
    def __init__(self, n: int, more_on_rank: int | None) -> None:
        self.n = n + (os.environ.get("RANK") == str(more_on_rank)) * 4

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.full((1,), i / self.n) for i in range(self.n))


class Mean(Task):
    def __init__(self, more_on_rank: int | None) -> None:
        self.more_on_rank = more_on_rank

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def train_dataset(self) -> Any:
        return Numbers(22, self.more_on_rank)

    def eval_dataset(self) -> Any:
        return torch.utils.data.TensorDataset(torch.ones(3, 1))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        batch = batch[0] if isinstance(batch, list) else batch
        return (model(batch) - 1).square().mean()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)


def train(folder: Path, more_on_rank: int | None) -> tuple[str | None, int]:
    torch.set_num_threads(1)
    job = JobSpec.model_validate(
        {
            "name": "t",
            "task": "t:T",
            "train": {"epochs": 2, "global_batch_size": 6},
            "eval": {"every_epochs": 1},
            "log": {"every_steps": 1},
        }
    )
    run = RunDir(folder)
    run.create()
    task = Mean(more_on_rank)
    context = TrainContext(job, run, RankInfo.from_env(), 0, task, torch.device("cpu"))
    try:
        return None, NativeTrainer(context).run().steps
    except DtrainError as error:
        return str(error), 0


def test_epochs_end_when_the_stream_ends(tmp_path: Path) -> None:
    assert run_ranks(train, 2, tmp_path, None) == [(None, 8)] * 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "eval"] == [4, 8]
    assert [line["epoch"] for line in lines if line["split"] == "train"] == [0] * 4 + [1] * 4
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (started,) = (event for event in events if event["event"] == "training_started")
    assert (started["total_steps"], started["total_epochs"]) == (None, 2)


def test_ranks_whose_streams_differ_stop_at_once(tmp_path: Path) -> None:
    errors = [error for error, _ in run_ranks(train, 2, tmp_path, 1)]
    for rank, stop in ((0, 21), (1, 23)):
        error = errors[rank]
        assert error is not None
        assert f"step 4: other ranks are not at positions 18 to {stop} of epoch 0" in error
        assert f"as rank {rank} is" in error
