"""Hosts made of namespaces: each has its own network, name, processes and mounts.

`ctl` holds the bridge that joins them, so nothing of it is to be seen in the machine's own network,
and two clusters with the same addresses never meet. The keeper holds the writing end of one pipe,
and process 1 of every host reads it: when the keeper ends, in whatever way, so does every host.
"""

from __future__ import annotations

import os
import subprocess

from cluster import conf
from cluster.enter import SHARED_HOST, enter, user_namespace
from cluster.needs import path_with_daemons, program
from cluster.processes import alive, children, kill, name_of, wait_until
from cluster.spec import ClusterError, Files, Host, State

_INIT = ["bash", "-c", "read -r _"]
"""As process 1 bash also takes leave of orphans; `sleep` would let zombies pile up."""


class Hosts:
    """Makes and breaks the hosts of one cluster; in mode `ports` there are none to make."""

    def __init__(self, state: State, files: Files) -> None:
        self._state = state
        self._files = files
        self._leash, self._held = os.pipe()

    def add_all(self) -> None:
        """The controller's, the login host, the nodes."""
        if self._state.spec.mode == "ports":
            return
        self.add("ctl", conf.CTL_IP)
        self.add("login", conf.LOGIN_IP)
        for index, name in enumerate(self._state.spec.node_names):
            self.add(name, conf.node_ip(index))

    def add(self, name: str, ip: str) -> None:
        """Make a host and plug it in."""
        holder = self._hold(name)
        self._state.hosts[name] = Host(ip, holder.pid, holder.pid)
        self._state.hosts[name].init = wait_until(
            f"host {name}", lambda: self._init_of(holder, name), timeout_s=10, step_s=0.005
        )
        setup = [f"hostname {name}", "ip link set lo up"]
        setup += [f"mount --bind {self._files.etc / 'hosts'} /etc/hosts"]
        if name == "ctl":
            setup += ["ip link add br0 type bridge forward_delay 0"]
            setup += [f"ip addr add {ip}/16 dev br0", "ip link set br0 up"]
        self._shell(name, setup)
        if name != "ctl":
            self._plug_in(name, ip)

    def lose(self, name: str) -> None:
        """All its processes end at once, and nobody is told: the cable goes first."""
        self.cable(name, up=False)
        host = self._state.hosts[name]
        kill([host.init, host.holder])
        wait_until(f"the end of host {name}", lambda: not alive(host.init), timeout_s=10)

    def cable(self, name: str, *, up: bool) -> None:
        """Plug the host's network cable in or pull it."""
        self._shell("ctl", [f"ip link set v-{name} {'up' if up else 'down'}"])

    def _hold(self, name: str) -> subprocess.Popen[bytes]:
        kinds = ["-n", "-u", "-m"]
        if name != SHARED_HOST:
            kinds += ["-p", "-f", "--mount-proc", "--kill-child=KILL"]
        own: list[str] = []
        if self._state.spec.mode == "userns" and name == "ctl":
            kinds = ["-U", "-r", *kinds]
        elif self._state.spec.mode == "userns":  # all hosts share the user namespace of ctl
            ctl = str(self._state.hosts["ctl"].init)
            own = [program("nsenter"), "-t", ctl, *user_namespace("userns"), "--"]
        return subprocess.Popen(
            [*own, program("unshare"), *kinds, "--", *_INIT],
            stdin=self._leash,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def _init_of(self, holder: subprocess.Popen[bytes], name: str) -> int | None:
        """The process in the namespaces, once it has become our bash."""
        if holder.poll() is not None:
            raise ClusterError(f"host {name}: unshare ended with {holder.returncode}")
        candidates = [holder.pid] if name == SHARED_HOST else children(holder.pid)
        return next((pid for pid in candidates if name_of(pid) == "bash"), None)

    def _plug_in(self, name: str, ip: str) -> None:
        # The far end is named by a process of the machine's table, so only the network is entered.
        # A network card keeps its address: with a new one, peers miss the host after a power cut.
        mac = "02:00:" + ":".join(f"{int(byte):02x}" for byte in ip.split("."))
        ctl, mode = self._state.hosts["ctl"], self._state.spec.mode
        here = [program("nsenter"), "-t", str(ctl.init), *user_namespace(mode), "-n", "--"]
        far = f"peer name eth0 address {mac} netns {self._state.hosts[name].init}"
        lines = [f"ip link del v-{name} 2>/dev/null || :"]  # a lost host's end may still be there
        lines += [f"ip link add v-{name} type veth {far}", f"ip link set v-{name} master br0 up"]
        _run_shell(here, lines, name)
        self._shell(name, [f"ip addr add {ip}/16 dev eth0", "ip link set eth0 up"])

    def _shell(self, host: str, lines: list[str]) -> None:
        _run_shell(enter(self._state, host, wiring=True), lines, host)


def _run_shell(prefix: list[str], lines: list[str], host: str) -> None:
    done = subprocess.run(
        [*prefix, "sh", "-ec", "\n".join(lines)],
        env={"PATH": path_with_daemons()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode:
        raise ClusterError(f"setting up host {host} failed: {done.stderr.strip()}")
