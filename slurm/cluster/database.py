"""What `sacct` takes: mariadb with its files in the cluster's directory, and slurmdbd."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from cluster.conf import Addresses
from cluster.enter import enter
from cluster.needs import path_with_daemons, program
from cluster.processes import tail, wait_until
from cluster.spec import ClusterError

if TYPE_CHECKING:
    from cluster.daemons import Daemons

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


def start_accounting(daemons: Daemons) -> None:
    """Before slurmctld, which ends when it finds no slurmdbd at its first start."""
    where = Addresses.of(daemons.state.spec)
    _install(daemons)
    _mariadbd(daemons, where)
    daemons.spawn("slurmdbd", ["slurmdbd", "-D"], "ctl")
    _wait_for_port(daemons, "slurmdbd", where.ctl_ip, where.slurmdbd)


def _install(daemons: Daemons) -> None:
    files = daemons.files
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


def _mariadbd(daemons: Daemons, where: Addresses) -> None:
    files = daemons.files
    users = files.etc / "users.sql"
    users.write_text(_USERS)
    own = ["--no-defaults", *_as_root(), f"--datadir={files.mysql}", f"--tmpdir={files.tmp}"]
    own += [f"--socket={files.run}/mysql.sock", f"--pid-file={files.run}/mariadbd.pid"]
    own += ["--bind-address=127.0.0.1", f"--port={where.mariadb}", f"--init-file={users}"]
    own += ["--skip-name-resolve", "--skip-log-bin", *_SMALL]
    daemons.spawn("mariadbd", ["mariadbd", *own], "ctl")
    _wait_for_port(daemons, "mariadbd", "127.0.0.1", where.mariadb)


def _wait_for_port(daemons: Daemons, name: str, ip: str, port: int) -> None:
    prefix = enter(daemons.state, "ctl")

    def listens() -> bool:
        daemons.check(name)
        tried = subprocess.run(
            [*prefix, "bash", "-c", f"exec 3<>/dev/tcp/{ip}/{port}"],
            stderr=subprocess.DEVNULL,
            timeout=10,
            check=False,
        )
        return tried.returncode == 0

    wait_until(f"{name} to listen on port {port}", listens, timeout_s=60, step_s=0.05)


def _as_root() -> list[str]:
    return ["--user=root"] if os.getuid() == 0 else []
