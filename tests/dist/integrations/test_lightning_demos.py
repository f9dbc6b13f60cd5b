"""Lightning's demos, and templates like its examples, train as with Lightning's own Trainer."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning_demos as demos
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.demos import boring_classes as boring
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from dtrain.integrations.lightning.user_loaders import seeded_by_job
from dtrain.ranks import RankInfo
from dtrain.testing import run_ranks
from dtrain.train.seeding import derive_seed, seed_everything
from support.lightning_fit import SEED, Done, InOrder, by_lightning, fit

BATCH = 16
BY_HAND = "automatic_optimization = False"


@dataclass(frozen=True)
class Demo:
    """How one is trained."""

    module: Any
    data: Any = None
    why: str | None = None
    """A part of why the loops are Lightning's; None: the step is dtrain's."""
    args: dict[str, Any] = field(default_factory=dict)
    data_args: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    on_two: dict[str, Any] = field(default_factory=dict)
    """What the job has besides on two ranks."""
    steps: int | None = 8
    """Of a training; None: as many as Lightning's Trainer does on one rank."""
    reads_text: bool = False
    repeats: bool = True
    """Whether Lightning's Trainer can be given the same samples."""
    same_on_two: bool = True
    """Whether two ranks train as one does, if Lightning's Trainer can do so too."""


BORING = boring.BoringModel
BORING_DATA = boring.BoringDataModule

ONE_EPOCH = {"train": {"epochs": 1}}
LIMITS = {"limit_train_batches": 12, "limit_val_batches": 4}

DEMOS = {
    "boring": Demo(BORING),
    "boring_data": Demo(BORING, BORING_DATA),
    "manual": Demo(boring.ManualOptimBoringModel, why=BY_HAND),
    # its loss is a sum over samples, not a mean
    "demo_model": Demo(boring.DemoModel, BORING_DATA, same_on_two=False),
    # new random numbers in every pass
    "no_len": Demo(
        BORING, boring.BoringDataModuleNoLen, why="", job=ONE_EPOCH, steps=512, repeats=False
    ),
    "no_len_asked_for": Demo(
        BORING,
        boring.BoringDataModuleNoLen,
        job={"lightning": {"step": "lightning", "trainer": LIMITS}},
        steps=24,
        repeats=False,
    ),
    "no_len_scheduler": Demo(
        BORING, demos.NoLenRepeated, why="", job=ONE_EPOCH, steps=512, same_on_two=False
    ),
    "no_len_repeated": Demo(boring.DemoModel, demos.NoLenRepeated, steps=64, same_on_two=False),
    "several": Demo(
        demos.BoringOfSeveral,
        demos.SeveralRepeated,
        why="a loader of BoringOfSeveral is a list",
        steps=32,
        same_on_two=False,
    ),
    # dropout, and z of the GAN, are other random numbers on each rank
    "lstm": Demo(
        demos.LocalLSTM,
        why="SequenceSampler",
        on_two={"lightning": {"trainer": {"use_distributed_sampler": False}}},
        reads_text=True,
        same_on_two=False,
    ),
    "transformer": Demo(demos.LocalTransformer, steps=6, reads_text=True, same_on_two=False),
    "gan": Demo(demos.GAN, why=BY_HAND, args={"width": 12}, same_on_two=False),
    "dqn": Demo(demos.DQN, steps=6, args={"sync_every": 2}, same_on_two=False),
    "reinforce": Demo(
        demos.Reinforce, job={"data": {"stream": "sharded"}}, steps=None, same_on_two=False
    ),
    "autoencoder": Demo(demos.Autoencoder, demos.Curves, args={"hidden": 6}),
    "images": Demo(demos.ImageClassifier, demos.Images, steps=6),
    "images_demo_net": Demo(
        demos.ImageClassifier,
        demos.Images,
        args={"net": "demo", "lr": 0.01},
        data_args={"size": 28},
        job=ONE_EPOCH,
        steps=3,
        same_on_two=False,
    ),
}


def named(kind: Any) -> str:
    """As a job names it: one of Lightning's by its package."""
    where = kind.__module__
    return f"{where if '.' in where else where + '.py'}:{kind.__name__}"


def arguments(demo: Demo, folder: Path) -> dict[str, Any]:
    return {**demo.args, **({"folder": str(folder / "text")} if demo.reads_text else {})}


def by_dtrain(name: str, folder: Path) -> Done:
    demo = DEMOS[name]
    job: dict[str, Any] = {**demo.job, "args": arguments(demo, folder)}
    if RankInfo.from_env().world_size > 1:
        job |= demo.on_two
    if demo.data is not None:
        data = {"data_module": named(demo.data), "data_args": demo.data_args}
        job["lightning"] = {**job.get("lightning", {}), **data}
    return fit(folder / "run", named(demo.module), job)


