"""`--placement slurm`: the variables of the job step identify the node."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import signal
import socket
from collections.abc import Iterator, Mapping
from itertools import product

from dtrain import ports
from dtrain.environ import inherited_env
from dtrain.errors import LaunchError
from dtrain.launch_plan import LaunchPlan
from dtrain.node.placement.base import Arguments, NodePlacement, PlacementReader
from dtrain.run import attempts, events, failures, files
from dtrain.run.backend_files import SlurmFiles
from dtrain.run.rundir import RunDir

_STOP_STATUSES = {128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
_MOST_ENDPOINT_S = 3600.0


class SlurmPlacement(PlacementReader):
    """One node of a batch job. The head writes its address to a file for the others."""

    plan: LaunchPlan
    """The plan after `join` has completed it."""

    def __init__(self, arguments: Arguments, environ: Mapping[str, str]) -> None:
        super().__init__(arguments, environ)
        self.node_rank = int(environ.get("SLURM_NODEID", -1))
        self.restarts = int(environ.get("SLURM_RESTART_COUNT", 0))

    def begin(self, run: RunDir) -> None:
        """Write to this node's log from now on.

        Until then, srun writes the output to the job's log.

        If srun opened the log, a node without the run's directory would never start, and the others
        would wait for it.
        """
        path = SlurmFiles(run).node_log(max(self.node_rank, 0))
        try:
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise LaunchError(
                f"{os.uname().nodename} cannot write to the run directory, which all nodes must "
                f"have at the same path ({error.strerror}: {path})",
                code="slurm.directory-not-shared",
            ) from error
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)

    def join(self, plan: LaunchPlan) -> NodePlacement:
        try:
            self._check_requeue_limit(plan)
            listener = self._resolve_placement(plan)
        except LaunchError as error:
            self._record(plan, error)
            raise
        listen_fd = None if listener is None else listener.detach()
        return NodePlacement(self.plan, [self.node_rank], listen_fd, inherited_env(self.environ))

    def is_superseded(self) -> bool:
        """Return whether Slurm has restarted the job elsewhere because this node seemed dead."""
        try:
            return SlurmFiles(self.plan.run).is_superseded(self.plan.attempt)
        except OSError:  # the file system is away, as is the rest of the network
            return False

    def finish(self, status: int, asked_to_stop: bool) -> int:
        """See `PlacementReader.finish`.

        A node that was asked to stop ends with 0. With any other status srun would kill the others
        while they still save.
        """
        stopped = status in _STOP_STATUSES or (asked_to_stop and status != 0)
        if self.node_rank != 0:
            return 0 if stopped else status
        plan = self.plan
        folder = SlurmFiles(plan.run)
        if folder.is_superseded(plan.attempt):
            return status
        cancelled = folder.cancel(plan.attempt - self.restarts).exists()
        if stopped and not cancelled and self.restarts < plan.max_requeues:
            folder.requeue(self.restarts).touch()
        else:
            plan.run.remove_secrets(plan.attempt)
        files.write_json(folder.end(plan.attempt), {"exit_code": status, "stopped": stopped})
        return 0 if stopped else status

    def _check_requeue_limit(self, plan: LaunchPlan) -> None:
        limit = plan.max_requeues
        if self.restarts > limit:
            raise LaunchError(
                f"the job was requeued more than {limit} times (option requeue)",
                code="slurm.requeued-too-often",
            )

    def _resolve_placement(self, plan: LaunchPlan) -> socket.socket | None:
        """Set `plan`. On the head, return the open port of the rendezvous.

        Raises:
            LaunchError: this is no job step, it has another size, or its head cannot be found.
            Held: another command or job drives the run.
        """
        environ = self.environ
        nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if self.node_rank < 0 or not nodelist:
            raise LaunchError(
                "this process is not a step of a Slurm job: start it with srun",
                code="slurm.no-step",
            )
        names = tuple(expand_nodelist(nodelist))
        if not plan.min_nodes <= len(names) <= plan.nodes:
            raise LaunchError(
                f"the plan is for {plan.nodes} nodes, but this step has {len(names)}: {nodelist}; "
                f"start it with srun --nodes={plan.nodes} --ntasks-per-node=1",
                code="slurm.wrong-node-count",
            )
        attempt = plan.attempt + self.restarts
        if self.node_rank == 0:
            attempts.claim_for_job(plan.run, attempt, self._job_id())
            return self._serve_as_head(plan, attempt, names)
        patience_s = min(plan.join_timeout_s, _MOST_ENDPOINT_S)
        found = SlurmFiles(plan.run).await_endpoint(attempt, patience_s)
        if found is None or found["job"] != self._job_key():
            raise LaunchError(
                f"the agent on {names[0]} has not published its address", code="slurm.head-silent"
            )
        self.plan = plan.placed(attempt, names, found["host"], found["port"])
        return None

    def _serve_as_head(
        self, plan: LaunchPlan, attempt: int, names: tuple[str, ...]
    ) -> socket.socket:
        """Open the port of the rendezvous, and publish it to the other nodes."""
        job = self._job_key()
        host = own_address(names, self.environ.get("SLURM_LAUNCH_NODE_IPADDR"))
        listener = ports.listen_on_candidate(ports.to_listen_on(host), f"{job}/{plan.run_id}")
        port = int(listener.getsockname()[1])
        folder = SlurmFiles(plan.run)
        folder.end(attempt).unlink(missing_ok=True)
        files.write_json(folder.endpoint(attempt), {"job": job, "host": host, "port": port})
        events.note_event(plan.run, "attempt_started", attempt=attempt, job=job, nodes=list(names))
        self.plan = plan.placed(attempt, names, host, port)
        return listener

    def _job_id(self) -> str:
        """Return the id from the job's submission: `ARRAY_INDEX` for an array's element."""
        array = self.environ.get("SLURM_ARRAY_JOB_ID")
        index = self.environ.get("SLURM_ARRAY_TASK_ID")
        return self.environ["SLURM_JOB_ID"] if array is None else f"{array}_{index}"

    def _job_key(self) -> str:
        """Return a key that no other job, array element or attempt has."""
        parts = ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")
        return "/".join(self.environ.get(name, "") for name in parts)

    def _record(self, plan: LaunchPlan, error: LaunchError) -> None:
        """Write a failure record for a node that could not take part."""
        node_rank = max(self.node_rank, 0)
        failures.record_node(
            plan.run,
            plan.attempt + self.restarts,
            str(error),
            node_rank=node_rank,
            node=socket.gethostname(),
            restart=0,
            log=SlurmFiles(plan.run).node_log(node_rank),
        )


def own_address(names: tuple[str, ...], launched_from: str | None) -> str:
    """Return the head's address on the network on which the other nodes reach it.

    The head's own name does not help: Debian maps it to 127.0.1.1. So this is the address from
    which the route to another node starts.

    Raises:
        LaunchError: no other node's name can be resolved.
    """
    if len(names) == 1:
        return "127.0.0.1"
    for name in (*names[1:], *filter(None, [launched_from])):
        with contextlib.suppress(OSError):
            address = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)[0][4][0]
            on_loopback = ipaddress.ip_address(address).is_loopback
            if not on_loopback or name == address:  # a node so named, on a one-machine cluster
                return ports.address_towards(str(address), 9)
    raise LaunchError(
        f"the names of the other nodes cannot be resolved here: {', '.join(names[1:])}",
        code="slurm.names-unresolved",
    )


def expand_nodelist(nodelist: str) -> Iterator[str]:
    """Yield the names in Slurm's list format, for example `gpu[1,03-05]-ib,login`, in order."""
    for group in _split(nodelist):
        parts = re.split(r"\[([^\]]*)\]", group)  # text and ranges alternate
        choices = [_ranges(part) if odd % 2 else [part] for odd, part in enumerate(parts)]
        for chosen in product(*choices):
            yield "".join(chosen)


def _split(nodelist: str) -> list[str]:
    """Split at commas outside brackets."""
    return [part for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist) if part]


def _ranges(text: str) -> list[str]:
    found = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if dash:
            found += [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
        else:
            found.append(part)
    return found
