"""When to evaluate, to save, to stop; and what a position is worth on other data."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from dtrain.errors import CheckpointError, UsageError
from dtrain.job.spec import CheckpointSpec, EarlyStoppingSpec, JobSpec, cross_problems
from dtrain.train.checkpoint.retention import Marks, Retention, read_score
from dtrain.train.data.placement import EpochPlan, Position
from dtrain.train.loop.metric_callbacks import EarlyStopping
from dtrain.train.loop.progress import (
    Progress,
    SaveClock,
    Schedule,
    best_interval,
    data_identity,
    refuse_to_end_before,
)
from support.errors import raises


def spec(**sections: Any) -> JobSpec:
    train = {"epochs": 3, "global_batch_size": 16}
    return JobSpec.model_validate({"name": "t", "task": "t:T", "train": train, **sections})


def due_steps(job: JobSpec, what: str) -> list[int]:
    schedule, course, progress = Schedule(job), EpochPlan(50, 16, 3, None), Progress()
    found = []
    for batch in course.batches(0, Position()):
        progress.step, progress.position = progress.step + 1, batch.after
        if getattr(schedule, what)(progress):
            found.append(progress.step)
    return found


def test_steps_and_epochs() -> None:
    assert due_steps(spec(), "evaluation_due") == []
    assert due_steps(spec(eval={"every_steps": 5}), "evaluation_due") == [5, 10]
    assert due_steps(spec(eval={"every_epochs": 1}), "evaluation_due") == [4, 8, 12]
    assert due_steps(spec(checkpoint={"every_epochs": 2}), "save_due") == [8]
    both = {"every_epochs": 2, "every_steps": 5}
    assert due_steps(spec(checkpoint=both), "save_due") == [5, 8, 10]


@pytest.mark.parametrize(
    ("settings", "values", "stops_after"),
    [
        ({"patience": 2}, [3.0, 2.0, 2.5, 2.0], 4),
        ({"patience": 2}, [3.0, 2.0, 2.5, 1.9, 2.0], None),
        ({"patience": 1, "mode": "max"}, [0.1, 0.2, 0.2], 3),
        ({"patience": 1, "min_delta": 0.5}, [3.0, 2.6], 2),
        ({"patience": 2}, [math.nan, math.nan], 2),
        ({"patience": 2}, [math.nan, 1.0, math.nan], None),
    ],
)
def test_patience(settings: dict[str, Any], values: list[float], stops_after: int | None) -> None:
    watch = EarlyStopping(EarlyStoppingSpec.model_validate({"metric": "m", **settings}))
    ended = None
    for index, value in enumerate(values, start=1):
        watch.update({"m": value}, index)
        copy = EarlyStopping(EarlyStoppingSpec.model_validate({"metric": "m", **settings}))
        copy.load_state_dict(json.loads(json.dumps(watch.state_dict())))
        watch = copy
        if watch.exhausted and ended is None:
            ended = index
    assert ended == stops_after


def test_a_metric_that_nobody_returns() -> None:
    watch = EarlyStopping(EarlyStoppingSpec(metric="acc"))
    with raises("eval.no-such-metric", "'acc'", "loss, accuracy", kind=UsageError):
        watch.update({"loss": 1.0, "accuracy": 0.5}, 1)


def test_a_position_is_of_its_data_only() -> None:
    data = data_identity(spec(), range(50), 50)
    progress = Progress(7, Position(1, 32), 6, {"loss": math.inf}, stopped_early=True)
    saved = json.loads(json.dumps(progress.to_saved(data)))
    assert Progress.from_saved(saved, data) == progress
    for other in (
        data_identity(spec(seed=1), range(50), 50),
        data_identity(spec(data={"shuffle": False}), range(50), 50),
        data_identity(spec(), range(51), 51),
    ):
        with raises("checkpoint.other-data", kind=CheckpointError):
            Progress.from_saved(saved, other)


def test_a_refused_seed_says_how_it_fits() -> None:
    dataset = [0] * 10
    saved = Progress().to_saved(data_identity(spec(seed=3), dataset, 10))
    with raises("checkpoint.other-data", "seed was 3, is 5", "--set seed=3", kind=CheckpointError):
        Progress.from_saved(saved, data_identity(spec(seed=5), dataset, 10))


def test_a_checkpoint_past_the_end_is_refused() -> None:
    refuse_to_end_before(12, 12)
    refuse_to_end_before(12, None)  # a stream
    with raises("run.end-passed", "of step 12", "after step 8", "train.steps=24"):
        refuse_to_end_before(12, 8)


def test_a_data_set_may_identify_itself() -> None:
    class Named:
        fingerprint = "v2"

    class Computed:
        def fingerprint(self) -> str:
            return "v3"

    assert data_identity(spec(), Named(), 1)["fingerprint"] == "v2"
    assert data_identity(spec(), Computed(), 1)["fingerprint"] == "v3"
    assert data_identity(spec(), [1], 1)["fingerprint"] is None


@pytest.mark.parametrize("cost", [0.05, 4.0, 600.0])
@pytest.mark.parametrize("mtbf", [3600.0, 86400.0])
def test_the_best_time_between_checkpoints_loses_least(cost: float, mtbf: float) -> None:
    """The time of a whole training as in Daly's equation 20, for failures at random moments."""

    def time_for_a_second(every: float) -> float:
        return mtbf * math.expm1((every + cost) / mtbf) / every

    best = best_interval(cost, mtbf)
    least = min(time_for_a_second(best * 1.02**n) for n in range(-100, 100))
    assert time_for_a_second(best) <= 1.0001 * least
    young = math.sqrt(2 * cost * mtbf)
    assert best == pytest.approx(young, rel=max(0.01, 2 * cost / young))


