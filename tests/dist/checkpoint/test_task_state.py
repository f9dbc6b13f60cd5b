"""What a task remembers: in every checkpoint, compared between ranks, the same after a resume."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain import Callback, Loss, Task
from dtrain.callback import Session
from dtrain.errors import CheckpointError
from dtrain.integrations.lightning.trainer import LightningTrainer
from dtrain.testing import run_ranks
from dtrain.train.checkpoint.content import read_checkpoint
from dtrain.train.checks.replicas import ReplicaError
from dtrain.train.load import as_task
from dtrain.train.loop.native import NativeTrainer
from support.errors import raises
from support.trainings import Outcome, Regression, job, lines, same_end, train

DATA = {"n": 56, "held_out": 7}
RANKS = {"single": 1, "dp": 1, "ddp": 2, "fsdp": 2, "exact": 2}


class Counting(Regression):
    """Its loss grows with the steps done and leans on the first weights it has seen."""

    def __init__(self, forgets: bool = False, **args: Any) -> None:
        super().__init__(**args)
        self.forgets = forgets
        self.count = 0
        self.anchor = torch.zeros(())
        self.told: dict[str, Any] = {"names": ["a", None], "pair": (1, 2.5), 3: True}

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        value = super().loss(model, batch)
        assert isinstance(value, torch.Tensor)
        return value * (1 + 0.1 * self.count) + value * self.anchor.to(value.dtype)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {**super().evaluate(model, batch), "count": Loss(torch.tensor(self.count), 1.0)}

    def _after_step(self, *_: Any) -> None:
        self.count += 1
        self.anchor = self.anchor + 0.01 * self.count
        super()._after_step()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "anchor": self.anchor, "told": self.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.anchor, self.told = state["anchor"], state["told"]
        if not self.forgets:
            self.count = state["count"]


def run(
    strategy: str,
    folder: Path,
    world_size: int | None = None,
    kind: type[Regression] = Counting,
    trainer: type[NativeTrainer] = NativeTrainer,
    sections: dict[str, Any] | None = None,
    **args: Any,
) -> list[Outcome]:
    world_size = world_size or RANKS[strategy]
    train_section = {"virtual_shards": 4} if strategy == "exact" else {}
    spec = job(strategy, DATA | args, train=train_section, **(sections or {}))
    call = functools.partial(train, kind=kind, trainer_class=trainer)
    replicas = 2 if strategy == "dp" else 1
    return run_ranks(call, world_size, spec, folder, replicas)


def kept(folder: Path) -> Any:
    tensors, _ = read_checkpoint(folder / "checkpoints" / "step-00000010")
    return tensors["kept"]["states"]


@pytest.mark.parametrize("strategy", RANKS)
def test_a_counter_in_the_loss_goes_on(strategy: str, tmp_path: Path) -> None:
    unbroken = run(strategy, tmp_path / "unbroken")
    assert unbroken[0].result is not None
    assert unbroken[0].result.metrics["count"] == 10
    run(strategy, tmp_path / "broken", stop_after=5)
    same_end(unbroken, run(strategy, tmp_path / "broken"))
    state = kept(tmp_path / "broken")["task"]
    assert state["told"] == {"names": ["a", None], "pair": (1, 2.5), 3: True}
    assert state["count"] == 10


class OwnTeacher(Regression):
    """A mean teacher that is written by hand: a model of its own, followed in a step's hook."""

    def model(self) -> nn.Module:
        model = super().model()
        self.student = model
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        return model

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        value = super().loss(model, batch)
        assert isinstance(value, torch.Tensor)
        return (
            value + (model.predict(batch["x"]) - self.teacher.predict(batch["x"])).square().mean()
        )

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return super().evaluate(self.teacher, batch)

    def _after_step(self, *_: Any) -> None:
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for mine, theirs in pairs:
            mine.lerp_(theirs.detach(), 0.2)
        super()._after_step()

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state["teacher"])


@pytest.mark.parametrize("strategy", ["single", "dp", "ddp", "exact"])
def test_a_teacher_goes_on(strategy: str, tmp_path: Path) -> None:
    unbroken = run(strategy, tmp_path / "unbroken", kind=OwnTeacher)
    run(strategy, tmp_path / "broken", kind=OwnTeacher, stop_after=5)
    same_end(unbroken, run(strategy, tmp_path / "broken", kind=OwnTeacher))


