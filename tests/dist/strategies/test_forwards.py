"""Blocks that are compiled or computed again in backward, beside plain torch written by hand."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dtrain.testing import run_ranks
from dtrain.train.data.permutation import Permutation
from dtrain.train.seeding import derive_seed, seed_everything
from dtrain.train.strategies import forwards
from support.errors import raises
from support.trainings import Numbers, Outcome, Regression, job, lines, train

# what torch's compiler itself warns of
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]

WIDTH = 6
Arrays = dict[str, np.ndarray[Any, Any]]


class Block(nn.Module):
    """A layer that drops, and may have a BatchNorm."""

    def __init__(self, dropout: float, norm: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.norm(self.layer(self.drop(x))))


class Chain(nn.Module):
    """Blocks of one class, and nothing else, so that torch compiles as little as possible."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(dropout, norm) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean(1, keepdim=True)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)


class Task(Regression):
    def model(self) -> nn.Module:
        return Chain(*self.net[:2])


def run(
    world_size: int,
    folder: Path,
    strategy: str,
    args: dict[str, Any] | None = None,
    replicas: int = 1,
    **sections: Any,
) -> list[Outcome]:
    spec = job(strategy, {"n": 48, "optimizer": "plain", **(args or {})}, **sections)
    return run_ranks(train, world_size, spec, folder, replicas, kind=Task)


