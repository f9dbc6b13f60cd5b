"""What a script takes from dtrain: sampler and checkpoint, on several ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dtrain
from dtrain.errors import CheckpointError, UsageError
from dtrain.integrations.script.sampler import Sampler
from dtrain.train import collectives
from support.checkpoints import TENSORS
from support.errors import raises


def sampler_of(rank: int, world_size: int, n: int, batch: int, **options: object) -> Sampler:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    return Sampler(n, batch, **options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "ranks" not in request.keywords:
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.setenv(name, "")


def epoch_of(samplers: list[Sampler], steps: int | None = None) -> list[list[int]]:
    """The global batch of each step, of all processes in turn."""
    taken: list[list[int]] = []
    for parts in zip(*samplers, strict=True):
        assert all(parts), "a process without samples would leave DDP's reduction alone"
        taken.append([i for part in parts for i in part])
        for sampler in samplers:
            sampler.step()
        if len(taken) == steps:
            break
    return taken


@pytest.mark.parametrize(("n", "batch"), [(50, 16), (49, 16), (7, 7), (64, 8), (33, 8)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_once_in_one_order(n: int, batch: int, world_size: int) -> None:
    samplers = [sampler_of(rank, world_size, n, batch, seed=5) for rank in range(world_size)]
    alone = [i for step in epoch_of([sampler_of(0, 1, n, batch, seed=5)]) for i in step]
    lengths = {len(sampler) for sampler in samplers}
    first, second = epoch_of(samplers), epoch_of(samplers)
    assert [i for step in first for i in step] == alone
    assert sorted(alone) == list(range(n))
    assert first != second
    assert lengths == {len(first)}
    assert samplers[0].epoch == 2


def test_a_position_goes_on_with_another_number_of_processes() -> None:
    whole = epoch_of([sampler_of(0, 1, 50, 8)])
    before = [sampler_of(rank, 2, 50, 8) for rank in range(2)]
    head = epoch_of(before, 3)
    after = [sampler_of(rank, 3, 50, 8) for rank in range(3)]
    for sampler in after:
        sampler.load_state_dict(before[0].state_dict())
    # 50 = 6 * 8 + 2: three processes cannot share two samples, so the last step has ten
    assert head + epoch_of(after) == [*whole[:5], whole[5] + whole[6]]


def test_a_position_in_other_data_is_refused() -> None:
    state = sampler_of(0, 1, 50, 8).state_dict()
    with raises("checkpoint.other-data", "num_samples was 50, is 51", kind=CheckpointError):
        sampler_of(0, 1, 51, 8).load_state_dict(state)


def test_forgotten_steps_are_told() -> None:
    sampler = sampler_of(0, 1, 16, 8)
    list(sampler)
    with raises("script.sampler-not-stepped", "step()", kind=UsageError):
        list(sampler)


def test_more_processes_than_samples_are_refused() -> None:
    with raises("data.too-few-samples", "4 processes", "3 samples", kind=UsageError):
        sampler_of(0, 4, 50, 3)


# -- on real ranks -----------------------------------------------------------------------------


def data() -> torch.utils.data.TensorDataset:
    draw = torch.Generator().manual_seed(1)
    return torch.utils.data.TensorDataset(
        torch.randn(51, 6, generator=draw), torch.randn(51, 1, generator=draw)
    )


def fit(model: nn.Module, sampler: Sampler, epochs: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = torch.utils.data.DataLoader(data(), batch_sampler=sampler)
    while sampler.epoch < epochs:
        for inputs, targets in loader:
            loss = nn.functional.mse_loss(model(inputs), targets) * sampler.scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sampler.step()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 3])
def test_unequal_parts_are_weighted_right(rank: int, world_size: int) -> None:
    model = net()
    fit(DistributedDataParallel(model), dtrain.sampler(data(), 16), epochs=5)
    os.environ.update(RANK="0", WORLD_SIZE="1")
    alone = net()
    fit(alone, dtrain.sampler(data(), 16), epochs=5)
    for mine, its in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-6)


@pytest.mark.ranks(2)
def test_a_damaged_checkpoint_is_passed_over(rank: int, tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer, Sampler, dtrain.checkpoint]:
        model = DistributedDataParallel(net())
        optimizer = torch.optim.AdamW(model.parameters())
        sampler = dtrain.sampler(data(), 16)
        saved = dtrain.checkpoint(model, optimizer, directory=tmp_path, sampler=sampler)
        return model, optimizer, sampler, saved

    model, optimizer, sampler, saved = made()
    assert saved.load() == 0
    kept = {}
    for step in (1, 2):
        model(torch.ones(3, 6)).sum().backward()
        optimizer.step()
        sampler.step()
        kept[step] = {name: each.clone() for name, each in model.module.state_dict().items()}
        folder = saved.save(step)
    if rank == 0:
        flip_a_bit(folder / TENSORS)
    collectives.gather_to_all(None)
    model, optimizer, sampler, saved = made()
    assert saved.load() == 1
    assert sampler.state_dict()["consumed"] == 16
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, kept[1][name])
    assert len(optimizer.state) == 4


class Odd:
    """State that nothing could read again."""

    def state_dict(self) -> dict[str, Any]:
        return {"deep": [Odd]}


@pytest.mark.ranks(2)
def test_what_could_not_be_trained_on_is_not_saved(rank: int, tmp_path: Path) -> None:
    model = net()
    saved = dtrain.checkpoint(model, directory=tmp_path)
    with torch.no_grad():
        model[0].bias[2] = float("nan")
    with raises("check.state-not-finite", "step 3", "0.bias", kind=CheckpointError):
        saved.save(3)
    odd = dtrain.checkpoint(net(), directory=tmp_path, odd=Odd())
    with raises("checkpoint.unsaveable-value", "checkpoint's['odd']['deep'][0] is a type"):
        odd.save(3)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.ranks(2)
def test_all_hear_of_a_wish_to_stop(rank: int) -> None:
    assert not dtrain.stopping()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    assert dtrain.stopping()


@pytest.mark.ranks(2, init=False)
def test_without_a_process_group_it_says_what_is_missing(rank: int) -> None:
    with raises("script.no-process-group", "dtrain.checkpoint()", kind=UsageError):
        dtrain.checkpoint(net(), directory=".")