def test_a_checkpoint_that_costs_more_than_two_failures() -> None:
    assert best_interval(100.0, 40.0) == 40.0


def test_the_clock_of_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    assert not SaveClock(CheckpointSpec()).overdue
    given = SaveClock(CheckpointSpec.model_validate({"every": "90s"}))
    chosen = SaveClock(CheckpointSpec.model_validate({"every": "auto", "mtbf": "10h"}))
    for clock, cost, before, after in ((given, 0.1, 90, 90), (chosen, 0.1, 267, 85)):
        now = 50.0
        clock.restart(None)
        assert clock.every_s == pytest.approx(before, rel=0.01)
        now = 49.0 + before
        assert not clock.overdue
        now = 51.0 + before
        assert clock.overdue
        clock.restart(cost)
        assert not clock.overdue
        assert clock.every_s == pytest.approx(after, rel=0.01)


def test_a_chosen_time_needs_the_time_between_failures() -> None:
    (problem,) = cross_problems({**spec().to_plain(), "checkpoint": {"every": "auto"}})
    assert (problem[0], problem[2]) == (("checkpoint", "every"), "job.no-mtbf")


MARKS = {
    "step-00000002": Marks(score=("loss", 0.5)),
    "step-00000004": Marks(score=("accuracy", 0.1)),
    "step-00000006": Marks(pinned=True, score=("loss", 0.9)),
    "step-00000008": Marks(score=("loss", 0.7)),
}


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(2), [12, 10, 6]),
        (Retention(1, 1, "loss"), [12, 6, 2]),
        (Retention(1, 2, "loss"), [12, 8, 6, 2]),
        (Retention(1, 1, "loss", "max"), [12, 6]),
        (Retention(1, 9, "accuracy"), [12, 6, 4]),
        (Retention(9), [12, 10, 8, 6, 4, 2]),
    ],
)
def test_which_checkpoints_are_kept(retention: Retention, kept: list[int]) -> None:
    names = [f"step-{step:08d}" for step in range(12, 0, -2)]
    found = retention.kept(names, MARKS)
    assert sorted(found, reverse=True) == [f"step-{step:08d}" for step in kept]


def test_a_damaged_score_is_none() -> None:
    assert read_score(b'{"metric": "loss", "value": 0.5}') == ("loss", 0.5)
    for text in (b"", b"{", b"[]", b'{"metric": "loss"}', b'{"metric": "a", "value": "b"}'):
        assert read_score(text) is None