class KeepsItsModel(OwnTeacher):
    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.student.state_dict()}


def test_parts_of_the_model_are_refused(tmp_path: Path) -> None:
    with raises("checkpoint.part-of-tensor", "task['teacher']['first.weight']", "'fsdp'"):
        run("fsdp", tmp_path, kind=KeepsItsModel)


def test_another_training_without_it(tmp_path: Path) -> None:
    """What the tests above would not see if the state changed nothing."""
    unbroken = run("single", tmp_path / "unbroken")
    run("single", tmp_path / "broken", stop_after=5)
    resumed = run("single", tmp_path / "broken", forgets=True)
    assert unbroken[0].result is not None
    assert resumed[0].result is not None
    assert unbroken[0].result.parameters_sha256 != resumed[0].result.parameters_sha256
    (event,) = [e for e in lines(tmp_path / "broken", "events") if e["event"][:5] == "state"]
    assert event["detail"] == "load_state_dict() of the task did not restore task['count']"


def test_on_another_number_of_processes(tmp_path: Path) -> None:
    unbroken = run("exact", tmp_path / "unbroken", 1)
    run("exact", tmp_path / "broken", 4, stop_after=3)
    run("exact", tmp_path / "broken", 1, stop_after=2)
    same_end(unbroken, run("exact", tmp_path / "broken", 2))


def test_trainer_lightning_and_back(tmp_path: Path) -> None:
    unbroken = run("ddp", tmp_path / "unbroken")
    run("ddp", tmp_path / "broken", trainer=LightningTrainer, stop_after=2)
    run("ddp", tmp_path / "broken", stop_after=2)
    same_end(unbroken, run("ddp", tmp_path / "broken", trainer=LightningTrainer))


class Faulty(Counting):
    """Rank 1 is hit by a fault in step 4; all go back, and it does not come again."""

    hit = False

    def _after_step(self, *_: Any) -> None:
        super()._after_step()
        if self.count == 4 and self.rank == 1 and not self.hit:
            self.hit = True
            self.anchor = self.anchor + 1


@pytest.mark.parametrize("every", [3, None])
def test_after_a_rollback(every: int | None, tmp_path: Path) -> None:
    unbroken = run("ddp", tmp_path / "unbroken")
    checks = {"every_steps": 2, "on_mismatch": "rollback"}
    sections = {"checks": checks, "checkpoint": {"every_steps": every}}
    faulty = run("ddp", tmp_path / "faulty", kind=Faulty, sections=sections)
    assert kept(tmp_path / "faulty")["task"] == kept(tmp_path / "unbroken")["task"]
    if every is not None:  # `train` hands out one model, which goes on from where it was
        same_end(unbroken, faulty)


class OnOneRank(Counting):
    """Rank 1 keeps something else from step 4 on."""

    def __init__(self, key: str, **args: Any) -> None:
        super().__init__(**args)
        self.key = key

    def _after_step(self, *_: Any) -> None:
        super()._after_step()
        if self.rank == 1 and self.count == 4:
            others = {"count": 9, "anchor": self.anchor + 1}
            setattr(self, self.key, others.get(self.key, {"pair": torch.zeros(2)}))


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("count", ["task state: task['count'] is 9 on rank 1 and 4 on rank 0"]),
        ("anchor", ["task state: task['anchor'] is 1.1"]),
        ("told", ["task state: task['told']['names'][0] ", "rank 0", "not on rank 1"]),
    ],
)
@pytest.mark.parametrize("every", [2, 50])
def test_a_rank_with_another_state_is_named(
    key: str, names: list[str], every: int, tmp_path: Path
) -> None:
    sections = {"checks": {"every_steps": every}, "checkpoint": {"every_steps": 4}}
    with raises("check.replicas-differ", "step 4:\n", *names, kind=ReplicaError) as caught:
        run("ddp", tmp_path, 3, kind=OnOneRank, sections=sections, key=key)
    assert isinstance(caught.value.__cause__, ReplicaError)
    assert caught.value.__cause__.culprits == [1]
    assert not list((tmp_path / "checkpoints").glob("step-*4"))


