"""Callbacks: told alike under both trainers, one that asks is enough, state survives a resume."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from dtrain import Callback
from dtrain.callback import LRMonitor, Session
from dtrain.errors import UsageError
from dtrain.integrations.lightning.trainer import LightningTrainer
from dtrain.run import failures
from dtrain.testing import run_ranks
from dtrain.train.checkpoint.content import read_checkpoint
from dtrain.train.loop.native import NativeTrainer
from support.errors import raises
from support.trainings import Regression, job, lines, losses, train

SMALL = {"args": {"n": 50, "held_out": 5}, "eval": {"every_steps": 4}}


class Diary(Callback):
    """Writes down what it hears, also over a resume."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_start(self, session: Session) -> None:
        self.heard.append(["start", session.step])

    def on_step(self, session: Session, loss: float) -> None:
        self.heard.append(["step", session.step, loss])

    def on_epoch(self, session: Session) -> None:
        self.heard.append(["epoch", session.epoch])

    def on_eval(self, session: Session, metrics: Mapping[str, float]) -> None:
        self.heard.append(["eval", session.step, sorted(metrics)])

    def on_checkpoint(self, session: Session, folder: Path) -> None:
        self.heard.append(["checkpoint", folder.name])

    def on_end(self, session: Session) -> None:
        if session.rank == 0:
            (session.run_dir / "diary.json").write_text(json.dumps(self.heard))

    def state_dict(self) -> dict[str, Any]:
        return {"heard": self.heard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heard = list(state["heard"])


class Kept(Regression):
    def callbacks(self) -> list[Any]:
        return [Diary(), LRMonitor()]


@pytest.mark.parametrize("trainer_class", [NativeTrainer, LightningTrainer])
def test_told_of_everything_in_order(trainer_class: type[NativeTrainer], tmp_path: Path) -> None:
    kept = functools.partial(train, kind=Kept, trainer_class=trainer_class)
    stopping = {**SMALL, "args": {**SMALL["args"], "stop_after": 5}}
    kept(job("single", **stopping), tmp_path)
    kept(job("single", **SMALL), tmp_path)
    heard = json.loads((tmp_path / "diary.json").read_text())
    loss = {step: ["step", step, each] for step, each in enumerate(losses(tmp_path), 1)}
    evaluation = ["ids", "mse"]
    assert heard == [
        ["start", 0], loss[1], loss[2], loss[3], loss[4], ["epoch", 1], ["eval", 4, evaluation],
        loss[5], loss[6],
        ["start", 6], loss[7], loss[8], ["epoch", 2], ["eval", 8, evaluation],
        loss[9], loss[10], ["eval", 10, evaluation], ["checkpoint", "step-00000010"],
    ]  # fmt: skip
    trained = [line for line in lines(tmp_path, "metrics") if line["split"] == "train"]
    assert [line["lr/0"] for line in trained[1:]] != [trained[0]["lr/0"]] * 9


class Asking(Callback):
    def __init__(self, rank: int, at: int, evaluation: bool) -> None:
        self.rank, self.at, self.evaluation = rank, at, evaluation

    def on_step(self, session: Session, loss: float) -> None:
        if not self.evaluation and session.rank == self.rank and session.step == self.at:
            session.stop("seen enough")

    def on_eval(self, session: Session, metrics: Mapping[str, float]) -> None:
        if self.evaluation and session.rank == self.rank and session.step == self.at:
            session.stop("seen enough")


class Asked(Regression):
    def callbacks(self) -> list[Any]:
        return [Asking(1, 4 if self.scale == 2.0 else 5, self.scale == 2.0)]


@pytest.mark.parametrize(("scale", "steps"), [(1.0, 6), (2.0, 4)])
def test_one_rank_that_asks_ends_training_on_all(scale: float, steps: int, tmp_path: Path) -> None:
    spec = job("ddp", **{**SMALL, "args": {**SMALL["args"], "scale": scale}})
    for outcome in run_ranks(functools.partial(train, kind=Asked), 2, spec, tmp_path):
        assert outcome.result is not None
        assert (outcome.result.steps, outcome.result.stopped_early) == (steps, True)
        assert outcome.result.stopped is None


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    values = [5.0, 3.0, 4.0, 3.5, 6.0]  # after 2, 4, … steps
    spec = job(
        "ddp",
        {"held_out": 5, "evaluations": values},
        eval={"every_steps": 2},
        checkpoint={"every_steps": 2, "keep": 1, "best": {"metric": "loss"}},
    )
    run_ranks(train, 2, spec, tmp_path)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["best", "step-00000010"]
    _, progress = read_checkpoint(tmp_path / "checkpoints" / "best")
    assert (progress["step"], progress["metrics"]) == (4, {"loss": 3.0})


@pytest.mark.parametrize("trainer", [NativeTrainer, LightningTrainer])
def test_the_best_three_stay_also_over_a_resume(
    tmp_path: Path, trainer: type[NativeTrainer]
) -> None:
    def spec(**args: Any) -> Any:
        return job(
            "single",
            {"held_out": 5, "evaluations": [5.0, 3.0, 4.0, 3.5, 6.0], **args},
            eval={"every_steps": 2},
            checkpoint={"every_steps": 2, "keep": 1, "best": {"metric": "loss", "keep": 3}},
        )

    train(spec(stop_after=5), tmp_path, trainer_class=trainer)
    train(spec(evaluations=[3.5, 6.0, 4.0]), tmp_path, trainer_class=trainer)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["best", *(f"step-{step:08d}" for step in (4, 6, 8, 10))]
    _, progress = read_checkpoint(tmp_path / "checkpoints" / "best")
    assert progress["step"] == 4


def test_the_best_of_all_attempts_is_kept(tmp_path: Path) -> None:
    def spec(**args: Any) -> Any:
        return job(
            "single",
            {"held_out": 5, **args},
            eval={"every_steps": 2},
            checkpoint={"best": {"metric": "loss", "mode": "max"}},
        )

    train(spec(evaluations=[1.0, 9.0, 9.0], stop_after=5), tmp_path)
    train(spec(evaluations=[2.0, 3.0, 4.0, 5.0, 6.0]), tmp_path)
    _, progress = read_checkpoint(tmp_path / "checkpoints" / "best")
    assert progress["step"] == 4


class Wrong(Regression):
    def callbacks(self) -> list[Any]:
        return [print]


class NoList(Regression):
    def callbacks(self) -> Any:
        return Callback()


class LogsText(Regression):
    def callbacks(self) -> list[Any]:
        told = Callback()
        told.on_step = lambda session, loss: session.log("text", "no number")  # type: ignore
        return [told]


def test_mistakes_are_told(tmp_path: Path) -> None:
    with raises("task.bad-callbacks", "a builtin_function_or_method"):
        train(job("single"), tmp_path / "a", kind=Wrong)
    with raises("task.bad-callbacks", "a Callback, not a list"):
        train(job("single"), tmp_path / "d", kind=NoList)
    with raises("task.log-not-a-number", "session.log('text', 'no number')"):
        train(job("single"), tmp_path / "e", kind=LogsText)
    foreign = "a builtin_function_or_method of builtins, not one of dtrain or pytorch_light"
    with raises("task.bad-callbacks", foreign):
        train(job("single"), tmp_path / "f", kind=Wrong, trainer_class=LightningTrainer)
    best = {"checkpoint": {"best": {"metric": "accuracy"}}}
    with raises("eval.no-data", "checkpoint.best", kind=UsageError):
        train(job("single", **best), tmp_path / "b")


class Raises(Callback):
    """Fails in one of its methods."""

    def __init__(self, method: str) -> None:
        def fail(*given: Any) -> Any:
            raise KeyError("momentum")

        setattr(self, method, fail)


class HasRaising(Regression):
    method = "on_step"

    def callbacks(self) -> list[Any]:
        return [LRMonitor(), Raises(self.method)]


@pytest.mark.parametrize("method", ["on_start", "on_step", "on_checkpoint", "state_dict"])
def test_an_error_names_callback_and_method(method: str, tmp_path: Path) -> None:
    kind = type("One", (HasRaising,), {"method": method})
    with pytest.raises(KeyError) as caught:
        train(job("single", {"n": 20}), tmp_path, kind=kind)
    made = failures.of_exception(caught.value, rank=0, node_rank=0, restart=0, log="")
    assert made.message == f"'momentum'\nin {method}() of callback Raises"
    assert [frame.function for frame in made.frames][-1] == "fail"


class LightningRaises(pl.Callback):
    def on_train_batch_end(self, *given: Any) -> None:
        self.fail()

    def fail(self) -> None:
        raise KeyError("momentum")


class HasLightning(Regression):
    def callbacks(self) -> list[Any]:
        return [LightningRaises()]


def test_an_error_names_lightnings_callback(tmp_path: Path) -> None:
    with pytest.raises(KeyError) as caught:
        train(job("single"), tmp_path, kind=HasLightning, trainer_class=LightningTrainer)
    assert caught.value.__notes__ == ["in on_train_batch_end() of callback LightningRaises"]
