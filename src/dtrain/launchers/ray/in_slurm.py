"""`python -m dtrain.launchers.ray.in_slurm`: a Ray cluster in a Slurm job, and a launch on it.

Run by the script of `ray_sbatch` on the first node of the job. It has srun start one node of the
cluster on each host, waits until all are up, launches, and ends all that it has started.
"""

from __future__ import annotations

import argparse
import os
import queue
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dtrain.errors import LaunchError
from dtrain.launchers.ray import raylet
from dtrain.procs import shell_code

_UP_S = 600.0  # three tries of Ray's, each of which may take minutes on a busy host
_LEAVE_S = 30.0


def main() -> None:
    """Start the cluster, launch on it, end it; exits with the launch's code."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.launchers.ray.in_slurm")
    parser.add_argument("--cpus", type=int, required=True, help="of each node")
    parser.add_argument("--gpus", type=int, default=0, help="of each node")
    parser.add_argument("launch", nargs="+", help="arguments of `dtrain launch --launcher ray`")
    given = parser.parse_args()
    token = Path(tempfile.mkdtemp(prefix=".ray-", dir=os.getcwd())) / "token"  # all hosts see it
    try:
        _protect(token)
        with Cluster(_hosts(), given.cpus, given.gpus) as address:
            code = _launch(given.launch, address)
    except LaunchError as error:
        print(f"dtrain: {error}", file=sys.stderr, flush=True)
        code = 1
    finally:
        token.unlink(missing_ok=True)
        token.parent.rmdir()
    sys.exit(code)


class Cluster:
    """A node of Ray on each host of the job; `with Cluster(…) as address:`."""

    def __init__(self, hosts: Sequence[str], cpus: int, gpus: int) -> None:
        self._hosts = hosts
        self._flags = [f"--cpus={cpus}", f"--gpus={gpus}"]
        self._nodes: dict[str, subprocess.Popen[str]] = {}
        self._said: queue.Queue[tuple[str, str]] = queue.Queue()

    def __enter__(self) -> str:
        """Start it; the head's address.

        Raises:
            LaunchError: a node does not come up; says which and why.
        """
        head, *others = self._hosts
        deadline = time.monotonic() + _UP_S
        try:
            self._start(head, [])
            address = self._await({head}, deadline)
            for host in others:
                self._start(host, [f"--head={address}"])
            self._await(set(others), deadline)
        except BaseException:
            self.__exit__()
            raise
        return address

    def __exit__(self, *_: object) -> None:
        """End every node; each removes its files."""
        for process in self._nodes.values():
            assert process.stdin is not None
            process.stdin.close()
        for process in self._nodes.values():
            try:
                process.wait(_LEAVE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, host: str, more: list[str]) -> None:
        cpus = next(flag for flag in self._flags if "cpus" in flag).partition("=")[2]
        self._nodes[host] = subprocess.Popen(
            [
                *("srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}"),
                f"--cpus-per-task={cpus}",
                *(sys.executable, "-P", "-m", raylet.__name__, *self._flags, *more),
            ],
            stdin=subprocess.PIPE,  # srun passes its end on; a signal would have it kill the node
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        threading.Thread(target=self._listen, args=(host,), daemon=True).start()

    def _listen(self, host: str) -> None:
        """Pass on what a node says, until it has ended."""
        output = self._nodes[host].stdout
        assert output is not None
        for line in output:
            self._said.put((host, line.strip()))
        self._said.put((host, f"{raylet.FAILED} it has ended"))

    def _await(self, hosts: set[str], deadline: float) -> str:
        """Wait until these are up; the address that the last of them has said."""
        address = ""
        waiting = set(hosts)
        while waiting:
            try:
                host, line = self._said.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                missing = ", ".join(sorted(waiting))
                raise LaunchError(
                    f"no node of Ray came up within {_UP_S:.0f} s on {missing}"
                ) from None
            word, _, rest = line.partition(" ")
            if word == raylet.FAILED:
                raise LaunchError(f"the node of Ray on {host} cannot be started: {rest}")
            if word == raylet.UP:
                waiting.discard(host)
                address = rest
            else:
                print(f"{host}: {line}", flush=True)
        return address


def _launch(arguments: Sequence[str], address: str) -> int:
    """Run `dtrain launch` on the cluster, and pass requests to stop on to it; its exit code."""
    command = [sys.executable, "-P", "-m", "dtrain", "launch", "--launcher", "ray"]
    process = subprocess.Popen([*command, *arguments, "--address", address])

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # the workers save and leave

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, pass_on)
    code = process.wait()
    return shell_code(code)


def _protect(token: Path) -> None:
    """Whoever reaches a Ray cluster without a token can run anything on it."""
    with open(
        os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(secrets.token_hex(32))
    os.environ.update(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_USAGE_STATS_ENABLED="0"
    )


def _hosts() -> list[str]:
    """The job's hosts, this one first.

    Raises:
        LaunchError: we are in no job of Slurm.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if nodes is None:
        raise LaunchError("this is no job of Slurm: hand the script to sbatch")
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.split()


if __name__ == "__main__":
    main()
