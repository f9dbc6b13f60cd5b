"""The prefix that runs a command on a host, and the environment it wants."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.needs import program
from cluster.spec import ClusterError, Files, Host, State

SHARED_HOST = "login"
"""It shares the machine's process table: what runs there is its starter's to end, as usual."""


def enter(state: State, host: str, folder: str | Path = "/", *, wiring: bool = False) -> list[str]:
    """What to put before a command so that it runs on `host`, in `folder`.

    Args:
        state: Of the running cluster.
        host: `login`, `ctl` or a node.
        folder: Where the command starts; the hosts share the machine's file system.
        wiring: With rights over the host's network and mounts, in mode `userns` too.
    """
    spec = state.spec
    known = ["login", "ctl", *spec.node_names]
    if host not in known:
        raise ClusterError(f"no host {host!r}: there are {', '.join(known)}")
    if spec.mode == "ports":
        return [program("env"), f"--chdir={folder}"]
    kinds = ["-n", "-u", "-m", *([] if host == SHARED_HOST else ["-p"])]
    pid = state.hosts[host].init
    prefix = [program("nsenter"), "-t", str(pid), *user_namespace(spec.mode), *kinds]
    prefix += [f"--wd={folder}", "--"]
    if spec.mode == "userns" and not wiring:
        prefix += as_oneself()
    # A host with processes of its own has the command as nsenter's child: it ends with nsenter.
    return prefix if host == SHARED_HOST else [*prefix, *ends_with_its_starter()]


def user_namespace(mode: str) -> list[str]:
    """What nsenter needs more where the hosts are a user's own."""
    return ["-U", "--preserve-credentials"] if mode == "userns" else []


def as_oneself() -> list[str]:
    """Slurm's daemons as root call setgroups, which a user's own namespace denies."""
    who = [f"--map-user={os.getuid()}", f"--map-group={os.getgid()}"]
    return [program("unshare"), "-U", *who, "--"]


def ends_with_its_starter() -> list[str]:
    """A prefix: the kernel kills the command when its parent ends."""
    return [program("setpriv"), "--pdeathsig", "KILL", "--"]


def environment(files: Files) -> dict[str, str]:
    """Ours, less what an outer Slurm job put in it, and with the cluster's address."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SQUEUE_"))
    }
    return {**env, "SLURM_CONF": str(files.slurm_conf)}


def write_wrappers(state: State, files: Files) -> None:
    """`bin/sbatch` and so on: Slurm's commands, run on the login host from anywhere.

    A job inherits the PATH of whoever submits it, and on a node these lead nowhere: hence they
    take themselves out of it.
    """
    for name in ("sbatch", "srun", "salloc", "squeue", "sinfo", "scancel", "scontrol", "sacct"):
        path = files.bin / name
        path.write_text(_wrapper(state.hosts.get("login"), state.spec.mode, files, program(name)))
        path.chmod(0o755)


def _wrapper(login: Host | None, mode: str, files: Files, command: str) -> str:
    prefix: list[str] = []
    if login is not None:
        prefix = [
            program("nsenter"),
            "-t",
            str(login.init),
            *user_namespace(mode),
            "-n",
            "-u",
            "--",
        ]
        prefix += as_oneself() if mode == "userns" else []
    return (
        "#!/bin/sh\n"
        f"export SLURM_CONF={files.slurm_conf}\n"
        f'PATH=$(printf %s ":$PATH:" | sed "s|:{files.bin}:|:|g; s|^:||; s|:$||")\n'
        f'exec {" ".join([*prefix, command])} "$@"\n'
    )
