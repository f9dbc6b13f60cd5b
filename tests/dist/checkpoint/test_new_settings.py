"""Settings that a resume is given: each is used, or refused, or said to have no effect."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain import Callback
from dtrain.callback import Session
from dtrain.errors import UsageError
from dtrain.testing import run_ranks
from support.errors import assert_named, raises
from support.trainings import Outcome, Regression, job, lines, train


@pytest.fixture(autouse=True)
def _caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch sets it for good


class Rated(Regression):
    """Its rate, and the length of its schedule, are arguments."""

    per_rank = False
    lowers = False

    def __init__(
        self,
        lr: float = 0.1,
        decay: float = 0.01,
        length: int | None = None,
        kind: str = "SGD",
        **args: Any,
    ) -> None:
        super().__init__(**args)
        self.given = lr, decay, length, kind
        self.used: list[tuple[float, float]] = []

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        lr, decay, _, kind = self.given
        size = torch.distributed.get_world_size() if self.per_rank else 1
        made: torch.optim.Optimizer = getattr(torch.optim, kind)(
            [{"params": [p]} for p in model.parameters()], lr=lr * size, weight_decay=decay
        )
        made.register_step_pre_hook(self._note)
        made.register_step_post_hook(self._after_step)
        return made

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        length = self.given[2]
        if length is None:
            return None
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=length)

    def callbacks(self) -> list[Any]:
        return [Lowers()] if self.lowers else []

    def _note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates = {(each["lr"], each["weight_decay"]) for each in optimizer.param_groups}
        self.used += rates
        type(self).last = self  # type: ignore[attr-defined]


class Lowers(Callback):
    def on_step(self, session: Session, loss: float) -> None:
        for group in session.optimizer.param_groups:
            group["lr"] = 0.03


class Lowering(Rated):
    lowers = True


class PerRank(Rated):
    per_rank = True


def stopping(kind: type[Rated] = Rated) -> type[Rated]:
    """One that is asked to leave in its second step, whatever its arguments."""

    def built(self: Any, **args: Any) -> None:
        kind.__init__(self, **args)
        self.stop_after = 2

    return type("Stopping", (kind,), {"__init__": built})


def go(folder: Path, task: type[Rated] = Rated, train_section: Any = None, **args: Any) -> Outcome:
    return train(job("single", args, train=train_section or {}), folder, kind=task)


def test_an_option_that_nothing_has_changed_is_used(tmp_path: Path) -> None:
    go(tmp_path, stopping())
    go(tmp_path, lr=0.01, decay=0.5)
    assert set(Rated.last.used) == {(0.01, 0.5)}  # type: ignore[attr-defined]
    rate, decay = not_restored(tmp_path)
    assert_named(rate, ["lr is 0.01 ", "0.1 (parameter group 0, 1, 2, 3)"])
    assert_named(decay, ["weight_decay is 0.5 ", "0.01 (parameter group 0, 1, 2, 3)"])


def not_restored(folder: Path) -> list[str]:
    return [e["detail"] for e in lines(folder, "events") if e["event"] == "state_not_restored"]


@pytest.mark.parametrize(
    ("kind", "before", "after", "names"),
    [
        (
            Rated,
            {"length": 20},
            {"length": 30},
            ["OneCycleLR.total_steps is 30, and was 20,", "--set args.length=20"],
        ),
        (Rated, {}, {"length": 20}, ["class is OneCycleLR, and was None,"]),
        (Rated, {}, {"kind": "Adam"}, ["the optimizer is Adam, and was SGD,"]),
        (
            Lowering,
            {},
            {"lr": 0.01},
            ["lr of parameter group 0 is 0.01, was 0.1, and has become 0.03,"],
        ),
    ],
)
def test_what_has_changed_since_is_not_replaced(
    kind: type[Rated], before: Any, after: Any, names: list[str], tmp_path: Path
) -> None:
    go(tmp_path, stopping(kind), **before)
    with raises("resume.settings-changed", *names, kind=UsageError):
        go(tmp_path, kind, **after)
    go(tmp_path, kind, **before)


def test_a_rate_that_follows_from_the_processes_stays(tmp_path: Path) -> None:
    for world_size, kind in ((2, stopping(PerRank)), (1, PerRank)):
        run_ranks(functools.partial(train, kind=kind), world_size, job("ddp"), tmp_path)
    rate, *_ = not_restored(tmp_path)
    assert_named(rate, ["lr stays 0.2", " 0.1 ", "(parameter group 0, 1, 2, 3)"])
    assert lines(tmp_path, "metrics")[-1]["lr"] == 0.2


def test_training_that_ended_early_goes_on_with_another_end(tmp_path: Path) -> None:
    args = {"held_out": 5, "evaluations": [5.0, 6.0, 7.0, 1.0, 1.0]}
    spec: dict[str, Any] = {"eval": {"every_steps": 2}}
    first = {"early_stopping": {"patience": 1}}
    ended = train(job("single", args, train=first, **spec), tmp_path, kind=Rated)
    assert ended.result is not None
    assert (ended.result.steps, ended.result.stopped_early) == (4, True)
    more = {"early_stopping": {"patience": 9}}
    went_on = train(job("single", args, train=more, **spec), tmp_path, kind=Rated)
    assert went_on.result is not None
    assert (went_on.result.steps, went_on.result.stopped_early) == (10, False)


def test_the_best_of_another_metric_is_none(tmp_path: Path) -> None:
    args = {"held_out": 5, "stop_after": 4}
    for mode, step in (("max", 2), ("min", 6)):
        best = {"best": {"metric": "mse", "mode": mode}}
        train(job("single", args, checkpoint=best, eval={"every_steps": 2}), tmp_path, kind=Rated)
        assert (tmp_path / "checkpoints" / "best").is_dir(), step


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"seed": 4}, "seed was 3, is 4"),
        ({"data": {"shuffle": False}}, "shuffle was True, is False"),
    ],
)
def test_other_data_is_refused(sections: Any, words: str, tmp_path: Path) -> None:
    go(tmp_path, stopping())
    spec = job("single", **sections) if "seed" not in sections else job("single")
    spec = spec.model_copy(update={"seed": sections.get("seed", 3)})
    with raises("checkpoint.none-loads", words):
        train(spec, tmp_path, kind=Rated)


def test_other_settings_are_used(tmp_path: Path) -> None:
    go(tmp_path, stopping())
    section = {"global_batch_size": 8, "clip_grad_norm": 0.5, "precision": "bf16", "steps": 6}
    outcome = go(tmp_path, train_section=section)
    assert [len(step) for step in outcome.seen] == [2, 8, 8]
    assert "grad_norm" in lines(tmp_path, "metrics")[-1]
