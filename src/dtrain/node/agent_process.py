"""The process of a node agent, from rendezvous to exit code."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence

from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.multiprocessing import SignalException

from dtrain.doctor import gpus
from dtrain.errors import EXIT_USAGE, DtrainError
from dtrain.forking import Channel
from dtrain.launch_plan import LaunchPlan
from dtrain.node.agent import NodeAgent, SameFailure
from dtrain.node.rendezvous import NodeRendezvous
from dtrain.node.store import NodeTaken, PeerFailed, RendezvousFailed, RendezvousSettings
from dtrain.procs import STOP_SIGNALS, ignore_stops
from dtrain.run import attempts, events, failures

log = logging.getLogger(__name__)

_MONITOR_S = 0.05


def run_agent(
    plan: LaunchPlan,
    node_rank: int,
    channel: Channel,
    listen_fd: int | None,
    *,
    inherited: dict[str, str],
) -> int:
    """Run the agent of one node until its workers have ended. Return the exit code of the node.

    Args:
        plan: the launch.
        node_rank: the rank of this node.
        channel: the channel to the node's fork server.
        listen_fd: on the head, the socket that the launcher opened for the rendezvous.
        inherited: the environment that the workers inherit. It is the node's, before the fork
            server limited its own to one thread.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for number in STOP_SIGNALS:
        signal.signal(number, _raise_signal)
    os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"  # ranks follow from the node rank alone
    os.environ["DTRAIN_NODE_NAME"] = plan.node_names[node_rank] or socket.gethostname()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # delivers pending signals
        listener = None if listen_fd is None else socket.socket(fileno=listen_fd)
        handler = NodeRendezvous(_settings(plan, node_rank), listener, _notice(plan, node_rank))
        try:
            if lacking := gpus.lacking(plan, inherited):
                raise RendezvousFailed(lacking)
            spec = _worker_spec(plan, handler)
            result = NodeAgent(spec, plan, node_rank, channel, inherited).run()
        except RendezvousFailed as error:
            handler.close_with(str(error))
            raise
        return int(result is None or result.is_failed())
    except Exception as error:
        return _exit_code(plan, node_rank, error)


def _worker_spec(plan: LaunchPlan, handler: NodeRendezvous) -> WorkerSpec:
    return WorkerSpec(
        role="default",
        local_world_size=plan.procs_per_node,
        rdzv_handler=handler,
        entrypoint="dtrain.worker",
        max_restarts=1_000_000,  # counted by rendezvous round, the same on all nodes
        monitor_interval=_MONITOR_S,
    )


def _exit_code(plan: LaunchPlan, node_rank: int, error: Exception) -> int:
    """Log why the agent ends, and write the records that no other process writes.

    Return its exit code.
    """
    match error:
        case SignalException():
            log.warning("stopped by %s", error.sigval.name)
            return 128 + int(error.sigval)
        case NodeTaken():  # the run belongs to the other agent, and continues
            log.error("%s", error)
            return EXIT_USAGE
        case PeerFailed():
            log.error("%s", error)
            if error.signal is not None:
                return 128 + error.signal
            _record_peer(plan, node_rank, error)
        case SameFailure():
            log.error("%s", error)
        case RendezvousFailed():
            log.error("%s", error)
            _record(plan, node_rank, str(error), error.missing, error.hint)
        case _:  # for example because of a limit that this host sets
            log.exception("the agent exits because of an error")
            kind = "" if isinstance(error, DtrainError) else f"{type(error).__name__}: "
            os.close(0)  # if no descriptor is left, the record needs one
            _record(plan, node_rank, f"{kind}{error}")
    return 1


def _settings(plan: LaunchPlan, node_rank: int) -> RendezvousSettings:
    try:
        secret = attempts.token(plan.run, plan.attempt)
    except OSError as error:
        raise RendezvousFailed(
            f"cannot read the token of the launch: {error.strerror}: {error.filename}"
        ) from error
    return RendezvousSettings(
        run_id=f"{plan.run_id}/{plan.attempt}",
        host=plan.rdzv_host,
        port=plan.rdzv_port,
        node_rank=node_rank,
        node_name=failures.node_name(),
        min_nodes=plan.min_nodes,
        max_nodes=plan.nodes,
        join_timeout_s=plan.join_timeout_s,
        token=secret,
        lost_after_s=plan.lost_after_s,
        names=plan.node_names,
    )


def _notice(plan: LaunchPlan, node_rank: int) -> Callable[[str], None]:
    def notice(text: str) -> None:
        log.info("%s", text)
        events.note_event(plan.run, "waiting", node_rank=node_rank, what=text)

    return notice


def _record(
    plan: LaunchPlan, node_rank: int, message: str, missing: Sequence[int] = (), hint: str = ""
) -> None:
    """Write a record of each node that did not join, or of this one if all joined."""
    for failed_node in missing or [node_rank]:
        is_own = failed_node == node_rank
        failures.record_node(
            plan.run,
            plan.attempt,
            message,
            kind="agent" if is_own else "node_missing",
            node_rank=failed_node,
            node=failures.node_name() if is_own else plan.node_names[failed_node],
            restart=0,
            log=plan.run.agent_log(plan.attempt, node_rank),
            hint=hint,
        )


def _record_peer(plan: LaunchPlan, node_rank: int, error: PeerFailed) -> None:
    """Save the report of another node: its records may be on a disk that is not visible here."""
    record = error.record
    if record is None:
        _record(plan, node_rank, str(error))
        return
    if record.node_rank >= plan.nodes or (record.rank or 0) >= plan.world_size:
        _record(plan, node_rank, f"{error} (the run has no such rank)")
        return
    known = failures.read_all(plan.run, plan.attempt)
    where = (record.node_rank, record.rank)
    same = [each for each in known if (each.node_rank, each.rank) == where]
    # a process that saw a node end knows more than one that only missed it
    if not any(record.rank is None or each.pid == record.pid for each in same):
        record.write(plan.run, plan.attempt)


def _raise_signal(number: int, _frame: object) -> None:
    ignore_stops()  # Slurm signals every process of the tree, and more than once
    raise SignalException("asked to stop", signal.Signals(number))