def distance(one: Arrays, other: Arrays) -> float:
    """The largest relative difference of a parameter or buffer."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[n] - other[n]).max() / np.abs(one[n]).max()) for n in one)


@pytest.mark.parametrize(
    ("strategy", "world_size", "replicas", "asked"),
    [
        ("single", 1, 1, True),
        ("dp", 1, 2, ["Linear", "Block"]),
        ("ddp", 2, 1, ["Linear", "Block"]),
        ("fsdp", 2, 1, True),
        ("exact", 2, 1, True),
    ],
)
def test_activations_computed_again_are_the_same_bits(
    strategy: str, world_size: int, replicas: int, asked: bool | list[str], tmp_path: Path
) -> None:
    # every backward draws the dropout of its forward; running statistics count a batch once
    args = {"dropout": 0.4, "norm": True, "optimizer": "adamw", "held_out": 8}
    kept, again = (
        run(world_size, tmp_path / name, strategy, args, replicas,
            train={"steps": 4, "activation_checkpointing": given})
        for name, given in (("kept", False), ("again", asked))
    )  # fmt: skip
    for one, other in zip(kept, again, strict=True):
        assert one.parameters.keys() == other.parameters.keys()
        for name, value in one.parameters.items():
            np.testing.assert_array_equal(other.parameters[name], value, err_msg=name)
        assert one.random == other.random


def test_a_checkpointed_module_keeps_names_class_and_copies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch sets it for good
    torch.manual_seed(0)
    model, plain = Chain(0.3), Chain(0.3)
    plain.load_state_dict(model.state_dict())
    by_hand = copy.deepcopy(plain)
    for index, block in enumerate(by_hand.blocks):
        by_hand.blocks[index] = checkpoint_wrapper(block)
    spec = job("single", train={"activation_checkpointing": True})
    forwards.change_forwards(model, spec, torch.device("cpu"))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(each).__name__ for each in model.modules()] == [
        type(each).__name__ for each in plain.modules()
    ]
    assert isinstance(model.blocks[0], Block)
    x = torch.randn(8, WIDTH)
    kept = {}
    for name, each in {
        "plain": plain, "changed": model, "copied": copy.deepcopy(model), "by hand": by_hand,
    }.items():  # fmt: skip
        saved: list[torch.Tensor] = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor) or tensor, lambda tensor: tensor
        ):
            each(x).sum().backward()
        kept[name] = len(saved)
        for (at, mine), theirs in zip(plain.named_parameters(), each.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad), at
    assert kept["changed"] == kept["copied"] == kept["by hand"] < kept["plain"]


@pytest.mark.parametrize(("asked", "code"), [
    (True, "strategy.no-blocks"), (["Blok"], "strategy.no-such-class"),
])  # fmt: skip
def test_a_model_without_such_blocks_is_refused(asked: Any, code: str) -> None:
    spec = job("single", train={"activation_checkpointing": asked})
    model = nn.Bilinear(2, 2, 2) if asked is True else Chain()
    with raises(code, "train.activation_checkpointing"):
        forwards.change_forwards(model, spec, torch.device("cpu"))


def test_a_missing_compiler_is_reported_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch sets it for good
    from torch._inductor import config, cpp_builder

    spec = job("single", train={"compile": True})
    with monkeypatch.context() as only:
        only.setattr(forwards.sysconfig, "get_path", lambda _: str(tmp_path))
        with raises("strategy.no-compiler", "Python.h", str(tmp_path)):
            forwards.change_forwards(Chain(), spec, torch.device("cpu"))
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    cpp_builder.cpp_compiler_search.cache_clear()
    with raises("strategy.no-compiler", "g++", "CXX"):
        forwards.change_forwards(Chain(), spec, torch.device("cpu"))


def by_hand(how: str) -> Arrays:
    """The same training in plain torch, compiled as its users write it."""
    torch.set_num_threads(1)
    rank = dist.get_rank()
    seed_everything(derive_seed("model", 3))
    model: Any = Chain()
    if how == "ddp":
        wrapped = DistributedDataParallel(torch.compile(model))
    else:
        mesh = init_device_mesh("cpu", (2,))
        for index, block in enumerate(model.blocks):
            model.blocks[index] = torch.compile(block)
            fully_shard(model.blocks[index], mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
        for module in (model, *model.blocks):  # gloo has no other reduction
            module.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    data = Numbers(48, torch.float32)
    for step in range(6):
        epoch, index = divmod(step, 3)
        first = index * 16 + rank * 8
        order = Permutation(48, 3, epoch).block(first, first + 8)
        optimizer.zero_grad()
        (wrapped(data.x[order]) - data.y[order]).square().mean().backward()
        optimizer.step()
        schedule.step()
    named = {name.replace("_orig_mod.", ""): each for name, each in model.named_parameters()}
    whole = {n: each.full_tensor() if how == "fsdp" else each for n, each in named.items()}
    return {name: each.detach().numpy() for name, each in whole.items()}


@pytest.mark.ranks(2)
def test_compiled_is_the_training_that_is_not_and_that_by_hand(tmp_path: Path) -> None:
    for strategy in ("ddp", "fsdp"):

        def trained(name: str, way: str = strategy, **given: Any) -> Outcome:
            args = {"n": 48, "optimizer": "plain", **given.pop("args", {})}
            spec = job(way, args, train={"steps": 6, **given}, checkpoint={"every_steps": 2})
            return train(spec, tmp_path / way / name, kind=Task)

        eager = trained("eager")
        before = forwards.graphs()
        trained("compiled", compile=True, args={"crash_after": 3})
        assert forwards.graphs() > before
        resumed = trained("compiled", compile=True)
        assert len(resumed.seen) == 4
        assert distance(eager.parameters, resumed.parameters) < 1e-6
        assert distance(by_hand(strategy), resumed.parameters) < 1e-6
        gc.collect()  # no DDP may outlive its process group


def test_the_speed_is_that_of_steps_that_did_not_compile(tmp_path: Path) -> None:
    # 20 samples: the second step has four, for which torch compiles again
    args, log = {"n": 20, "dropout": 0.3}, {"log": {"every_steps": 3}}
    (eager,) = run(1, tmp_path / "eager", "single", args, train={"steps": 6})
    both = {"steps": 6, "compile": True, "activation_checkpointing": True}
    (compiled,) = run(1, tmp_path, "single", args, train=both, **log)
    first, third, sixth = (each for each in lines(tmp_path, "metrics") if each["split"] == "train")
    assert "samples_per_second" not in first
    passed = third["time"] - first["time"]  # of step 2, which compiles, and step 3
    assert third["samples_per_second"] * passed > 3 * 16
    assert sixth["samples_per_second"] > 0
    assert distance(eager.parameters, compiled.parameters) < 1e-6
    assert compiled.random == eager.random  # dropout drew the same numbers


class Bare(nn.Module):
    """Has no forward that a loss calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 1))

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class BareTask(Task):
    def model(self) -> nn.Module:
        return Bare()


def test_a_loss_that_calls_no_module_is_reported(tmp_path: Path) -> None:
    spec = job("single", {"n": 16}, train={"steps": 2, "compile": True})
    run_ranks(train, 1, spec, tmp_path, kind=BareTask)
    assert "nothing_compiled" in [each["event"] for each in lines(tmp_path, "events")]
