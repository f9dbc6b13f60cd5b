"""What `sacct` takes: mariadb with its files in the cluster's directory, and slurmdbd."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

from cluster.conf import Addresses
from cluster.enter import enter
from cluster.needs import path_with_daemons, program
from cluster.processes import tail, wait_until
from cluster.spec import ClusterError, Files, State

_USERS = """\
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';
"""
_SMALL = [
    "--innodb-buffer-pool-size=64M",
    "--innodb-log-file-size=8M",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-lock-wait-timeout=900",
    "--performance-schema=OFF",
    "--key-buffer-size=1M",
    "--aria-pagecache-buffer-size=8M",
    "--max-connections=40",
]


def start_accounting(
    state: State,
    files: Files,
    spawn: Callable[[str, list[str], str], None],
    check: Callable[[str], None],
) -> None:
    """Before slurmctld, which ends when it finds no slurmdbd at its first start.

    Args:
        state: of the cluster.
        files: its paths.
        spawn: starts a daemon, given its name, command and host.
        check: raises when the daemon of that name has ended.
    """
    where = Addresses.of(state.spec)
    _install(files)
    for name, command, ip, port in (
        ("mariadbd", _mariadbd(files, where), "127.0.0.1", where.mariadb),
        ("slurmdbd", ["slurmdbd", "-D"], where.ctl_ip, where.slurmdbd),
    ):
        spawn(name, command, "ctl")

        def listens(name: str = name, ip: str = ip, port: int = port) -> bool:
            check(name)
            return _can_connect(state, ip, port)

        wait_until(f"{name} to listen on port {port}", listens, timeout_s=60, step_s=0.05)


def _install(files: Files) -> None:
    log = files.log / "mariadb-install.out"
    command = [program("mariadb-install-db"), "--no-defaults", *_as_root()]
    command += [f"--datadir={files.mysql}", f"--tmpdir={files.tmp}", "--innodb-log-file-size=8M"]
    command += ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
    with log.open("wb") as out:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={"PATH": path_with_daemons()},
            timeout=120,
            check=False,
        )
    if done.returncode:
        raise ClusterError(f"mariadb-install-db failed:{tail(log)}")


def _mariadbd(files: Files, where: Addresses) -> list[str]:
    users = files.etc / "users.sql"
    users.write_text(_USERS)
    own = ["--no-defaults", *_as_root(), f"--datadir={files.mysql}", f"--tmpdir={files.tmp}"]
    own += [f"--socket={files.run}/mysql.sock", f"--pid-file={files.run}/mariadbd.pid"]
    own += ["--bind-address=127.0.0.1", f"--port={where.mariadb}", f"--init-file={users}"]
    return ["mariadbd", *own, "--skip-name-resolve", "--skip-log-bin", *_SMALL]


def _can_connect(state: State, ip: str, port: int) -> bool:
    tried = subprocess.run(
        [*enter(state, "ctl"), "bash", "-c", f"exec 3<>/dev/tcp/{ip}/{port}"],
        stderr=subprocess.DEVNULL,
        timeout=10,
        check=False,
    )
    return tried.returncode == 0


def _as_root() -> list[str]:
    return ["--user=root"] if os.getuid() == 0 else []