def initial(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of a demo before its first step."""
    demo = DEMOS[name]
    seed_everything(derive_seed("model", SEED))
    state: dict[str, torch.Tensor] = demo.module(**arguments(demo, folder)).state_dict()
    return state


def reference(name: str, folder: Path) -> Done:
    """What Lightning's own Trainer makes of a demo, with the samples that dtrain gives it.

    What a loader draws for itself comes from a generator of its own: dtrain's reading leaves
    alone the global one, which dropout and a GAN draw from.
    """
    demo = DEMOS[name]
    make = functools.partial(demo.module, **arguments(demo, folder))
    data = None
    if demo.data is not None:  # it is made after the module
        seed_everything(derive_seed("model", SEED))
        make()
        data = demo.data(**demo.data_args)
        _read_as_by_dtrain(data, demo)

    def made() -> Any:
        module = make()
        if data is None:
            _read_as_by_dtrain(module, demo)
        return module

    epochs = demo.job.get("train", {}).get("epochs", 2)
    return by_lightning(made, data, max_epochs=epochs)


def _read_as_by_dtrain(source: Any, demo: Demo) -> None:
    """Let the loaders of a module or a data module give what dtrain reads of them."""
    setup, train, val = source.setup, source.train_dataloader, source.val_dataloader

    def seeded_setup(stage: str) -> None:
        seed_everything(derive_seed("train_dataset", SEED))
        setup(stage)

    def in_order() -> Any:
        with seeded_by_job("train_dataloader", SEED):
            loader = train()
        if isinstance(loader, list):
            return [_with_own_generator(each) for each in loader]
        data, own = loader.dataset, torch.Generator()
        stream = isinstance(data, IterableDataset)
        if stream and demo.why is None:
            return DataLoader(data, batch_size=BATCH, generator=own)
        if stream or type(loader.batch_sampler) is not BatchSampler:
            return _with_own_generator(loader)
        return DataLoader(data, batch_sampler=InOrder(len(data), BATCH), generator=own)

    def validated() -> Any:
        with seeded_by_job("val_dataloader", SEED):
            loaders = val()
        for each in loaders if isinstance(loaders, list) else [loaders]:
            _with_own_generator(each)
        return loaders

    source.setup, source.train_dataloader = seeded_setup, in_order
    if is_overridden("val_dataloader", source):
        source.val_dataloader = validated


def _with_own_generator(loader: Any) -> Any:
    loader.generator = torch.Generator()
    return loader


def close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", sorted(DEMOS))
def test_on_one_rank_as_with_lightnings_own_trainer(name: str, tmp_path: Path) -> None:
    demo = DEMOS[name]
    mine = by_dtrain(name, tmp_path)
    assert (mine.why is None) == (demo.why is None), mine.why
    assert (demo.why or "") in (mine.why or "")
    if not demo.repeats:
        assert mine.steps == demo.steps
        return
    theirs = reference(name, tmp_path)
    assert mine.steps == (theirs.steps if demo.steps is None else demo.steps)
    close(mine.parameters, theirs.parameters)
    assert mine.metrics == pytest.approx(theirs.metrics, abs=2e-6)


@pytest.mark.parametrize("name", sorted(DEMOS))
def test_on_two_ranks(name: str, tmp_path: Path) -> None:
    demo = DEMOS[name]
    first, second = run_ranks(by_dtrain, 2, name, tmp_path)
    assert (first.why is None) == (demo.why is None), first.why
    assert first.stopped is None
    assert first.steps == second.steps > 0
    assert demo.steps in (None, first.steps)
    for key, value in first.parameters.items():
        assert torch.equal(second.parameters[key], value), key
        assert value.isfinite().all(), key
    before = initial(name, tmp_path)
    assert any(not torch.equal(value, before[key]) for key, value in first.parameters.items())
    if demo.repeats and demo.same_on_two:
        theirs = reference(name, tmp_path)
        close(first.parameters, theirs.parameters)
        val = {key: each for key, each in theirs.metrics.items() if key.startswith("val")}
        assert {key: first.metrics[key] for key in val} == pytest.approx(val, abs=2e-6)


def test_a_module_that_dtrain_trained_is_tested_by_lightning(tmp_path: Path) -> None:
    def tested(done: Done) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few loader processes, as in the harness
            trainer = pl.Trainer(
                accelerator="cpu", logger=False, enable_progress_bar=False,
                enable_model_summary=False, default_root_dir=tmp_path,
            )  # fmt: skip
            return trainer.test(done.module, datamodule=demos.Images(), verbose=False)

    (mine,), (theirs,) = (
        tested(by_dtrain("images", tmp_path)),
        tested(reference("images", tmp_path)),
    )
    assert mine.keys() == {"test_loss", "test_acc"}
    assert mine == pytest.approx(theirs, abs=2e-6)
