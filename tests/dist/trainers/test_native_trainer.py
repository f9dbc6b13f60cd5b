"""The native trainer's smaller promises: state by name, loaders that die, words for mistakes."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from dtrain import Loss, Task
from dtrain.errors import CheckpointError, UsageError
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import RankError, run_ranks
from dtrain.train.checkpoint.state import (
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from dtrain.train.context import StopFlag, TrainContext, TrainResult
from dtrain.train.load import load_task
from dtrain.train.loop.native import NativeTrainer
from support import EXAMPLES
from support.errors import raises
from support.trainings import Regression, job, lines, train

DIGITS = EXAMPLES / "digits"


def run_task(task: Task, folder: Path, strategy: str, **sections: Any) -> TrainResult:
    torch.set_num_threads(1)
    run = RunDir(folder)
    run.create()
    ranks = RankInfo.from_env() if strategy == "ddp" else RankInfo()
    context = TrainContext(
        job(strategy, **sections), run, ranks, 0, task, torch.device("cpu"), 2, StopFlag()
    )
    return NativeTrainer(context).run()


# -- digits ----------------------------------------------------------------------------------


def train_digits(folder: Path, strategy: str) -> TrainResult:
    task = load_task("task.py:Digits", {}, DIGITS)
    sizes = {"global_batch_size": 64, "epochs": 10, "steps": None}
    return run_task(task, folder, strategy, train=sizes, log={"every_steps": 10})


def test_digits_are_learned_by_four_ranks(tmp_path: Path) -> None:
    results = run_ranks(train_digits, 4, tmp_path, "ddp", timeout=120)
    assert {result.parameters_sha256 for result in results} == {results[0].parameters_sha256}
    assert results[0].steps == 230
    assert results[0].metrics["accuracy"] >= 0.97


# -- state by name ---------------------------------------------------------------------------


def reordered() -> list[bool]:
    """Two models of the same parts in another order, and optimizers with other groups' order."""

    def build(names: list[str]) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
        torch.manual_seed(names.index("a"))
        model = nn.ModuleDict({name: nn.Linear(3, 3) for name in names})
        groups = [
            {"params": list(model[name].parameters()), "lr": 0.1 if name == "a" else 0.2}
            for name in names
        ]
        return model, torch.optim.AdamW(groups)

    def step(model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
        x = torch.linspace(-1, 1, 12).reshape(4, 3)
        model["c"](torch.relu(model["b"](torch.tanh(model["a"](x))))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, other = build(["a", "b", "c"]), build(["c", "a", "b"])
    step(*one)
    state = copy.deepcopy((model_state(one[0]), optimizer_state(*one)))  # as through a file
    load_model_state(other[0], state[0])
    load_optimizer_state(*other, state[1])
    step(*one)
    step(*other)
    model, _ = build(["a", "b", "c"])
    stranger = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(2))])
    merged = torch.optim.AdamW(model.parameters())
    for broken in (
        lambda: optimizer_state(model, stranger),
        lambda: load_optimizer_state(model, merged, state[1]),
    ):
        with pytest.raises(CheckpointError):
            broken()
    return [torch.equal(v, other[0].state_dict()[name]) for name, v in one[0].state_dict().items()]


def test_state_finds_its_parameter_in_any_order() -> None:
    (same,) = run_ranks(reordered, 1)
    assert same == [True] * 6


# -- loader processes ------------------------------------------------------------------------


class KillsItself(Regression):
    """Its rank is killed while loader processes run; their pids are in a file by then."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        if len(self.seen) == 3:
            children = [child.pid for child in psutil.Process().children()]
            Path(os.environ["PIDS"]).write_text(" ".join(map(str, children)))
            os.kill(os.getpid(), 9)
        return super().loss(model, batch)


def kill_with_loaders(folder: Path) -> None:
    os.environ["PIDS"] = str(folder / "pids")
    run_task(KillsItself(n=500), folder / "run", "single", data={"workers": 2})


def test_a_killed_rank_leaves_no_loader_process(tmp_path: Path) -> None:
    with pytest.raises(RankError):
        run_ranks(kill_with_loaders, 1, tmp_path)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(psutil.pid_exists, pids))


# -- at the start ----------------------------------------------------------------------------


class Varied(Regression):
    """Builds what depends on the rank."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def model(self) -> nn.Module:
        rank = RankInfo.from_env().rank
        if self.kind == "shape" and rank == 1:
            self.net = (0.0, False, 17, "")
        if self.kind == "values" and rank == 1:
            torch.manual_seed(99)
        if self.kind == "none":
            return None  # type: ignore[return-value]
        if self.kind == "frozen":
            return super().model().requires_grad_(False)
        return super().model()

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        if self.kind == "plateau":
            return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return None

    def loss(self, model: nn.Module, batch: Any) -> Any:
        loss = super().loss(model, batch)
        return Loss(loss, 0.0) if self.kind == "weightless" else loss


