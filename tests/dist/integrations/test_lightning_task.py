"""A dtrain task under Lightning's Trainer is the training of `native`, and either goes on."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl

from dtrain.integrations.lightning.trainer import LightningTrainer
from dtrain.testing import run_ranks
from dtrain.train.loop.native import NativeTrainer
from support.trainings import Outcome, Regression, job, lines, losses, steps_of, train

under_lightning = functools.partial(train, trainer_class=LightningTrainer)

EVALUATED = {"eval": {"every_steps": 4}, "args": {"n": 50, "held_out": 21, "weighted": True}}


def same(a: Outcome, b: Outcome) -> None:
    for name, value in a.parameters.items():
        np.testing.assert_array_equal(value, b.parameters[name])


def test_one_process(tmp_path: Path) -> None:
    native = train(job("single", **EVALUATED), tmp_path / "native")
    other = under_lightning(job("single", **EVALUATED), tmp_path / "lightning")
    same(native, other)
    assert native.seen == other.seen
    assert native.result is not None
    assert other.result is not None
    assert native.result.metrics == other.result.metrics
    assert losses(tmp_path / "native") == losses(tmp_path / "lightning")
    assert native.random == other.random


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world_size", "strategy"), [(2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp"), (2, "exact")]
)
def test_on_several_ranks_bit_for_bit(world_size: int, strategy: str, tmp_path: Path) -> None:
    spec = job(strategy, **EVALUATED)
    native = train(spec, tmp_path / "native")
    other = under_lightning(spec, tmp_path / "lightning")
    same(native, other)
    assert native.seen == other.seen
    assert native.result is not None
    assert other.result is not None
    assert native.result.metrics == other.result.metrics


@pytest.mark.parametrize("first", [NativeTrainer, LightningTrainer])
def test_a_run_changes_its_trainer_in_the_middle_of_an_epoch(
    first: type[NativeTrainer], tmp_path: Path
) -> None:
    second = LightningTrainer if first is NativeTrainer else NativeTrainer
    whole = run_ranks(train, 2, job("ddp", **EVALUATED), tmp_path / "whole")
    stopping: dict[str, Any] = {**EVALUATED, "args": {**EVALUATED["args"], "stop_after": 5}}
    begin = functools.partial(train, trainer_class=first)
    go_on = functools.partial(train, trainer_class=second)
    head = run_ranks(begin, 2, job("ddp", **stopping), tmp_path / "changed")
    tail = run_ranks(go_on, 2, job("ddp", **EVALUATED), tmp_path / "changed")
    assert [len(steps_of(part)) for part in (head, tail)] == [6, 4]
    assert steps_of(head) + steps_of(tail) == steps_of(whole)
    same(whole[0], tail[0])


class Watch(pl.Callback):
    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.stop_at: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.heard.append(("start", trainer.global_step, trainer.current_epoch))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.heard.append(("step", trainer.global_step, trainer.current_epoch, i))
        if trainer.global_step == self.stop_at:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.heard.append(("validation", trainer.global_step, metrics))


class Watched(Regression):
    """Under a class attribute, since the trainer makes nothing of it."""

    watch = Watch()

    def callbacks(self) -> list[Any]:
        return [Watched.watch]


def test_lightnings_callbacks_see_the_counters_go_on(tmp_path: Path) -> None:
    Watched.watch = Watch()
    stopping = job("single", **{**EVALUATED, "args": {**EVALUATED["args"], "stop_after": 5}})
    under_lightning(stopping, tmp_path, kind=Watched)
    first, Watched.watch = Watched.watch, Watch()
    under_lightning(job("single", **EVALUATED), tmp_path, kind=Watched)
    both = [*first.heard, *Watched.watch.heard]
    # four steps an epoch of 50 samples
    assert [each[1:] for each in both if each[0] == "step"] == [
        (step, (step - 1) // 4, (step - 1) % 4) for step in range(1, 11)
    ]
    assert [each for each in both if each[0] == "start"] == [("start", 0, 0), ("start", 6, 1)]
    measured = {line["step"]: line["mse"] for line in lines(tmp_path, "metrics")
                if line["split"] == "eval"}  # fmt: skip
    heard = {each[1]: each[2]["mse"] for each in both if each[0] == "validation"}
    assert list(heard) == [4, 8, 10]
    assert heard == pytest.approx(measured)


def test_a_callback_of_lightnings_ends_training_as_complete(tmp_path: Path) -> None:
    Watched.watch = Watch()
    Watched.watch.stop_at = 6
    result = under_lightning(job("single", **EVALUATED), tmp_path, kind=Watched).result
    assert result is not None
    assert (result.steps, result.stopped_early, result.stopped) == (6, True, None)
    assert (tmp_path / "checkpoints" / "step-00000006").is_dir()
    finished = [e for e in lines(tmp_path, "events") if e["event"] == "finished"]
    assert json.loads(json.dumps(finished))[0]["stopped_early"] is True
