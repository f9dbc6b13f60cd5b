"""Starts, breaks and stops everything of one cluster. Lives in the keeper, and only there."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

from cluster import conf
from cluster.database import start_accounting
from cluster.enter import ends_with_its_starter, enter, environment, write_wrappers
from cluster.hosts import Hosts
from cluster.needs import path_with_daemons, program
from cluster.processes import (
    alive,
    children,
    descendants,
    kill,
    network_of,
    reap,
    sharing_network,
    tail,
    wait_until,
)
from cluster.spec import ClusterError, Files, State

_STOP_S = 20.0


class Daemons:
    """All processes of a cluster, as children of this one."""

    def __init__(self, state: State, files: Files) -> None:
        self.state = state
        self.files = files
        self._hosts = Hosts(state, files)

    # ------------------------------------------------------------------ start

    def start(self) -> None:
        """Everything, until all nodes are idle."""
        self._write_files()
        self._hosts.add_all()
        self.state.save(self.files)
        self._munged()
        if self.state.spec.accounting:
            start_accounting(self.state, self.files, self.spawn, self.check)
        self.spawn("slurmctld", ["slurmctld", "-D", "-i"], "ctl")
        for name in self.state.spec.node_names:
            self.start_slurmd(name)
        self._wait_idle()
        write_wrappers(self.state, self.files)

    def spawn(self, name: str, command: list[str], host: str) -> None:
        """Start a daemon on a host; its output goes to log/NAME.out."""
        env = {"PATH": path_with_daemons(), "HOME": os.environ.get("HOME", "/"), "LANG": "C.UTF-8"}
        prefix = [*enter(self.state, host), *ends_with_its_starter()]
        with (self.files.log / f"{name}.out").open("ab") as log:
            started = subprocess.Popen(
                [*prefix, program(command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**env, "SLURM_CONF": str(self.files.slurm_conf)},
                start_new_session=True,
                cwd="/",
            )
        self.state.daemons[name] = self._pid_of(started, name)

    def check(self, name: str) -> None:
        """An error with the end of its log when a daemon has ended."""
        if not alive(self.state.daemons[name]):
            log = self.files.log / f"{name}.log"
            raise ClusterError(
                f"{name} ended as soon as it was started:"
                + (tail(self.files.log / f"{name}.out") or tail(log))
            )

    def _pid_of(self, started: subprocess.Popen[bytes], name: str) -> int:
        """In namespaces the daemon is the child of what entered them."""
        if self.state.spec.mode == "ports":
            return started.pid

        def child() -> int | None:
            found = children(started.pid)
            if not found and started.poll() is not None:
                output = tail(self.files.log / f"{name}.out")
                raise ClusterError(f"{name} did not start:{output}")
            return found[0] if found else None

        return wait_until(f"the start of {name}", child, timeout_s=10, step_s=0.005)

    def _munged(self) -> None:
        files = self.files
        key = files.etc / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        own = [f"--key-file={key}", f"--socket={files.munge_socket}", "--force"]
        own += [f"--pid-file={files.run}/munged.pid", f"--log-file={files.log}/munged.log"]
        own += [f"--seed-file={files.run}/munged.seed"]
        self.spawn("munged", ["munged", "-F", *own], "ctl")

        def socket_is_there() -> bool:
            self.check("munged")
            return files.munge_socket.exists()

        wait_until("munged's socket", socket_is_there, timeout_s=20)

    def _wait_idle(self) -> None:
        names = self.state.spec.node_names
        daemons = ["slurmctld", *(f"slurmd-{name}" for name in names)]

        def idle() -> bool:
            for daemon in daemons:
                self.check(daemon)
            reap()
            return list(self.node_states().values()) == ["idle"] * len(names)

        try:
            wait_until("all nodes to be idle", idle, timeout_s=60 + len(names), step_s=0.1)
        except ClusterError as error:
            log = tail(self.files.log / "slurmctld.log")
            raise ClusterError(f"{error}; they are {self.node_states()}{log}") from None

    def node_states(self) -> dict[str, str]:
        """As sinfo tells; empty when nobody answers."""
        command = [program("sinfo"), "-h", "-N", "-p", "main", "-o", "%N %T"]
        asked = subprocess.run(
            [*enter(self.state, "login"), *command],
            env=environment(self.files),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if asked.returncode:
            return {}
        return {name: state for name, state in map(str.split, asked.stdout.splitlines())}

    # ------------------------------------------------------------------ files

    def _write_files(self) -> None:
        spec, files = self.state.spec, self.files
        (files.etc / "hosts").write_text(conf.hosts(spec))
        (files.etc / "gres.conf").write_text(conf.gres_conf(spec, self._devices()))
        files.slurm_conf.write_text(conf.slurm_conf(spec, files))
        if spec.memory_limits:
            (files.etc / "cgroup.conf").write_text(conf.cgroup_conf())
        if spec.accounting:
            secret = files.etc / "slurmdbd.conf"
            secret.touch(mode=0o600)  # slurmdbd insists
            secret.write_text(conf.slurmdbd_conf(spec, files))

    def _devices(self) -> list[Path]:
        """A character device for each GPU of a node: made where we may, else what is everywhere."""
        count = max(self.state.spec.gpus.values())
        made = [self.files.dev / f"nvidia{index}" for index in range(count)]
        null = os.makedev(1, 3)
        try:
            for path in made:
                os.mknod(path, 0o666 | stat.S_IFCHR, null)
        except PermissionError:
            names = ("null", "zero", "full", "random", "urandom", "tty", "ptmx")
            if count > len(names):
                raise ClusterError(
                    f"{count} GPUs per node: without root there can be {len(names)}, since each "
                    "stands for a device that exists"
                ) from None
            return [Path("/dev", name) for name in names[:count]]
        return made

    # ------------------------------------------------------------------ faults

    def power_off(self, node: str) -> None:
        """The node's plug is pulled: its processes end, and its peers hear nothing."""
        self._needs_hosts("power_off")
        self._hosts.lose(node)

    def power_on(self, node: str) -> None:
        """It boots again, with the address it had."""
        self._needs_hosts("power_on")
        if alive(self.state.hosts[node].init):
            raise ClusterError(f"{node} is on already")
        self._hosts.add(node, self.state.hosts[node].ip)
        self.start_slurmd(node)

    def cut(self, node: str) -> None:
        """Its network cable is pulled: its processes go on, unheard."""
        self._needs_hosts("cut")
        self._hosts.cable(node, up=False)

    def heal(self, node: str) -> None:
        """The cable is plugged in, and the node says at once that it is back."""
        self._needs_hosts("heal")
        self._hosts.cable(node, up=True)
        # Left alone, the controller asks it again only 15 to 41 s later.
        kill([self.state.daemons[f"slurmd-{node}"]], signal.SIGHUP)

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL the node's daemon; its jobs go on."""
        self._end(f"slurmd-{node}")

    def start_slurmd(self, node: str) -> None:
        """As at boot."""
        self._refuse_second(f"slurmd-{node}")
        self.spawn(f"slurmd-{node}", ["slurmd", "-D", "-N", node], node)

    def kill_ctl(self) -> None:
        """SIGKILL the controller; jobs go on."""
        self._end("slurmctld")

    def start_ctl(self) -> None:
        """Start it from its saved state, and wait until it answers."""
        self._refuse_second("slurmctld")
        self.spawn("slurmctld", ["slurmctld", "-D"], "ctl")
        wait_until("slurmctld to answer", self.node_states, timeout_s=30, step_s=0.1)

    def _needs_hosts(self, verb: str) -> None:
        if self.state.spec.mode == "ports":
            raise ClusterError(
                f"{verb.replace('_', '-')} takes hosts of their own: this cluster runs in mode "
                "ports, where only daemons can be killed"
            )

    def _refuse_second(self, name: str) -> None:
        if name in self.state.daemons and alive(self.state.daemons[name]):
            raise ClusterError(f"{name} runs already")

    def _end(self, name: str) -> None:
        pid = self.state.daemons[name]
        kill([pid])
        wait_until(f"the end of {name}", lambda: not alive(pid), timeout_s=10)
        reap()

    # ------------------------------------------------------------------ stop

    def stop(self) -> None:
        """End everything, whoever started it: jobs, daemons, hosts, shells on the login host."""
        login = self.state.hosts.get("login")
        network = network_of(login.init) if login else ""
        deadline = time.monotonic() + _STOP_S
        # Again and again: what is about to end may just be starting something.
        while left := self._left(network):
            kill(left)
            reap()
            if time.monotonic() > deadline:
                raise ClusterError(f"these processes would not end: {sorted(left)}")
            time.sleep(0.01)
        reap()
        for group in self.state.spec.cgroups:  # of the kernel, and empty by now
            for folder, _, _ in os.walk(group, topdown=False):
                os.rmdir(folder)

    def _left(self, network: str) -> set[int]:
        strangers = sharing_network(network) if network else set()
        return strangers | descendants(os.getpid())
