"""What must be installed, and which kind of hosts this machine can make."""

from __future__ import annotations

import os
import shutil
import subprocess

from cluster.spec import MODES, ClusterError

_SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Daemons are looked for where an ordinary user's PATH does not lead."""

_PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sinfo": "slurm-wlm",
    "munged": "munge",
    "setpriv": "util-linux",
}
_HOSTS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "mount": "mount"}
_ACCOUNTING = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}


def path_with_daemons() -> str:
    """PATH, with the folders where daemons are."""
    return os.environ.get("PATH", "") + ":" + _SBIN


def program(name: str) -> str:
    """Where it is."""
    found = shutil.which(name, path=path_with_daemons())
    if found is None:
        package = {**_PACKAGES, **_HOSTS, **_ACCOUNTING}.get(name, name)
        raise ClusterError(f"{name} is not installed: {_install([package])}")
    return found


def missing(*, accounting: bool = False) -> str | None:
    """What is not installed and how to get it, or None when all is there."""
    wanted = _PACKAGES | (_ACCOUNTING if accounting else {})
    absent = [name for name in wanted if not shutil.which(name, path=path_with_daemons())]
    if not absent:
        return None
    packages = list(dict.fromkeys(wanted[name] for name in absent))
    verb = "is" if len(absent) == 1 else "are"
    return f"{', '.join(absent)} {verb} not installed: {_install(packages)}"


def choose_mode(asked: str) -> str:
    """The mode asked for, or of those that work here the one with the most separate hosts."""
    if asked == "auto":
        return next(mode for mode in MODES if why_not(mode) is None)
    reason = why_not(asked)
    if reason is not None:
        raise ClusterError(f"mode {asked} does not work here: {reason}")
    return asked


def why_not(mode: str) -> str | None:
    """Why this machine cannot have hosts of that kind, or None when it can. Takes 20 ms."""
    if mode == "ports":
        return None
    absent = [name for name in _HOSTS if not shutil.which(name, path=path_with_daemons())]
    if absent:
        packages = list(dict.fromkeys(_HOSTS[name] for name in absent))
        return f"{', '.join(absent)} not installed: {_install(packages)}"
    if mode == "netns" and os.getuid() != 0:
        return "it takes root; an ordinary user has the modes userns and ports"
    if mode == "userns" and os.getuid() == 0:
        return "it is for ordinary users; root has the modes netns and ports"
    return _try_namespaces(["-U", "-r"] if mode == "userns" else [])


def _try_namespaces(user: list[str]) -> str | None:
    wiring = "ip link add b0 type bridge && ip link add v0 type veth peer name v1"
    tried = subprocess.run(
        [
            program("unshare"),
            *user,
            "-n",
            "-u",
            "-m",
            "-p",
            "-f",
            "--mount-proc",
            "sh",
            "-c",
            wiring,
        ],
        env={"PATH": path_with_daemons()},
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode == 0:
        return None
    why = (tried.stderr.strip().splitlines() or ["refused"])[-1]
    return f"this machine lets us make no namespaces of that kind ({why})"


def _install(packages: list[str]) -> str:
    return f"apt-get install --no-install-recommends {' '.join(packages)}"
