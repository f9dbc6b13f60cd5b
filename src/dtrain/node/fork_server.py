"""`python -m dtrain.node`: the fork server of a host. It imports torch once and forks the rest.

The server imports torch and forks the node agents (one, or several for simulated nodes). While they
meet their peers, it imports torch._dynamo. Then it forks workers when an agent requests them.
Without this, DDP's first step would import torch._dynamo in each rank (2.6 s, measured), and a
restart would import everything again.

All processes that it forks die with it. The workers of an agent that has ended are killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.forking import Channel, Children, Ended, import_once
from dtrain.launch_plan import LaunchPlan
from dtrain.node import stack_dump
from dtrain.node.heartbeat import Peer, pause_s, silence_message
from dtrain.procs import (
    DEFERRED_SIGNALS,
    STOP_SIGNALS,
    fork_child,
    is_ending,
    kill_group,
    shell_code,
)
from dtrain.ranks import RankInfo
from dtrain.run import events, failures, progress_bars
from dtrain.run.flight_recorder import Ring
from dtrain.run.rundir import RunDir

WORKER_MODULES = ("dtrain.node.worker", "torch._dynamo")
"""Modules imported before the first worker is forked, in addition to the plan's modules."""


@dataclass(frozen=True)
class _Worker:
    """A rank's process, and the ring that it shares with this one."""

    ranks: RankInfo
    ring: Ring
    log: Path

    def save_collectives(self, plan: LaunchPlan) -> None:
        """Save its last collectives for the verdict."""
        folder = plan.run.collectives(plan.attempt, self.ranks.restart)
        with contextlib.suppress(OSError):  # a full disk may be why it ended
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank-{self.ranks.rank:05d}").write_bytes(self.ring.contents())


@dataclass
class _Agent:
    """A node agent and the workers that it requested."""

    node_rank: int
    pid: int
    channel: Channel
    peer: Peer
    workers: dict[int, _Worker] = field(default_factory=dict)
    """The workers by pid."""
    killed: set[int] = field(default_factory=set)
    """Workers that were killed at its request."""
    status: int | None = None


class _StopRequested(BaseException):
    """Ends the imports for workers that will not be started."""


