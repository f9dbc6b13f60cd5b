"""What is said once: BatchNorm over a part of a batch, and buffers that some ranks alone write."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain import Loss
from dtrain.integrations.lightning.trainer import LightningTrainer
from dtrain.ranks import RankInfo
from dtrain.testing import run_ranks
from dtrain.train.checks.notices import remedy
from dtrain.train.loop.native import NativeTrainer
from support.trainings import Regression, job, lines, train


class Writes(Regression):
    """Some ranks write a buffer, in some steps.

    Args:
        ranks: that write; None for all.
        first: the step from which they do.
    """

    def __init__(self, ranks: list[int] | None = None, first: int = 1, **args: Any) -> None:
        super().__init__(**args)
        self.ranks, self.first = ranks, first

    def model(self) -> nn.Module:
        model = super().model()
        model.register_buffer("seen", torch.zeros(2))
        model.register_buffer("constant", torch.ones(2))
        return model

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        rank = RankInfo.from_env().rank
        if (self.ranks is None or rank in self.ranks) and len(self.seen) >= self.first:
            model.seen += 1 + rank  # type: ignore[operator]
        return super().loss(model, batch)


def said(folder: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in lines(folder, "events") if line["event"] == event]


def warned(call: Any, *args: Any) -> list[str]:
    """The warnings of this rank while it trains."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.endswith("checks.notices"):
                found.append(record.getMessage())

    handler = Keep()
    logging.getLogger("dtrain").addHandler(handler)
    try:
        call(*args)
    finally:
        logging.getLogger("dtrain").removeHandler(handler)
    return found


def warnings(
    world_size: int,
    strategy: str,
    folder: Path,
    trainer: type[NativeTrainer] = NativeTrainer,
    sections: dict[str, Any] | None = None,
    **args: Any,
) -> list[list[str]]:
    """Those of each rank."""
    call = functools.partial(train, kind=Writes, trainer_class=trainer)
    spec = job(strategy, {"n": 56, **args}, **(sections or {}))
    replicas = 2 if strategy == "dp" else 1
    return run_ranks(functools.partial(warned, call), world_size, spec, folder, replicas)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([1], "rank 1 changed the buffer seen, and ranks 0, 2 did not.*what rank 1 wrote is lost"),
        ([0, 2], "ranks 0, 2 changed the buffer seen, and rank 1 did not.*rank 2 wrote is lost"),
        ([0], "rank 0 changed the buffer seen, and ranks 1, 2 did not.*all get what it wrote"),
    ],
)
def test_a_buffer_of_some_ranks(
    strategy: str, ranks: list[int], words: str, tmp_path: Path
) -> None:
    first, *others = warnings(3, strategy, tmp_path, ranks=ranks)
    assert others == [[], []]
    (text,) = first
    assert text.startswith("in step 1 ")
    assert re.search(words, text), text
    (event,) = said(tmp_path, "buffer_of_some_ranks")
    lost = [rank for rank in ranks if rank != 0]
    assert (event["step"], event["buffers"]) == (1, ["seen"])
    assert (event["ranks"], event["lost"]) == (ranks, lost)


def test_trainer_lightning_says_it_too(tmp_path: Path) -> None:
    first, _ = warnings(2, "ddp", tmp_path, LightningTrainer, ranks=[1], norm=True)
    assert len(first) == 2


def test_a_later_write_is_seen_after_a_comparison(tmp_path: Path) -> None:
    sections = {"checks": {"every_steps": 6}}
    warnings(2, "ddp", tmp_path / "seen", sections=sections, ranks=[1], first=5)
    (event,) = said(tmp_path / "seen", "buffer_of_some_ranks")
    assert event["step"] == 7
    unlooked = {"checks": {"every_steps": 0}}
    warnings(2, "ddp", tmp_path / "off", sections=unlooked, ranks=[1])
    assert said(tmp_path / "off", "buffer_of_some_ranks") == []


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nothing_is_said_where_all_write(strategy: str, tmp_path: Path) -> None:
    """Nor of ranks without samples: an epoch of 33 ends with a step of one sample."""
    assert warnings(3, strategy, tmp_path / "all", n=33) == [[], [], []]
    norm = [[len(each) for each in warnings(3, strategy, tmp_path / "norm", n=38, norm=True)]]
    assert norm == [[1, 0, 0]]
    for folder in ("all", "norm"):
        assert said(tmp_path / folder, "buffer_of_some_ranks") == []


@pytest.mark.parametrize("strategy", ["single", "exact", "dp"])
def test_nothing_is_said_where_no_copy_is_made(strategy: str, tmp_path: Path) -> None:
    world_size = 2 if strategy == "exact" else 1
    sections = {"train": {"virtual_shards": 4}} if strategy == "exact" else {}
    found = warnings(world_size, strategy, tmp_path, sections=sections, ranks=[0])
    assert not any(found)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "dp"])
def test_batch_norm(strategy: str, tmp_path: Path) -> None:
    world_size = 1 if strategy == "dp" else 2
    first, *others = warnings(world_size, strategy, tmp_path, norm=True)
    part = "replica" if strategy == "dp" else "process"
    assert first == [
        f"BatchNorm (norm) normalises over each {part}'s own samples, so the training depends "
        "on their number, 2: use a norm over features (GroupNorm, LayerNorm), or strategy 'exact' "
        "(torch's SyncBatchNorm works on GPUs only)"
    ]
    assert not any(others)
    (event,) = said(tmp_path, "batch_norm")
    assert (event["modules"], event["parts"]) == (["norm"], 2)


def test_the_remedy_works_on_the_device() -> None:
    convert = "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) in model(); or a norm over"
    assert remedy("ddp", "cuda").startswith(f"use {convert}")
    assert remedy("dp", "cuda").startswith(f"use strategy 'ddp' and {convert}")
    assert "convert" not in remedy("ddp", "cpu")


@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("ddp", 1), ("exact", 2)])
def test_batch_norm_over_the_whole_batch(strategy: str, world_size: int, tmp_path: Path) -> None:
    sections = {"train": {"virtual_shards": 4}} if strategy == "exact" else {}
    warnings(world_size, strategy, tmp_path, sections=sections, norm=True)
    assert said(tmp_path, "batch_norm") == []
