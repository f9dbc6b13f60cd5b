"""What a step of strategy `exact` costs beside one of `ddp`.

All arms train at once in the same processes, a step of each in turn (A B C A B C …), so that a
busy moment hits all of them; prints a table of medians, and of ratios to `ddp`::

    python benchmarks/exact.py --steps 30

Two models on synthetic data, AdamW, one thread per rank: `mlp` (GEMMs) and `text`, a small
decoder-only transformer. Reading data is not part of a step here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dtrain import Loss, Task, catalog
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.context import TrainContext
from dtrain.train.data.placement import GlobalBatch
from dtrain.train.loop.build import build_parts
from dtrain.train.loop.step import TrainStep

WARM_UP = 3
"""Steps before the measured ones: the first makes buffers and optimizer state."""


class Mlp(Task):
    """Three layers; 256 inputs, 10 classes."""

    def __init__(self, width: int) -> None:
        self.width = width

    def model(self) -> nn.Module:
        layers = [nn.Linear(256, self.width), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Linear(self.width, self.width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(self.width, 10))

    def data(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(batch_size, 256), torch.randint(0, 10, (batch_size,))

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        inputs, labels = batch
        total = nn.functional.cross_entropy(model(inputs), labels, reduction="sum")
        return Loss(total, len(labels))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters())


class Text(Mlp):
    """Transformer blocks on 32 tokens of 256 kinds."""

    def model(self) -> nn.Module:
        block = nn.TransformerEncoderLayer(
            self.width, 4, 4 * self.width, dropout=0.0, batch_first=True, norm_first=True
        )
        blocks = nn.TransformerEncoder(block, 6, enable_nested_tensor=False)
        return nn.Sequential(nn.Embedding(256, self.width), blocks, nn.Linear(self.width, 256))

    def data(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(0, 256, (batch_size, 33))
        return tokens[:, :-1], tokens[:, 1:]

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        inputs, targets = batch
        scores = model(inputs).flatten(0, 1)
        total = nn.functional.cross_entropy(scores, targets.flatten(), reduction="sum")
        return Loss(total, targets.numel())


MODELS: dict[str, tuple[Callable[[], Mlp], tuple[int, ...]]] = {
    "mlp 1 M": (lambda: Mlp(640), (64, 512)),
    "mlp 5 M": (lambda: Mlp(1472), (64, 512)),
    "text 1 M": (lambda: Text(116), (32,)),
    "text 5 M": (lambda: Text(256), (32,)),
}
"""Of 1 and 5 million parameters, and the global batches to train them with."""


class Arm:
    """One strategy's training of a model, step by step."""

    def __init__(self, strategy: str, virtual_shards: int, task: Mlp, batch_size: int) -> None:
        train = {"steps": 1, "global_batch_size": batch_size, "virtual_shards": virtual_shards}
        job = {"name": "b", "task": "b:B", "strategy": strategy, "train": train}
        spec = JobSpec.model_validate(job)
        run = RunDir(Path(tempfile.gettempdir()) / "never-written")
        cpu = torch.device("cpu")
        context = TrainContext(spec, run, RankInfo.from_env(), 0, task, cpu)
        self._strategy = catalog.load("strategy", strategy)(context)
        parts = build_parts(context, self._strategy)
        self._strategy.prepare(parts.loss)
        self._step = TrainStep(parts, self._strategy, spec.train, cpu)
        self._size = batch_size
        self._number = 0
        self.num_parameters = sum(p.numel() for p in parts.model.parameters())
        self.seconds: list[float] = []

    def step(self, data: tuple[torch.Tensor, ...]) -> None:
        """Train on one global batch, and note how long it took."""
        batch = GlobalBatch(self._number, 0, 0, self._size)
        places = self._strategy.micro_batches(batch)
        micro = [(len(p), [t[p.start : p.stop] for t in data]) for p in places]
        dist.barrier()
        started = time.perf_counter()
        self._strategy.start_step(batch)
        self._step(micro, len(micro), self._size, ())
        self.seconds.append(time.perf_counter() - started)
        self._number += 1


def measure(model: str, batch_size: int, steps: int) -> tuple[int, dict[str, list[float]]]:
    """(parameters, seconds of each step by arm) on this rank."""
    torch.set_num_threads(1)
    task = MODELS[model][0]()
    world_size = dist.get_world_size()
    arms = {
        "ddp": Arm("ddp", world_size, task, batch_size),
        f"exact V={world_size}": Arm("exact", world_size, task, batch_size),
        "exact V=8": Arm("exact", 8, task, batch_size),
    }
    torch.manual_seed(0)
    data = task.data(batch_size)
    for _ in range(WARM_UP + steps):
        for arm in arms.values():
            arm.step(data)
    return arms["ddp"].num_parameters, {name: arm.seconds[WARM_UP:] for name, arm in arms.items()}


def row(model: str, batch_size: int, world_size: int, steps: int) -> str:
    """One line of the table: medians of the slowest rank's time, and of its ratio to ddp's.

    A ratio is of steps that followed one another, which a busy moment hits alike.
    """
    everyone = run_ranks(measure, world_size, model, batch_size, steps, timeout=600)
    size = everyone[0][0]
    times = {
        arm: [max(step) for step in zip(*(of_rank[arm] for _, of_rank in everyone), strict=True)]
        for arm in everyone[0][1]
    }
    ddp = times.pop("ddp")
    cells = [f"{statistics.median(ddp) * 1e3:.0f} ms"]
    for seconds in times.values():
        ratio = statistics.median(a / b for a, b in zip(seconds, ddp, strict=True))
        cells.append(f"{statistics.median(seconds) * 1e3:.0f} ms ({ratio:.2f}×)")
    name = model.split()[0]
    return f"| {name} | {size / 1e6:.1f} M | {batch_size} | {world_size} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time of strategy exact beside ddp.")
    parser.add_argument("--steps", type=int, default=30, help="of each arm, in turns")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}", flush=True)
    print("| model | parameters | batch | ranks | `ddp` | `exact`, V = ranks | `exact`, V = 8 |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for model in arguments.models:
        for batch_size in MODELS[model][1]:
            for world_size in arguments.ranks:
                print(row(model, batch_size, world_size, arguments.steps), flush=True)


if __name__ == "__main__":
    main()
