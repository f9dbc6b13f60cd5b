"""One launch for each run id, and how a run stands by what it has left behind."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtrain import procs
from dtrain.errors import UsageError
from dtrain.job.launcher_options import AnyOptions
from dtrain.job.spec import JobSpec
from dtrain.launch_plan import Facts, LaunchPlan, make_plan
from dtrain.launchers import base, prepare, status
from dtrain.launchers.summary import summary
from dtrain.run import events, files
from dtrain.run.attempts import Handle, Result
from dtrain.run.failures import FailureRecord
from support.errors import raises

TRAIN = {"epochs": 1, "global_batch_size": 8}
JOB = JobSpec.model_validate({"name": "digits", "task": "task.py:T", "train": TRAIN})


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    facts = Facts("digits-abc", str(tmp_path), "python3", "laptop", cores=8, free_port=16000)
    made = make_plan(
        JOB, job_dir="/job", launcher="local", profile="local", options=AnyOptions(), facts=facts
    )
    return base.load("local").complete(made, facts)


def launch(plan: LaunchPlan, text: str = "name: digits\n") -> None:
    prepare.prepare(plan, JOB, text, Handle.of_this_process("local", plan.attempt))


def test_of_launches_at_once_with_one_id_one_goes_on(plan: LaunchPlan) -> None:
    texts = [f"name: digits # {number}\n" for number in range(8)]
    with ThreadPoolExecutor(len(texts)) as threads:
        launches = {text: threads.submit(launch, plan, text) for text in texts}
    refusals = {text: each.exception() for text, each in launches.items()}
    (winner,) = [text for text, refusal in refusals.items() if refusal is None]
    assert plan.run.job.read_text() == winner
    for text in set(texts) - {winner}:
        assert isinstance(refusals[text], UsageError)


def test_a_plan_may_be_written_before_and_a_further_attempt_follows(plan: LaunchPlan) -> None:
    prepare.prepare(plan, JOB, "name: digits\n")
    launch(plan)
    launch(replace(plan, attempt=1))
    with pytest.raises(UsageError):
        launch(plan)


def test_another_node_of_the_same_launch_is_not_refused(plan: LaunchPlan) -> None:
    launch(plan)
    (command,) = plan.commands
    other = replace(plan, commands=(replace(command, node_ranks=(1,)),))
    prepare.prepare(other, JOB, "name: digits\n")
    Result("succeeded", 0, 0.0, 1.0).write(plan.run, 0)
    with raises("run.exists", "digits-abc"):
        prepare.prepare(other, JOB, "name: digits\n")


def test_a_launch_that_could_not_be_written_leaves_the_id_free(plan: LaunchPlan) -> None:
    plan.run.plan.mkdir(parents=True)  # so that it cannot be a file
    with raises("launch.not-writable", str(plan.run.path)):
        launch(plan)
    plan.run.plan.rmdir()
    launch(plan)


def test_status_says_what_a_running_run_waits_for(plan: LaunchPlan) -> None:
    launch(plan)

    def waits(event: str, node_rank: int, **fields: Any) -> Any:
        events.note_event(plan.run, event, node_rank=node_rank, **fields)
        return summary(plan.run)["waits"]

    assert waits("silent", 0, what="rank 0 at a.py:1") == "rank 0 at a.py:1"
    assert waits("silent", 1, what="rank 1 at b.py:2") == "rank 0 at a.py:1\nrank 1 at b.py:2"
    assert waits("heard", 0) == "rank 1 at b.py:2"
    assert waits("workers_started", 0, pids=[1]) is None
    waits("silent", 0, what="rank 0 at a.py:1")
    Result("succeeded", 0, 0.0, 1.0).write(plan.run, 0)
    assert summary(plan.run)["waits"] is None


def test_status_shows_the_metrics_of_every_split(plan: LaunchPlan) -> None:
    launch(plan)
    for split, values in (("train", {"loss": 2.0}), ("test", {"acc": 0.5})):
        files.append_line(plan.run.metrics, {"time": 1.0, "step": 3, "split": split, **values})
    found = summary(plan.run)
    shown = {split: found[split] for split in ("train", "eval", "validate", "test")}
    assert shown == {"train": {"loss": 2.0}, "eval": {}, "validate": {}, "test": {"acc": 0.5}}


def test_a_run_that_was_started_by_hand_is_not_launched_over(plan: LaunchPlan) -> None:
    prepare.prepare(plan, JOB, "name: digits\n")
    events.note_event(plan.run, "training_started", attempt=0)
    with raises("run.exists", "digits-abc"):
        launch(plan)


def tell(plan: LaunchPlan, event: str, **facts: Any) -> None:
    """As rank 0 does when its worker was started by hand."""
    events.note_event(plan.run, event, attempt=0, restart=0, **facts)


def fail(plan: LaunchPlan) -> None:
    record = FailureRecord("exit", "sys.exit(3)", 3, 0, "here", rank=1, time=time.time())
    record.write(plan.run, 0)


def state(plan: LaunchPlan) -> tuple[str, int | None]:
    found, result = status.state_of(plan.run)
    return found, None if result is None else result.exit_code


def test_the_state_of_a_run_by_hand_is_what_it_tells(plan: LaunchPlan) -> None:
    prepare.prepare(plan, JOB, "name: digits\n")
    plan.run.secret_env(0).touch()
    assert state(plan) == ("prepared", None)
    tell(plan, "worker_started", process=procs.this_process())
    tell(plan, "training_started")
    assert state(plan) == ("running", None)
    assert plan.run.secret_env(0).exists()
    fail(plan)
    assert state(plan) == ("failed", 3)
    assert not plan.run.secret_env(0).exists()
    here = procs.this_process()
    gone = {**here, "identity": f"{here['identity']}0"}
    tell(plan, "worker_started", process=gone)  # the same line was typed again
    assert state(plan) == ("lost", None)
    tell(plan, "stopped", reason="SIGINT", rank=0, step=3)
    tell(plan, "worker_ended", exit_code=0)
    assert state(plan) == ("cancelled", 130)
    tell(plan, "worker_started", process=gone)
    tell(plan, "finished")
    tell(plan, "worker_ended", exit_code=0)
    assert state(plan) == ("succeeded", 0)


def test_a_failure_by_hand_that_torchrun_restarts_is_not_the_end(plan: LaunchPlan) -> None:
    prepare.prepare(replace(plan, max_restarts=1), JOB, "name: digits\n")
    tell(plan, "worker_started", process=procs.this_process())
    fail(plan)
    tell(plan, "worker_ended", exit_code=1)
    assert state(plan) == ("running", None)


def test_what_the_next_attempt_inherits_is_of_the_last_that_trained(plan: LaunchPlan) -> None:
    run = plan.run
    launch(plan)
    assert events.accepted_job(run) == run.resolved_of(0)
    launch(replace(plan, attempt=1))
    assert events.accepted_job(run) == run.resolved_of(1)  # none has trained: what was tried last
    tell(plan, "training_started")
    assert events.accepted_job(run) == run.resolved_of(0)
    events.note_event(run, "training_started", attempt=3)  # a batch job has made it by itself
    assert events.accepted_job(run) == run.resolved_of(1)