def train_varied(folder: Path, kind: str, **sections: Any) -> TrainResult:
    return run_task(Varied(kind), folder, "ddp", **sections)


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        (
            *("shape", "check.model-differs"),
            "first.weight is (17, 6) torch.float32 trained, number 0 on rank 1",
        ),
        ("none", "task.not-a-model", "NoneType"),
        ("frozen", "task.nothing-to-train", "model()"),
        ("plateau", "task.plateau-scheduler", "scheduler()"),
        ("weightless", "task.loss-weights-zero", "add up to 0"),
    ],
)
def test_broken_contracts_have_a_code(tmp_path: Path, kind: str, code: str, words: str) -> None:
    with raises(code, words):
        run_ranks(train_varied, 2, tmp_path, kind)


def test_other_initial_values_on_a_rank_are_an_error_or_replaced_on_request(
    tmp_path: Path,
) -> None:
    with raises("check.initial-values-differ", "first.weight[0, 0] is ", "on rank 1 and "):
        run_ranks(train_varied, 2, tmp_path, "values")
    results = run_ranks(train_varied, 2, tmp_path, "values", checks={"init": "broadcast"})
    assert results[0].parameters_sha256 == results[1].parameters_sha256


def test_one_process_strategies_refuse_more(tmp_path: Path) -> None:
    for strategy in ("single", "dp"):
        context = TrainContext(
            job(strategy), RunDir(tmp_path), RankInfo(1, 2), 0, Regression(), torch.device("cpu")
        )
        with raises("strategy.one-process-only", f"'{strategy}'", "but 2", kind=UsageError):
            NativeTrainer(context).run()


def test_early_stopping_without_evaluation_data_is_refused(tmp_path: Path) -> None:
    spec = job("single", train={"early_stopping": {"metric": "mse"}}, eval={"every_steps": 1})
    with raises("eval.no-data", "train.early_stopping"):
        run_ranks(train, 1, spec, tmp_path)


# -- what is written -------------------------------------------------------------------------


def test_lines_and_events_of_a_run(tmp_path: Path) -> None:
    spec = job(
        "ddp",
        {"held_out": 5},
        train={"steps": 9, "clip_grad_norm": 1.0},
        log={"every_steps": 4},
        eval={"every_steps": 6},
        checkpoint={"every_steps": 5},
    )
    run_ranks(train, 2, spec, tmp_path)
    metrics = lines(tmp_path, "metrics")
    assert [(x["split"], x["step"], x["epoch"]) for x in metrics] == [
        ("train", 1, 0),  # the first step has a line of its own
        ("train", 4, 0),
        ("eval", 6, 1),
        ("train", 8, 1),
        ("train", 9, 2),  # and so has the last
        ("eval", 9, 2),
    ]
    assert {"loss", "lr", "samples_per_second", "grad_norm", "time"} < set(metrics[0])
    assert set(metrics[2]) == {"time", "step", "epoch", "split", "mse", "ids"}
    events = lines(tmp_path, "events")
    assert [event["event"] for event in events] == [
        "training_started",
        "checkpoint_saved",
        "checkpoint_saved",
        "finished",
    ]
    started, _, saved, finished = events
    assert started["total_steps"] == 9
    assert started["total_epochs"] == 3
    assert (started["world_size"], started["strategy"]) == (2, "ddp")
    assert started["resumed_from"] is None
    assert (saved["step"], saved["checkpoint"]) == (9, "step-00000009")
    assert finished["metrics"] == {name: metrics[-1][name] for name in ("mse", "ids")}
    assert len(finished["parameters_sha256"]) == 64
