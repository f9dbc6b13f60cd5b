"""`exact`: the same bits on any number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain import catalog
from dtrain.errors import UsageError
from dtrain.testing import run_ranks
from dtrain.train.strategies.exact import exchange, shards, tree
from support.errors import assert_named, assert_shown
from support.launch import dtrain
from support.trainings import Outcome, job, lines, losses, steps_of, train

EVERYTHING = {"n": 40, "dropout": 0.3, "noise": 0.2, "weighted": True, "optimizer": "adamw"}
"""Dropout, random data, unequal weights, AdamW; 40 / 12: the last step of an epoch has four."""

HARD = {"steps": 50, "global_batch_size": 12, "micro_batch_size": 1, "clip_grad_norm": 0.5}
"""Clipping and accumulation: a shard of two samples is two micro-batches."""


def run(
    world_size: int, folder: Path, args: dict[str, Any], strategy: str = "exact", **sections: Any
) -> list[Outcome]:
    return run_ranks(train, world_size, job(strategy, args, **sections), folder)


def sha(outcomes: list[Outcome]) -> str:
    """Of the final parameters, the same on every rank."""
    digests = {outcome.result.parameters_sha256 for outcome in outcomes if outcome.result}
    (digest,) = digests
    assert digest is not None
    return digest


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Of every evaluation, without the time."""
    return [line | {"time": 0} for line in lines(folder, "metrics") if line["split"] == "eval"]


def test_any_number_of_processes_gives_the_same_bits(tmp_path: Path) -> None:
    spec = {"train": HARD, "eval": {"every_steps": 25}}
    args = {**EVERYTHING, "held_out": 13}
    runs = {w: run(w, tmp_path / f"{w}", args, **spec) for w in (1, 2, 4, 8)}
    assert len({sha(outcomes) for outcomes in runs.values()}) == 1
    assert len({json.dumps(metrics(tmp_path / f"{w}")) for w in runs}) == 1
    assert len({tuple(losses(tmp_path / f"{w}")) for w in runs}) == 1
    assert all(steps_of(outcomes) == runs[1][0].seen for outcomes in runs.values())


@pytest.mark.parametrize("world_sizes", [(4, 2), (1, 8)])
def test_killed_and_resumed_on_another_number_of_processes(
    world_sizes: tuple[int, int], tmp_path: Path
) -> None:
    first, second = world_sizes
    train_ = {**HARD, "steps": 20}
    unbroken = run(2, tmp_path / "unbroken", EVERYTHING, train=train_)
    saving = {"train": train_, "checkpoint": {"every_steps": 3}}
    killed = run(first, tmp_path / "broken", {**EVERYTHING, "crash_after": 10}, **saving)
    assert killed[0].result is None
    resumed = run(second, tmp_path / "broken", EVERYTHING, **saving)
    assert len(resumed[0].seen) == 11  # from step 9 on
    assert sha(resumed) == sha(unbroken)


def test_batch_norm_sees_one_shard_at_a_time_on_any_number_of_processes(tmp_path: Path) -> None:
    args = {"n": 40, "norm": True, "dropout": 0.3, "optimizer": "adamw"}
    spec = {"train": {"steps": 10, "global_batch_size": 20, "virtual_shards": 4}}
    runs = {w: run(w, tmp_path / f"{w}", args, **spec) for w in (1, 2, 4)}
    one = runs[1][0].parameters
    assert one["norm.num_batches_tracked"] == 10
    assert {"norm.running_mean", "norm.running_var"} < set(one)
    for outcome in (outcome for outcomes in runs.values() for outcome in outcomes):
        for name, value in one.items():
            np.testing.assert_array_equal(outcome.parameters[name], value, err_msg=name)


@pytest.mark.parametrize("spare", ["never", "sometimes"])
def test_parameters_without_a_gradient_and_shards_without_samples(
    spare: str, tmp_path: Path
) -> None:
    # 7 samples, 5 a step: the second step of an epoch has 2 samples for 6 shards
    args = {"n": 7, "spare": spare, "optimizer": "adamw", "weighted": True}
    spec = {"train": {"steps": 12, "global_batch_size": 5, "virtual_shards": 6}}
    runs = {w: run(w, tmp_path / f"{w}", args, **spec) for w in (1, 2, 3, 6)}
    assert len({sha(outcomes) for outcomes in runs.values()}) == 1
    assert all(steps_of(outcomes) == runs[1][0].seen for outcomes in runs.values())
    (untouched,) = run(1, tmp_path / "start", args, train={**spec["train"], "steps": 1})
    decayed = runs[1][0].parameters["spare.weight"] != untouched.parameters["spare.weight"]
    # AdamW decays weights whose gradient is zero, and leaves those alone that have none
    assert decayed.any() == (spare == "sometimes")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(precision: str, tmp_path: Path) -> None:
    # losses so large that fp16 overflows and the scaler skips steps
    args = {"dropout": 0.3, "optimizer": "adamw", "scale": 30.0}
    spec = {"train": {"steps": 8, "global_batch_size": 16, "precision": precision}}
    runs = [run(w, tmp_path / f"{w}", args, **spec) for w in (1, 4)]
    assert sha(runs[0]) == sha(runs[1])
    assert losses(tmp_path / "1") == losses(tmp_path / "4")


