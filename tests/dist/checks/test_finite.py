"""A gradient or a state that is not finite reaches no checkpoint, and is named."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.integrations.lightning.trainer import LightningTrainer
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.checkpoint.content import read_checkpoint
from dtrain.train.checks.finite import NonFiniteError
from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.loop.native import NativeTrainer
from support.faults import Talkative
from support.trainings import lines

ODD = 77
"""The sample whose loss is finite and whose gradient is not."""


class Wide(nn.Module):
    """A large layer without a bias, behind which nothing of the gradient shows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(192, 128)
        self.last = nn.Linear(128, 1)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("peak", torch.zeros(1))


class RootOfZero(Talkative):
    """sqrt at 0, on the side of `where` that is not taken: NaN backwards, for one sample."""

    kind: Any = torch.optim.SGD
    rate = 0.01

    def model(self) -> nn.Module:
        return Wide()

    def train_dataset(self) -> Any:
        ids = torch.arange(192)
        return torch.utils.data.TensorDataset(ids, ids % 7 / 7)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        ids, y = batch
        x = model.embed(ids)
        odd = (ids == ODD).unsqueeze(1)
        root = torch.where(odd, x, torch.sqrt(torch.where(odd, x * 0, x.square() + 1)))
        return (model.last(root).squeeze(1) - y).square().mean()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.kind(model.parameters(), lr=self.rate)  # type: ignore[no-any-return]

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return None


def trained(
    folder: Path,
    kind: type[Talkative],
    strategy: str = "ddp",
    trainer: type[NativeTrainer] = NativeTrainer,
    clip: float | None = None,
    **checks: Any,
) -> Any:
    torch.set_num_threads(1)
    spec = JobSpec.model_validate(
        {
            "name": "t", "task": "t:T", "strategy": strategy,
            "train": {"steps": 9, "global_batch_size": 24, "clip_grad_norm": clip},
            "checkpoint": {"every_steps": 1, "keep": 20},
            "checks": {"every_steps": 100, **checks},
        }
    )  # fmt: skip
    run = RunDir(folder)
    run.create()
    ranks = RankInfo() if strategy == "single" else RankInfo.from_env()
    context = TrainContext(spec, run, ranks, 0, kind(), torch.device("cpu"))
    try:
        return trainer(context).run()
    except NonFiniteError as error:
        return str(error), error.collateral


def step_of(results: list[Any]) -> int:
    found = re.search(r"of step (\d+)|after step (\d+)", results[0][0])
    assert found is not None
    return int(found[1] or found[2])


def saved(folder: Path) -> list[int]:
    """The steps of all checkpoints, once it is sure that all of them are of numbers."""
    folders = sorted((folder / "checkpoints").glob("step-*"))
    for each in folders:
        tensors, _ = read_checkpoint(each)
        values = [v for s in tensors["optimizer"]["state"].values() for v in s.values()]
        states = {**tensors["model"], **dict(enumerate(values))}
        assert all(v.isfinite().all() for n, v in states.items() if n != "mask"), each.name
    return [int(each.name.removeprefix("step-")) for each in folders]


@pytest.mark.parametrize(
    ("strategy", "clip", "trainer"),
    [
        ("single", None, NativeTrainer),
        ("ddp", None, NativeTrainer),
        ("ddp", 1.0, LightningTrainer),
        ("fsdp", 1.0, NativeTrainer),
        ("exact", None, NativeTrainer),
    ],
)
def test_a_gradient_of_one_large_tensor_is_seen_in_its_step(
    tmp_path: Path, strategy: str, clip: float | None, trainer: type[NativeTrainer]
) -> None:
    call = functools.partial(trained, strategy=strategy, clip=clip, trainer=trainer)
    results = run_ranks(call, 1 if strategy == "single" else 2, tmp_path, RootOfZero)
    assert saved(tmp_path) == list(range(1, step_of(results)))
    blamed = [text for text, collateral in results if not collateral]
    assert all(
        "1 of 3 parameters; the one nearest to the loss is embed.weight" in text for text in blamed
    )
    if strategy != "fsdp":
        (text,) = blamed
        assert "from embed.weight of rank" in text
        assert text.endswith(f"sample {ODD} gives the same when computed alone")


class Overflowing(RootOfZero):
    """Adam's squares of a finite gradient are infinite."""

    kind = torch.optim.Adam

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        ids, _ = batch
        return (model.last(model.embed(ids)) * torch.where(ids == ODD, 1e30, 1.0)).mean()


class Bursting(RootOfZero):
    """A rate that makes the weights infinite at once."""

    rate = 1e38

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model.last(model.embed(batch[0])).sum() * 1e4  # type: ignore[no-any-return]


class Peaking(RootOfZero):
    """A forward writes infinity into a buffer."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if ODD in batch[0]:
            model.peak.fill_(float("inf"))
        return model.last(model.embed(batch[0])).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Overflowing, "optimizer state embed.weight.exp_avg_sq is not finite"),
        (Bursting, "parameters embed.weight is not finite, nor"),
        (Peaking, "buffers peak is not finite, although"),
    ],
)
def test_what_an_update_or_a_forward_spoils_is_not_saved(
    tmp_path: Path, kind: type[RootOfZero], words: str
) -> None:
    text, collateral = trained(tmp_path, kind, "single")
    assert not collateral
    assert words in text
    assert saved(tmp_path) == list(range(1, step_of([(text,)])))


def test_warned_of_it_training_goes_on_and_saves_nothing_of_it(tmp_path: Path) -> None:
    results = run_ranks(functools.partial(trained, on_nan="warn"), 2, tmp_path, RootOfZero)
    assert all(isinstance(each, TrainResult) for each in results)
    steps = saved(tmp_path)
    assert 0 < len(steps) < 9
    assert len({e["step"] for e in lines(tmp_path, "events") if "saved" in e["event"]}) < 9
