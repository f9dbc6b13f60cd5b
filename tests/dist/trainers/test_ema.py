"""`dtrain.EMA`: once a step, the same on all ranks and after a resume, evaluated or a teacher."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dtrain
from dtrain import Loss
from dtrain.integrations.lightning.trainer import LightningTrainer
from dtrain.testing import run_ranks
from dtrain.train.checkpoint.content import read_checkpoint
from dtrain.train.loop.native import NativeTrainer
from support.errors import raises
from support.trainings import Outcome, Regression, job, lines, same_end, train

DATA = {"n": 56, "held_out": 7, "norm": True, "dropout": 0.2}
RANKS = {"single": 1, "dp": 1, "ddp": 2, "exact": 2}
DECAY = 0.8


class Listed(Regression):
    """Evaluates the averaged weights without a word in `evaluate`."""

    def callbacks(self) -> list[Any]:
        return [dtrain.EMA(decay=DECAY)]


class Kept(Regression):
    """Has an average of its own, and measures both."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        self.ema = dtrain.EMA(model, DECAY)
        return super().optimizer(model)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        found = super().evaluate(self.ema.model, batch)
        return {**found, "trained": super().evaluate(model, batch)["mse"]}


class Teacher(Regression):
    """A mean teacher: the loss has a part that comes from the average."""

    def model(self) -> nn.Module:
        model = super().model()
        self.ema = dtrain.EMA(model, DECAY, use_buffers=False)
        return model

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        value = super().loss(model, batch)
        assert isinstance(value, torch.Tensor)
        apart = model.predict(batch["x"]) - self.ema.model.predict(batch["x"])
        return value + 0.5 * apart.square().mean()


def run(
    kind: type[Regression],
    strategy: str,
    folder: Path,
    world_size: int | None = None,
    trainer: type[NativeTrainer] = NativeTrainer,
    sections: dict[str, Any] | None = None,
    **args: Any,
) -> list[Outcome]:
    train_section: dict[str, Any] = {"micro_batch_size": 4}
    if strategy == "exact":
        train_section["virtual_shards"] = 4
    given = {"eval": {"every_steps": 4}, "train": train_section, **(sections or {})}
    call = functools.partial(train, kind=kind, trainer_class=trainer)
    replicas = 2 if strategy == "dp" else 1
    spec = job(strategy, DATA | args, **given)
    return run_ranks(call, world_size or RANKS[strategy], spec, folder, replicas)


def same(ones: list[Outcome], others: list[Outcome], folders: tuple[Path, Path]) -> None:
    same_end(ones, others)
    mine, theirs = (average(folder) for folder in folders)
    assert mine["updates"] == theirs["updates"] == 10
    for name, value in mine["weights"].items():
        assert torch.equal(value, theirs["weights"][name]), name


def average(folder: Path, step: int = 10) -> Any:
    tensors, _ = read_checkpoint(folder / "checkpoints" / f"step-{step:08d}")
    return tensors["kept"]["states"]["EMA.0"]


@pytest.mark.parametrize("kind", [Listed, Kept, Teacher])
@pytest.mark.parametrize("strategy", RANKS)
def test_resumed_has_the_same_bits(strategy: str, kind: type[Regression], tmp_path: Path) -> None:
    folders = tmp_path / "unbroken", tmp_path / "broken"
    unbroken = run(kind, strategy, folders[0])
    run(kind, strategy, folders[1], stop_after=5)
    same(unbroken, run(kind, strategy, folders[1]), folders)


@pytest.mark.parametrize("kind", [Listed, Teacher])
def test_exact_has_the_same_bits_on_any_number_of_processes(
    kind: type[Regression], tmp_path: Path
) -> None:
    folders = tmp_path / "one", tmp_path / "moved"
    one = run(kind, "exact", folders[0], 1)
    run(kind, "exact", folders[1], 4, stop_after=3)
    same(one, run(kind, "exact", folders[1], 2), folders)


@pytest.mark.parametrize("kind", [Listed, Kept])
def test_trainer_lightning(kind: type[Regression], tmp_path: Path) -> None:
    folders = tmp_path / "native", tmp_path / "moved"
    native = run(kind, "ddp", folders[0])
    run(kind, "ddp", folders[1], trainer=LightningTrainer, stop_after=2)
    run(kind, "ddp", folders[1], stop_after=2)
    same(native, run(kind, "ddp", folders[1], trainer=LightningTrainer), folders)


def test_it_is_the_average_by_definition(tmp_path: Path) -> None:
    """Once a step, whatever the number of micro-batches, from the weights after step 1 on."""
    every = {"checkpoint": {"every_steps": 1, "keep": 20}}
    run(Listed, "ddp", tmp_path, sections=every)
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 11):
        tensors, _ = read_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}")
        for name, value in tensors["model"].items():
            if step == 1 or not value.is_floating_point():
                expected[name] = value.double() if value.is_floating_point() else value
            else:
                expected[name] = DECAY * expected[name] + (1 - DECAY) * value.double()
    found = average(tmp_path)["weights"]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].to(value.dtype), msg=name)
    assert int(found["norm.num_batches_tracked"]) > 9
    assert not torch.equal(found["norm.running_mean"], tensors["model"]["norm.running_mean"])


def test_evaluation_is_of_the_average(tmp_path: Path) -> None:
    kept = run(Kept, "ddp", tmp_path / "kept")[0].result
    listed = run(Listed, "ddp", tmp_path / "listed")[0].result
    plain = run(Regression, "ddp", tmp_path / "plain")[0].result
    assert kept is not None
    assert listed is not None
    assert plain is not None
    assert kept.parameters_sha256 == listed.parameters_sha256 == plain.parameters_sha256
    assert kept.metrics["mse"] == listed.metrics["mse"] != plain.metrics["mse"]
    assert kept.metrics["trained"] == plain.metrics["mse"]