class Chain(tree.TreeSum[Any]):
    """Another tree: no pairs, the leaves one after the other from the right."""

    def push(self, node: tree.Node[Any]) -> None:
        self._nodes.append(node)

    def pop_left_of(self, leaf: int) -> None:
        return None


@pytest.mark.parametrize("other", [tree.TreeSum, Chain])
@pytest.mark.ranks(1)
def test_another_tree_is_another_training(other: Any, tmp_path: Path, rank: int) -> None:
    spec = job("exact", EVERYTHING, train={**HARD, "steps": 20})
    digests = []
    for kind in (tree.TreeSum, other):
        with pytest.MonkeyPatch.context() as patch:
            for module in (tree, exchange, shards):
                patch.setattr(module, "TreeSum", kind)
            result = train(spec, tmp_path / str(len(digests))).result
            assert result is not None
            digests.append(result.parameters_sha256)
    assert (digests[0] == digests[1]) == (other is tree.TreeSum)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "rtol", "steps", "optimizer"),
    [("float64", 1e-10, 50, "sgd"), ("float32", 1e-5, 50, "plain"), ("float32", 2e-6, 1, "plain")],
)
def test_it_is_the_training_of_one_process(
    world_size: int, dtype: str, rtol: float, steps: int, optimizer: str, tmp_path: Path
) -> None:
    args = {"dtype": dtype, "weighted": True, "optimizer": optimizer}
    spec = {"train": {"steps": steps, "global_batch_size": 16, "clip_grad_norm": 0.3}}
    (single,) = run(1, tmp_path / "single", args, "single", **spec)
    outcomes = run(world_size, tmp_path / "exact", args, **spec)
    assert steps_of(outcomes) == single.seen
    for outcome in outcomes:
        for name, value in single.parameters.items():
            np.testing.assert_allclose(
                outcome.parameters[name], value, rtol=0, atol=rtol * np.abs(value).max()
            )


def test_the_planner_names_the_nearest_that_works() -> None:
    assert catalog.shard_problem("exact", 8, [1, 2, 4, 8]) is None
    assert catalog.shard_problem("ddp", 8, [3]) is None
    for world_size, near, multiple in ((3, "2 or 4", 9), (16, "8", 16), (5, "4 or 8", 10)):
        problem = catalog.shard_problem("exact", 8, [1, world_size])
        assert problem is not None
        shards = f"--set train.virtual_shards={multiple}"
        assert_named(problem, [f"{world_size} processes", f"{near} processes", shards])
    assert run_ranks(refused, 3) == ["plan.uneven-shards"] * 3


def refused() -> str:
    with pytest.raises(UsageError) as caught:
        train(job("exact"), Path("unused"))
    return caught.value.code


WIDE = """
import os, signal
from pathlib import Path
import torch
from torch import nn
from dtrain import Task

class Wide(Task):
    def __init__(self, killed: str = ""):
        self.killed, self.losses = killed and Path(killed), 0

    def model(self):
        return nn.Sequential(nn.Linear(4, 8192), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8192, 1))

    def train_dataset(self):
        x = torch.randn(256, 4, generator=torch.Generator().manual_seed(1))
        return torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True))

    def loss(self, model, batch):
        self.losses += 1
        if self.losses == 20 and self.killed and not self.killed.exists():
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        hidden = model[:3](batch[0])  # 65,536 numbers: torch adds them up in one part per thread
        return (model[3](hidden) - batch[1]).square().mean() + 0.01 * hidden.square().sum().sqrt()

    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters())
"""

WIDE_JOB = """
name: wide
task: task.py:Wide
strategy: exact
train: {steps: 20, global_batch_size: 64, clip_grad_norm: 1.0}
checkpoint: {every_steps: 3}
"""


def test_killed_on_four_processes_and_resumed_on_two_is_one_process_with_more_threads(
    tmp_path: Path,
) -> None:
    (tmp_path / "task.py").write_text(WIDE)
    (tmp_path / "job.yaml").write_text(WIDE_JOB)
    killed = f"args.killed={tmp_path / 'killed'}"
    broken = dtrain("launch", "job.yaml", "--procs", "4", "--set", killed, cwd=tmp_path)
    assert broken.returncode == 137, broken.stdout + broken.stderr
    assert "SIGKILL" in broken.stdout
    resumed = dtrain("resume", "--procs", "2", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    environment = {"OMP_NUM_THREADS": "3"}
    alone = dtrain("launch", "job.yaml", "--runs", "alone", cwd=tmp_path, env=environment)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    digests = [status(tmp_path, runs)["parameters_sha256"] for runs in ("runs", "alone")]
    assert digests[0] == digests[1] is not None
    assert f"parameters sha256 {digests[0]}" in resumed.stdout
    refused_ = dtrain("launch", "job.yaml", "--procs", "3", "--runs", "refused", cwd=tmp_path)
    assert refused_.returncode == 2
    assert_shown(refused_.stderr, "plan.uneven-shards", "3 processes", "2 or 4 processes")


def status(cwd: Path, runs: str) -> dict[str, Any]:
    """`dtrain status last --json`."""
    done = dtrain("status", "last", "--json", "--runs", runs, cwd=cwd)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
