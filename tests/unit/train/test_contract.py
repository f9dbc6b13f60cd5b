"""What a task's methods return: refused, or told, before the first step and with their place."""

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

from dtrain.errors import DtrainError
from dtrain.integrations.lightning.optimizers import EveryFew
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.train import contract
from dtrain.train.context import TrainContext
from dtrain.train.load import load_task
from dtrain.train.loop.native import NativeTrainer
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


def samples() -> Iterator[int]:
    yield 1


BROKEN: list[tuple[str, Any, str]] = [
    ("model", lambda task: None, "returned NoneType, not a torch.nn.Module"),
    ("model", lambda task: nn.Linear, "returned the class Linear"),
    ("model", lambda task: nn.Sequential(DataParallel(nn.Linear(6, 1))), "whose 0 is wrapped in"),
    ("model", lazy, "1.weight has no shape yet"),
    ("optimizer", lambda task, model: None, "returned NoneType, not a torch.optim.Optimizer"),
    ("optimizer", lambda task, model: [SGD(model.parameters())] * 2, "returned 2 optimizers"),
    ("optimizer", lambda task, model: torch.optim.LBFGS(model.parameters()), "step(closure)"),
    ("optimizer", own_layer, "2 of 6 parameters that are not the model's, the first of shape (3,"),
    ("scheduler", over_another, "returned StepLR over another optimizer"),
    ("scheduler", lambda task, optimizer: 0.1, "returned float, not a scheduler"),
    ("scheduler", one_cycle, "total_steps=3, and this training has 4 steps: torch would raise"),
    ("train_dataset", lambda task: None, "returned NoneType: is there a return?"),
    ("train_dataset", lambda task: "data.csv", "returned str"),
    ("train_dataset", lambda task: samples, "returned the function samples() itself: call it"),
    ("train_dataset", lambda task: samples(), "returned generator, an iterator"),
    ("train_dataset", lambda task: {"train": [1], "test": [2]}, "keys ('train', 'test')"),
    ("train_dataset", lambda task: DataLoader(Numbers(9, torch.float32)), "return its data set"),
    ("train_dataset", lambda task: object(), "lacks __len__ or __getitem__"),
    ("eval_dataset", lambda task: Numbers, "returned the class Numbers"),
    ("eval_dataset", lambda task: {"x": [1]}, "keys ('x')"),
    ("loss", lambda task, model, batch: None, "returned NoneType; return a scalar tensor"),
    ("loss", lambda task, model, batch: torch.ones(3), "a tensor of shape (3,), not of one"),
    ("loss", lambda task, model, batch: torch.ones(()), "a tensor without a graph"),
]
NAMES = [f"{method}, {words[:30]}" for method, _, words in BROKEN]


@pytest.mark.parametrize(
    ("method", "function", "words"),
    BROKEN,
    ids=[f"{method}, {words[:30]}" for method, _, words in BROKEN],
)
def test_a_broken_contract_is_told_with_method_and_place(
    method: str, function: Callable[..., Any], words: str, tmp_path: Path
) -> None:
    kind = type("Broken", (Regression,), {method: function})
    with pytest.raises(DtrainError) as caught:
        trained(kind, tmp_path)
    place = f"test_contract.py:{inspect.getsourcelines(function)[1]}: {method}()"
    assert place in str(caught.value)
    assert words in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (None, "evaluate() returned NoneType; return a dict"),
        ({"accuracy": "good"}, "evaluate()['accuracy'] returned str"),
        ({"accuracy": None}, "evaluate()['accuracy'] returned NoneType"),
        ({"accuracy": torch.ones(2)}, "evaluate()['accuracy'] returned a tensor of shape (2,)"),
    ],
)
def test_metrics_that_are_no_numbers(metrics: Any, words: str, tmp_path: Path) -> None:
    class Broken(Regression):
        def evaluate(self, model: nn.Module, batch: Any) -> Any:
            return metrics

    with pytest.raises(DtrainError, match=r"test_contract\.py:\d+: evaluate\(\)") as caught:
        trained(Broken, tmp_path, args={"held_out": 3}, eval={"every_steps": 2})
    assert words in str(caught.value)


def test_numbers_of_numpy_are_metrics(tmp_path: Path) -> None:
    class Of32Bits(Regression):
        def evaluate(self, model: nn.Module, batch: Any) -> Any:
            return {"a": np.float32(0.5), "b": np.int64(2)}

    trained(Of32Bits, tmp_path, args={"held_out": 3})
    told = [line for line in lines(tmp_path, "metrics") if line["split"] == "eval"]
    assert (told[-1]["a"], told[-1]["b"]) == (0.5, 2)


def test_trainable_parameters_left_out_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Partial(Regression):
        def optimizer(self, model: Any) -> Any:
            return SGD(model.last.parameters(), lr=0.1)

    with caplog.at_level(logging.WARNING):
        trained(Partial, tmp_path)
    (event,) = [each for each in lines(tmp_path, "events") if each["event"] == "not_optimized"]
    assert event["parameters"] == ["first.weight", "first.bias"]
    assert caplog.text.count("first.weight for one") == 1


def test_a_good_task_is_told_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    return [
        re.sub(r": schedulers.*|; schedulers.*", "", each)
        for each in contract.remarks_on_length(scheduler, steps, Regression())
    ]


@pytest.mark.parametrize(
    ("make", "steps", "words"),
    [
        (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9), 5, "before its rate has come"),
        (lambda o: lr_scheduler.PolynomialLR(o, total_iters=3), 5, "rate is 0 from step 3"),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=3), 5, "rises again from step 3"),
        (
            lambda o: lr_scheduler.SequentialLR(
                o,
                [lr_scheduler.ConstantLR(o), lr_scheduler.CosineAnnealingLR(o, T_max=3)],
                milestones=[2],
            ),
            9,
            "T_max=3, and this training has 7 steps",
        ),
        (
            lambda o: EveryFew(
                {"scheduler": lr_scheduler.CosineAnnealingLR(o, T_max=2)}, lambda wish: 3
            ),
            9,
            "T_max=2, and this training has 3 steps",
        ),
    ],
)
def test_a_schedule_of_another_length_is_told_with_both(
    make: Callable[[Any], Any], steps: int, words: str
) -> None:
    (said,) = remarks(make, steps)
    assert words in said
    assert remarks(make, None) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=5),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
        lambda o: lr_scheduler.LinearLR(o, total_iters=2),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0),
        lambda o: EveryFew({"scheduler": lr_scheduler.CosineAnnealingLR(o, 2)}, lambda wish: None),
    ],
)
def test_a_schedule_that_may_be_meant_is_not_remarked_on(make: Callable[[Any], Any]) -> None:
    assert remarks(make, 5) == []


def test_a_method_of_a_class_that_derives_from_nothing_has_its_place(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "class T:\n  def model(self): return 1\n  def train_dataset(self): return [1]\n"
        "  def loss(self, model, batch): return 0\n  def optimizer(self, model): return None\n"
    )
    task = load_task("own.py:T", {}, tmp_path)
    assert contract.named(task, "optimizer").endswith("own.py:5: optimizer()")
    assert contract.named(task, "evaluate") == "evaluate()"
