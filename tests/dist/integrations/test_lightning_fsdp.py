"""Strategy `fsdp` in Lightning's own loops: the training of `ddp`, each process with a part."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning_shapes
import pytest
import pytorch_lightning as pl
import torch

from dtrain.testing import run_ranks
from support.errors import raises
from support.lightning_fit import Done, fit

AUTOMATIC = [
    "Accumulates",
    "Clips",
    "Counted",
    "Gathers",
    "LateLayers",
    "lightning_parts.py:OwnParameters",
    "SeveralLoaders",
    "WrappedWarmUp",
]
MANUAL = [
    "CountedByHand",
    "Gan",
    "Manual",
    "Stream",
    "lightning_parts.py:ByClosure",
    "lightning_parts.py:UsedBySome",
]

STOP = {"SeveralLoaders": 3, "Stream": 3}
"""After how many batches a training is left."""


def job(strategy: str) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "lightning": {"step": "lightning", "find_unused": True},  # of DDP
        "checkpoint": {"every_steps": 3},
    }


def trainings(folder: Path, names: list[str]) -> list[tuple[Done, Done, Done]]:
    """Of each under `ddp`, unbroken under `fsdp`, and resumed in mid-epoch."""
    found = []
    for name in names:
        place = folder / name.rpartition(":")[2]
        ddp = fit(place / "ddp", name, job("ddp"))
        whole = fit(place / "whole", name, job("fsdp"))
        cut = fit(place / "cut", name, job("fsdp"), stop_after=STOP.get(name, 5))
        assert cut.stopped == "test"
        assert 0 < cut.steps < whole.steps
        found.append((ddp, whole, fit(place / "cut", name, job("fsdp"))))
    return found


@pytest.mark.parametrize("names", [AUTOMATIC, MANUAL], ids=["automatic", "manual"])
def test_it_is_the_training_of_ddp_and_resumes_in_mid_epoch(
    names: list[str], tmp_path: Path
) -> None:
    for ranks in run_ranks(trainings, 2, tmp_path, names):
        for name, (ddp, whole, resumed) in zip(names, ranks, strict=True):
            for key, value in ddp.parameters.items():
                close(whole.parameters[key], value)
                assert torch.equal(resumed.parameters[key], whole.parameters[key]), (name, key)
            assert whole.metrics == pytest.approx(ddp.metrics, abs=2e-6), name
            assert resumed.metrics == whole.metrics, name
            if "held" in ddp.remembered:
                assert float(whole.remembered["held"]) <= 0.6 * float(ddp.remembered["held"])


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)


def one(folder: Path, name: str, strategy: str, stop: int | None = None) -> Done:
    train = {"global_batch_size": 15}
    return fit(folder, name, {**job(strategy), "train": train}, stop_after=stop)


def test_a_checkpoint_moves_to_another_strategy_and_number_of_ranks(tmp_path: Path) -> None:
    """From two ranks of `fsdp` to three, to `ddp`, and to one process."""
    expected = one(tmp_path / "one", "Gan", "single")
    run_ranks(one, 2, tmp_path / "moved", "Gan", "fsdp", 2)
    run_ranks(one, 3, tmp_path / "moved", "Gan", "fsdp", 2)
    run_ranks(one, 2, tmp_path / "moved", "Gan", "ddp", 2)
    moved = one(tmp_path / "moved", "Gan", "single")
    assert moved.steps == expected.steps == 8
    for key, value in expected.parameters.items():
        close(moved.parameters[key], value)


def test_files_of_lightnings_callbacks_are_whole(tmp_path: Path) -> None:
    """Another Trainer goes on from them, in one process."""
    done = run_ranks(one, 2, tmp_path, "Saves", "fsdp")[0]
    (last,) = (tmp_path / "lightning").rglob("*step=6.ckpt")
    state = torch.load(last)["state_dict"]
    assert state.keys() == done.parameters.keys()
    module = lightning_shapes.Saves()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=8, accelerator="cpu", logger=False, default_root_dir=tmp_path
        )
        trainer.fit(module, ckpt_path=last)
    assert trainer.global_step == 8
    assert not torch.equal(module.net[0].weight, state["net.0.weight"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_module_that_cuts_itself_is_refused(strategy: str, tmp_path: Path) -> None:
    with raises("task.model-wrapped", "CutsItself", "net.0 is already wrapped in FSDP"):
        run_ranks(one, 2, tmp_path, "lightning_parts.py:CutsItself", strategy)


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("Averaged", "lightning.average-of-parts", "EMAWeightAveraging"),
        ("Swa", "lightning.average-of-parts", "StochasticWeightAveraging"),
        ("EmaInCallback", "checkpoint.part-of-tensor", "['net.0.weight']"),
    ],
)
def test_what_keeps_copies_of_parts_is_refused(
    name: str, code: str, words: str, tmp_path: Path
) -> None:
    with raises(code, words):
        run_ranks(one, 2, tmp_path, name, "fsdp", 5)
