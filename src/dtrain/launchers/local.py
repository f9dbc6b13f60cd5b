"""Launcher `local`: this machine, as one node or as several simulated ones."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from dataclasses import replace
from typing import Any

from dtrain import ports, procs, rundir
from dtrain.errors import LaunchError, UsageError
from dtrain.launchers import base
from dtrain.launchers.base import Handle
from dtrain.plan import Command, Facts, LaunchPlan
from dtrain.remote.runs import is_silent
from dtrain.rundir import RunDir
from dtrain.variables import inherited_env


class LocalLauncher:
    """One fork server for all nodes: 4 ranks on 2 nodes cost one import of torch, not two."""

    def complete(self, plan: LaunchPlan, facts: Facts) -> LaunchPlan:
        """See `Launcher.complete`."""
        plan = base.with_options(plan, {})
        names = (facts.host,) if plan.nodes == 1 else tuple(f"node-{k}" for k in range(plan.nodes))
        plan = replace(plan, node_names=names, rdzv_port=facts.free_port)
        return replace(plan, commands=(node_command(plan, facts, range(plan.nodes)),))

    def start(self, plan: LaunchPlan) -> NodeProcess:
        """See `Launcher.start`."""
        return NodeProcess(plan, listen_host="127.0.0.1")

    def is_running(self, run: RunDir) -> bool:
        """See `Launcher.is_running`."""
        handle = Handle.read(run)
        if handle is None or not handle.is_alive():
            return False
        return handle.host == socket.gethostname() or not is_silent(run)

    def cancel(self, run: RunDir, timeout_s: float) -> None:
        """See `Launcher.cancel`: the driver ends its nodes, and dies with them if it must."""
        handle = Handle.read(run)
        if handle is None or not handle.is_alive():
            return
        if handle.host != socket.gethostname():
            raise UsageError(f"run {run.id} is driven from {handle.host}; cancel it there")
        os.kill(handle.pid, signal.SIGTERM)
        if not base.wait_until(lambda: not handle.is_alive(), timeout_s):
            os.kill(handle.pid, signal.SIGKILL)  # the nodes and workers die with it
            base.wait_until(lambda: not handle.is_alive(), timeout_s)


class NodeProcess:
    """A `python -m dtrain.node` of our own on this host."""

    def __init__(self, plan: LaunchPlan, listen_host: str | None) -> None:
        """Start the plan's node command.

        Args:
            plan: the launch.
            listen_host: where to open the rendezvous port before anything starts, so that
                nobody can take it in between; None when the head is another host.
        """
        self._plan = plan
        command = next(command for command in plan.commands if not command.by_hand)
        argv = [*command.argv, "--parent", str(os.getpid())]
        keep: list[int] = []
        if listen_host is not None:
            listener = _listen(listen_host, plan.rdzv_port)
            keep = [listener.detach()]
            argv += ["--listen-fd", str(keep[0])]
        log_path = plan.run.host_log(plan.attempt, int(command.argv[-1]))
        try:
            rundir.make_parent(log_path)
            with log_path.open("ab") as log:
                self._process: subprocess.Popen[bytes] = subprocess.Popen(
                    argv,
                    env={**inherited_env(), **command.env},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=keep,
                    start_new_session=True,  # a Ctrl-C is ours to pass on
                )
        except OSError as error:
            raise LaunchError(f"cannot start {argv[0]}: {error.strerror}") from error
        finally:
            for fd in keep:
                os.close(fd)

    def poll(self) -> int | None:
        """See `Launch.poll`."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def stop(self) -> None:
        """See `Launch.stop`."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """See `Launch.kill`: agents and workers die with their fork server."""
        if self._process.poll() is None:
            procs.kill_group(self._process.pid)
            self._process.wait()


def node_command(plan: LaunchPlan, facts: Facts, node_ranks: Any) -> Command:
    """The `python -m dtrain.node` that serves some of a plan's nodes on this host."""
    argv = [facts.python, "-m", "dtrain.node", plan.run_dir]
    for node_rank in node_ranks:
        argv += ["--node-rank", str(node_rank)]
    return Command(where=facts.host, argv=tuple(argv))


def _listen(host: str, port: int) -> Any:
    try:
        return ports.listen(host, port)
    except OSError as error:
        raise LaunchError(
            f"port {port} of the rendezvous cannot be opened on {host or 'this host'}: "
            f"{error.strerror}; launch again for another port, or choose one with --rdzv-endpoint"
        ) from error
