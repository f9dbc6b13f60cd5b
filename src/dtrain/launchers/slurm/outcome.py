"""Interpret the end of a batch job, and record the facts that only Slurm knows."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.slurm import queue
from dtrain.launchers.slurm.queue import Job
from dtrain.node.placement.slurm import expand_nodelist
from dtrain.run import failures
from dtrain.run.attempts import Handle
from dtrain.run.backend_files import End, SlurmFiles
from dtrain.run.failures import Kind

_STOPPED = 128 + signal.SIGTERM

_OUT_OF_MEMORY = "the job used more memory than it requested"
_MESSAGES = {
    "TIMEOUT": "the time limit came before the workers had exited; raise option signal_before",
    "DEADLINE": "the job's deadline has passed",
    "PREEMPTED": "preempted by another job, and Slurm did not start it again",
    "REVOKED": "revoked by Slurm",
    "GONE": "Slurm no longer knows the job, and its first node has not recorded how it ended",
}
_NODE_LOST = {
    "NODE_FAIL": "the node failed, and Slurm did not start the job again",
    "BOOT_FAIL": "the node did not boot",
}


@dataclass(frozen=True)
class Ending:
    """The meaning of a job's end for its run."""

    exit_code: int
    message: str = ""
    """A message that no node could record; empty when there is nothing to record."""
    kind: Kind = "agent"
    is_unexplained: bool = False
    """True if the job's logs may contain more than the message."""
    wants_requeue: bool = False
    """True if the first node exited so that the job can be put back into the queue.

    The batch script does that, unless the nodes have none of Slurm's commands.
    """


def ending_of(plan: LaunchPlan, job: Job) -> Ending:
    """Interpret the end of a job and of its newest attempt."""
    folder = SlurmFiles(plan.run)
    return classify(
        job,
        folder.read_end(plan.attempt),
        cancelled=was_cancelled(plan),
        recorded=bool(failures.read_all(plan.run, plan.attempt)),
        requeue_requested=folder.requeue(job.restarts).exists(),
        max_requeues=plan.max_requeues,
    )


def classify(
    job: Job,
    end: End | None,
    *,
    cancelled: bool = False,
    recorded: bool = False,
    requeue_requested: bool = False,
    max_requeues: int = 0,
) -> Ending:
    """Interpret the end of a job, from its state, its first node's end record and files.

    Args:
        recorded: true if a node has left a failure record.
        requeue_requested: true if the first node has left the file that requests it.
    """
    if end is not None and not end.stopped:
        return Ending(end.exit_code)
    if cancelled or job.state == "CANCELLED":
        return Ending(_STOPPED)
    code = job.exit_code or 1
    if job.state in _NODE_LOST:
        return Ending(code, _NODE_LOST[job.state], "node_lost")
    if end is not None and job.state != "FAILED":  # FAILED means that another node has failed
        why = "the job was asked to stop, and Slurm did not let it requeue itself"
        if job.restarts >= max_requeues:
            why = (
                f"the job was asked to stop and was already requeued {job.restarts} times, the "
                "maximum (option requeue)"
            )
        return Ending(code, why, wants_requeue=requeue_requested and job.state == "COMPLETED")
    if job.state == "OUT_OF_MEMORY":
        return Ending(code, _OUT_OF_MEMORY, "oom")
    if recorded:
        return Ending(code)
    if job.state in _MESSAGES:
        return Ending(code, _MESSAGES[job.state])
    return Ending(code, f"job {job.job_id} ended with code {job.exit_code}", is_unexplained=True)


def record(plan: LaunchPlan, job: Job, ending: Ending) -> None:
    """Record what no node could. For lost nodes, write a record for each that is down."""

    def note(message: str, node_rank: int = 0, node: str = "the batch job") -> None:
        failures.record_node(
            plan.run,
            plan.attempt,
            message,
            kind=ending.kind,
            node_rank=node_rank,
            node=node,
            log=SlurmFiles(plan.run).log,
        )

    if ending.kind == "node_lost":
        down = queue.nodes_down(job)
        ranks = list(expand_nodelist(job.nodes))  # they follow the order of the names
        for name, why in down.items():
            note(f"{ending.message} (Slurm: {why})", ranks.index(name), name)
        if not down:
            note(f"one of {job.nodes}: {ending.message}")
    elif ending.is_unexplained:
        note(f"{ending.message}: {_last_line(SlurmFiles(plan.run), job)}")
    elif ending.message:
        note(ending.message)


def _last_line(folder: SlurmFiles, job: Job) -> str:
    """Return the last line of the batch script or of the first node's process, dtrain's lines
    first.

    The log of the job contains the output of every node before the node opened its own log.
    """
    lines = [
        line
        for path in (folder.log, folder.submitit_log(job.job_id), folder.node_log(0))
        if path.exists()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    by_dtrain = [line.removeprefix("dtrain: ") for line in lines if line.startswith("dtrain: ")]
    nothing = "it has written no output; check the setup lines of the job"
    if not folder.log.exists():
        nothing = (
            "it has written no output; check that all nodes have the run directory at this path: "
            f"{folder.path.parent}"
        )
    return (by_dtrain or lines or [nothing])[-1]


def was_cancelled(plan: LaunchPlan) -> bool:
    """Return whether a user has requested the end of the job that made an attempt."""
    handle = Handle.read(plan.run, plan.attempt)
    return handle is not None and SlurmFiles(plan.run).cancel(handle.first).exists()
