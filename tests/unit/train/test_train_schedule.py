"""When to evaluate, to save, to stop; and what a position is worth on other data."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from dtrain.errors import CheckpointError, UsageError
from dtrain.job.spec import EarlyStoppingSpec, JobSpec
from dtrain.train.data.placement import EpochPlan, Position
from dtrain.train.loop.metric_callbacks import EarlyStopping
from dtrain.train.loop.progress import Progress, Schedule, data_identity, refuse_to_end_before
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


def test_time() -> None:
    assert not Schedule(spec()).save_overdue()
    assert not Schedule(spec(checkpoint={"every": "1h"})).save_overdue()
    assert Schedule(spec(checkpoint={"every": "0.000000001s"})).save_overdue()


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
