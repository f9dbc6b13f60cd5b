"""Every hook of Lightning's is called as often, and in the order, as by its own Trainer."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_shapes import Plain, Points
from pytorch_lightning.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from torch.utils.data import DataLoader

from dtrain.integrations.lightning import callbacks, needs_loops
from dtrain.testing import run_ranks
from support import ROOT
from support.lightning_fit import by_lightning, fit

DIARY: list[str] = []

OF_MODULE = [
    *(name for kind in (ModelHooks, DataHooks, CheckpointHooks) for name in vars(kind)),
    "backward", "configure_callbacks", "configure_gradient_clipping", "configure_optimizers",
    "lr_scheduler_step", "optimizer_step", "optimizer_zero_grad", "training_step",
    "validation_step",
]  # fmt: skip
OF_DATA = [
    *(name for kind in (DataHooks, CheckpointHooks) for name in vars(kind)),
    "on_exception", "state_dict", "load_state_dict",
]  # fmt: skip
OF_CALLBACK = list(vars(pl.Callback))


def heard(kind: Any, who: str, names: list[str], left_out: tuple[str, ...] = ()) -> Any:
    """A class that writes down which of these methods are called, with the module's own effect."""

    def noted(name: str) -> Any:
        method = getattr(kind, name)

        def called(self: Any, *given: Any, **named: Any) -> Any:
            DIARY.append(f"{who}.{name}")
            return method(self, *given, **named)

        # Lightning looks whether a hook is its own through `wraps`, and at the arguments of steps
        return functools.wraps(method)(called) if name.endswith("_step") else called

    own = {
        name: noted(name)
        for name in names
        if not name.startswith("_") and name not in left_out and callable(getattr(kind, name, None))
    }
    return type(f"Heard{kind.__name__}", (kind,), own)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(Points(50), batch_size=BATCH[0], shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Points(21, 2), batch_size=4)


BATCH = [16]


class Scheduled(Plain):
    train_dataloader = pl.LightningModule.train_dataloader
    val_dataloader = pl.LightningModule.val_dataloader

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


STEP = {
    "module": (*needs_loops._LOOP_HOOKS, "configure_callbacks"),
    "data": needs_loops._DATA_HOOKS,
    "callback": callbacks._LOOP_HOOKS,
}
"""Hooks of which one sends a module to Lightning's own loops."""
NONE: dict[str, tuple[str, ...]] = {
    "module": ("configure_callbacks", "configure_sharded_model"),
    "data": (),
    "callback": (),
}


def made(left_out: dict[str, tuple[str, ...]]) -> Any:
    listener = heard(pl.Callback, "callback", OF_CALLBACK, left_out["callback"])

    class Listened(Scheduled):
        def configure_callbacks(self) -> Any:
            return [listener()]

    return heard(Listened, "module", OF_MODULE, left_out["module"])()


def make_module(step: bool) -> Any:
    return made(STEP if step else NONE)


def make_data(step: bool = False) -> Any:
    return heard(Data, "data", OF_DATA, (STEP if step else NONE)["data"])()


def by_dtrain(folder: Path, step: bool) -> list[str]:
    """What was called under dtrain's step, or Lightning's loops."""
    DIARY.clear()
    here = f"{__name__}:make_module"
    lightning = {
        "step": "dtrain" if step else "lightning",
        "data_module": f"{__name__}:make_data",
        "data_args": {"step": step},
    }
    job = {
        "args": {"step": step},
        "lightning": lightning,
        "eval": {"every_epochs": 1, "batch_size": 4},
    }
    fit(folder, here, job)
    return list(DIARY)


def by_itself(step: bool, ranks: int) -> list[str]:
    """By Lightning's own Trainer, on as many ranks."""
    DIARY.clear()
    BATCH[0] = 16 // ranks
    more = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "here")
        by_lightning(lambda: make_module(step), make_data(step), batch=16 // ranks, **more)
    return list(DIARY)


def both(folder: Path, step: bool, ranks: int) -> tuple[list[str], list[str]]:
    return by_dtrain(folder, step), by_itself(step, ranks)


WHY = {
    ("dtrain", "callback.state_dict"): "at the start, and for each of dtrain's checkpoints",
    ("lightning", "callback.on_save_checkpoint"): "for each of dtrain's checkpoints",
    ("lightning", "callback.state_dict"): "for each of dtrain's checkpoints",
    ("lightning", "data.state_dict"): "for each of dtrain's checkpoints",
    ("lightning", "module.on_save_checkpoint"): "for each of dtrain's checkpoints",
}
"""Differences, by way and hook, and their reasons: all that there are."""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("way", ["dtrain", "lightning"])
def test_each_is_called_as_often_and_in_the_order(way: str, ranks: int, tmp_path: Path) -> None:
    for mine, theirs in run_ranks(both, ranks, tmp_path, way == "dtrain", ranks):
        counts, expected = Counter(mine), Counter(theirs)
        differing = {name for name in counts | expected if counts[name] != expected[name]}
        assert {(way, name) for name in differing} == {each for each in WHY if each[0] == way}
        assert all(expected[name] == 0 for name in differing)
        if way == "dtrain":  # whose start is another: see docs/lightning.md
            mine, theirs = _in_the_fit(mine), _in_the_fit(theirs)
        assert [e for e in mine if e not in differing] == theirs


def _in_the_fit(diary: list[str]) -> list[str]:
    begun = diary.index("callback.on_fit_start")
    return [each for each in diary[begun:] if not each.endswith("_dataloader")]


def test_the_differences_are_a_table_in_the_docs() -> None:
    rows = [f"| `{way}` | `{hook}` | {why} |" for (way, hook), why in WHY.items()]
    text = (ROOT / "docs" / "lightning.md").read_text()
    for row in ["| `lightning.step` | also called | when |", *rows]:
        assert row in text, row