def test_buffers_may_be_those_of_the_model(tmp_path: Path) -> None:
    run(Teacher, "ddp", tmp_path)
    tensors, _ = read_checkpoint(tmp_path / "checkpoints" / "step-00000010")
    found = average(tmp_path)["weights"]
    assert torch.equal(found["norm.running_mean"], tensors["model"]["norm.running_mean"])
    assert not torch.equal(found["first.weight"], tensors["model"]["first.weight"])


class Both(Kept):
    """One that the task has made evaluates, and a part of the model has another."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        self.first = dtrain.EMA(model.first, 0.5)  # type: ignore[arg-type]
        return super().optimizer(model)

    def callbacks(self) -> list[Any]:
        return [self.ema]

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        assert model is self.ema.model
        assert not model.training
        assert not any(each.requires_grad for each in model.parameters())
        return Regression.evaluate(self, model, batch)

    def predict(self, model: nn.Module, batch: Any) -> torch.Tensor:
        assert model is self.ema.model
        return batch["i"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("trainer", [NativeTrainer, LightningTrainer])
def test_several(trainer: type[NativeTrainer], tmp_path: Path) -> None:
    run(Both, "ddp", tmp_path, trainer=trainer, stop_after=4)
    run(Both, "ddp", tmp_path, trainer=trainer)
    tensors, _ = read_checkpoint(tmp_path / "checkpoints" / "step-00000010")
    states = tensors["kept"]["states"]
    assert list(states["EMA.0"]["weights"]) == ["weight", "bias"]
    assert "last.weight" in states["EMA.1"]["weights"]
    assert (tmp_path / "predictions.npz").exists()
    assert [line["event"] for line in lines(tmp_path, "events")].count("state_not_restored") == 0


def test_a_new_average_starts_with_the_weights(tmp_path: Path) -> None:
    run(Regression, "ddp", tmp_path, stop_after=3)
    run(Listed, "ddp", tmp_path)
    (event,) = [e for e in lines(tmp_path, "events") if e["event"] == "state_not_restored"]
    assert event["detail"].startswith("it holds no state of EMA.0,")
    assert average(tmp_path)["updates"] == 6


class Watching(Kept):
    """Looks at the teacher before the first step of this process."""

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        if len(self.seen) == 1:
            assert torch.equal(self.ema.model.last.weight, model.last.weight)  # type: ignore[union-attr]
        return super().loss(model, batch)


def test_one_that_is_new_begins_with_the_weights_that_were_loaded(tmp_path: Path) -> None:
    run(Regression, "ddp", tmp_path, stop_after=3)
    run(Watching, "ddp", tmp_path)


class FaultyAverage(Kept):
    """Rank 1's average is hit by a fault."""

    def _after_step(self, *_: Any) -> None:
        super()._after_step()
        if self.rank == 1 and len(self.seen) == 5:
            self.ema.model.last.weight[0, 2] += 1


def test_a_rank_with_another_average_is_named(tmp_path: Path) -> None:
    place = "task state: EMA.0['weights']['last.weight'][0, 2] is "
    with raises("check.replicas-differ", place, "rank 1 differs"):
        run(FaultyAverage, "ddp", tmp_path, 3, sections={"checks": {"every_steps": 1}}, norm=False)


def test_a_step_that_is_left_out_is_no_update(tmp_path: Path) -> None:
    checks = {"on_nan": "skip", "inject": ["kind=nan-loss,rank=1,step=5"]}
    run(Listed, "ddp", tmp_path, sections={"checks": checks})
    assert average(tmp_path)["updates"] == 9


class Two(Regression):
    def callbacks(self) -> list[Any]:
        return [dtrain.EMA(), dtrain.EMA(decay=0.9)]


class OfAPart(Regression):
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        self.ema = dtrain.EMA(model.first)  # type: ignore[arg-type]
        return super().optimizer(model)

    def callbacks(self) -> list[Any]:
        return [self.ema]


class OfAnother(Regression):
    def model(self) -> nn.Module:
        self.ema = dtrain.EMA(nn.Linear(2, 2))
        return super().model()


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: Any) -> nn.Module:
        return nn.Linear(1, 1, bias=False)


class OfUncopied(Regression):
    def model(self) -> nn.Module:
        model = super().model()
        model.extra = Uncopied(2, 2)
        self.ema = dtrain.EMA(model)
        return model


class DecayFirst(Regression):
    def callbacks(self) -> list[Any]:
        return [dtrain.EMA(0.99)]  # type: ignore[arg-type]


class DecayTooLarge(Regression):
    def callbacks(self) -> list[Any]:
        return [dtrain.EMA(decay=99.9)]


def test_mistakes_are_reported(tmp_path: Path) -> None:
    for kind, code, *names in (
        (Two, "ema.several", "2 of dtrain.EMA"),
        (OfAPart, "ema.part-of-model", "dtrain.EMA"),
        (OfAnother, "ema.of-other-model", " ema ", "Linear"),
        (OfUncopied, "ema.cannot-copy", "copy.deepcopy", " Net"),
        (DecayFirst, "ema.bad-argument", "dtrain.EMA(0.99)"),
        (DecayTooLarge, "ema.bad-argument", "decay", "99.9"),
    ):
        with raises(code, *names):
            train(job("single"), tmp_path / kind.__name__, kind=kind)
    with raises("ema.no-model-yet"):
        _ = dtrain.EMA().model


@pytest.mark.parametrize("kind", [Listed, Kept])
def test_fsdp_is_refused(kind: type[Regression], tmp_path: Path) -> None:
    with raises("ema.needs-whole-weights", "'fsdp'"):
        run(kind, "fsdp", tmp_path, 2)
