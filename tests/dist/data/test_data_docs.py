"""The tasks of docs/data.md, in every layout: the same pixels, the same training."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets  # noqa: F401  before the ranks are forked; it takes each of them 3 s
import torch

from dtrain import Task
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.context import TrainContext
from dtrain.train.data.pipeline import MapFeed
from dtrain.train.data.placement import GlobalBatch, Position
from dtrain.train.loop.native import NativeTrainer
from support import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
DOCUMENT = ROOT / "docs" / "data.md"


def documented() -> dict[str, Any]:
    """What the document's Python blocks define; the one with the imports comes first."""
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {"__name__": "documented"}
    for block in sorted(blocks, key=lambda block: "class Shifted(" not in block):
        exec(block, found)
    return found


def spec(strategy: str, workers: int = 0, steps: int = 12) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "t",
            "task": "t:T",
            "seed": 3,
            "strategy": strategy,
            # 400 / 36: 12 steps an epoch, the last one short, so that 18 are one and a half
            "train": {"steps": steps, "global_batch_size": 36, "micro_batch_size": 7},
            "data": {"workers": workers},
            "log": {"every_steps": 1},
        }
    )


# -- pixels ------------------------------------------------------------------------------------


def pixels(workers: tuple[int, ...]) -> list[dict[tuple[int, int], str]]:
    """(epoch, sample) → digest of the sample on this rank, for each number of loader processes."""
    return [_pixels(spec("ddp", number, 18), RankInfo.from_env()) for number in workers]


def _pixels(job: JobSpec, ranks: RankInfo) -> dict[tuple[int, int], str]:
    task = documented()["Shifted"]()
    task.collate = lambda samples: samples
    feed = MapFeed(task.train_dataset(), task, job, ranks, pin_memory=False)

    def split(batch: GlobalBatch) -> tuple[range, ...]:
        return batch.micro_batches(ranks.rank, ranks.world_size, 7)

    seen = {}
    for batch, parts, _ in feed.batches(0, Position(), split):
        order = feed.order.epoch(batch.epoch)
        for part, (_, samples) in zip(split(batch), parts, strict=True):
            for i, (image, _) in zip(order.block(part.start, part.stop), samples, strict=True):
                seen[batch.epoch, int(i)] = hashlib.sha256(image.numpy().tobytes()).hexdigest()
    feed.check()
    return seen


def test_pixels_belong_to_the_sample_in_every_layout() -> None:
    alone: dict[tuple[int, int], str] = {}
    for world_size in (1, 2, 4):
        for seen in zip(*run_ranks(pixels, world_size, (0, 1, 3)), strict=True):
            together = {key: value for rank in seen for key, value in rank.items()}
            assert sum(map(len, seen)) == len(together) == 616  # every sample on one rank alone
            alone = alone or together
            assert together == alone
    assert len(set(alone.values())) == 616


# -- training ----------------------------------------------------------------------------------

Trained = tuple[list[float], dict[str, np.ndarray]]


def train(names: tuple[str, ...], job: JobSpec, folder: Path) -> list[Trained]:
    """Losses and parameters of a training of each of these tasks."""
    torch.set_num_threads(1)
    ranks = RankInfo.from_env() if job.strategy == "ddp" else RankInfo()
    return [_train(documented()[name](), job, ranks, folder / name) for name in names]


def _train(task: Task, job: JobSpec, ranks: RankInfo, folder: Path) -> Trained:
    run = RunDir(folder)
    run.create()
    kept: list[torch.nn.Module] = []
    build = task.model
    task.model = lambda: kept.append(build()) or kept[0]  # type: ignore[func-returns-value, method-assign]
    NativeTrainer(TrainContext(job, run, ranks, 0, task, torch.device("cpu"))).run()
    lines = (folder / "metrics.jsonl").read_text().splitlines() if ranks.rank == 0 else []
    parameters = {name: value.numpy() for name, value in kept[0].state_dict().items()}
    return [json.loads(line)["loss"] for line in lines], parameters


def test_the_same_training_under_single_and_ddp(tmp_path: Path) -> None:
    """One process; and four for ten steps, then two with loader processes."""
    names = ("Shifted", "Rare", "Curriculum", "Streamed")
    (alone,) = run_ranks(train, 1, names, spec("single", steps=18), tmp_path / "alone")
    run_ranks(train, 4, names, spec("ddp", steps=10), tmp_path / "moved")
    moved = run_ranks(train, 2, names, spec("ddp", workers=2, steps=18), tmp_path / "moved")
    for index, (losses, parameters) in enumerate(alone):
        assert len(losses) == 18
        np.testing.assert_allclose(moved[0][index][0], losses, rtol=2e-6)
        for rank in moved:
            for name, value in parameters.items():
                np.testing.assert_allclose(rank[index][1][name], value, rtol=0, atol=1e-5)