class ForkServer:
    """Forks agents and workers of one host, and reaps them."""

    def __init__(
        self,
        plan: LaunchPlan,
        node_ranks: list[int],
        run_agent: Callable[[LaunchPlan, int, Channel, int | None], int],
        is_superseded: Callable[[], bool],
    ) -> None:
        """Prepare the server. Nothing is forked yet.

        Args:
            plan: the launch.
            node_ranks: the nodes that this host serves, more than one when simulated.
            run_agent: called in each agent's process with (plan, node_rank, channel, listen_fd).
            is_superseded: called from time to time. Returns whether the launch has begun again
                without this host.
        """
        self.plan = plan
        self.node_ranks = node_ranks
        self._run_agent = run_agent
        self._agents: list[_Agent] = []
        self._stop_signal: int | None = None
        self._is_importing = False
        self._is_superseded = is_superseded
        self._children = Children()

    def serve(self, listen_fd: int | None = None) -> int:
        """Fork the agents and serve them until all have ended. Return their worst exit code.

        Args:
            listen_fd: the socket on which node 0 serves the rendezvous, already listening.
        """
        stack_dump.enable()
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(sig, self._ask_to_stop)
        for node_rank in self.node_ranks:
            self._fork_agent(node_rank, listen_fd if node_rank == 0 else None)
        if listen_fd is not None:
            os.close(listen_fd)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, DEFERRED_SIGNALS)
        with contextlib.suppress(_StopRequested):
            self._import_for_workers()
        while any(agent.status is None for agent in self._agents):
            running = [agent.channel for agent in self._agents if agent.status is None]
            self._children.wait(running, pause_s(self.plan.lost_after_s))
            self._reap()
            self._handle_requests()
            self._kill_silent()
            if self._is_superseded():
                print("dtrain: the job was restarted elsewhere; this node exits", file=sys.stderr)
                return 1  # all that it forked dies with it
        return max(agent.status or 0 for agent in self._agents)

    def _import_for_workers(self) -> None:
        """Import what workers need.

        After a stop request there will be no workers, so do nothing.
        """
        self._is_importing = True
        if self._stop_signal is not None:
            raise _StopRequested
        modules, preload = (*WORKER_MODULES, *self.plan.modules), self.plan.preload
        # an agent may fail during the imports, and this must not be noticed only afterwards
        threads = 1 + import_once(modules, preload, between=self._reap)
        if threads > 1:
            cause = f"; preloading {', '.join(preload)} started them" if preload else ""
            print(
                f"dtrain: the fork server has {threads} threads{cause}; forked workers may hang",
                file=sys.stderr,
            )
        self._is_importing = False

    # -- agents ------------------------------------------------------------------------------

    def _fork_agent(self, node_rank: int, listen_fd: int | None) -> None:
        server_end, agent_end = Channel.pair()
        log = _open_log(self.plan.run.agent_log(self.plan.attempt, node_rank))
        keep = [agent_end.fileno(), *([] if listen_fd is None else [listen_fd])]
        pid = fork_child(
            lambda: self._run_agent(self.plan, node_rank, agent_end, listen_fd),
            stdout=log,
            stderr=log,
            keep_fds=keep,
            block=STOP_SIGNALS,
        )
        os.close(log)
        agent_end.close()
        self._agents.append(_Agent(node_rank, pid, server_end, Peer(self.plan.lost_after_s)))
        events.note_event(self.plan.run, "agent_started", node_rank=node_rank, pid=pid)

    @property
    def asked_to_stop(self) -> bool:
        """Return whether this host was asked to stop."""
        return self._stop_signal is not None

    def _ask_to_stop(self, sig: int, _frame: object) -> None:
        self._stop_signal = sig
        for agent in self._agents:
            if agent.status is None:
                kill_group(agent.pid, sig)
        if self._is_importing:
            self._is_importing = False
            raise _StopRequested

    # -- the loop ----------------------------------------------------------------------------

    def _reap(self) -> None:
        for ended in self._children.reap():
            for agent in self._agents:
                if ended.pid == agent.pid:
                    self._agent_ended(agent, ended.code)
                elif ended.pid in agent.workers:
                    self._worker_ended(agent, ended)

    def _worker_ended(self, agent: _Agent, ended: Ended) -> None:
        worker = agent.workers.pop(ended.pid)
        kill_group(ended.pid)  # data loader processes and any others that it left
        progress_bars.settle(worker.log)
        if agent.status is None:
            killed = ended.pid in agent.killed
            message = {"exited": ended.pid, "code": ended.code, "time": time.time(),
                       "killed": killed, "exit_note": worker.ring.exit_note().decode(),
                       "peak": ended.peak}  # fmt: skip
            _send(agent.channel, message)
        agent.killed.discard(ended.pid)
        if ended.code != 0:  # after the report to the agent, so that a restart need not wait for it
            worker.save_collectives(self.plan)

    def _agent_ended(self, agent: _Agent, code: int) -> None:
        agent.status = shell_code(code)
        for pid in agent.workers:
            kill_group(pid)
        agent.channel.close()
        if code < 0:
            self._record_lost_node(agent, code)
            for other in (each for each in self._agents if each.status is None):
                _send(other.channel, {"lost": agent.node_rank})

    def _kill_silent(self) -> None:
        """Kill agents that are stopped: no other process would detect that their workers fail."""
        for agent in self._agents:
            if agent.status is None and agent.peer.is_silent():
                kill_group(agent.pid)

    def _record_lost_node(self, agent: _Agent, code: int) -> None:
        plan = self.plan
        how = f"the node agent was killed by {failures.signal_name(-code)}"
        if agent.peer.is_silent():
            how = silence_message("the node agent", plan.lost_after_s)
        failures.record_node(
            plan.run,
            plan.attempt,
            how,
            kind="node_lost",
            exit_code=shell_code(code),
            node_rank=agent.node_rank,
            node=plan.node_names[agent.node_rank],
            pid=agent.pid,
            log=plan.run.agent_log(plan.attempt, agent.node_rank),
        )

    # -- requests ----------------------------------------------------------------------------

    def _handle_requests(self) -> None:
        for agent in self._agents:
            while agent.status is None:
                try:
                    request = agent.channel.receive()
                except EOFError:
                    break  # it has ended; the next reap reports how
                if request is None:
                    break
                if "alive" in request:
                    agent.peer.hear()
                    _send(agent.channel, {"heard": True})
                    continue
                if "start" in request and self.asked_to_stop:
                    continue  # its agent must stop too, and the workers' modules are missing
                if "start" in request:
                    started = [self._fork_worker(agent, worker) for worker in request["start"]]
                    _send(agent.channel, {"started": started})
                elif request["signal"] in agent.workers or request["signal"] == 0:
                    self._signal(agent, request)

    def _signal(self, agent: _Agent, request: dict[str, Any]) -> None:
        for pid in agent.workers if request["signal"] == 0 else [request["signal"]]:
            if request["number"] == signal.SIGKILL:
                if not is_ending(pid):  # a process that is ending reports why the others are killed
                    agent.killed.add(pid)
                kill_group(pid)
            else:
                os.kill(pid, request["number"])

    def _fork_worker(self, agent: _Agent, worker: dict[str, Any]) -> int:
        log = _open_log(Path(worker["log"]))
        ring = Ring()
        pid = fork_child(lambda: _become_worker(worker, ring), stdout=log, stderr=log)
        os.close(log)
        agent.workers[pid] = _Worker(RankInfo.from_env(worker["env"]), ring, Path(worker["log"]))
        return pid


def _become_worker(request: dict[str, Any], ring: Ring) -> int:
    os.environ.clear()
    os.environ.update(request["env"])
    # PYTHONUNBUFFERED is read when an interpreter starts, and a fork does not start one: without
    # these a log would show what a script prints 8 KB at a time.
    streams = progress_bars.replace_streams(Path(request["log"]))
    # What the imports above registered for exit (174 op libraries of torch) is the server's task,
    # not each worker's: it takes 0.2 s. What the worker registers itself still runs.
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
    from dtrain.node import worker

    status = worker.run_worker(RunDir(request["run_dir"]), ring)
    for stream in streams:
        stream.finish()
    return status


def _open_log(path: Path) -> int:
    """Open a log to append to. If this fails (a full disk), output is dropped."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        print(f"dtrain: cannot write {path}: {error.strerror}", file=sys.stderr)
        return os.open(os.devnull, os.O_WRONLY)


def _send(channel: Channel, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the agent has ended; the next reap reports how
        channel.send(message)
