"""Helpers of the tests that train: small tasks that keep a diary, and one training as a call."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dtrain import Loss, Task
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.train.context import StopFlag, TrainContext, TrainResult
from dtrain.train.loop.native import NativeTrainer


class Crash(Exception):
    """Stands for a process that is killed: nothing is saved any more."""


class Numbers(torch.utils.data.Dataset[Any]):
    """Sample i: 6 inputs, a target, a weight, and i itself; with noise if asked for."""

    def __init__(self, n: int, dtype: torch.dtype, noise: float = 0.0) -> None:
        draw = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 6, generator=draw, dtype=dtype)
        self.y = torch.sin(self.x.sum(dim=1, keepdim=True))
        self.w = torch.rand(n, generator=draw, dtype=dtype) * 3
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        x = self.x[i]
        if self.noise:
            x = x + self.noise * torch.randn(6, dtype=x.dtype) + np.random.rand()
        return {"x": x, "y": self.y[i], "w": self.w[i], "i": torch.tensor(i)}


class Net(nn.Module):
    """Two layers; may drop, normalise, be big, and own a layer that is used now and then."""

    def __init__(self, dropout: float, norm: bool, width: int, spare: str) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.spare = nn.Linear(6, 1) if spare else None
        self.last = nn.Linear(width, 1)
        self.use = spare

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Not forward, on purpose: a task may call any method."""
        out = self.last(self.drop(torch.tanh(self.norm(self.first(x)))))
        if self.spare is not None and (self.use == "sometimes" and bool(x[0, 0] > 0.5)):
            out = out + self.spare(x)
        return out


