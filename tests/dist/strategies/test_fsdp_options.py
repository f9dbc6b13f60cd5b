"""Options of `fsdp`, beside plain torch written by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dtrain.job.launcher_options import AnyOptions
from dtrain.job.spec import JobSpec
from dtrain.launch_plan import Facts, LaunchPlan, make_plan
from dtrain.testing import run_ranks
from dtrain.train.data.permutation import Permutation
from dtrain.train.seeding import derive_seed, seed_everything
from dtrain.train.strategies.fsdp_wrapping import outermost, units
from support.errors import raises
from support.trainings import Numbers, Outcome, Regression, job, lines, same_end, train

STEPS, BATCH, SIZE = 4, 16, 48

Arrays = dict[str, np.ndarray[Any, Any]]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.layer(self.drop(x)))


class Model(nn.Module):
    """A first layer, two blocks, a head."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.last = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.last(x)

    predict = forward


class Task(Regression):
    def model(self) -> nn.Module:
        return Model()


class CallsModel(Task):
    """Calls the model itself, not one of its methods."""

    def model(self) -> nn.Module:
        model = Model()
        model.predict = model.__call__  # type: ignore[assignment, method-assign]
        return model


def by_hand(
    rank: int, shape: tuple[int, ...], *, checkpoints: bool = False, **given: Any
) -> Arrays:
    """The same training in plain torch, as torchtitan writes it: equal shares, mean of the ranks.

    Args:
        rank: this rank.
        shape: of the mesh: (shard,) or (replicate, shard).
        checkpoints: whether blocks compute their activations again.
        given: further arguments of `fully_shard`.
    """
    seed_everything(derive_seed("model", 3))
    model = Model()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for name, block in enumerate(model.blocks):
        model.blocks[name] = checkpoint_wrapper(block) if checkpoints else block
        fully_shard(model.blocks[name], mesh=mesh, **given)
    fully_shard(model, mesh=mesh, **given)
    size = int(np.prod(shape))
    for module in (model, *model.blocks):  # gloo has no other reduction
        module.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    data, share = Numbers(SIZE, torch.float32), BATCH // size
    for step in range(STEPS):
        epoch, index = divmod(step, SIZE // BATCH)
        first = index * BATCH + rank * share
        order = Permutation(SIZE, 3, epoch).block(first, first + share)
        optimizer.zero_grad()
        (model(data.x[order]).float() - data.y[order]).square().mean().backward()
        optimizer.step()
        schedule.step()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): each.full_tensor().detach().numpy()
        for name, each in model.named_parameters()
    }


def distance(one: Arrays, other: Arrays) -> float:
    """The largest relative difference of a parameter."""
    return max(float(np.abs(one[n] - other[n]).max() / np.abs(one[n]).max()) for n in one)


def trained(folder: Path, strategy: str = "fsdp", kind: type[Task] = Task, **given: Any) -> Arrays:
    sections = {"fsdp": given.pop("fsdp", {}), "train": {"steps": STEPS, **given}}
    args = {"n": SIZE, "optimizer": "plain"}
    return train(job(strategy, args, **sections), folder, kind=kind).parameters


@pytest.mark.ranks(4)
def test_each_option_is_that_of_plain_torch(tmp_path: Path, rank: int) -> None:
    mine = tmp_path / str(rank)
    plain = trained(mine / "plain", "single")
    fsdp = trained(mine / "fsdp")
    assert distance(plain, fsdp) < 1e-6
    assert distance(by_hand(rank, (4,)), fsdp) < 1e-6
    # gathering in other pieces, or less often, moves the same numbers
    for name, options in {
        "kept": {"reshard_after_forward": False},
        "linear": {"wrap": ["Linear"]},
        "nested": {"wrap": ["Block", "Linear"], "reshard_after_forward": False},
    }.items():
        assert distance(fsdp, trained(mine / name, fsdp=options)) == 0.0, name
    kept = by_hand(rank, (4,), reshard_after_forward=False)
    assert distance(kept, fsdp) < 1e-6
    again = trained(mine / "again", activation_checkpointing=True)
    assert distance(fsdp, again) == 0.0
    assert distance(by_hand(rank, (4,), checkpoints=True), again) < 1e-6
    # copies add gradients in another order
    copies = trained(mine / "copies", fsdp={"replicas": 2})
    assert distance(by_hand(rank, (2, 2)), copies) < 1e-6
    assert distance(plain, copies) < 1e-6


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", [Task, CallsModel])
def test_rounded_parameters_are_another_training_the_same_as_by_hand(
    tmp_path: Path, rank: int, kind: type[Task]
) -> None:
    mine, options = tmp_path / str(rank), {"param_dtype": "bf16"}
    fp32 = trained(mine / "fp32")
    bf16 = trained(mine / "bf16", kind=kind, fsdp=options)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    expected = by_hand(rank, (2,), mp_policy=policy)
    assert distance(expected, bf16) < 0.1 * distance(fp32, bf16)
    assert {each.dtype for each in bf16.values()} == {np.dtype("float32")}
    low = trained(mine / "low", fsdp={**options, "reduce_dtype": "bf16"})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    expected = by_hand(rank, (2,), mp_policy=policy)
    assert distance(expected, low) < 0.1 * distance(fp32, low)
    if rank == 0:
        names = [each["event"] for each in lines(mine / "bf16", "events")]
        assert "param_dtype" in names
        names = [each["event"] for each in lines(mine / "fp32", "events")]
        assert "param_dtype" not in names


