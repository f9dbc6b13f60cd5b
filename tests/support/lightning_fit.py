"""A training of a LightningModule in this process, and what Lightning's own Trainer makes of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler

from dtrain import catalog
from dtrain.integrations.lightning.module import ModuleTask
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.train.context import StopFlag, TrainContext
from dtrain.train.data.permutation import Permutation
from dtrain.train.load import load_task
from dtrain.train.seeding import derive_seed, seed_everything
from support import JOBS
from support.launch import events

SEED = 3


@dataclass
class Done:
    module: Any
    parameters: dict[str, torch.Tensor]
    metrics: dict[str, float]
    """Of `trainer.callback_metrics`."""
    steps: int
    stopped: str | None = None
    why: str | None = None
    """Why the loops were Lightning's; None where they were not, or were asked for."""
    told: list[str] = field(default_factory=list)
    """Names of the events."""
    remembered: dict[str, torch.Tensor] = field(default_factory=dict)
    """What a module or a callback keeps besides, see `lightning_shapes`."""

    def __reduce__(self) -> Any:
        """Without the module, which other processes cannot be sent."""
        others = [getattr(self, each.name) for each in fields(self)[1:]]
        return Done, (None, *others)


def fit(
    folder: Path,
    name: str,
    job: dict[str, Any],
    stop_after: int | None = None,
    *,
    stop_attribute: bool = False,
) -> Done:
    """Train `lightning_shapes.py:name` under trainer lightning.

    Args:
        folder: of the run.
        name: of the module, or its reference.
        job: sections of the job.
        stop_after: ask the training to leave after so many batches of this process.
        stop_attribute: let the module ask for that, by its attribute `stop`.
    """
    torch.set_num_threads(1)
    train = {"epochs": 2, "global_batch_size": 16, **job.get("train", {})}
    spec = JobSpec.model_validate(
        {
            "name": "lit",
            "task": name if ":" in name else f"lightning_shapes.py:{name}",
            "trainer": "lightning",
            "seed": SEED,
            "log": {"every_steps": 1},
            "eval": {"every_epochs": 1},
            **job,
            "train": train,
        }
    )
    run = RunDir(folder)
    run.create()
    ranks, stop = RankInfo.from_env(), StopFlag()
    task = load_task(spec.task, spec.args, JOBS, "lightning")
    assert isinstance(task, ModuleTask)
    made: list[Any] = []
    make = task._make

    def kept() -> Any:
        module = make()
        made.append(module)
        if stop_attribute:
            module.stop = stop
        if stop_after is not None:
            _stop_after(module, stop_after, stop)
        return module

    task._make = kept
    context = TrainContext(spec, run, ranks, 0, task, torch.device("cpu"), 1, stop, code_dir=JOBS)
    result = catalog.load("trainer", "lightning")(context).run()
    module = made[-1]
    told = events(run)
    why = [each["why"] for each in told if each["event"] == "own_loops"]
    metrics = {n: float(each) for n, each in module.trainer.callback_metrics.items()}
    state = {n: whole(each.detach()).clone() for n, each in module.state_dict().items()}
    return Done(
        module,
        state,
        metrics,
        result.steps,
        result.stopped,
        why[-1] if why else None,
        [each["event"] for each in told],
        dict(getattr(module, "remembered", {})),
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """With all its parts; all ranks call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _stop_after(module: Any, batches: int, stop: StopFlag) -> None:
    step, count = module.training_step, 0

    def counted(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == batches:
            stop.request("test")
        return step(*given)

    module.training_step = counted


class InOrder(Sampler[list[int]]):
    """dtrain's order, for Lightning's own Trainer."""

    def __init__(self, n: int, batch: int) -> None:
        self.n, self.batch, self.epoch = n, batch, 0

    def __len__(self) -> int:
        return -(-self.n // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        ids = Permutation(self.n, SEED, self.epoch).block(0, self.n).tolist()
        self.epoch += 1
        return iter([ids[i : i + self.batch] for i in range(0, self.n, self.batch)])


def by_lightning(make: Any, data: Any = None, batch: int = 16, **trainer: Any) -> Done:
    """Train with Lightning's Trainer in this process, as if dtrain were not there."""
    seed_everything(derive_seed("model", SEED))
    module = make()
    source = data or module
    loader = source.train_dataloader

    def ordered() -> Any:
        given = loader()
        if trainer.get("devices") or type(getattr(given, "sampler", None)) is not RandomSampler:
            return given
        sampler = InOrder(len(given.dataset), batch)
        return DataLoader(given.dataset, batch_sampler=sampler)

    source.train_dataloader = ordered
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet: dict[str, Any] = dict.fromkeys(names, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitter = pl.Trainer(
            accelerator="cpu", num_sanity_val_steps=0, **{**quiet, "max_epochs": 2, **trainer}
        )
        _seed_where_dtrain_does(fitter)
        fitter.fit(module, datamodule=data)
    metrics = {n: float(each) for n, each in fitter.callback_metrics.items()}
    state = {n: each.detach().clone() for n, each in module.state_dict().items()}
    kept = dict(getattr(module, "remembered", {}))
    return Done(module, state, metrics, fitter.global_step, remembered=kept)


def _seed_where_dtrain_does(fitter: Any) -> None:
    """The random numbers of the first step are dtrain's."""
    advance = fitter.fit_loop.epoch_loop.advance
    begun = False

    def seeded(fetcher: Any) -> None:
        nonlocal begun
        if not begun:
            seed_everything(derive_seed("train", SEED, 0, 0))
            begun = True
        advance(fetcher)

    fitter.fit_loop.epoch_loop.advance = seeded
