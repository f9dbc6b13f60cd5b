"""`fsdp`: the same training with the parameters cut over the processes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtrain.testing import run_ranks
from dtrain.train.strategies.fsdp_wrapping import check_shardable, units
from support.errors import raises
from support.trainings import Outcome, Regression, job, losses, steps_of, train


class Block(nn.Module):
    """A residual block; one may be skipped for some inputs."""

    def __init__(self, width: int, skips: str) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.drop = nn.Dropout(0.0)
        self.skips = skips

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.skips == "always" or (self.skips == "sometimes" and bool(x[0, 0] > 0.3)):
            return x
        return x + torch.tanh(self.layer(self.drop(x)))


class Deep(nn.Module):
    """Embedding, blocks of unequal kinds in a list, a head; called by a method of its own."""

    def __init__(self, width: int, norm: bool, spare: str, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        kinds = ["", spare and {"never": "always"}.get(spare, spare), ""]
        self.blocks = nn.ModuleList([Block(width, kind) for kind in kinds])
        for block in self.blocks:
            block.drop.p = dropout
        self.last = nn.Linear(width, 1)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.tanh(self.first(x)))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class DeepRegression(Regression):
    """The same data and loss over `Deep`."""

    def model(self) -> nn.Module:
        dropout, norm, width, spare = self.net
        return Deep(width, norm, spare, dropout).to(self.dtype)


def run(
    world_size: int, folder: Path, args: dict[str, Any], strategy: str = "fsdp", **sections: Any
) -> list[Outcome]:
    """Train in `world_size` processes."""
    spec = job(strategy, {"width": 7, **args}, **sections)
    return run_ranks(train, world_size, spec, folder, kind=DeepRegression)


def same(one: Outcome, other: Outcome, rtol: float) -> None:
    for name, value in one.parameters.items():
        np.testing.assert_allclose(
            other.parameters[name], value, rtol=0, atol=rtol * np.abs(value).max(), err_msg=name
        )


def trained(outcomes: list[Outcome]) -> list[list[int]]:
    """The samples of each step; fillers run samples of the same step again."""
    return [list(dict.fromkeys(step)) for step in steps_of(outcomes)]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("steps", "rtol"), [(1, 2e-6), (50, 1e-5)])
def test_it_is_the_training_of_one_process(
    world_size: int, steps: int, rtol: float, tmp_path: Path
) -> None:
    args = {"weighted": True, "optimizer": "plain"}
    spec = {"train": {"steps": steps, "clip_grad_norm": 0.3}}
    (single,) = run(1, tmp_path / "single", args, "single", **spec)
    outcomes = run(world_size, tmp_path / "fsdp", args, **spec)
    for outcome in outcomes:
        same(single, outcome, rtol)


@pytest.mark.parametrize("world_size", [2, 4])
def test_unequal_micro_batches_and_evaluation_in_between(world_size: int, tmp_path: Path) -> None:
    # 50 samples in batches of 18, by twos: on four ranks 3, 2, 3, 2 micro-batches in a step, and
    # 2 each in an epoch's last; two batches to evaluate on one rank, one on the others
    args = {"dtype": "float64", "weighted": True, "held_out": 5, "optimizer": "sgd"}
    train_ = {"steps": 10, "global_batch_size": 18, "micro_batch_size": 2, "clip_grad_norm": 0.3}
    spec = {"train": train_, "eval": {"every_steps": 4, "batch_size": 1}}
    (single,) = run(1, tmp_path / "single", args, "single", **spec)
    outcomes = run(world_size, tmp_path / "fsdp", args, **spec)
    assert trained(outcomes) == single.seen
    np.testing.assert_allclose(losses(tmp_path / "fsdp"), losses(tmp_path / "single"), rtol=1e-10)
    assert single.result is not None
    for outcome in outcomes:
        same(single, outcome, 1e-10)
        assert outcome.result is not None
        assert outcome.result.metrics == pytest.approx(single.result.metrics, rel=1e-10)


def test_ranks_without_samples_in_training_and_evaluation(tmp_path: Path) -> None:
    # 7 samples by threes: steps of 3, 3, 1 on 4 ranks; two held out, so two ranks evaluate nothing
    args = {"n": 7, "held_out": 2, "norm": False, "optimizer": "adamw", "weighted": True}
    spec = {"train": {"steps": 9, "global_batch_size": 3}, "eval": {"every_steps": 2}}
    (single,) = run(1, tmp_path / "single", args, "single", **spec)
    outcomes = run(4, tmp_path / "fsdp", args, **spec)
    assert trained(outcomes) == single.seen
    for outcome in outcomes:
        same(single, outcome, 1e-5)


@pytest.mark.parametrize("spare", ["never", "sometimes"])
def test_blocks_without_a_gradient(spare: str, tmp_path: Path) -> None:
    # AdamW decays what has a gradient of zero, and leaves alone what has none
    args = {"spare": spare, "optimizer": "adamw", "dtype": "float64"}
    (ddp, *_) = run(4, tmp_path / "ddp", args, "ddp")
    for outcome in run(4, tmp_path / "fsdp", args):
        same(ddp, outcome, 1e-10)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_as_under_ddp(precision: str, tmp_path: Path) -> None:
    # fp16 overflows in the first steps: every rank must skip them
    args = {"n": 48, "norm": True, "scale": 3e4 if precision == "fp16" else 1.0}
    spec = {"train": {"precision": precision, "clip_grad_norm": 1.0}}
    (ddp, _) = run(2, tmp_path / "ddp", args, "ddp", **spec)
    for outcome in run(2, tmp_path / "fsdp", args, **spec):
        same(ddp, outcome, 1e-6)
    np.testing.assert_allclose(losses(tmp_path / "fsdp"), losses(tmp_path / "ddp"), rtol=1e-6)


@pytest.mark.parametrize(
    ("first", "ranks_before", "second", "ranks_after"),
    [
        ("fsdp", 4, "single", 1),
        ("single", 1, "fsdp", 2),
        ("fsdp", 2, "fsdp", 4),
        ("ddp", 2, "fsdp", 4),
    ],
)
def test_a_checkpoint_moves_between_strategies_and_world_sizes(
    first: str, ranks_before: int, second: str, ranks_after: int, tmp_path: Path
) -> None:
    args = {"dtype": "float64", "optimizer": "adamw"}
    spec = {"checkpoint": {"every_steps": 3}, "train": {"clip_grad_norm": 0.3}}
    (unbroken,) = run(1, tmp_path / "unbroken", args, "single", **spec)
    run(ranks_before, tmp_path / "broken", {**args, "crash_after": 7}, first, **spec)
    resumed = run(ranks_after, tmp_path / "broken", args, second, **spec)
    assert len(resumed[0].seen) == 4  # from step 6 on
    for outcome in resumed:
        same(unbroken, outcome, 1e-10)


def test_killed_and_resumed_is_bitwise_the_unbroken_run(tmp_path: Path) -> None:
    args = {"n": 48, "dropout": 0.3, "noise": 0.2, "norm": True, "optimizer": "adamw"}
    spec = {"checkpoint": {"every_steps": 3}, "eval": {"every_steps": 2}}
    unbroken = run(2, tmp_path / "unbroken", args, **spec)
    run(2, tmp_path / "broken", {**args, "crash_after": 7}, **spec)
    resumed = run(2, tmp_path / "broken", args, **spec)
    for one, other in zip(unbroken, resumed, strict=True):
        assert one.random == other.random
        assert one.result is not None
        assert other.result is not None
        assert one.result.parameters_sha256 == other.result.parameters_sha256
        for name, value in one.parameters.items():
            np.testing.assert_array_equal(other.parameters[name], value, err_msg=name)


@pytest.mark.ranks(2)
def test_the_digest_is_that_of_the_whole_parameters(tmp_path: Path, rank: int) -> None:
    """Zero learning rate: the training is bitwise that of `single`."""
    digests = {}
    for strategy in ("fsdp", "single"):
        spec = job(strategy, {"width": 7}, train={"steps": 1})
        outcome = train(spec, tmp_path / f"{strategy}-{rank}", kind=Frozen)
        assert outcome.result is not None
        digests[strategy] = outcome.result.parameters_sha256
    assert digests["fsdp"] == digests["single"]


class Frozen(DeepRegression):
    """Learns nothing."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.0)


