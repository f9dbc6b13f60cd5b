"""What becomes of a batch job when an agent ends, and what is made of a job that is over."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtrain.job.launcher_options import AnyOptions
from dtrain.job.spec import JobSpec
from dtrain.launch_plan import Facts, LaunchPlan, make_plan
from dtrain.launchers import base, supervise
from dtrain.launchers.slurm import outcome, queue
from dtrain.launchers.slurm.options import SlurmOptions
from dtrain.launchers.slurm.outcome import Ending
from dtrain.launchers.slurm.queue import Job
from dtrain.node.placement.base import Arguments
from dtrain.node.placement.slurm import SlurmPlacement
from dtrain.run import failures, files, verdict
from dtrain.run.attempts import Handle
from dtrain.run.backend_files import End, SlurmFiles
from support.errors import assert_named

STOPPED = 128 + signal.SIGTERM


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    train = {"epochs": 1, "global_batch_size": 8}
    job = JobSpec.model_validate({"name": "digits", "task": "task.py:T", "train": train})
    facts = Facts("digits-abc", str(tmp_path), "python3", "laptop", cores=8, free_port=16000)
    options: dict[str, Any] = {"requeue": 2}
    made = make_plan(
        job,
        job_dir="/job",
        launcher="slurm",
        profile="slurm",
        options=SlurmOptions.of(AnyOptions(**options)),
        facts=facts,
    )
    made = base.load("slurm").complete(made, facts)
    made.run.slurm.mkdir(parents=True)
    return made


def end(plan: LaunchPlan, status: int, *, asked: bool = True, node_rank: int = 0) -> int:
    reader = SlurmPlacement(Arguments(), {**os.environ, "SLURM_NODEID": str(node_rank)})
    reader.plan = plan
    return reader.finish(status, asked)


def conclude(plan: LaunchPlan, job: Job) -> int:
    """The exit code of a job that is over; what no node could tell is recorded."""
    ending = outcome.ending_of(plan, job)
    outcome.record(plan, job, ending)
    return ending.exit_code


LEFT, ENDED = End(STOPPED, stopped=True), End(3, stopped=False)
LOST = "the node failed, and Slurm did not start the job again"
OFTEN = "the job was asked to stop and was already requeued 2 times, the maximum (option requeue)"


@pytest.mark.parametrize(
    ("job", "end", "facts", "ending"),
    [
        (Job("7", "FAILED", exit_code=1), ENDED, {}, Ending(3)),
        (Job("7", "NODE_FAIL"), ENDED, {"cancelled": True}, Ending(3)),
        (Job("7", "COMPLETED"), End(0, stopped=False), {}, Ending(0)),
        (Job("7", "CANCELLED"), None, {}, Ending(STOPPED)),
        (Job("7", "COMPLETED"), LEFT, {"cancelled": True}, Ending(STOPPED)),
        (Job("7", "NODE_FAIL", exit_code=9), None, {}, Ending(9, LOST, "node_lost")),
        (Job("7", "NODE_FAIL"), LEFT, {"recorded": True}, Ending(1, LOST, "node_lost")),
        (Job("7", "COMPLETED", restarts=2), LEFT, {}, Ending(1, OFTEN)),
        (
            Job("7", "COMPLETED"),
            LEFT,
            {"requeue_requested": True, "recorded": True},
            Ending(
                1,
                "the job was asked to stop, and Slurm did not let it requeue itself",
                wants_requeue=True,
            ),
        ),
        (
            Job("7", "OUT_OF_MEMORY"),
            None,
            {"recorded": True},
            Ending(1, "the job used more memory than it requested", "oom"),
        ),
        (Job("7", "DEADLINE"), None, {}, Ending(1, "the job's deadline has passed")),
        (Job("7", "DEADLINE"), None, {"recorded": True}, Ending(1)),
        (
            Job("7", "FAILED", exit_code=5),
            LEFT,
            {"requeue_requested": True},
            Ending(5, "job 7 ended with code 5", is_unexplained=True),
        ),
        (Job("7", "FAILED", exit_code=5), LEFT, {"recorded": True}, Ending(5)),
    ],
)
def test_what_the_end_of_a_job_means(
    job: Job, end: End | None, facts: dict[str, bool], ending: Ending
) -> None:
    assert outcome.classify(job, end, max_requeues=2, **facts) == ending


def test_a_node_that_was_asked_to_leave_ends_well_and_wants_to_go_on(plan: LaunchPlan) -> None:
    plan.run.secret_env(0).touch()
    assert end(plan, STOPPED) == 0
    assert SlurmFiles(plan.run).requeue(0).exists()
    assert plan.run.secret_env(0).exists()  # the next attempt needs it


def test_other_nodes_say_nothing_of_the_job(plan: LaunchPlan) -> None:
    assert end(plan, STOPPED, node_rank=1) == 0
    assert end(plan, 3, asked=False, node_rank=1) == 3
    assert not list(plan.run.slurm.iterdir())


def test_a_job_that_failed_or_was_cancelled_is_not_requeued(plan: LaunchPlan) -> None:
    assert end(plan, 3, asked=False) == 3
    SlurmFiles(plan.run).cancel(0).touch()
    plan.run.secret_env(0).touch()
    assert end(plan, STOPPED) == 0
    assert not SlurmFiles(plan.run).requeue(0).exists()
    assert not plan.run.secret_env(0).exists()


def test_it_is_not_requeued_for_ever(plan: LaunchPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert end(plan, STOPPED) == 0
    assert not SlurmFiles(plan.run).requeue(2).exists()
    assert conclude(plan, Job("7", "COMPLETED", restarts=2)) == 1
    (record,) = failures.read_all(plan.run, 0)
    assert_named(record.message, ["requeued 2 times", "option requeue"])


def test_a_node_taken_for_dead_leaves_the_next_attempt_alone(plan: LaunchPlan) -> None:
    files.write_json(SlurmFiles(plan.run).endpoint(1), {"host": "elsewhere"})
    end(plan, STOPPED)
    assert not SlurmFiles(plan.run).requeue(0).exists()
    assert not SlurmFiles(plan.run).end(0).exists()


@pytest.mark.parametrize(
    ("job", "kind", "names"),
    [
        (Job("7", "NODE_FAIL", nodes="n[1-2]", exit_code=1), "node_lost", ["n[1-2]: "]),
        (Job("7", "OUT_OF_MEMORY", exit_code=253), "oom", ["memory"]),
        (Job("7", "TIMEOUT"), "agent", ["time limit", "signal_before"]),
        (Job("7", "PREEMPTED"), "agent", ["preempted"]),
        (Job("7", "GONE"), "agent", ["Slurm", "first node"]),
        (Job("7", "FAILED", exit_code=9), "agent", ["job 7 ", "code 9: srun: no such thing"]),
    ],
)
def test_what_only_slurm_knows_is_recorded(
    plan: LaunchPlan, job: Job, kind: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sinfo(monkeypatch, "")  # as of nodes that are up again
    SlurmFiles(plan.run).log.write_text("loading\nsrun: no such thing\n")
    assert conclude(plan, job) == (job.exit_code or 1)
    judged = verdict.judge(plan.run, 0)
    assert judged is not None
    assert judged.culprit.kind == kind
    assert_named(verdict.render(judged, plan.run), names)


def sinfo(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Have Slurm report which nodes are down."""
    done = subprocess.CompletedProcess([], 0, text, "")
    monkeypatch.setattr(queue, "run_command", lambda *argv: done)


