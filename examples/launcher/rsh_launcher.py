"""Launcher `rsh`: one node on each host of a list, started by ssh or a similar command."""

import os
import socket
import subprocess
from dataclasses import replace

from dtrain.errors import PlanError
from dtrain.job.launcher_options import LauncherOptions
from dtrain.launch_plan import Command, Facts, LaunchPlan
from dtrain.launchers.base import LaunchGroup
from dtrain.launchers.flags import Flag
from dtrain.launchers.local import LocalLauncher, NodeProcess
from dtrain.node.placement.base import NodePlacement, PlacementReader
from dtrain.procs import die_with_parent, kill_group
from dtrain.run.rundir import RunDir

FLAGS = (Flag(("--hosts",), "rsh", "HOST,HOST", "hosts of the nodes, node 0 first."),)
HERE = LocalLauncher()  # the launching command is a process of this host, as with `local`


class RshOptions(LauncherOptions):
    launcher = "rsh"

    hosts: str = ""
    shell: list[str] = ["ssh", "-tt", "{host}", "env", "RSH_HOST={host}"]


class RshLauncher:
    options_model = RshOptions

    def complete(self, plan: LaunchPlan, facts: Facts) -> LaunchPlan:
        options = RshOptions.of(plan.options)
        hosts = tuple(options.hosts.split(","))
        if len(hosts) != plan.nodes:
            text = f"--hosts names {len(hosts)} hosts for {plan.nodes} nodes"
            raise PlanError(text, code="rsh.too-few-hosts")
        node = (facts.python, "-P", "-m", "dtrain.node", plan.run_dir, "--placement", "rsh")
        shells = [[part.format(host=host) for part in options.shell] for host in hosts]
        commands = tuple(
            Command(host, (*shell, *node), node_ranks=(rank,))
            for rank, (host, shell) in enumerate(zip(hosts, shells, strict=True))
        )
        return replace(plan, node_names=hosts, rdzv_host=hosts[0], commands=commands)

    def start(self, plan: LaunchPlan) -> LaunchGroup:
        return LaunchGroup([NodeProcess(plan, each, None, Rsh) for each in plan.commands])

    def is_running(self, run: RunDir) -> bool:
        return HERE.is_running(run)

    def cancel(self, run: RunDir, timeout_s: float) -> None:
        HERE.cancel(run, timeout_s)


class Rsh(subprocess.Popen):
    def __init__(self, argv, env, log, _listener) -> None:
        with log.open("ab") as out:
            super().__init__(
                argv, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        kill_group(self.pid)
        self.wait()


class RshPlacement(PlacementReader):
    """Find the rank of this node from the name of the host."""

    def begin(self, run: RunDir) -> None:
        die_with_parent(os.getppid())  # the node ends with its ssh

    def join(self, plan: LaunchPlan) -> NodePlacement:
        host = self.environ.get("RSH_HOST") or socket.gethostname()
        return NodePlacement(plan, [plan.node_names.index(host)], None, self.environ)
