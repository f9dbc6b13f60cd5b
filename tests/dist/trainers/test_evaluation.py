"""Evaluation is exact: every sample once, one division, the same numbers on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain import Loss, Task
from dtrain.errors import UsageError
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.context import TrainContext
from dtrain.train.loop.evaluation import Evaluator
from support.errors import raises
from support.trainings import job, lines, train


class Ids(Task):
    """Evaluates to sums over the sample ids, and to whatever else a test wants."""

    def __init__(self, kind: str = "") -> None:
        self.kind = kind
        self.visited: list[int] = []

    def evaluate(self, model: nn.Module, batch: torch.Tensor) -> dict[str, Any]:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.visited += batch.tolist()
        mean = batch.double().mean()
        metrics: dict[str, Any] = {
            "mean": mean,
            "as_float": float(mean),
            "weighted": Loss((batch.double() * (batch + 1)).sum(), (batch.double() + 1).sum()),
        }
        if self.kind == "disagree" and 0 not in self.visited:
            metrics["extra"] = 1.0
        if self.kind == "weightless":
            metrics["nothing"] = Loss(torch.tensor(0.0), 0.0)
        if self.kind == "random":
            torch.rand(3)
        return metrics


def evaluate(
    n: int, kind: str = "", **sections: Any
) -> tuple[dict[str, float] | None, list[int], bool]:
    task = Ids(kind)
    context = TrainContext(
        job("ddp", **sections), RunDir("x"), RankInfo.from_env(), 0, task, torch.device("cpu")
    )
    evaluator = Evaluator(context, range(n), pin_memory=False)
    model = nn.Dropout()
    before = torch.get_rng_state()
    metrics = evaluator(model)
    evaluator.close()
    return metrics, task.visited, model.training and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("n", "batch", "workers"), [(1, 2, 0), (3, 1, 0), (7, 2, 0), (101, 8, 2)])
def test_every_sample_once_for_any_number_of_samples(n: int, batch: int, workers: int) -> None:
    results = {
        world_size: run_ranks(
            evaluate, world_size, n, eval={"batch_size": batch}, data={"workers": workers}
        )
        for world_size in (1, 4)
    }
    ids = torch.arange(n).double()
    for ranks in results.values():
        assert [i for _, visited, _ in ranks for i in visited] == list(range(n))
        for metrics, _, untouched in ranks:
            assert metrics == ranks[0][0]
            assert metrics is not None
            assert metrics["mean"] == metrics["as_float"] == pytest.approx((n - 1) / 2, abs=1e-12)
            expected = (ids * (ids + 1)).sum() / (ids + 1).sum()
            assert metrics["weighted"] == pytest.approx(expected.item(), abs=1e-12)
            assert untouched


def test_random_numbers_of_an_evaluation_do_not_reach_the_training() -> None:
    assert all(untouched for _, _, untouched in run_ranks(evaluate, 2, 9, "random"))


def test_ranks_with_other_metrics_are_an_error_on_every_rank() -> None:
    with raises("eval.metrics-differ", "extra on ranks [1]"):
        run_ranks(evaluate, 2, 9, "disagree")


def test_a_metric_without_weight_is_nan() -> None:
    for metrics, _, _ in run_ranks(evaluate, 2, 9, "weightless"):
        assert metrics is not None
        assert metrics["nothing"] != metrics["nothing"]


def test_an_evaluation_more_changes_nothing(tmp_path: Path) -> None:
    args = {"dropout": 0.3, "noise": 0.5, "held_out": 11}
    for often in (None, 2):
        spec = job("ddp", args, eval={"every_steps": often})
        run_ranks(train, 2, spec, tmp_path / str(often))
    digests = [
        [
            x["parameters_sha256"]
            for x in lines(tmp_path / name, "events")
            if x["event"] == "finished"
        ]
        for name in ("None", "2")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"train": {"early_stopping": {"metric": "mes"}}}, "train.early_stopping.metric"),
        ({"checkpoint": {"best": {"metric": "mes"}}}, "checkpoint.best.metric"),
    ],
)
def test_a_misspelt_metric_is_told_with_the_one_that_was_meant(
    section: dict[str, Any], field: str, tmp_path: Path
) -> None:
    config = job("single", {"held_out": 5}, eval={"every_steps": 1}, **section)
    with raises("eval.no-such-metric", f"{field} is 'mes'", "'mse'?", kind=UsageError):
        train(config, tmp_path)
