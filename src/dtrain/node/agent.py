"""The node agent: torch's elastic agent, with workers forked by the node's fork server."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed.elastic.agent.server import SimpleElasticAgent, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerState
from torch.distributed.elastic.multiprocessing import ProcessFailure, SignalException

from dtrain import environ
from dtrain.forking import SERVER_ENDED, Channel
from dtrain.launch_plan import LaunchPlan
from dtrain.memory import Memory
from dtrain.node import early_exit, stack_dump
from dtrain.node.environment import worker_environment
from dtrain.node.heartbeat import Peer, send_heartbeats, silence_message
from dtrain.node.rendezvous import NodeRendezvous
from dtrain.node.silence import SilenceWatcher
from dtrain.node.store import PeerFailed
from dtrain.node.usage import UsageLog
from dtrain.procs import ignore_stops
from dtrain.run import events, failures, verdict
from dtrain.run.failures import FailureRecord

log = logging.getLogger(__name__)

# After one worker has failed, the others' work is lost: this is for their failure records.
_COLLATERAL_GRACE_S = 0.3
_REPORT_S = 1.0  # for the other agents to learn the reason, 20 times the interval of their queries
_DEATH_S = 5.0  # a rank that hangs in the kernel must not delay the message to the others


class SameFailure(Exception):
    """The workers have failed in the same way as before their restart."""


class NodeAgent(SimpleElasticAgent):
    """Starts and watches one node's workers through the fork server."""

    def __init__(
        self,
        spec: WorkerSpec,
        plan: LaunchPlan,
        node_rank: int,
        channel: Channel,
        inherited: dict[str, str],
    ) -> None:
        """Prepare the agent. See `agent_process.run_agent` for the arguments."""
        super().__init__(spec, shutdown_timeout=int(plan.stop_timeout_s))
        self.plan = plan
        self.node_rank = node_rank
        self.node = failures.node_name()
        self._channel = channel
        self._server = Peer(plan.lost_after_s)
        send_heartbeats(channel, plan.lost_after_s)
        self._inherited = inherited
        self._rendezvous_handler: NodeRendezvous = spec.rdzv_handler
        self._running: dict[int, int] = {}
        self._failed: dict[int, FailureRecord] = {}
        self._absent: list[FailureRecord] = []
        self._left: list[FailureRecord] = []
        self._memory = Memory()
        self._restart = 0
        self._last_failure: FailureRecord | None = None
        """The failure that caused the last restart."""

    # -- hooks that torch's agent calls -------------------------------------------------------

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._restart = self._rendezvous_handler.round
        if self.plan.preflight and self._restart == 0:
            from dtrain.node.preflight import run_preflight  # no other launch needs its imports

            run_preflight(self.plan, self.node_rank, self._rendezvous_handler)
        self._failed.clear()
        self._absent.clear()
        self._left.clear()
        self._memory = Memory()
        workers = worker_group.workers
        errors = self.plan.run.error_file(self.plan.attempt, self._restart, 0).parent
        with contextlib.suppress(OSError):  # a program that finds no directory prints its error
            errors.mkdir(parents=True, exist_ok=True)
        logs = {worker.global_rank: self._log_of(worker.global_rank) for worker in workers}
        requests = [
            {
                "run_dir": self.plan.run_dir,
                "log": str(logs[worker.global_rank]),
                "env": worker_environment(
                    self.plan, worker_group, worker, self._restart, self._inherited
                ),
            }
            for worker in workers
        ]
        self._channel.send({"start": requests})
        pids = self._await_started()
        self._running = {pid: worker.local_rank for pid, worker in zip(pids, workers, strict=True)}
        self._event("workers_started", pids=pids, restart=self._restart)
        if self._restart == 0:  # now, because to read them takes 0.05 s, and the workers are busy
            self._event("environment", versions=environ.versions())
        self._silence = SilenceWatcher(self.plan, logs)
        self._usage = UsageLog(self.plan.run, self.plan.attempt, self.node_rank)
        return dict(enumerate(pids))

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._handle_messages(worker_group)
        if self._running and not self._failed:
            ranks = self._ranks(worker_group)
            self._silence.watch(ranks, self._signal, self._event)
            self._usage.record(ranks)
        if self._failed:
            if self._restart >= self.plan.max_restarts:
                self._remaining_restarts = 0
            return RunResult(
                state=WorkerState.FAILED,
                failures={
                    local_rank: ProcessFailure(local_rank, record.pid or 0, record.exit_code, "")
                    for local_rank, record in self._failed.items()
                },
            )
        # A node that is done waits for the others: if one must restart, all do.
        if not self._running and self._rendezvous_handler.all_done(done_here=True):
            return RunResult(
                state=WorkerState.SUCCEEDED,
                return_values={worker.global_rank: None for worker in worker_group.workers},
            )
        return RunResult(state=WorkerState.HEALTHY)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Stop the workers after a failure on this or another node.

        None of their state is saved.
        """
        self._wait_for_end(worker_group, _COLLATERAL_GRACE_S)
        causes = [f for f in self._failed.values() if not failures.is_collateral(f.message)]
        if self._running and not causes:
            self._record_absent(worker_group)
        for record in [] if causes else self._left:  # the verdict decides, as for the absent ranks
            record.write(self.plan.run, self.plan.attempt)
        self._signal_all(signal.SIGKILL)
        self._wait_for_end(worker_group, _DEATH_S)
        repeated = bool(self._failed) and self._report_failure()
        self._kill(worker_group)
        if repeated:
            raise SameFailure(f"failed as before restart {self._restart}; no further restart")

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, PeerFailed):
            if error.signal is None:
                self._stop_workers(self._worker_group)
            else:
                death_sig = signal.Signals(error.signal)  # dtrain's workers record the same reason
        if isinstance(error, SignalException):  # so that the other nodes stop as well
            self._rendezvous_handler.close_with(f"stopped by {death_sig.name}", signal=death_sig)
        if self._running:
            self._signal_all(death_sig)
            self._wait_for_end(self._worker_group, timeout)
            self._kill(self._worker_group)
        self._rendezvous_handler.shutdown()

    def _exit_barrier(self) -> None:
        """Leave the rendezvous. All nodes are already done, see `_monitor_workers`."""
        self._rendezvous_handler.leave()

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        try:
            return super()._invoke_run(role)
        except PeerFailed:
            # Another node stops, so this one does too. Its stop signal may also come here, perhaps
            # only now: that must not cut short the wait for workers that still save.
            ignore_stops()
            raise

    # -- workers -----------------------------------------------------------------------------

    def _await_started(self) -> list[int]:
        """Wait for the requested workers, as the server may still import torch.

        Return their pids.
        """
        while True:
            message = self._next_message()
            if message is not None and "started" in message:
                return list(message["started"])

    def _next_message(self, wait_s: float = 1.0) -> dict[str, Any] | None:
        try:
            message = self._channel.receive(wait_s)
        except EOFError:
            sys.exit(SERVER_ENDED)
        if message is not None:
            self._server.hear()
            if "lost" in message:
                self._rendezvous_handler.mark_lost(message["lost"])
        return message

    def _handle_messages(self, worker_group: WorkerGroup, wait_s: float = 0.0) -> None:
        message = self._next_message(wait_s)
        while message is not None:
            local_rank = self._running.pop(message.get("exited", 0), None)
            if local_rank is not None and not message["killed"]:
                rank = worker_group.workers[local_rank].global_rank
                if message["code"] != 0:
                    self._failed[local_rank] = self._record_of(rank, message)
                elif message["exit_note"]:
                    note = json.loads(message["exit_note"])
                    where = self._location(rank, message["exited"], message["time"])
                    self._left.append(early_exit.of_script(note, **where))
            message = self._next_message(0.0)
        if self._server.is_silent():
            self._end_silent_server()

    def _wait_for_end(self, worker_group: WorkerGroup, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._running and (left := deadline - time.monotonic()) > 0:
            self._handle_messages(worker_group, min(left, 0.2))

    def _kill(self, worker_group: WorkerGroup) -> None:
        self._signal_all(signal.SIGKILL)
        while self._running:
            self._handle_messages(worker_group, 0.2)

    def _signal_all(self, number: int) -> None:
        self._channel.send({"signal": 0, "number": int(number)})

    def _log_of(self, rank: int) -> Path:
        return self.plan.run.rank_log(self.plan.attempt, self.node_rank, rank)

    # -- failures ----------------------------------------------------------------------------

    def _record_of(self, rank: int, message: dict[str, Any]) -> FailureRecord:
        """Return the worker's own record of this restart if it wrote one, else the kernel's."""
        for own in failures.read_all(self.plan.run, self.plan.attempt, rank):
            if own.pid == message["exited"]:
                return own
        where = self._location(rank, message["exited"], message["time"])
        reported = self.plan.run.error_file(self.plan.attempt, self._restart, rank)
        status = message["code"]
        record = failures.of_error_file(reported, status, **where) or failures.of_exit_status(
            status, out_of_memory=self._memory.ran_out(), **where
        )
        if status == -signal.SIGKILL:
            advice = verdict.ADVICE.get(record.kind, "find out what sent the signal")
            record = replace(record, hint=f"{advice}: {self._memory.describe(message['peak'])}")
        elif status < 0 and not record.hint:
            from dtrain.doctor.explained import explain

            record = replace(record, hint=explain(record.message))
        record.write(self.plan.run, self.plan.attempt)
        return record

    def _location(self, rank: int, pid: int, when: float) -> dict[str, Any]:
        """Return the rank, location and time of a record."""
        return {
            "rank": rank,
            "node_rank": self.node_rank,
            "node": self.node,
            "restart": self._restart,
            "time": when,
            "pid": pid,
            "log": str(self._log_of(rank)),
        }

    def _record_absent(self, worker_group: WorkerGroup) -> None:
        """Record which ranks still run now that others have given up, and where they are.

        The verdict decides whether one of them is the cause: one node does not know what happened
        on the others.
        """
        ranks = self._ranks(worker_group)
        logs = {pid: self._log_of(rank) for pid, rank in ranks.items()}
        answers = stack_dump.request(logs.values(), lambda: self._signal(ranks, stack_dump.SIGNAL))
        for pid, rank in ranks.items():
            stack = answers[logs[pid]]
            record = failures.of_worker(
                "absent",
                "did not reach the collective that the others waited for "
                f"({self.plan.collective_timeout_s:g} s)",
                1,
                frames=(failures.only_user_frames(stack) or stack[:1])[::-1],
                collateral=stack_dump.is_waiting_or_failing(stack),
                **self._location(rank, pid, time.time()),
            )
            record.write(self.plan.run, self.plan.attempt)
            self._absent += [] if record.collateral else [record]

    def _ranks(self, worker_group: WorkerGroup) -> dict[int, int]:
        """Map the pids of the workers that run to ranks."""
        return {pid: worker_group.workers[at].global_rank for pid, at in self._running.items()}

    def _signal(self, pids: Iterable[int], number: int) -> None:
        for pid in pids:
            self._channel.send({"signal": pid, "number": int(number)})

    def _end_silent_server(self) -> NoReturn:
        """Report that the fork server is silent, and end it.

        Its forks and this agent die with it.
        """
        record = failures.record_node(
            self.plan.run,
            self.plan.attempt,
            silence_message("the node process", self.plan.lost_after_s),
            kind="node_lost",
            node_rank=self.node_rank,
            log=self.plan.run.agent_log(self.plan.attempt, self.node_rank),
            node=self.node,
            restart=self._restart,
        )
        log.error("%s", record.message)
        self._rendezvous_handler.close_with(record.message, record)
        time.sleep(_REPORT_S)
        os.kill(os.getppid(), signal.SIGKILL)
        sys.exit("the node's fork server was silent")

    def _report_failure(self) -> bool:
        """Report the failure of workers here.

        Returns:
            Whether it repeats the failure that caused the last restart: no other would help.
        """
        first = verdict.cause_on_node([*self._failed.values()], self._absent, self._left)
        repeated = self._last_failure is not None and first.repeats(self._last_failure)
        self._last_failure = first
        if repeated:
            first = replace(first, repeated=True)
            first.write(self.plan.run, self.plan.attempt)
        what = f"{first.type}: {first.message}" if first.type else first.message
        log.error("rank %s failed: %s", first.rank, what.splitlines()[0] if what else "")
        self._event(
            "worker_failed",
            rank=first.rank,
            what=what[:500],
            restart=self._restart,
            max_restarts=self.plan.max_restarts,
        )
        if repeated or self._restart >= self.plan.max_restarts:
            self._rendezvous_handler.close_with(f"rank {first.rank} failed", first)
        return repeated and self._restart < self.plan.max_restarts

    def _event(self, event: str, **fields: Any) -> None:
        node = {"node_rank": self.node_rank, "node": self.node}
        events.note_event(self.plan.run, event, **node, **fields)