DOWN = "n2|down*, Not responding\n" * 2  # once for each partition


@pytest.mark.parametrize("left", [True, False])
def test_the_node_that_slurm_lost_is_named(
    plan: LaunchPlan, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    """Also where Slurm asked the first node to leave before it gave the job up."""
    sinfo(monkeypatch, DOWN)
    if left:
        end(plan, STOPPED)
    assert conclude(plan, Job("7", "NODE_FAIL", nodes="n[1-2]", exit_code=143)) == 143
    (record,) = failures.read_all(plan.run, 0)
    assert (record.kind, record.node_rank, record.node) == ("node_lost", 1, "n2")
    assert "down*, Not responding" in record.message


def test_a_failure_without_a_record_is_the_first_nodes(plan: LaunchPlan) -> None:
    """Its logs may have the reason; its agent's has been written to later."""
    SlurmFiles(plan.run).node_log(0).write_text("a warning\n")
    os.utime(SlurmFiles(plan.run).node_log(0), (1.0, 1.0))
    log = plan.run.agent_log(0, 0)
    log.parent.mkdir(parents=True)
    log.write_text("Traceback …\nImportError: libcuda.so\n")
    end(plan, 3, asked=False)
    supervise.record_end(plan, conclude(plan, Job("7", "FAILED", exit_code=3)), 0.0)
    kept = verdict.read(plan.run, 0)
    assert kept is not None
    assert (kept.exit_code, kept.culprit.node_rank) == (3, 0)
    assert kept.culprit.message.endswith("ImportError: libcuda.so")
    assert kept.culprit.log == str(log)


def test_another_nodes_failure_is_not_the_first_nodes_request(plan: LaunchPlan) -> None:
    """srun asks the first node to leave when another has failed."""
    SlurmFiles(plan.run).log.write_text(
        "dtrain: n1 cannot write to the run directory\nsrun: Terminating step\n"
    )
    end(plan, STOPPED)
    assert conclude(plan, Job("7", "FAILED", exit_code=1)) == 1
    (record,) = failures.read_all(plan.run, 0)
    assert "n1 cannot write to the run directory" in record.message


def test_the_first_nodes_exit_code_is_kept(plan: LaunchPlan) -> None:
    end(plan, 3, asked=False)
    assert conclude(plan, Job("7", "FAILED", exit_code=1)) == 3
    end(replace(plan, attempt=1), 0, asked=False)
    assert conclude(replace(plan, attempt=1), Job("7", "COMPLETED")) == 0


def test_a_cancelled_job_has_not_failed(plan: LaunchPlan) -> None:
    assert conclude(plan, Job("7", "CANCELLED")) == STOPPED
    assert not failures.read_all(plan.run, 0)


def test_only_a_job_that_left_to_resume_is_requeued(plan: LaunchPlan) -> None:
    def wants_requeue(job: Job) -> bool:
        return outcome.ending_of(plan, job).wants_requeue

    done = Job("7", "COMPLETED")
    assert not wants_requeue(done)
    end(plan, STOPPED)
    assert wants_requeue(done)
    assert not wants_requeue(Job("7", "CANCELLED"))
    assert not wants_requeue(Job("7", "COMPLETED", restarts=1))
    Handle.of_this_process("slurm", 0).write(plan.run)
    SlurmFiles(plan.run).cancel(0).touch()
    assert not wants_requeue(done)


@pytest.mark.parametrize("log", [True, False])
def test_a_job_without_output(plan: LaunchPlan, log: bool) -> None:
    """Its log is empty, or missing: then the run directory may not be on its node."""
    if log:
        SlurmFiles(plan.run).log.touch()
    conclude(plan, Job("7", "FAILED", exit_code=7))
    (record,) = failures.read_all(plan.run, 0)
    assert_named(record.message, ["job 7 ", "code 7: "])
    assert (str(plan.run.path) in record.message) != log


def test_what_srun_prints_under_submitit_is_read_too(plan: LaunchPlan) -> None:
    SlurmFiles(plan.run).log.write_text("srun: error: task 1 failed\n")
    SlurmFiles(plan.run).submitit_log("7_1").write_text(
        "dtrain: n1 cannot write to the run directory  [slurm.directory-not-shared]\nbye\n"
    )
    conclude(plan, Job("7_1", "FAILED", exit_code=1))
    (record,) = failures.read_all(plan.run, 0)
    assert_named(record.message, ["job 7_1 ", "code 1: n1 cannot write to the run directory"])
    assert record.code == "slurm.directory-not-shared"
