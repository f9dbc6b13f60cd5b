"""Parameters that some steps, ranks or samples do not use: one training under every strategy.

An optimizer treats a gradient of zero unlike none: AdamW decays the weight and counts a step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from dtrain import Loss
from dtrain.testing import run_ranks
from support.trainings import Outcome, Regression, job, train

BATCH, STEPS, LAYERS = 6, 7, 3
LAST = 4
"""Samples of the last step, which ends the epoch: fewer than the others have."""

Uses = list[list[list[bool]]]
"""Step → conditional layer → for each sample of the step, whether it uses the layer."""


def begun_whole(uses: Uses, steps: int) -> Uses:
    """The same, with all layers used by all samples in the first steps."""
    return [[[True] * BATCH] * LAYERS] * steps + uses[steps:]


covers = st.sampled_from(
    [[letter == "x" for letter in word] for word in (
        "......", "......", "xxxxxx", "xxxxxx", "xxx...", "...xxx", "x.....", ".....x", "xx..xx",
    )]
)  # fmt: skip
cases = st.fixed_dictionaries(
    {
        "uses": st.lists(
            st.lists(covers, min_size=LAYERS, max_size=LAYERS), min_size=STEPS, max_size=STEPS
        ),
        "micro": st.sampled_from([None, None, 1, 2]),
        "recomputed": st.sampled_from([None, "reentrant", "saved"]),
        "stop": st.integers(1, STEPS - 1),
        "whole": st.integers(0, 3),
    }
).map(lambda case: {**case, "uses": begun_whole(case["uses"], case.pop("whole"))})


class Layers(nn.Module):
    """Layers that only some samples go through, between two of all samples.

    They are in lists, so that `fsdp` gathers each by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.all = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.some = nn.ModuleList([nn.Linear(8, 8) for _ in range(LAYERS)])
        self.last = nn.Linear(8, 1)

    def predict(self, x: torch.Tensor, uses: torch.Tensor, recomputed: str | None) -> torch.Tensor:
        hidden = torch.tanh(self.all[0](torch.tanh(self.first(x))))
        for index, layer in enumerate(self.some):
            rows = uses[:, index]
            if not rows.any():
                continue
            given = hidden[rows]
            if recomputed is None:
                made = layer(given)
            else:
                made = checkpoint(layer, given, use_reentrant=recomputed == "reentrant")
            hidden = hidden.index_put((rows.nonzero()[:, 0],), torch.tanh(made))
        return self.last(torch.tanh(self.all[1](hidden)))


class Conditional(Regression):
    """Samples in turn, each with the layers that it uses."""

    def __init__(self, uses: Uses, recomputed: str | None = None, **args: Any) -> None:
        number = BATCH * (STEPS - 1) + LAST
        super().__init__(n=number, optimizer="adamw", dtype="float64", **args)
        table = torch.tensor(uses).permute(0, 2, 1).reshape(-1, LAYERS)
        self.uses, self.recomputed = table[:number], recomputed

    def model(self) -> nn.Module:
        return Layers().to(self.dtype)

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        out = model.predict(batch["x"], self.uses[batch["i"]], self.recomputed)
        return Loss((out - batch["y"]).square().sum(), len(out))


def trained(strategy: str, some: list[dict[str, Any]], folder: Path, broken: bool) -> list[Outcome]:
    """Each case in one go, or left after some steps and resumed."""
    outcomes = []
    for index, case in enumerate(some):
        sizes = {"global_batch_size": BATCH, "micro_batch_size": case["micro"], "steps": STEPS}
        place = folder / f"{strategy}-{index}-{broken}"
        args = {"uses": case["uses"], "recomputed": case["recomputed"]}
        sections = {"train": {**sizes, "virtual_shards": BATCH}, "data": {"shuffle": False}}
        if broken:
            stopping = {**args, "stop_after": case["stop"]}
            train(job(strategy, stopping, **sections), place, 2, Conditional)
        outcomes.append(train(job(strategy, args, **sections), place, 2, Conditional))
    return outcomes


def assert_same_training(
    some: list[dict[str, Any]], folder: Path, strategies: tuple[tuple[str, int], ...]
) -> None:
    """Strategies against one process in fp64, and every resume against the unbroken run."""
    reference = trained_on(1, "single", some, folder, broken=False)
    for strategy, processes in strategies:
        place = folder / f"{strategy}-{processes}"
        unbroken = trained_on(processes, strategy, some, place, broken=False)
        resumed = trained_on(processes, strategy, some, place, broken=True)
        for case, one, other, again in zip(some, reference, unbroken, resumed, strict=True):
            for name, value in one.parameters.items():
                message = f"{strategy} ×{processes}, {name}, {case}"
                np.testing.assert_allclose(
                    other.parameters[name], value, rtol=1e-10, atol=1e-12, err_msg=message
                )
                np.testing.assert_array_equal(
                    again.parameters[name], other.parameters[name], err_msg=f"resumed {message}"
                )


def trained_on(
    processes: int, strategy: str, some: list[dict[str, Any]], folder: Path, *, broken: bool
) -> list[Outcome]:
    outcomes = run_ranks(trained, processes, strategy, some, folder, broken)
    return outcomes[0]


ALL, NONE = [True] * BATCH, [False] * BATCH
FIRST_HALF = [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    "uses",
    [
        pytest.param([ALL, ALL, NONE, ALL, NONE, ALL, ALL], id="first-unused-in-step-3"),
        pytest.param([ALL, NONE, ALL, NONE, ALL, NONE, ALL], id="every-second-step"),
        pytest.param([FIRST_HALF, ALL, FIRST_HALF, NONE, ALL, NONE, NONE], id="on-one-rank"),
    ],
)
def test_a_layer_that_a_step_does_not_use(uses: list[list[bool]], tmp_path: Path) -> None:
    case = {"uses": [[rows] * LAYERS for rows in uses], "micro": None, "recomputed": None}
    stops = [{**case, "stop": stop} for stop in (1, 2, 3)]
    assert_same_training(stops, tmp_path, (("ddp", 2), ("ddp", 3)))


@given(st.lists(cases, min_size=3, max_size=3))
@settings(
    max_examples=2, deadline=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_any_layers_used_by_any_samples(
    tmp_path_factory: pytest.TempPathFactory, some: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    assert_same_training(some, folder, (("ddp", 2), ("exact", 2), ("fsdp", 2), ("dp", 1)))
