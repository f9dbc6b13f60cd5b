"""A fault on purpose is made, or it is said why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.errors import DtrainError
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.checks import collective_trace
from dtrain.train.context import TrainContext
from dtrain.train.loop.native import NativeTrainer
from support.errors import assert_named
from support.faults import Talkative


class Silent(Talkative):
    """Calls no collective itself, and its model has no buffers; 4 steps an epoch."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        return (model(x) - y).square().mean()


EARLY = {
    "kind=lr,step=40": ["--inject lr on rank 1: step 40 ", " 8"],
    "kind=flip-parameter-bit,param=middle": ["'middle'", " 0.weight,"],
    "kind=flip-moment-bit,param=0.bias,element=16": ["element 16 ", "0.bias's 16"],
    "kind=swap-gradient-elements,param=2.weight,element=15": ["element 16 ", "2.weight's"],
    "kind=nan-gradient,element=96": ["element 96 ", " 96"],
    "kind=flip-gradient-bit,bit=32": ["bit 32 ", " 32"],
    "kind=scale-buffer": ["no buffers"],
}
LATE = {
    "kind=skip-collective,step=3": ["no collective ", "step 3"],
    "kind=swap-collectives,step=3": ["no collective ", "step 3"],
}


def errors_of(faults: list[str], folder: Path) -> list[tuple[str, str, bool, int]]:
    """Train with each fault on rank 1.

    Returns:
        For each fault the error's code and message, whether it is collateral, and the steps done.
    """
    torch.set_num_threads(1)
    errors = []
    for number, fault in enumerate(faults):
        run = RunDir(folder / str(number))
        run.create()
        spec = JobSpec.model_validate(
            {
                "name": "t", "task": "t:T",
                "train": {"epochs": 2, "global_batch_size": 48},
                "checks": {"inject": [f"rank=1,{fault}"]},
                "log": {"every_steps": 1},
            }
        )  # fmt: skip
        collective_trace.install()
        ranks = RankInfo.from_env()
        context = TrainContext(spec, run, ranks, 0, Silent(), torch.device("cpu"))
        with pytest.raises(DtrainError) as caught:
            NativeTrainer(context).run()
        steps = run.metrics.read_text().count("\n") if run.metrics.exists() else 0
        error = caught.value
        errors.append((error.code, str(error), getattr(error, "collateral", False), steps))
    return errors


def test_a_fault_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    expected = EARLY | LATE
    results = run_ranks(errors_of, 2, list(expected), tmp_path)
    for rank, errors in enumerate(results):
        for (fault, names), (code, text, collateral, steps) in zip(
            expected.items(), errors, strict=True
        ):
            early = "job.fault-after-the-end" if "step=40" in fault else "inject.impossible"
            assert code == ("inject.never-made" if fault in LATE else early), fault
            assert_named(text, names)
            assert "\n" not in text
            assert collateral == (fault in LATE and rank == 0), fault
            assert (steps == 0) == (fault in EARLY), fault