class Regression(Task):
    """Fits `Numbers`.

    Args:
        n: samples.
        held_out: samples of evaluation; 0 for none.
        dtype: float32 or float64.
        weighted: return `Loss` with unequal weights instead of a mean.
        spare: "": no spare layer, "never" or "sometimes" used otherwise.
        crash_after, stop_after: optimizer steps of this process.
        stop_rank: the rank that asks to stop.
        evaluations: what `evaluate` says after 2, 4, 6 … steps.
    """

    def __init__(
        self,
        n: int = 50,
        held_out: int = 0,
        dtype: str = "float32",
        weighted: bool = False,
        dropout: float = 0.0,
        norm: bool = False,
        width: int = 16,
        spare: str = "",
        optimizer: str = "sgd",
        noise: float = 0.0,
        scale: float = 1.0,
        crash_after: int | None = None,
        stop_after: int | None = None,
        stop_rank: int = 0,
        stop_in_evaluation: bool = False,
        evaluations: list[float] | None = None,
    ) -> None:
        self.n, self.held_out, self.weighted = n, held_out, weighted
        self.dtype = getattr(torch, dtype)
        self.net = dropout, norm, width, spare
        self.optimizer_name, self.noise, self.scale = optimizer, noise, scale
        self.crash_after, self.stop_after, self.stop_rank = crash_after, stop_after, stop_rank
        self.stop_in_evaluation, self.evaluations = stop_in_evaluation, evaluations
        self.stop = StopFlag()
        self.rank = 0
        self.seen: list[list[int]] = [[]]  # sample ids of each optimizer step, on this rank
        self.inputs: dict[int, bytes] = {}
        self.evaluated: list[int] = []

    def model(self) -> nn.Module:
        return Net(*self.net).to(self.dtype)

    def train_dataset(self) -> Numbers:
        return Numbers(self.n, self.dtype, self.noise)

    def eval_dataset(self) -> Numbers | None:
        return Numbers(self.held_out, self.dtype) if self.held_out else None

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        if torch.is_grad_enabled():
            self.seen[-1] += batch["i"].tolist()
            for i, x in zip(batch["i"].tolist(), batch["x"], strict=True):
                self.inputs[i] = x.numpy().tobytes()
        errors = (model.predict(batch["x"]) - batch["y"]).square().squeeze(1) * self.scale
        if not self.weighted:
            return errors.mean()
        return Loss((errors * batch["w"]).sum(), batch["w"].sum())

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        kinds = {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
            "plain": lambda p: torch.optim.SGD(p, lr=0.1),
            "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
        }
        optimizer: torch.optim.Optimizer = kinds[self.optimizer_name](model.parameters())
        optimizer.register_step_post_hook(self._after_step)
        return optimizer

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        self.evaluated += batch["i"].tolist()
        if self.stop_in_evaluation and self.rank == self.stop_rank:
            self.stop.request("test")
        if self.evaluations is not None:
            return {"loss": float(self.evaluations[(len(self.seen) - 1) // 2 - 1])}
        errors = (model.predict(batch["x"]) - batch["y"]).square().sum()
        return {"mse": Loss(errors, len(batch["x"])), "ids": Loss(batch["i"].sum(), 1.0)}

    def _after_step(self, *_: Any) -> None:
        self.seen.append([])
        steps = len(self.seen) - 1
        if self.stop_after == steps and self.rank == self.stop_rank:
            self.stop.request("test")
        if self.crash_after == steps:
            raise Crash


@dataclass
class Outcome:
    """What one rank brings back from a training."""

    result: TrainResult | None
    """None after a crash."""
    parameters: dict[str, np.ndarray[Any, Any]]
    seen: list[list[int]]
    evaluated: list[int]
    inputs: dict[int, bytes] = field(repr=False)
    random: float
    """The next random number of this rank after training."""


def job(strategy: str = "single", args: dict[str, Any] | None = None, **sections: Any) -> JobSpec:
    """A job of `Regression`; sections override `{train: {steps: 10, global_batch_size: 16}}`."""
    sections["train"] = {"steps": 10, "global_batch_size": 16, **sections.get("train", {})}
    sections.setdefault("log", {"every_steps": 1})
    return JobSpec.model_validate(
        {
            "name": "t",
            "task": "t:T",
            "strategy": strategy,
            "args": args or {},
            "seed": 3,
            **sections,
        }
    )


def train(
    spec: JobSpec,
    folder: Path,
    replicas: int = 1,
    kind: type[Regression] = Regression,
    trainer_class: type[NativeTrainer] = NativeTrainer,
) -> Outcome:
    """Train in this process, or with the other ranks of its group."""
    torch.set_num_threads(1)
    run = RunDir(folder)
    run.create()
    ranks = RankInfo() if spec.strategy in ("single", "dp") else RankInfo.from_env()
    task = kind(**spec.args)
    task.rank = ranks.rank
    cpu = torch.device("cpu")
    kept: list[nn.Module] = []
    build = task.model
    task.model = lambda: kept.append(build()) or kept[0]  # type: ignore[func-returns-value, method-assign]
    context = TrainContext(spec, run, ranks, 0, task, cpu, replicas, task.stop)
    trainer = trainer_class(context)
    result = None
    with contextlib.suppress(Crash):
        result = trainer.run()
    state = {n: v for n, v in kept[0].state_dict().items() if isinstance(v, torch.Tensor)}
    whole = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in state.items()}
    arrays = {name: value.numpy().copy() for name, value in whole.items()}
    number = torch.rand(()).item()
    return Outcome(result, arrays, task.seen[:-1], task.evaluated, task.inputs, number)


def same_end(ones: list[Outcome], others: list[Outcome]) -> None:
    """Make sure that two trainings ended with the same bits and metrics."""
    one, other = ones[0].result, others[0].result
    assert one is not None
    assert other is not None
    assert one.parameters_sha256 == other.parameters_sha256 is not None
    assert one.metrics == other.metrics
    for name, value in ones[0].parameters.items():
        np.testing.assert_array_equal(others[0].parameters[name], value, err_msg=name)


def losses(folder: Path) -> list[float]:
    """The training loss of every step, in order of the lines."""
    return [line["loss"] for line in lines(folder, "metrics") if line["split"] == "train"]


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl or events.jsonl."""
    text = (folder / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def steps_of(outcomes: list[Outcome]) -> list[list[int]]:
    """The ordered global list of samples of each step: the ranks' parts, one after the other."""
    return [
        [i for part in parts for i in part]
        for parts in zip(*(o.seen for o in outcomes), strict=True)
    ]