def run(world_size: int, folder: Path, args: dict[str, Any], **sections: Any) -> list[Outcome]:
    sections["train"] = {"clip_grad_norm": 0.3, **sections.get("train", {})}
    strategy = sections.pop("strategy", "fsdp")
    return run_ranks(train, world_size, job(strategy, args, **sections), folder, kind=Task)


def test_copies_of_the_model_resume_and_move_to_other_strategies(tmp_path: Path) -> None:
    # 50 samples in batches of 16: the last step of an epoch has two, for four ranks; clipped
    args = {"optimizer": "adamw", "weighted": True, "held_out": 5}
    spec = {"checkpoint": {"every_steps": 3}}
    copies = {**spec, "fsdp": {"replicas": 2}}
    crash = {**args, "crash_after": 7}
    (single,) = run(1, tmp_path / "single", args, strategy="single", **spec)
    unbroken = run(4, tmp_path / "unbroken", args, **copies)
    run(4, tmp_path / "broken", crash, **copies)
    shutil.copytree(tmp_path / "broken", tmp_path / "moved")
    same_end(unbroken, run(4, tmp_path / "broken", args, **copies))
    moved = run(2, tmp_path / "moved", args, strategy="ddp", **spec)
    run(1, tmp_path / "other", crash, strategy="single", **spec)
    other = run(4, tmp_path / "other", args, **copies)
    for outcome in (*unbroken, *moved, *other):
        assert distance(single.parameters, outcome.parameters) < 1e-5
        assert single.result is not None
        assert outcome.result is not None
        expected = pytest.approx(single.result.metrics["mse"], rel=1e-5)
        assert outcome.result.metrics["mse"] == expected


def test_blocks_by_class() -> None:
    model = Model()
    layers = [each.layer for each in model.blocks]
    assert units(model, ["Block"]) == list(model.blocks)[::-1]
    assert units(model, ["Block", "Linear"])[:3] == [model.last, layers[1], model.blocks[1]]
    assert list(outermost(model, units(model, ["Linear"]))) == [model.first, *layers, model.last]
    assert list(outermost(model, [])) == [model.first, *model.blocks, model.last]
    with raises("strategy.no-such-class", "fsdp.wrap", "Blok", "Linear, Block"):
        units(model, ["Linear", "Blok"])
    with raises("strategy.no-such-class", "Dropout"):  # has no parameters
        units(model, ["Dropout"])


def planned(launch: dict[str, Any], **fields: Any) -> LaunchPlan:
    given = {"name": "t", "task": "t:T", "train": {"epochs": 1, "global_batch_size": 8}, **fields}
    spec = JobSpec.model_validate({**given, "launch": launch})
    facts = Facts("t-abc234", "/runs", "python3", "here", cores=8, free_port=16000)
    return make_plan(
        spec, job_dir="/job", launcher="local", profile="local", options=AnyOptions(), facts=facts
    )


def test_what_does_not_fit_is_refused_before_anything_starts() -> None:
    copies = {"strategy": "fsdp", "fsdp": {"replicas": 2}}
    planned({"procs_per_node": 4}, **copies)
    with raises("plan.uneven-replicas", "fsdp.replicas is 2", "3 processes"):
        planned({"procs_per_node": 3}, **copies)
    with raises("plan.uneven-replicas", "3 processes"):  # if one node of two is lost
        planned({"nodes": "1:2", "procs_per_node": 3}, **copies)
    offload = {"strategy": "fsdp", "fsdp": {"cpu_offload": True}}
    with raises("plan.offload-without-gpus", "--gpus"):
        planned({"procs_per_node": 2}, **offload)
    planned({"gpus_per_node": 2}, **offload)