class Spoiling(Callback):
    """Changes what rank 1's task keeps once all ranks have been compared."""

    def __init__(self, task: Counting) -> None:
        self.task = task

    def on_step(self, session: Session, loss: float) -> None:
        if session.rank == 1 and session.step == 4:
            self.task.count = 9


class Spoilt(Counting):
    def callbacks(self) -> list[Any]:
        return [Spoiling(self)]


def test_nothing_that_differs_is_saved(tmp_path: Path) -> None:
    sections = {"checks": {"every_steps": 2}, "checkpoint": {"every_steps": 4}}
    with raises("check.replicas-differ", "is 9 on rank 1 and 4 on rank 0"):
        run("ddp", tmp_path, kind=Spoilt, sections=sections)
    assert not list((tmp_path / "checkpoints").glob("step-*4"))


class OnlySaves(Regression):
    def state_dict(self) -> dict[str, Any]:
        return {}


class OnlyLoads(Regression):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class Holds(Regression):
    """Remembers what a checkpoint cannot hold."""

    thing: Any = None

    def state_dict(self) -> Any:
        return {"list": [1, {"deep": self.thing}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class HoldsSet(Holds):
    thing = {1}


class HoldsSparse(Holds):
    thing = torch.eye(2).to_sparse()


class HoldsKey(Holds):
    thing = {None: 1}


class IsNoDict(Holds):
    def state_dict(self) -> Any:
        return [1]


def test_mistakes_are_told_before_training(tmp_path: Path) -> None:
    place = "task['list'][1]['deep']"
    for kind, code, words in (
        (OnlySaves, "task.incomplete-state", "state_dict() but no load_state_dict()"),
        (OnlyLoads, "task.incomplete-state", "load_state_dict() but no state_dict()"),
        (HoldsSet, "checkpoint.unsaveable-value", f"{place} is a set"),
        (HoldsSparse, "checkpoint.unsaveable-value", f"{place} is a Tensor of layout torch.sparse"),
        (HoldsKey, "checkpoint.unsaveable-key", f"{place} has a key None"),
        (IsNoDict, "task.bad-state", "returned list"),
    ):
        with raises(code, words):
            train(job("single"), tmp_path / kind.__name__, kind=kind)
        assert not (tmp_path / kind.__name__ / "metrics.jsonl").exists()


def test_a_checkpoint_without_it_and_one_with_more_are_told(tmp_path: Path) -> None:
    run("single", tmp_path, kind=Regression, stop_after=1)
    run("single", tmp_path, stop_after=1)
    run("single", tmp_path, kind=Regression, stop_after=1)
    found = [line for line in lines(tmp_path, "events") if line["event"] == "state_not_restored"]
    assert [(line["step"], line["detail"]) for line in found] == [
        (2, "it holds no state of the task, which starts with its initial state"),
        (4, "it holds state of the task, which has no state now"),
    ]


class Picky(Counting):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError("another size")


def test_a_state_that_the_task_does_not_take_is_an_error(tmp_path: Path) -> None:
    run("single", tmp_path, stop_after=1)
    picky = ("the task", "ValueError('another size')")
    with raises("checkpoint.none-loads", *picky, kind=CheckpointError):
        train(job("single", DATA), tmp_path, kind=Picky)


class Plain:
    """A task that derives from nothing."""

    def __init__(self) -> None:
        self.inner = Counting(**DATA)
        self.model, self.loss = self.inner.model, self.inner.loss
        self.train_dataset, self.optimizer = self.inner.train_dataset, self.inner.optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def test_a_class_of_its_own_has_it_too() -> None:
    adapted = as_task(Plain(), "Plain")
    assert isinstance(adapted, Task)
    adapted.load_state_dict({**adapted.state_dict(), "count": 5})
    assert adapted.state_dict()["count"] == 5


class HalfPlain(Plain):
    load_state_dict = None  # type: ignore[assignment]


def test_a_class_of_its_own_has_both(tmp_path: Path) -> None:
    class Train(NativeTrainer):
        def __init__(self, context: Any) -> None:
            object.__setattr__(context, "task", as_task(HalfPlain(), "HalfPlain"))
            super().__init__(context)

    with raises("task.incomplete-state", "state_dict() but no load_state_dict()"):
        train(job("single"), tmp_path, trainer_class=Train)
