"""Ordinary tasks under every strategy: `verify` raises no false alarm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dtrain.train.load import load_task
from dtrain.verification.judge import Judge
from dtrain.verification.layouts import Layout
from dtrain.verification.rules import BATCH_NORM
from support import JOBS
from support.errors import assert_named
from support.warm_runner import WarmRunner

LAYOUTS = (
    Layout("dp", procs=2),
    Layout("ddp", procs=2, micro_batch_size=3, resume_after=2),
    Layout("fsdp", procs=2),
    Layout("exact", procs=2),
)
NOISY = {"Attention", "Diffusion", "FunctionalDropout", "NumPyNoise", "Recomputed"}
"""Tasks whose loss draws random numbers."""


def judge(name: str, folder: Path, *overrides: str) -> Judge:
    runner = WarmRunner(
        JOBS / "clean" / "job.yaml",
        overrides=(f"task=clean.py:{name}", *overrides),
        max_train_samples=65,  # 24, 24 and 17 a step: two for each of exact's shards
        max_eval_samples=41,
        keep=folder,
    )
    return Judge(runner)


@pytest.mark.parametrize(
    "name",
    [
        "Mean", "FunctionalDropout", "Convolution", "Diffusion", "NumPyNoise", "Adapted", "Tied",
        "Attention", "Recomputed", "RareHead", "Augmented", "Stream", "Weighted", "Clipped",
    ],
)  # fmt: skip
def test_no_strategy_is_called_another_training(name: str, tmp_path: Path) -> None:
    results = list(judge(name, tmp_path).judge(LAYOUTS))
    wrong = [(r.layout.name, r.verdict, r.finding, r.failure) for r in results if not r.passed]
    assert wrong == []
    # under dp the replicas may draw the same numbers, one after the other
    assert any(result.fixed_noise for result in results) == (name in NOISY)


def test_stored_weights_are_the_start_of_a_resumed_training_too(tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = tmp_path / "weights.pt"
    torch.save(load_task("clean.py:Plain", {}, JOBS / "clean").model().state_dict(), source)
    judged = judge("Plain", tmp_path, f"checkpoint.init_from={source}").judge(LAYOUTS[1:2])
    assert [(each.verdict, each.finding, each.failure) for each in judged] == [("same", None, "")]


def test_an_average_of_the_weights_is_the_same_wherever_it_can_be(tmp_path: Path) -> None:
    results = list(judge("Averaged", tmp_path).judge(LAYOUTS))
    failed = [(result.layout.strategy, result.failure) for result in results if not result.passed]
    ((strategy, failure),) = failed
    assert strategy == "fsdp"
    assert_named(failure, ["DtrainError: strategy 'fsdp' ", "dtrain.EMA needs whole weights"])


def test_batch_norm_is_another_training_but_under_exact(tmp_path: Path) -> None:
    for result in judge("BatchNorm", tmp_path).judge(LAYOUTS):
        if result.layout.is_exact:
            continue
        assert result.finding is not None, result
        assert result.finding.rule == BATCH_NORM
