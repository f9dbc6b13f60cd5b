"""Parameters that are frozen and unfrozen between steps: one training under every strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from dtrain import Callback
from dtrain.callback import Session
from dtrain.testing import run_ranks
from support.trainings import Regression, job, train

STEPS = 6

Frozen = dict[int, list[str]]
"""Steps done → what is frozen from then on, by how names begin; 0 for the model as it is made."""


class Freezing(Callback):
    """Freezes layers after some steps."""

    def __init__(self, frozen: Frozen) -> None:
        self.frozen = frozen

    def on_step(self, session: Session, loss: float) -> None:
        freeze(session.model, self.frozen.get(session.step))


def freeze(model: nn.Module, layers: list[str] | None) -> None:
    if layers is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(layers)))


class GradualRegression(Regression):
    """A training in which layers are frozen and unfrozen."""

    def __init__(self, frozen: Frozen, **args: Any) -> None:
        super().__init__(dtype="float64", optimizer="adamw", **args)
        self.frozen = frozen

    def model(self) -> nn.Module:
        model = super().model()
        freeze(model, self.frozen.get(0))
        return model

    def callbacks(self) -> list[Callback]:
        return [Freezing(self.frozen)]


CASES: list[Frozen] = [
    {2: ["first"], 4: []},
    {0: ["first"], 1: ["first.bias"], 3: []},
    {0: ["last"], 2: ["first"], 3: ["last"], 4: ["first.w", "last.b"], 5: []},
]


def trained(strategy: str, folder: Path, stop_after: int | None) -> list[dict[str, Any]]:
    """The parameters of each case."""
    sizes = {"global_batch_size": 8, "virtual_shards": 4, "steps": STEPS, "micro_batch_size": 3}
    ends = []
    for index, frozen in enumerate(CASES):
        place = folder / str(index)
        for stop in [stop_after, None] if stop_after else [None]:
            args = {"frozen": frozen, "stop_after": stop}
            spec = job(strategy, args, train=sizes, checks={"every_steps": 1})
            end = train(spec, place, 2, GradualRegression)
        ends.append(end.parameters)
    return ends


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """In one process."""
    return run_ranks(trained, 1, "single", tmp_path_factory.mktemp("single"), None)[0]


@pytest.mark.parametrize(
    ("strategy", "processes"), [("ddp", 2), ("ddp", 3), ("fsdp", 2), ("exact", 2), ("dp", 1)]
)
def test_frozen_and_unfrozen(
    strategy: str, processes: int, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    unbroken = run_ranks(trained, processes, strategy, tmp_path / "a", None)[0]
    resumed = run_ranks(trained, processes, strategy, tmp_path / "b", 3)[0]
    for case, one, other, again in zip(CASES, reference, unbroken, resumed, strict=True):
        for name, value in one.items():
            message = f"{strategy} ×{processes}, {name}, {case}"
            np.testing.assert_allclose(other[name], value, rtol=1e-9, atol=1e-12, err_msg=message)
            np.testing.assert_array_equal(again[name], other[name], err_msg=f"resumed {message}")
