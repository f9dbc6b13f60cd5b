"""One launch for each run id, and how a run stands by what it has left behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain import rundir
from dtrain.errors import LaunchError, UsageError
from dtrain.job.spec import JobSpec
from dtrain.launchers import base
from dtrain.launchers.base import Handle, Result
from dtrain.plan import Facts, LaunchPlan, make_plan

TRAIN = {"epochs": 1, "global_batch_size": 8}
JOB = JobSpec.model_validate({"name": "digits", "task": "task.py:T", "train": TRAIN})


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    facts = Facts("digits-abc", str(tmp_path), "python3", "laptop", cores=8, free_port=16000)
    made = make_plan(
        JOB, job_dir="/job", launcher="local", profile="local", options={}, facts=facts
    )
    return base.load("local").complete(made, facts)


def launch(plan: LaunchPlan, text: str = "name: digits\n") -> None:
    base.prepare(plan, JOB, text, Handle.of_this_process(plan))


def test_of_launches_at_once_with_one_id_one_goes_on(plan: LaunchPlan) -> None:
    texts = [f"name: digits # {number}\n" for number in range(8)]
    with ThreadPoolExecutor(len(texts)) as threads:
        launches = {text: threads.submit(launch, plan, text) for text in texts}
    refusals = {text: each.exception() for text, each in launches.items()}
    (winner,) = [text for text, refusal in refusals.items() if refusal is None]
    assert plan.run.job.read_text() == winner
    for text in set(texts) - {winner}:
        assert isinstance(refusals[text], UsageError)
        assert "go on with: dtrain resume digits-abc" in str(refusals[text])


def test_a_plan_may_be_written_before_and_a_further_attempt_follows(plan: LaunchPlan) -> None:
    base.prepare(plan, JOB, "name: digits\n")
    launch(plan)
    launch(replace(plan, attempt=1))
    with pytest.raises(UsageError):
        launch(plan)


def test_another_node_of_the_same_launch_is_not_refused(plan: LaunchPlan) -> None:
    launch(plan)
    other = replace(plan, options={"node_rank": 1})
    base.prepare(other, JOB, "name: digits\n")
    Result("succeeded", 0, 0.0, 1.0).write(plan.run, 0)
    with pytest.raises(UsageError, match="digits-abc exists"):
        base.prepare(other, JOB, "name: digits\n")


def test_a_launch_that_could_not_be_written_leaves_the_id_free(plan: LaunchPlan) -> None:
    plan.run.plan.mkdir(parents=True)  # so that it cannot be a file
    with pytest.raises(LaunchError, match="cannot write the run directory"):
        launch(plan)
    plan.run.plan.rmdir()
    launch(plan)


def test_a_run_that_was_started_by_hand_is_not_launched_over(plan: LaunchPlan) -> None:
    base.prepare(plan, JOB, "name: digits\n")
    rundir.note_event(plan.run, "training_started", attempt=0)
    with pytest.raises(UsageError, match="digits-abc exists"):
        launch(plan)
