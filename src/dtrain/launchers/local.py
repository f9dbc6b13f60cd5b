"""Launcher `local`, which uses this machine as one node or as several simulated ones."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from dtrain import ports, procs
from dtrain.doctor import gpus
from dtrain.doctor.asked import open_files_limit, open_files_of_agents
from dtrain.environ import HASH_SEED, inherited_env
from dtrain.errors import LaunchError, UsageError
from dtrain.job.launcher_options import LauncherOptions
from dtrain.launch_plan import Command, Facts, LaunchPlan
from dtrain.launchers.base import Slot
from dtrain.memory import Memory
from dtrain.run import failures, files
from dtrain.run.attempts import Handle
from dtrain.run.rundir import RunDir
from dtrain.waiting import poll


class Process(Protocol):
    """A node process, controlled by the process that started it."""

    def poll(self) -> int | None:
        """Return its exit status once it has ended, negative for a signal."""

    def send_signal(self, number: int) -> None:
        """Send it a signal."""

    def kill(self) -> None:
        """End it and wait until it has ended."""


Spawn = Callable[[Sequence[str], Mapping[str, str], Path, socket.socket | None], Process]
"""A function from (command, environment, log, socket of the rendezvous on node 0) to a node
process."""


class NoOptions(LauncherOptions):
    launcher = "local"


class LocalLauncher:
    """A launcher with one fork server for all nodes: 4 ranks on 2 nodes import torch once, not
    twice."""

    options_model: type[LauncherOptions] = NoOptions

    def __init__(self, spawn: Spawn | None = None) -> None:
        """Use `spawn` to start the node process. Without it, start a new interpreter."""
        self._spawn = spawn

    def complete(self, plan: LaunchPlan, facts: Facts) -> LaunchPlan:
        plan = replace(plan, options=NoOptions.of(plan.options))
        names = (facts.host,) if plan.nodes == 1 else tuple(f"node-{k}" for k in range(plan.nodes))
        plan = replace(plan, node_names=names, rdzv_port=facts.free_port)
        return replace(plan, commands=(node_command(plan, facts, range(plan.nodes)),))

    def start(self, plan: LaunchPlan) -> NodeProcess:
        (command,) = plan.commands
        return NodeProcess(plan, command, "127.0.0.1", self._spawn)

    def lacking(self, plan: LaunchPlan) -> str:
        return gpus.lacking(plan)

    def slots(self, plan: LaunchPlan, runs: int, at_once: int | None) -> list[Slot]:
        """See `Shareable.slots`. By default, there are no more processes than cores.

        No GPU is in two slots. If there are fewer runs than cores, a run has several.
        """
        cores = len(os.sched_getaffinity(0))
        if plan.gpus_per_node:
            shared = gpus.split(plan.gpus_per_node * plan.nodes)
            shared = shared[: min(runs, at_once or runs)]
            return [Slot(max(1, cores // len(shared)), names) for names in shared]
        count = at_once or max(1, cores // (plan.world_size * plan.replicas))
        count = min(count, runs)
        return [Slot(max(1, cores // count))] * count

    def is_running(self, run: RunDir) -> bool:
        handle = Handle.read(run)
        return handle is not None and handle.is_alive(run)

    def cancel(self, run: RunDir, timeout_s: float) -> None:
        """See `Launcher.cancel`. The driver ends its nodes. If it is killed, they die with it."""
        handle = Handle.read(run)
        if handle is None or not handle.is_alive(run):
            return
        if not handle.is_visible:
            raise UsageError(
                f"run {run.id} is driven from {handle.host}; cancel it there",
                code="run.driven-elsewhere",
            )
        os.kill(handle.pid, signal.SIGTERM)
        if not poll(lambda: not handle.is_alive(run), timeout_s):
            os.kill(handle.pid, signal.SIGKILL)  # the nodes and workers die with it
            poll(lambda: not handle.is_alive(run), timeout_s)


class NodeProcess:
    """A running `python -m dtrain.node`, or the command that starts one on another host."""

    def __init__(
        self,
        plan: LaunchPlan,
        command: Command,
        listen_host: str | None,
        spawn: Spawn | None = None,
    ) -> None:
        """Start a node command of a plan.

        Args:
            plan: the launch.
            command: one of the plan's commands.
            listen_host: the address on which to open the rendezvous port before anything starts, so
                that no other process can take the port. None means that the head is another host.
            spawn: the function that starts it. None means a new interpreter.
        """
        _refuse_few_files(plan)
        self._plan = plan
        self._node_ranks = command.node_ranks
        self._stop_requested = False
        self._memory = Memory()
        log = plan.run.host_log(plan.attempt, self._node_ranks[0])
        env = {**inherited_env(), **command.env, HASH_SEED: plan.worker_env[HASH_SEED]}
        listener = None if listen_host is None else _listen(listen_host, plan.rdzv_port)
        try:
            files.make_parent(log)
            self._process = (spawn or _Interpreter)(command.argv, env, log, listener)
        except OSError as error:
            raise LaunchError(
                f"cannot start {command.argv[0]}: {error.strerror}",
                code="launch.command-not-started",
            ) from error
        finally:
            if listener is not None:
                listener.close()

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is None or code >= 0:
            return code
        if not self._stop_requested and -code not in procs.STOP_SIGNALS:
            self._stop_requested = True
            self._record_killed(code)
        return procs.shell_code(code)

    def stop(self) -> None:
        self._stop_requested = True
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """See `Launch.kill`. Agents and workers die with their fork server."""
        self._stop_requested = True
        if self._process.poll() is None:
            self._process.kill()

    def _record_killed(self, status: int) -> None:
        """Record the loss of all nodes at once, because none of them could."""
        plan, (first, *others) = self._plan, self._node_ranks
        if any(
            record.kind == "node_lost" and record.node_rank in self._node_ranks
            for record in failures.read_all(plan.run, plan.attempt)
        ):
            return  # an agent has ended it, and recorded why
        served = f" of nodes {', '.join(map(str, self._node_ranks))}" if others else ""
        failures.record_node(
            plan.run,
            plan.attempt,
            f"the node process{served} {failures.describe_exit(status)}",
            node_rank=first,
            log=plan.run.host_log(plan.attempt, first),
            node=plan.node_names[first] or failures.node_name(),
            exit_code=procs.shell_code(status),
            kind="oom" if self._memory.ran_out() else "node_lost",
        )


class _Interpreter:
    """A node process in a new interpreter."""

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], log: Path, listener: socket.socket | None
    ) -> None:
        keep = [] if listener is None else [listener.fileno()]
        listen = [part for fd in keep for part in ("--listen-fd", str(fd))]
        self._process = procs.start_child([*argv, *listen], env=env, log=log, pass_fds=keep)
        self.poll, self.send_signal = self._process.poll, self._process.send_signal

    def kill(self) -> None:
        """End its process group and wait until it has ended."""
        procs.kill_group(self._process.pid)
        self._process.wait()


def node_command(plan: LaunchPlan, facts: Facts, node_ranks: Iterable[int]) -> Command:
    """Return the `python -m dtrain.node` command that serves some of a plan's nodes on this
    host."""
    served = tuple(node_ranks)
    flags = [part for node_rank in served for part in ("--node-rank", str(node_rank))]
    argv = (facts.python, "-P", "-m", "dtrain.node", plan.run_dir, *flags)
    return Command(where=facts.host, argv=argv, node_ranks=served)


def _refuse_few_files(plan: LaunchPlan) -> None:
    """Refuse to start where the limit of open files would make torch's store wait forever."""
    needed = open_files_of_agents(plan.procs_per_node * len(plan.node_ranks))
    limit, _ = open_files_limit()
    if limit < needed:
        raise LaunchError(
            f"this host allows {limit} open files per process, and this launch needs {needed}: "
            "raise the limit, for example with `ulimit -n 4096`",
            code="launch.too-few-open-files",
        )


def _listen(host: str, port: int) -> Any:
    try:
        return ports.listen(host, port)
    except OSError as error:
        raise LaunchError(
            f"port {port} of the rendezvous cannot be opened on {host or 'this host'}: "
            f"{error.strerror}; launch again for another port, or choose one with --rdzv-endpoint",
            code="launch.port-not-opened",
        ) from error
