"""Trainings with a fault made on purpose, and what the checks make of them."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dtrain import Task
from dtrain.errors import DtrainError
from dtrain.job.faults import KINDS, TENSOR_KINDS
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.checks import collective_trace
from dtrain.train.context import TrainContext
from dtrain.train.loop.native import NativeTrainer

STEP = 5
"""When a fault is made; an epoch has 4 steps."""
STEPS = 9
NAN = ("nan-loss", "nan-gradient")
DATA = ("duplicate-sample", "drop-sample")
STRATEGIES = ("ddp", "exact", "fsdp", "dp")


class Net(nn.Module):
    """Two layers with a BatchNorm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(torch.tanh(self.norm(self.first(x))))
        return out


class Talkative(Task):
    """Regression that makes two collectives of one shape in each loss."""

    def model(self) -> nn.Module:
        return Net()

    def train_dataset(self) -> Any:
        x = torch.randn(192, 6, generator=torch.Generator().manual_seed(1))
        return torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        if dist.is_initialized() and torch.is_grad_enabled():
            largest, smallest = x.max(), -x.min()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            dist.all_reduce(smallest, op=dist.ReduceOp.MAX)
        return (model(x) - y).square().mean()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.01)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)


@dataclass(frozen=True)
class Case:
    """One training with a fault."""

    strategy: str
    kind: str
    culprit: int
    every: int
    mismatch: str = "stop"
    steps: int = STEPS
    place: str | None = None
    """Where in a tensor, as `,param=…`; None: where the table's faults are."""

    def spec(self) -> JobSpec:
        """The job."""
        fault = f"kind={self.kind},rank={self.culprit},step={STEP}{self._place()}"
        checks = {"every_steps": self.every, "inject": [fault], "on_mismatch": self.mismatch}
        train = {"steps": self.steps, "global_batch_size": 48, "virtual_shards": 12}
        job = {"name": "t", "task": "t:T", "strategy": self.strategy}
        return JobSpec.model_validate({**job, "train": train, "checks": checks})

    def _place(self) -> str:
        if self.place is not None:
            return self.place
        if self.kind == "nan-gradient":
            return ",param=first.weight"
        if self.kind not in TENSOR_KINDS:
            return ""
        if "-buffer" in self.kind:
            return ",param=norm.running_mean,element=3,bit=10"
        return ",param=first.weight,element=7,bit=10"


@dataclass(frozen=True)
class Outcome:
    """What ended a training on one rank."""

    error: str = ""
    """The class of the error; empty when there was none."""
    text: str = ""
    collateral: bool = False


def train(case: Case, folder: Path, replicas: int = 1) -> Outcome:
    """One training on this rank."""
    torch.set_num_threads(1)
    run = RunDir(folder)
    run.create()
    ranks = RankInfo() if case.strategy == "dp" else RankInfo.from_env()
    collective_trace.install()
    context = TrainContext(case.spec(), run, ranks, 0, Talkative(), torch.device("cpu"), replicas)
    try:
        NativeTrainer(context).run()
    except DtrainError as error:
        return Outcome(type(error).__name__, str(error), getattr(error, "collateral", False))
    finally:
        collective_trace.CHAIN.fault_hook = None
        if ranks.is_rank_zero:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return Outcome()


def train_each(cases: list[Case], folder: Path, replicas: int = 1) -> list[Outcome]:
    """One training after the other, in the same processes."""
    return [train(case, folder / str(number), replicas) for number, case in enumerate(cases)]


def outcomes(cases: list[Case], world_size: int, folder: Path) -> list[list[Outcome]]:
    """For each case what every rank made of it; the cases have one strategy."""
    if cases[0].strategy == "dp":
        return [[outcome] for outcome in run_ranks(train_each, 1, cases, folder, 2)[0]]
    ranks = run_ranks(train_each, world_size, cases, folder, timeout=300)
    return [list(each) for each in zip(*ranks, strict=True)]


def found(case: Case, ranks: list[Outcome]) -> str:
    """What is found out, in the words of docs/checks.md."""
    blamed = [rank for rank, each in enumerate(ranks) if each.error and not each.collateral]
    if not blamed:
        return "not seen"
    mine = ranks[blamed[0]]
    known = blamed == [case.culprit] and "is not known" not in mine.text
    parts = ["rank"] if len(ranks) > 1 and known else []
    if re.search(r"\w\[[\d, ]+\] is ", mine.text):
        parts += ["tensor", "element"]
    elif "holds other bits" in mine.text or "nearest to the loss" in mine.text:
        parts += ["tensor"]
    parts += ["line"] if "all_reduce" in mine.text else []
    parts += ["values"] if re.search(r"(lr|seed) is ", mine.text) else []
    parts += ["samples"] if re.search(r"samples? \d", mine.text) else []
    return ", ".join(parts)


def kinds_of(strategy: str) -> list[str]:
    """The faults that can be made, without the one that hangs: one process has no other rank."""
    not_made = {"skip-collective"}
    if strategy == "dp":
        not_made |= {"lr", "seed", "swap-collectives"}
    return [kind for kind in KINDS if kind not in not_made]
