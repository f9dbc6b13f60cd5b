"""Leaving, coming back, and being killed: the training that follows is the unbroken one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dtrain import Loss
from dtrain.errors import CheckpointError
from dtrain.testing import run_ranks
from support.errors import raises
from support.trainings import Crash, Numbers, Outcome, Regression, job, lines, steps_of, train

STORMY = {"n": 56, "dropout": 0.2, "noise": 0.5, "norm": True, "held_out": 7}
"""Everything that draws random numbers or keeps statistics."""


def run(world_size: int, folder: Path, args: dict[str, Any], **sections: Any) -> list[Outcome]:
    strategy = "ddp" if world_size > 1 else "single"
    return run_ranks(train, world_size, job(strategy, args, **sections), folder)


def identical(ones: list[Outcome], others: list[Outcome]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.random == other.random
        assert one.result is not None
        assert other.result is not None
        assert one.result.parameters_sha256 == other.result.parameters_sha256
        assert one.result.metrics == other.result.metrics
        for name, value in one.parameters.items():
            np.testing.assert_array_equal(other.parameters[name], value, err_msg=name)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_asked_to_leave_and_resumed_is_bitwise_the_unbroken_run(
    world_size: int, workers: int, tmp_path: Path
) -> None:
    # 56 / 16: four steps an epoch, so step 6 is in the middle of the second
    sections = {"data": {"workers": workers}, "eval": {"every_steps": 3}}
    unbroken = run(world_size, tmp_path / "unbroken", STORMY, **sections)
    leaving = {**STORMY, "stop_after": 5, "stop_rank": world_size - 1}
    first = run(world_size, tmp_path / "broken", leaving, **sections)
    assert first[0].result is not None
    # the flag is raised after step 5, so step 6 brings it to everyone
    assert (first[0].result.stopped, first[0].result.steps) == ("test", 6)
    second = run(world_size, tmp_path / "broken", STORMY, **sections)
    identical(unbroken, second)
    assert steps_of(first) + steps_of(second) == steps_of(unbroken)
    stopped, resumed = (
        [line for line in lines(tmp_path / "broken", "events") if line["event"] == event]
        for event in ("stopped", "resumed")
    )
    assert (stopped[0]["reason"], stopped[0]["rank"]) == ("test", world_size - 1)
    assert (resumed[0]["step"], resumed[0]["epoch"], resumed[0]["consumed"]) == (6, 1, 32)


class Interrupted(Regression):
    """Is asked to leave between two micro-batches of a step."""

    def loss(self, model: nn.Module, batch: Any) -> Loss | Any:
        if len(self.seen) == 5 and len(self.seen[-1]) == 4 and self.rank == 1:
            self.stop.request("in a step")
        return super().loss(model, batch)


def test_a_flag_raised_in_the_middle_of_accumulation(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"train": {"micro_batch_size": 2}}
    unbroken = run(2, tmp_path / "unbroken", STORMY, **sections)
    spec = job("ddp", STORMY, **sections)
    first = run_ranks(train, 2, spec, tmp_path / "left", kind=Interrupted)
    # raised in step 5, which is finished; step 6 brings it to everyone
    assert [(o.result.stopped, o.result.steps) for o in first if o.result] == [("in a step", 6)] * 2
    second = run(2, tmp_path / "left", STORMY, **sections)
    identical(unbroken, second)
    assert steps_of(first) + steps_of(second) == steps_of(unbroken)


def test_another_number_of_loader_workers_is_bitwise_the_same(tmp_path: Path) -> None:
    unbroken = run(2, tmp_path / "unbroken", STORMY)
    seen = []
    for workers, stop in ((2, 1), (0, 3), (1, None)):
        args = {**STORMY, "stop_after": stop}
        outcomes = run(2, tmp_path / "moved", args, data={"workers": workers})
        seen += steps_of(outcomes)
    assert seen == steps_of(unbroken)
    identical(unbroken, outcomes)


class Versioned(Regression):
    """Its data set tells its version."""

    def __init__(self, version: str, **args: Any) -> None:
        super().__init__(**args)
        self.version = version

    def train_dataset(self) -> Numbers:
        dataset = super().train_dataset()
        dataset.fingerprint = self.version  # type: ignore[attr-defined]
        return dataset


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"version": "sha-two"}, "fingerprint was sha-one, is sha-two"),
        ({"n": 51}, "num_samples was 50, is 51"),
    ],
)
def test_other_data_is_refused(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    args = {"version": "sha-one", "n": 50}
    run_ranks(train, 2, job("ddp", {**args, "stop_after": 1}), tmp_path, kind=Versioned)
    with raises("checkpoint.none-loads", words, kind=CheckpointError):
        run_ranks(train, 2, job("ddp", args | changed), tmp_path, kind=Versioned)
    run_ranks(train, 3, job("ddp", args), tmp_path, kind=Versioned)  # it is still there


class InMemory(Regression):
    """A TensorDataset, whose fingerprint nobody has to write."""

    def __init__(self, shift: float = 0.0, **args: Any) -> None:
        super().__init__(**args)
        self.shift = shift

    def train_dataset(self) -> Any:
        numbers = super().train_dataset()
        numbers.x[17, 3] += self.shift
        return torch.utils.data.TensorDataset(numbers.x, numbers.y)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        loss: torch.Tensor = (model.predict(x) - y).square().mean()
        return loss


def test_another_number_in_a_tensor_dataset_is_refused(tmp_path: Path) -> None:
    run_ranks(train, 2, job("ddp", {"stop_after": 1}), tmp_path, kind=InMemory)
    names = ("step-00000002: ", "fingerprint was ")
    with raises("checkpoint.none-loads", *names, kind=CheckpointError) as caught:
        run_ranks(train, 2, job("ddp", {"shift": 0.5}), tmp_path, kind=InMemory)
    assert re.search(r"fingerprint was \w{32}, is \w{32}", str(caught.value))


def test_killed_and_resumed_is_bitwise_the_unbroken_run(tmp_path: Path) -> None:
    # 1.6 MB of gradients, so that DDP has two buckets: their layout must not depend on the start
    args = {**STORMY, "width": 50_000, "optimizer": "adamw"}
    sections = {"train": {"micro_batch_size": 2}, "checkpoint": {"every_steps": 2}}
    unbroken = run(4, tmp_path / "unbroken", args, **sections)
    killed = run(4, tmp_path / "killed", {**args, "crash_after": 6}, **sections)
    assert [outcome.result for outcome in killed] == [None] * 4
    again = run(4, tmp_path / "killed", args, **sections)
    identical(unbroken, again)
    assert steps_of(again) == steps_of(unbroken)[4:]


def test_a_new_process_repeats_the_run_bitwise(tmp_path: Path) -> None:
    identical(run(2, tmp_path / "one", STORMY), run(2, tmp_path / "two", STORMY))


def test_resumed_on_another_world_size_consumes_the_same_lists(tmp_path: Path) -> None:
    args = {"dtype": "float64", "noise": 0.5}
    (unbroken,) = run(1, tmp_path / "unbroken", args)
    seen = []
    for world_size, stop in ((4, 3), (2, 3), (3, None)):
        outcomes = run(world_size, tmp_path / "moved", {**args, "stop_after": stop})
        seen += steps_of(outcomes)
    assert seen == unbroken.seen
    for name, value in unbroken.parameters.items():
        np.testing.assert_allclose(outcomes[0].parameters[name], value, rtol=0, atol=1e-12)


def test_augmentation_depends_on_the_sample_alone(tmp_path: Path) -> None:
    pixels = []
    for world_size, workers in ((1, 0), (3, 0), (2, 2)):
        folder = tmp_path / f"{world_size}-{workers}"
        sections = {"train": {"steps": 4}, "data": {"workers": workers}}
        outcomes = run(world_size, folder, {"noise": 0.5}, **sections)
        pixels.append({i: x for outcome in outcomes for i, x in outcome.inputs.items()})
    assert pixels[0] == pixels[1] == pixels[2]
    assert len(set(pixels[0].values())) == 50


def test_a_flag_raised_during_evaluation(tmp_path: Path) -> None:
    args = {"held_out": 9, "dtype": "float64"}
    sections = {"eval": {"every_steps": 4, "batch_size": 1}}
    unbroken = run(3, tmp_path / "unbroken", args, **sections)
    leaving = {**args, "stop_in_evaluation": True, "stop_rank": 1}
    first = run(3, tmp_path / "left", leaving, **sections)
    assert [outcome.result.steps for outcome in first if outcome.result] == [4, 4, 4]
    assert len(first[1].evaluated) == 1  # nobody finishes a share that will not count
    second = run(3, tmp_path / "left", args, **sections)
    identical(unbroken, second)
    evaluations = [
        [line for line in lines(tmp_path / name, "metrics") if line["split"] == "eval"]
        for name in ("unbroken", "left")
    ]
    for one, other in zip(*evaluations, strict=True):
        assert {**one, "time": 0} == {**other, "time": 0}


class KilledInEvaluation(Regression):
    """Does not survive its second batch of evaluation."""

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        if self.evaluated:
            raise Crash
        return super().evaluate(model, batch)


def test_killed_during_evaluation(tmp_path: Path) -> None:
    sections = {"eval": {"every_steps": 4, "batch_size": 1}, "checkpoint": {"every_steps": 3}}
    unbroken = run(2, tmp_path / "unbroken", STORMY, **sections)
    spec = job("ddp", STORMY, **sections)
    killed = run_ranks(train, 2, spec, tmp_path / "killed", kind=KilledInEvaluation)
    assert [(o.result, len(o.seen)) for o in killed] == [(None, 4)] * 2
    again = run(2, tmp_path / "killed", STORMY, **sections)
    identical(unbroken, again)
    assert steps_of(again) == steps_of(unbroken)[3:]


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    args = {"held_out": 7}
    once = run(2, tmp_path, args)
    again = run(2, tmp_path, args)
    assert steps_of(again) == []
    assert [o.result.metrics for o in again if o.result] == [
        o.result.metrics for o in once if o.result
    ]
    assert again[0].evaluated == []


def test_checkpoints_by_time_are_saved_by_all_at_one_step(tmp_path: Path) -> None:
    run(2, tmp_path, {}, checkpoint={"every": "0.000001s", "keep": 3})
    saved = [line for line in lines(tmp_path, "events") if line["event"] == "checkpoint_saved"]
    assert [line["step"] for line in saved] == list(range(1, 11))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000008",
        "step-00000009",
        "step-00000010",
    ]


def test_early_stopping_is_agreed_and_survives_a_resume(tmp_path: Path) -> None:
    values = [5.0, 4.0, 4.5, 4.0, 3.0]
    args = {"held_out": 5, "evaluations": values}
    stopping = {"early_stopping": {"patience": 2}, "steps": 40}
    outcomes = run(3, tmp_path, args, train=stopping, eval={"every_steps": 2})
    for outcome in outcomes:
        assert outcome.result is not None
        assert (outcome.result.steps, outcome.result.stopped_early) == (8, True)
        assert outcome.result.stopped is None
        assert outcome.result.metrics == {"loss": 4.0}
    again = run(3, tmp_path, args, train=stopping, eval={"every_steps": 2})
    assert again[0].result is not None
    assert (again[0].result.steps, again[0].seen) == (8, [])
