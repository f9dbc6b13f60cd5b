"""What owners of small states give to a checkpoint comes back as it is, or is refused at once."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from dtrain import Callback
from dtrain.callback import Session
from dtrain.errors import CheckpointError
from dtrain.integrations.lightning.trainer import LightningTrainer
from dtrain.testing import run_ranks
from dtrain.train.checkpoint.leaves import read, refuse_unreadable
from support.errors import raises
from support.trainings import Net, Regression, job, train


@dataclasses.dataclass
class Thing:
    """What no checkpoint can hold."""

    number: int = 1


class Point(NamedTuple):
    x: int
    y: int


def state() -> dict[Any, Any]:
    """What JSON would change, or has no word for."""
    return {
        "best": np.float32(0.1), "seen": np.arange(3), 3: (1, [2.5]), "last": float("nan"),
        "tensor": torch.arange(2), "count": Counter("aab"), "kinds": {1, 2},
    }  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(torch.as_tensor(one == other).all()) or one != one


class Keeps:
    """Keeps what it is given, and says what came back."""

    def __init__(self, kept: Any) -> None:
        self.kept = kept
        self.loaded: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"deep": [self.kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["deep"][0]


class Told(Keeps, Callback):
    """As one of dtrain's callbacks."""


class LightningTold(Keeps, pl.Callback):
    """As one of Lightning's."""


class Rate:
    """A callable of LambdaLR, whose attributes are in the scheduler's state."""

    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def __call__(self, step: int) -> float:
        return 1.0


class Extra(Net):
    """A module with state that is no tensor."""

    def get_extra_state(self) -> Any:
        return {"deep": [self.kept]}

    def set_extra_state(self, state: Any) -> None:
        self.loaded = state["deep"][0]


class Owners(Regression):
    """One of them keeps `kept`, the others nothing."""

    kept: Any = None
    owners: tuple[str, ...] = ("scheduler", "optimizer", "module", "callback", "task")

    def model(self) -> nn.Module:
        self.net_ = Extra(*self.net)
        self.net_.kept = self._of("module")
        self.net_.loaded = None
        return self.net_

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        self.optimizer_ = super().optimizer(model)
        self.optimizer_.param_groups[0]["kept"] = self._of("optimizer")
        return self.optimizer_

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        self.rate = Rate(self._of("scheduler"))
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)

    def callbacks(self) -> list[Any]:
        self.told: Any = Told(self._of("callback"))
        self.lightning = LightningTold(self._of("lightning"))
        return [self.told, *([self.lightning] if "lightning" in self.owners else [])]

    def state_dict(self) -> dict[str, Any]:
        return {"deep": [self._of("task")]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["deep"][0]

    def _of(self, owner: str) -> Any:
        return self.kept if owner in self.owners else None


class Everyone(Owners):
    owners = (*Owners.owners, "lightning")
    kept = state()
    made: list[Owners] = []

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self.made.append(self)

    def _of(self, owner: str) -> Any:  # a task is compared between ranks, and sets have no order
        without = {key: value for key, value in state().items() if key != "kinds"}
        return without if owner == "task" else super()._of(owner)


def test_every_type_comes_back(tmp_path: Path) -> None:
    spec = job("single", {"stop_after": 1})
    for _ in range(2):
        train(spec, tmp_path, kind=Everyone, trainer_class=LightningTrainer)
    task: Any = Everyone.made[-1]
    everywhere = (
        task.rate.kept, task.optimizer_.param_groups[0]["kept"], task.net_.loaded,
        task.told.loaded, task.lightning.loaded,
    )  # fmt: skip
    assert all(same(each, state()) for each in everywhere)
    assert same(task.loaded, task._of("task"))


@pytest.mark.parametrize(
    ("owner", "words"),
    [
        ("scheduler", "state_dict() of scheduler LambdaLR['lr_lambdas'][0]['kept']['odd']"),
        ("optimizer", "state_dict() of optimizer SGD['param_groups'][0]['kept']['odd']"),
        ("module", "get_extra_state() of the model, _extra_state['deep'][0]['odd']"),
        ("callback", "state_dict() of callback Told['deep'][0]['odd']"),
        ("lightning", "state_dict() of callback lightning['LightningTold']['deep'][0]['odd']"),
        ("task", "task['deep'][0]['odd']"),
    ],
)
def test_what_no_checkpoint_holds_is_told_before_training(
    owner: str, words: str, tmp_path: Path
) -> None:
    kind = type("One", (Owners,), {"owners": (owner,), "kept": {"odd": Thing()}})
    with raises("checkpoint.unsaveable-value", f"{words} is a test_states.Thing"):
        train(job("single"), tmp_path, kind=kind, trainer_class=LightningTrainer)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "odd", [defaultdict(int), Path("x"), Point(1, 2), lambda: 1, np.array([Thing()], dtype=object)]
)
def test_what_the_reader_refuses_is_refused(odd: Any) -> None:
    with raises("checkpoint.unsaveable-value", "x['a'][0]"):
        refuse_unreadable({"a": [odd]}, "x")


class Later(Told):
    """Is fine until step 3."""

    def on_step(self, session: Session, loss: float) -> None:
        self.kept = Thing() if session.step == 3 else session.step


class OddLater(Regression):
    def callbacks(self) -> list[Any]:
        return [Later(0)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_becomes_so_later_is_told_at_the_next_save(strategy: str, tmp_path: Path) -> None:
    spec = job(strategy, checkpoint={"every_steps": 1})
    with raises("checkpoint.unsaveable-value", "Later['deep'][0] is a test_states.Thing"):
        run_ranks(functools.partial(train, kind=OddLater), 2, spec, tmp_path)
    assert [each.name[-1] for each in sorted((tmp_path / "checkpoints").iterdir())] == ["1", "2"]


class Forgetful(Told):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        state["shallow"]


class Forgets(Owners):
    def callbacks(self) -> list[Any]:
        return [type("Told", (Forgetful,), {})(1)]


def test_who_cannot_take_it_back_is_named(tmp_path: Path) -> None:
    train(job("single", {"stop_after": 1}), tmp_path, kind=Owners)
    shallow = ("callback Told", "KeyError('shallow')")
    with raises("checkpoint.none-loads", *shallow, kind=CheckpointError):
        train(job("single"), tmp_path, kind=Forgets)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save({"a": Thing()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        read(tmp_path / "evil.pt")
    with raises("checkpoint.unsaveable-key", "x has a key <class"):
        refuse_unreadable({Thing: 1}, "x")
