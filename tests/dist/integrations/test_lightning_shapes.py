"""Modules in the shapes of public code: they train as with Lightning's own Trainer, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning_shapes
import pytest
import torch

from dtrain.testing import run_ranks
from support import ROOT
from support.lightning_fit import Done, by_lightning, fit

FEATURES = [
    ("`automatic_optimization = False`", ["Manual"]),
    ("several optimizers, toggled, for example in a GAN", ["Gan"]),
    ("`ReduceLROnPlateau` on a metric", ["Plateau"]),
    ("`optimizer_step()`, `lr_scheduler_step()`, `optimizer_zero_grad()`", ["WarmUp"]),
    ("the same around a wrapped optimizer", ["WrappedWarmUp"]),
    ("`configure_gradient_clipping()`", ["Clips"]),
    ("your own sampler", ["OwnSampler"]),
    ("your own batch sampler", ["OwnBatchSampler"]),
    ("several training loaders", ["SeveralLoaders"]),
    ("`on_after_backward()`, `on_before_optimizer_step()`", ["StepHooks"]),
    ("`on_save_checkpoint()` of the module", ["EmaInCheckpoint"]),
    ("`EMAWeightAveraging`", ["Averaged"]),
    ("an average in the state of a callback", ["EmaInCallback"]),
    ("a stream without a length, manual optimization", ["Stream"]),
    ("torchmetrics in `training_step`", ["Counted", "CountedByHand"]),
    ("`trainer.estimated_stepping_batches` and similar properties", ["Length"]),
    ("`all_gather()` in the loss", ["Gathers"]),
    ("`on_train_batch_start()` returns -1", ["Short"]),
    ("layers made in `setup()`, `configure_model()`", ["LateLayers"]),
    ("`batch_size=None`", ["ReadyBatches"]),
    ("`on_validation_batch_end()` of a callback", ["ValidationHooks"]),
    ("transfer hooks of a data module", ["WithoutLoaders", "WithoutLoadersByHand"]),
    ("a DataLoader with its own `__iter__()`", ["OwnIterator"]),
    ("`training_step()` returns None", ["Skips"]),
    ("no optimizer", ["NoOptimizer"]),
    ("a step that reads `automatic_optimization`", ["Asks"]),
    ('`[optimizer], {"scheduler": ...}`', ["BareDict"]),
    ('`"lr_scheduler": {}`', ["EmptyDict"]),
    ("`trainer.train_dataloader.dataset`", ["AsksLoader", "AsksLoaderByHand"]),
    ("`GradientAccumulationScheduler`", ["Accumulates"]),
    ("a constructor that takes objects, called by a function", ["with_objects"]),
]
"""What public modules do, and the modules here that do it."""

OURS = {
    "Plain", "Counted", "Length", "LateLayers", "ValidationHooks", "Asks", "BareDict",
    "EmptyDict", "AsksLoader", "EmaInCallback", "with_objects", "WithoutLoaders", "OwnSampler",
}  # fmt: skip
"""Those that dtrain's step trains."""

SHAPES = {"Plain", *(name for _, names in FEATURES for name in names)}
THEIRS = SHAPES - OURS
"""Those of which the loops are Lightning's."""

DATA = {"lightning": {"data_module": "lightning_shapes.py:Transfers"}}
JOBS: dict[str, dict[str, Any]] = {
    "with_objects": {"args": {"lr": 0.1}},
    "OwnBatchSampler": {"lightning": {"trainer": {"use_distributed_sampler": False}}},
    "WithoutLoaders": DATA,
    "WithoutLoadersByHand": DATA,
}
OWN_READING = {
    "OwnSampler",
    "OwnBatchSampler",
    "SeveralLoaders",
    "Stream",
    "ReadyBatches",
    "OwnIterator",
}


def close(mine: Done, theirs: Done, metrics: bool = True) -> None:
    assert mine.parameters.keys() == theirs.parameters.keys()
    for name, value in theirs.parameters.items():
        torch.testing.assert_close(mine.parameters[name], value, rtol=0, atol=2e-6)
    for name, value in theirs.remembered.items():
        torch.testing.assert_close(mine.remembered[name], value, rtol=0, atol=2e-6)
    if metrics:
        assert mine.metrics == pytest.approx(theirs.metrics, abs=2e-6)


WITHOUT_METRICS = {"Short", "Stream"}
"""Lightning does not validate at the end of these epochs; here what training ends with is."""


def reference(name: str) -> Done:
    make = getattr(lightning_shapes, {"EmptyDict": "Plain"}.get(name, name))
    args = JOBS.get(name, {}).get("args", {})
    data = lightning_shapes.Transfers() if JOBS.get(name) is DATA else None
    return by_lightning(lambda: make(**args), data)


@pytest.mark.parametrize("name", sorted((OURS | THEIRS) - {"OwnBatchSampler"}))
def test_on_one_rank_as_with_lightnings_own_trainer(name: str, tmp_path: Path) -> None:
    mine = fit(tmp_path, name, JOBS.get(name, {}))
    assert (mine.why is None) == (name in OURS), mine.why
    close(mine, reference(name), metrics=name not in WITHOUT_METRICS)


STOP = dict.fromkeys([*OWN_READING, "Short", "OwnSampler"], 3)
"""After how many batches a training is left."""


def twice(folder: Path, names: list[str]) -> list[tuple[Done, Done, Done]]:
    """Each unbroken; left after a few batches; and resumed from there."""
    return [
        (
            fit(folder / name / "whole", name, job(name)),
            fit(folder / name / "cut", name, job(name), stop_after=STOP.get(name, 5)),
            fit(folder / name / "cut", name, job(name)),
        )
        for name in names
    ]


def job(name: str) -> dict[str, Any]:
    return {**JOBS.get(name, {}), "checkpoint": {"every_steps": 3}}


SEVERAL = sorted(SHAPES - {"Skips"})
"""Lightning refuses to skip a batch on several ranks."""


@pytest.mark.parametrize(
    "names", [SEVERAL[i : i + 6] for i in range(0, len(SEVERAL), 6)], ids="-".join
)
def test_on_two_ranks_left_and_resumed_in_mid_epoch(names: list[str], tmp_path: Path) -> None:
    """The same bits as unbroken; and where dtrain deals out the samples, as on one rank."""
    for ranks in run_ranks(twice, 2, tmp_path, names):
        for name, (whole, cut, resumed) in zip(names, ranks, strict=True):
            assert cut.stopped == "test", name
            assert 0 < cut.steps < whole.steps == resumed.steps, name
            for key, value in {**whole.parameters, **whole.remembered}.items():
                mine = {**resumed.parameters, **resumed.remembered}[key]
                assert torch.equal(mine, value), (name, key)
            assert resumed.metrics == whole.metrics, name
    for name, (whole, _, _) in zip(names, ranks, strict=True):
        if name not in OWN_READING and name not in ALONE:
            close(whole, fit(tmp_path / name / "one", name, JOBS.get(name, {})), metrics=False)


ALONE = {"Clips", "StepHooks", "NoOptimizer"}
"""What they make of a gradient is not the sum of what they make of its parts."""


def test_the_features_are_a_table_in_the_docs() -> None:
    text = (ROOT / "docs" / "lightning.md").read_text()
    for feature, names in FEATURES:
        ways = ["dtrain's step" if name in OURS else "Lightning's loops" for name in names]
        assert f"| {feature} | {' or '.join(ways)} |" in text
