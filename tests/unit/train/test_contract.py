"""Wrong results of a task's methods are refused or reported, before the first step."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader

from dtrain.integrations.lightning.optimizers import IntervalScheduler
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.train import contract
from dtrain.train.context import TrainContext
from dtrain.train.load import load_task
from dtrain.train.loop.native import NativeTrainer
from support.errors import assert_named, raises
from support.trainings import Numbers, Regression, job, lines

STEPS = 4


@pytest.fixture(autouse=True)
def _inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch sets it for good


def trained(kind: type[Regression], folder: Path, **sections: Any) -> None:
    torch.set_num_threads(1)
    run = RunDir(folder)
    run.create()
    spec = job("single", train={"steps": STEPS}, **sections)
    task = kind(**spec.args)
    NativeTrainer(TrainContext(spec, run, RankInfo(), 0, task, torch.device("cpu"))).run()


def lazy(task: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.LazyLinear(1))


def own_layer(task: Any, model: nn.Module) -> Any:
    return SGD([*model.parameters(), *nn.Linear(2, 3).parameters()], lr=0.1)


def one_cycle(task: Any, optimizer: Any) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS - 1)


def over_another(task: Any, optimizer: Any) -> Any:
    return lr_scheduler.StepLR(SGD([torch.zeros(1)], lr=1.0), 10)


def wrapped(task: Any) -> nn.Module:
    return nn.Sequential(DataParallel(nn.Linear(6, 1)))


def two(task: Any, model: nn.Module) -> Any:
    return [SGD(model.parameters())] * 2


def lbfgs(task: Any, model: nn.Module) -> Any:
    return torch.optim.LBFGS(model.parameters())


def split(task: Any) -> Any:
    return {"train": [1], "test": [2]}


def loader(task: Any) -> Any:
    return DataLoader(Numbers(9, torch.float32))


def samples() -> Iterator[int]:
    yield 1


BROKEN: list[tuple[Any, ...]] = [
    ("model", lambda task: None, "task.not-a-model", "NoneType"),
    ("model", lambda task: nn.Linear, "task.not-a-model", "the class Linear"),
    ("model", wrapped, "task.model-wrapped", " 0 ", "DataParallel"),
    ("model", lazy, "task.lazy-layer", "1.weight"),
    ("optimizer", lambda task, model: None, "task.not-an-optimizer", "NoneType"),
    ("optimizer", two, "task.several-optimizers", "2 optimizers"),
    ("optimizer", lbfgs, "task.optimizer-needs-closure", "LBFGS", "step(closure)"),
    ("optimizer", own_layer, "task.optimizer-foreign-parameters", "2 of 6"),
    ("scheduler", over_another, "task.scheduler-of-other-optimizer", "StepLR"),
    ("scheduler", lambda task, optimizer: 0.1, "task.not-a-scheduler", "float"),
    ("scheduler", one_cycle, "task.scheduler-too-short", "total_steps=3", "4 steps"),
    ("train_dataset", lambda task: None, "data.not-a-data-set", "NoneType"),
    ("train_dataset", lambda task: "data.csv", "data.not-a-data-set", " str"),
    ("train_dataset", lambda task: samples, "data.not-a-data-set", "function samples()"),
    ("train_dataset", lambda task: samples(), "data.not-a-data-set", "generator"),
    ("train_dataset", split, "data.not-a-data-set", "('train', 'test')"),
    ("train_dataset", loader, "data.not-a-data-set", "DataLoader"),
    ("train_dataset", lambda task: object(), "data.no-positions", "__len__", "__getitem__"),
    ("eval_dataset", lambda task: Numbers, "data.not-a-data-set", "the class Numbers"),
    ("eval_dataset", lambda task: {"x": [1]}, "data.not-a-data-set", "('x')"),
    ("loss", lambda task, model, batch: None, "task.loss-not-scalar", "NoneType"),
    ("loss", lambda task, model, batch: torch.ones(3), "task.loss-not-scalar", "(3,)"),
    ("loss", lambda task, model, batch: torch.ones(()), "task.loss-without-graph", "tensor"),
]


@pytest.mark.parametrize(
    ("method", "function", "code", "names"),
    [(method, function, code, names) for method, function, code, *names in BROKEN],
    ids=[f"{method}, {code}, {names[0]}" for method, _, code, *names in BROKEN],
)
def test_the_error_of_a_broken_contract_names_method_and_location(
    method: str, function: Callable[..., Any], code: str, names: list[str], tmp_path: Path
) -> None:
    kind = type("Broken", (Regression,), {method: function})
    place = f"test_contract.py:{inspect.getsourcelines(function)[1]}: {method}()"
    with raises(code, place, *names):
        trained(kind, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("metrics", "code", "names"),
    [
        (None, "eval.not-metrics", ["evaluate()", "NoneType"]),
        ({"accuracy": "good"}, "task.loss-not-scalar", ["evaluate()['accuracy'] ", " str"]),
        ({"accuracy": None}, "task.loss-not-scalar", ["evaluate()['accuracy'] ", " NoneType"]),
        ({"accuracy": torch.ones(2)}, "task.loss-not-scalar", ["evaluate()['accuracy'] ", "(2,)"]),
    ],
)
def test_metrics_that_are_no_numbers(
    metrics: Any, code: str, names: list[str], tmp_path: Path
) -> None:
    class Broken(Regression):
        def evaluate(self, model: nn.Module, batch: Any) -> Any:
            return metrics

    with raises(code, *names) as caught:
        trained(Broken, tmp_path, args={"held_out": 3}, eval={"every_steps": 2})
    assert re.search(r"test_contract\.py:\d+: evaluate\(\)", str(caught.value))


def test_numbers_of_numpy_are_metrics(tmp_path: Path) -> None:
    class Of32Bits(Regression):
        def evaluate(self, model: nn.Module, batch: Any) -> Any:
            return {"a": np.float32(0.5), "b": np.int64(2)}

    trained(Of32Bits, tmp_path, args={"held_out": 3})
    evaluated = [line for line in lines(tmp_path, "metrics") if line["split"] == "eval"]
    assert (evaluated[-1]["a"], evaluated[-1]["b"]) == (0.5, 2)


def test_trainable_parameters_left_out_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Partial(Regression):
        def optimizer(self, model: Any) -> Any:
            return SGD(model.last.parameters(), lr=0.1)

    with caplog.at_level(logging.WARNING):
        trained(Partial, tmp_path)
    (event,) = [each for each in lines(tmp_path, "events") if each["event"] == "not_optimized"]
    assert event["parameters"] == ["first.weight", "first.bias"]
    assert caplog.text.count("for example first.weight") == 1


def test_a_good_task_has_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Good(Regression):
        def train_dataset(self) -> Any:
            return dict(enumerate(Numbers(self.n, self.dtype)))  # keys are positions

        def scheduler(self, optimizer: Any) -> Any:
            warmup = lr_scheduler.LinearLR(optimizer, total_iters=1)
            rest = lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS - 1)
            return lr_scheduler.SequentialLR(optimizer, [warmup, rest], milestones=[1])

    with caplog.at_level(logging.WARNING):
        trained(Good, tmp_path)
    kinds = {each["event"] for each in lines(tmp_path, "events")}
    assert kinds.isdisjoint({"not_optimized", "schedule_length"})


def remarks(make: Callable[[Any], Any], steps: int | None) -> list[str]:
    scheduler = make(SGD([torch.zeros(1)], lr=0.1))
    return list(contract.remarks_on_length(scheduler, steps, Regression()))


@pytest.mark.parametrize(
    ("make", "steps", "names"),
    [
        (
            lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
            5,
            ["total_steps=9", "5 steps", "ends"],
        ),
        (
            lambda o: lr_scheduler.PolynomialLR(o, total_iters=3),
            5,
            ["total_iters=3", "5 steps", "is 0 from step 3"],
        ),
        (
            lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=3),
            5,
            ["T_max=3", "5 steps", "rises", "step 3"],
        ),
        (
            lambda o: lr_scheduler.SequentialLR(
                o,
                [lr_scheduler.ConstantLR(o), lr_scheduler.CosineAnnealingLR(o, T_max=3)],
                milestones=[2],
            ),
            9,
            ["T_max=3", "7 steps"],
        ),
        (
            lambda o: IntervalScheduler(
                {"scheduler": lr_scheduler.CosineAnnealingLR(o, T_max=2)}, lambda config: 3
            ),
            9,
            ["T_max=2", "3 steps"],
        ),
    ],
)
def test_a_warning_about_a_schedule_has_both_lengths(
    make: Callable[[Any], Any], steps: int, names: list[str]
) -> None:
    (remark,) = remarks(make, steps)
    assert_named(remark, names)
    assert remarks(make, None) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=5),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
        lambda o: lr_scheduler.LinearLR(o, total_iters=2),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0),
        lambda o: IntervalScheduler(
            {"scheduler": lr_scheduler.CosineAnnealingLR(o, 2)}, lambda config: None
        ),
    ],
)
def test_a_schedule_that_may_be_meant_is_not_remarked_on(make: Callable[[Any], Any]) -> None:
    assert remarks(make, 5) == []


def test_a_method_of_a_class_without_a_base_has_its_location(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "class T:\n  def model(self): return 1\n  def train_dataset(self): return [1]\n"
        "  def loss(self, model, batch): return 0\n  def optimizer(self, model): return None\n"
    )
    task = load_task("own.py:T", {}, tmp_path)
    assert contract.named(task, "optimizer").endswith("own.py:5: optimizer()")
    assert contract.named(task, "evaluate") == "evaluate()"