@pytest.mark.ranks(2)
def test_a_gradient_that_overflows_on_one_rank_is_skipped_by_all(rank: int) -> None:
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    before = model.weight.detach().to_local().clone()
    if rank == 1:
        model.weight.grad.to_local()[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert torch.equal(model.weight.detach().to_local(), before)


def test_blocks_are_what_lists_and_sequences_hold() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    deep = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.Identity(), inner])
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "deep": deep, "head": nn.Linear(2, 4)})
    assert units(model) == [deep[0][0], inner]
    assert units(inner) == [inner[0], inner[2]]
    assert units(nn.Linear(2, 2)) == []
    again = nn.ModuleList([inner, inner])  # one block, called twice
    assert units(again) == [inner]
    deep[0][0].weight = model["head"].weight
    assert units(model) == [inner]


@pytest.mark.parametrize("kind", ["scalar", "types"])
def test_what_cannot_be_cut_is_named(kind: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    check_shardable(model, units(model))
    if kind == "scalar":
        model[1].gain = nn.Parameter(torch.tensor(1.5))
        code, words = "strategy.scalar-parameter", ("1.gain", "torch.tensor([1.5])")
    else:
        model[1].bias = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        code, words = "strategy.mixed-types", ("1.weight is float32", "1.bias is float64")
    with raises(code, *words):
        check_shardable(model, units(model))


class Tied(DeepRegression):
    """Two blocks with one weight, and a block that is called twice."""

    def model(self) -> nn.Module:
        model = Deep(7, False, "", 0.0).to(self.dtype)
        model.blocks[0].layer.weight = model.blocks[1].layer.weight
        model.blocks.append(model.blocks[2])
        return model


def test_tied_weights_and_blocks_called_twice(tmp_path: Path) -> None:
    args = {"dtype": "float64", "optimizer": "adamw"}
    runs = [
        run_ranks(train, world_size, job(strategy, args), tmp_path / strategy, kind=Tied)
        for strategy, world_size in (("single", 1), ("fsdp", 2))
    ]
    same(runs[0][0], runs[1][0], 1e-10)


class Divergence(nn.Module):
    """A chain of two blocks, which rank 1 turns round in a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.last = nn.Linear(6, 1)
        self.step, self.forwards = step, 0

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        turned = self.forwards == self.step and os.environ["RANK"] == "1"
        for block in reversed(self.blocks) if turned else self.blocks:
            x = block(x)
        return self.last(x)


class PartingRegression(Regression):
    """The same data and loss over `Divergence`."""

    def model(self) -> nn.Module:
        return Divergence(step=self.net[2]).to(self.dtype)


def test_ranks_that_part_later_are_reported_with_the_block(tmp_path: Path) -> None:
    config = job("fsdp", {"width": 3}, checks={"every_steps": 1})
    with raises("check.replicas-differ", "step 3:") as caught:
        run_ranks(train, 2, config, tmp_path, kind=PartingRegression)
    assert re.search(r"blocks\.[01] on rank 1", str(caught.value))
