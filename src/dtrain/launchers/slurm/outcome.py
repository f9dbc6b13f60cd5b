"""How a batch job ended: its exit code, and a record of what only Slurm knows."""

from __future__ import annotations

import signal
from dataclasses import replace

from dtrain.launchers.slurm import queue
from dtrain.launchers.slurm.queue import Job
from dtrain.node.placement.slurm import expand_nodelist
from dtrain.plan import LaunchPlan
from dtrain.run import attempts, failures
from dtrain.run.attempts import Handle
from dtrain.run.backend_files import SlurmFiles
from dtrain.run.failures import Kind

_STOPPED = 128 + signal.SIGTERM

_WORDS = {
    "TIMEOUT": "the time limit came before the workers had left; raise signal_before",
    "DEADLINE": "the job's deadline has passed",
    "OUT_OF_MEMORY": "the job used more memory than it had asked for",
    "PREEMPTED": "preempted by another job, and Slurm did not start it again",
    "REVOKED": "revoked by Slurm",
    "GONE": "Slurm has forgotten the job, and its first node has not said how it ended",
}
_NODE_LOST = {
    "NODE_FAIL": "the node failed, and Slurm did not start the job again",
    "BOOT_FAIL": "the node did not boot",
}
_KINDS: dict[str, Kind] = {"OUT_OF_MEMORY": "oom"}


def should_requeue(plan: LaunchPlan, job: Job) -> bool:
    """Whether a job has ended that its first node wanted to be put back into the queue.

    Its batch script does that, unless the nodes have none of Slurm's commands.
    """
    folder = SlurmFiles(plan.run)
    end = folder.read_end(plan.attempt)
    return bool(
        job.state == "COMPLETED"
        and end is not None
        and end.left
        and folder.requeue(job.restarts).exists()
        and not was_cancelled(plan)
    )


def exit_code(plan: LaunchPlan, job: Job) -> int:
    """The exit code of a job that is over; what no node could tell is written down as a record.

    Args:
        plan: of the newest attempt.
        job: as Slurm knows it.
    """
    folder = SlurmFiles(plan.run)
    end = folder.read_end(plan.attempt)
    if end is not None and not end.left:
        return end.exit_code
    if was_cancelled(plan) or job.state == "CANCELLED":
        return _STOPPED
    records = failures.read_all(plan.run, plan.attempt)
    if job.state in _NODE_LOST:
        _record_lost(plan, job)
    elif end is not None and job.state != "FAILED":  # then another node has failed, and it had to
        _record(plan, _requeue_refusal_reason(plan, job))
    elif job.state in _WORDS:
        if not records or job.state in _KINDS:
            _record(plan, _WORDS[job.state], _KINDS.get(job.state, "agent"))
    elif not records:
        _record(
            plan, f"job {job.job_id} ended with code {job.exit_code}: {_last_words(folder, job)}"
        )
    return job.exit_code or 1


def _requeue_refusal_reason(plan: LaunchPlan, job: Job) -> str:
    if job.restarts >= plan.max_requeues:
        return (
            f"the job had to leave and was requeued {job.restarts} times already, as often as it "
            "may be (option requeue)"
        )
    return "the job had to leave, and Slurm did not let it requeue itself"


def _record(
    plan: LaunchPlan,
    message: str,
    kind: Kind = "agent",
    node_rank: int = 0,
    node: str = "the batch job",
) -> None:
    failures.record_node(
        plan.run,
        plan.attempt,
        message,
        kind=kind,
        node_rank=node_rank,
        node=node,
        log=SlurmFiles(plan.run).log,
    )


def _record_lost(plan: LaunchPlan, job: Job) -> None:
    """A record for each node that is down, or of one without a name where none is down any more.

    Ranks of nodes follow the order of the names, see `node.placement.slurm`.
    """
    down = queue.nodes_down(job)
    if not down:
        _record(plan, f"one of {job.nodes}: {_NODE_LOST[job.state]}", "node_lost")
    for name, why in down.items():
        message = f"{_NODE_LOST[job.state]} (Slurm: {why})"
        rank = list(expand_nodelist(job.nodes)).index(name)
        _record(plan, message, "node_lost", node_rank=rank, node=name)


def _last_words(folder: SlurmFiles, job: Job) -> str:
    """The last thing that the batch script or the first node's process said; our own words first.

    The log of the job holds what any node said before it had found its own.
    """
    said = [
        line
        for path in (folder.log, folder.submitit_log(job.job_id), folder.node_log(0))
        if path.exists()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    ours = [line.removeprefix("dtrain: ") for line in said if line.startswith("dtrain: ")]
    nothing = "it has said nothing; did a set-up line end it?"
    if not folder.log.exists():
        nothing = (
            "it has said nothing; the run folder: is it on all nodes, at the same path? "
            f"{folder.path.parent}"
        )
    return (ours or said or [nothing])[-1]


def at_newest_attempt(plan: LaunchPlan) -> LaunchPlan:
    """The plan of a submitted job with the attempt that the job has come to."""
    return replace(plan, attempt=attempts.newest_of(plan.run, plan.attempt))


def was_cancelled(plan: LaunchPlan) -> bool:
    """Whether someone has asked for the end of the job that has made an attempt."""
    handle = Handle.read(plan.run, plan.attempt)
    return handle is not None and SlurmFiles(plan.run).cancel(handle.first).exists()
