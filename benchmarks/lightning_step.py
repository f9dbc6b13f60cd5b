"""A step of a LightningModule: Lightning's own Trainer, dtrain around its loops, and dtrain's step.

A small MLP, so that what goes on around the step is most of it; all defaults on. The three take
turns in the same processes, and each round's times are compared with those of Lightning's Trainer
in it. Prints Markdown::

    python benchmarks/lightning_step.py --rounds 5
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain import catalog
from dtrain.integrations.lightning.adapter import LightningAdapter
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.context import TrainContext

WIDTH, BATCH, STEPS, FIRST = 64, 64, 300, 50
WAYS = ("Lightning's Trainer", "own loops", "dtrain's step")
TIMES: list[float] = []


class Small(pl.LightningModule):
    """Notes when each of its steps is over."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def train_dataloader(self) -> Any:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(BATCH * STEPS, WIDTH, generator=draw)
        share = BATCH // RankInfo.from_env().world_size
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), share, shuffle=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        TIMES.append(time.perf_counter())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def by_lightning() -> None:
    world_size = RankInfo.from_env().world_size
    os.environ["TORCHELASTIC_RUN_ID"] = "here"  # the processes are there already
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_epochs=1,
        **dict.fromkeys(quiet, False),  # type: ignore[arg-type]
    )
    trainer.fit(Small())
    del os.environ["TORCHELASTIC_RUN_ID"]


def by_dtrain(step: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        spec = JobSpec.model_validate(
            {
                "name": "small",
                "task": "lightning_step.py:Small",
                "trainer": "lightning",
                "train": {"epochs": 1, "global_batch_size": BATCH},
                "lightning": {"step": step},
            }
        )
        run = RunDir(folder)
        run.create()
        task = LightningAdapter().adapt(functools.partial(Small), "Small", "lightning")
        assert task is not None
        context = TrainContext(spec, run, RankInfo.from_env(), 0, task, torch.device("cpu"))
        catalog.load("trainer", "lightning")(context).run()


def measure(rounds: int) -> dict[str, list[float]]:
    """Median seconds of a step, for each way and round; on this rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of loader processes that Lightning would like to have
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            TIMES.clear()
            if way == WAYS[0]:
                by_lightning()
            else:
                by_dtrain("lightning" if way == WAYS[1] else "dtrain")
            steps = [b - a for a, b in zip(TIMES[FIRST:], TIMES[FIRST + 1 :], strict=False)]
            found[way].append(statistics.median(steps))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| ranks | " + " | ".join(WAYS) + " |\n| --- | --- | --- | --- |")
    for ranks in (1, 2):
        everyone = run_ranks(measure, ranks, rounds, timeout=600)
        slowest = {
            way: [max(each) for each in zip(*(rank[way] for rank in everyone), strict=True)]
            for way in WAYS
        }
        cells = []
        for way in WAYS:
            ratio = statistics.median(
                mine / theirs for mine, theirs in zip(slowest[way], slowest[WAYS[0]], strict=True)
            )
            cells.append(f"{1e3 * statistics.median(slowest[way]):.2f} ms ({ratio:.2f}×)")
        print(f"| {ranks} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
