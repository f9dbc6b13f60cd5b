"""Parameter groups that are added while training."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dtrain import Callback
from dtrain.callback import Session
from dtrain.testing import run_ranks
from support.errors import raises
from support.trainings import Outcome, Regression, job, same_end, train

RANKS = {"single": 1, "ddp": 2, "fsdp": 2, "exact": 2}


class Adds(Callback):
    """Gives the optimizer the first layer after step 3."""

    def __init__(self, task: Any) -> None:
        self.task = task

    def on_step(self, session: Session, loss: float) -> None:
        if session.step == 3:
            self.task.add(session.model, session.optimizer)


class Growing(Regression):
    """Trains its last layer, and from step 4 on the first one too."""

    frozen = False

    def model(self) -> nn.Module:
        model = super().model()
        for parameter in model.first.parameters():
            parameter.requires_grad_(not self.frozen)
        return model

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.last.parameters(), lr=0.1, momentum=0.9)
        optimizer.register_step_post_hook(self._after_step)
        return optimizer

    def add(self, model: Any, optimizer: Any) -> None:
        for parameter in model.first.parameters():
            parameter.requires_grad_(True)
        optimizer.add_param_group({"params": model.first.parameters(), "lr": 0.05})

    def scheduler(self, optimizer: torch.optim.Optimizer) -> None:
        return None

    def callbacks(self) -> list[Any]:
        return [Adds(self)]


def run(
    strategy: str, folder: Path, kind: type[Regression] = Growing, **args: Any
) -> list[Outcome]:
    section: dict[str, Any] = {"clip_grad_norm": 0.05, "steps": 8}
    if strategy == "exact":
        section["virtual_shards"] = 4
    spec = job(strategy, {"weighted": True, **args}, train=section)
    return run_ranks(functools.partial(train, kind=kind), RANKS[strategy], spec, folder)


class Thawing(Growing):
    """The first layer is frozen until then."""

    frozen = True


@pytest.mark.parametrize("kind", [Growing, Thawing])
@pytest.mark.parametrize("strategy", RANKS)
def test_an_added_group_is_clipped_saved_and_restored(
    strategy: str, kind: type[Growing], tmp_path: Path
) -> None:
    unbroken = run(strategy, tmp_path / "unbroken", kind)
    run(strategy, tmp_path / "broken", kind, stop_after=5)
    same_end(unbroken, run(strategy, tmp_path / "broken", kind))
    one = run("single", tmp_path / "single", kind)[0].parameters
    for name, value in one.items():
        np.testing.assert_allclose(unbroken[0].parameters[name], value, rtol=1e-5, atol=1e-6)


class Stranger(Growing):
    """Adds a layer that the model did not have."""

    def add(self, model: Any, optimizer: Any) -> None:
        model.more = nn.Linear(2, 3)
        optimizer.add_param_group({"params": model.more.weight})


def test_a_parameter_that_the_model_did_not_have_is_refused(tmp_path: Path) -> None:
    with raises("task.optimizer-foreign-parameters", "(3, 2)") as caught:
        run("ddp", tmp_path, Stranger)
    assert re.search(r"(?s)in on_step\n.*in add\n", str(caught.value))
