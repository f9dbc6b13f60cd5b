"""A node of a batch job: which one we are, where the others are, what becomes of the job."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dtrain import ports
from dtrain.errors import LaunchError
from dtrain.nodelist import expand
from dtrain.plan import LaunchPlan
from dtrain.run import attempts, events, files
from dtrain.run.backend_files import SlurmFiles
from dtrain.run.failures import FailureRecord

_STOPS = {128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
_MOST_ENDPOINT_S = 3600.0


@dataclass(frozen=True)
class Place:
    """A node's part of a plan, once Slurm has said where it runs."""

    plan: LaunchPlan
    """With attempt, node names and rendezvous as they are in this job."""
    node_rank: int
    listener: socket.socket | None
    """On the head, the open port of the rendezvous."""


def take_place(plan: LaunchPlan, environ: Mapping[str, str]) -> Place:
    """Our place in the job step that we run in.

    Args:
        plan: as it was submitted.
        environ: with the variables of the job step.

    Raises:
        LaunchError: this is no job step, it has another size, or its head cannot be found.
        Held: another command or job drives the run.
    """
    node_rank = int(environ.get("SLURM_NODEID", -1))
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if node_rank < 0 or not nodelist:
        raise LaunchError("this is no step of a Slurm job: start it with srun, or give --node-rank")
    names = tuple(expand(nodelist))
    if not plan.min_nodes <= len(names) <= plan.nodes:
        raise LaunchError(
            f"the plan is for {plan.nodes} nodes, but this step has {len(names)}: {nodelist}; "
            f"start it with srun --nodes={plan.nodes} --ntasks-per-node=1"
        )
    restarts = int(environ.get("SLURM_RESTART_COUNT", 0))
    plan = replace(
        plan,
        attempt=plan.attempt + restarts,
        node_names=names,
        nodes=len(names),
        min_nodes=len(names),
        world_size=len(names) * plan.procs_per_node,
    )
    job = _job_of(environ)
    if node_rank == 0:
        attempts.go_on(plan.run, plan.attempt, _job_id(environ))
        return _be_head(plan, job, environ)
    found = SlurmFiles(plan.run).await_endpoint(plan.attempt, _patience(plan))
    if found is None or found["job"] != job:
        raise LaunchError(f"the agent on {names[0]} has not said where it listens")
    endpoint = {"rdzv_host": found["host"], "rdzv_port": found["port"]}
    return Place(replace(plan, **endpoint), node_rank, None)


def _patience(plan: LaunchPlan) -> float:
    return min(plan.join_timeout_s, _MOST_ENDPOINT_S)


def _job_id(environ: Mapping[str, str]) -> str:
    """As `dtrain` knows it from submitting the job: an array's elements are `ARRAY_INDEX`."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    index = environ.get("SLURM_ARRAY_TASK_ID")
    return environ["SLURM_JOB_ID"] if array is None else f"{array}_{index}"


def _job_of(environ: Mapping[str, str]) -> str:
    """A key that no other job, array element or attempt has."""
    parts = ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")
    return "/".join(environ.get(name, "") for name in parts)


def _be_head(plan: LaunchPlan, job: str, environ: Mapping[str, str]) -> Place:
    host = own_address(plan.node_names, environ.get("SLURM_LAUNCH_NODE_IPADDR"))
    listener = ports.listen_on_candidate(ports.to_listen_on(host), f"{job}/{plan.run_id}")
    port = int(listener.getsockname()[1])
    folder = SlurmFiles(plan.run)
    folder.end(plan.attempt).unlink(missing_ok=True)
    files.write_json(folder.endpoint(plan.attempt), {"job": job, "host": host, "port": port})
    events.note_event(
        plan.run, "attempt_started", attempt=plan.attempt, job=job, nodes=list(plan.node_names)
    )
    return Place(replace(plan, rdzv_host=host, rdzv_port=port), 0, listener)


def own_address(names: tuple[str, ...], launched_from: str | None) -> str:
    """The head's address on the network on which the other nodes reach it.

    The name of the head itself is no help: Debian gives it 127.0.1.1. So it is the address from
    which the route to another node leaves.

    Raises:
        LaunchError: no other node's name can be resolved.
    """
    if len(names) == 1:
        return "127.0.0.1"
    for name in (*names[1:], *filter(None, [launched_from])):
        with contextlib.suppress(OSError):
            address = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)[0][4][0]
            on_loopback = ipaddress.ip_address(address).is_loopback
            if not on_loopback or name == address:  # a node named so, on a cluster of one machine
                return ports.address_towards(str(address), 9)
    raise LaunchError(
        f"the names of the other nodes cannot be resolved here: {', '.join(names[1:])}"
    )


def conclude(place: Place, status: int, asked_to_stop: bool) -> int:
    """Say what becomes of the job, once this node's agent has ended; the exit code of the node.

    A node that was asked to leave ends with 0: with anything else srun would kill the others
    while they still save.

    Args:
        place: ours.
        status: the agent's exit code.
        asked_to_stop: whether Slurm or a person has asked this node to leave.
    """
    left = status in _STOPS or (asked_to_stop and status != 0)
    if place.node_rank != 0:
        return 0 if left else status
    plan = place.plan
    folder = SlurmFiles(plan.run)
    if folder.is_superseded(plan.attempt):
        return status
    cancelled = folder.cancel(plan.attempt - _restarts()).exists()
    if left and not cancelled and _may_requeue(plan):
        folder.requeue(_restarts()).touch()
    else:
        plan.run.remove_secrets(plan.attempt)
    files.write_json(folder.end(plan.attempt), {"exit_code": status, "left": left})
    return 0 if left else status


def is_superseded(plan: LaunchPlan) -> bool:
    """Whether Slurm has started the job again elsewhere, taking our node for dead."""
    try:
        return SlurmFiles(plan.run).is_superseded(plan.attempt)
    except OSError:  # the file system is away, as is the rest of the network
        return False


def _may_requeue(plan: LaunchPlan) -> bool:
    return _restarts() < plan.max_requeues


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def refuse_endless(plan: LaunchPlan) -> None:
    """Fail a job that Slurm has requeued more often than it may be.

    Raises:
        LaunchError: it has.
    """
    most = plan.max_requeues
    if _restarts() > most:
        raise LaunchError(f"the job was requeued more than {most} times (option requeue)")


def record(plan: LaunchPlan, node_rank: int, error: LaunchError) -> None:
    """Leave a failure record for a node that could not take its place."""
    restarts = _restarts()
    FailureRecord(
        kind="agent",
        message=str(error),
        exit_code=1,
        node_rank=max(node_rank, 0),
        node=socket.gethostname(),
        time=time.time(),
        log=str(SlurmFiles(plan.run).node_log(max(node_rank, 0))),
    ).write(plan.run, plan.attempt + restarts)
